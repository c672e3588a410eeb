"""Two processes take the steps of one with the doubled batch, on a CPU with gloo, up to the rounding of sums."""

from __future__ import annotations

import csv
import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import SequentialSampler

from famseg.cli.train import main
from famseg.training.config import ConfigError
from famseg.training.distributed import (
    Processes,
    RankBatches,
    SyncBatchNorm2d,
    run_processes,
    sum_over_processes,
    synchronise_batch_norm,
    this_process,
)
from famseg.training.loss import SegmentationLoss

# Processes are forked from one that has imported everything: a fresh interpreter takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["famseg.training.run", "famseg.cli.train"])
RUN = ["--data", "phantom:13", "--image-size", "32", "--class-weights", "1,3,2", "--loss", "ce+focal+dice"]
# Small steps: a network fresh from its start makes 1e-4 of rounding in two epochs of larger ones.
RUN += ["--device", "cpu", "--learning-rate", "0.004", "--min-learning-rate", "0.00004", "--lr-limit-min", "0.00001"]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("length", "batch", "count"), [(13, 2, 2), (12, 2, 3), (9, 4, 2), (17, 2, 4), (3, 4, 2)])
def test_the_parts_of_a_batch_make_the_batch(length, batch, count, drop_last):
    def batches(batch_size, rank, count):
        return RankBatches(
            SequentialSampler(range(length)), batch_size, Processes(rank, count, count), drop_last=drop_last
        )

    whole = list(batches(batch * count, 0, 1))
    parts = [batches(batch, rank, count) for rank in range(count)]
    for part in parts:
        assert len(list(part)) == len(part)
    joined = [[] for _ in whole]
    for part in parts:
        for i, positions in enumerate(part):
            joined[i] += positions
    assert joined == whole
    if drop_last:
        assert all(len(positions) == batch for part in parts for positions in part)


def one_step(network: nn.Module, loss: SegmentationLoss, x: torch.Tensor, target: torch.Tensor) -> dict:
    value = loss.value(sum_over_processes(loss.sums(network(x), target)))
    value.backward()
    return {
        "loss": value.detach(),
        **{name: parameter.grad for name, parameter in network.named_parameters()},
        **dict(network.named_buffers()),
    }


def network_and_batch() -> tuple[nn.Module, SegmentationLoss, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
    )
    # The mean is large beside the spread, and one half of the batch has no class 2.
    x = 100 + torch.randn(4, 1, 12, 12) * torch.tensor([1.0, 2, 3, 4]).reshape(4, 1, 1, 1)
    target = torch.randint(0, 3, (4, 8, 8))
    target[:2] = target[:2].clamp(max=1)
    return network, SegmentationLoss("ce+focal+dice", [1.0, 3.0, 2.0]), x, target


def half_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network, loss, x, target = network_and_batch()
    network = nn.parallel.DistributedDataParallel(synchronise_batch_norm(network, "cpu"), broadcast_buffers=False)
    result = one_step(network, loss, x[2 * rank : 2 * rank + 2], target[2 * rank : 2 * rank + 2])
    torch.save({name.removeprefix("module."): value for name, value in result.items()}, f"{folder}/{rank}.pt")
    del network
    dist.destroy_process_group()


def run_both(target, *arguments) -> None:
    processes = [CONTEXT.Process(target=target, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_loss_gradients_and_statistics_are_those_of_the_whole_batch(tmp_path):
    run_both(half_step, str(tmp_path))
    whole = one_step(*network_and_batch())
    for rank in range(2):
        half = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert half.keys() == whole.keys()
        for name, value in whole.items():
            # A convolution's bias before a batch norm has the gradient 0 and is all rounding: hence the atol.
            torch.testing.assert_close(half[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_synchronised_batch_norm_keeps_names_and_parameters():
    network = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.BatchNorm2d(2))
    before = dict(network.state_dict(keep_vars=True))
    after = dict(synchronise_batch_norm(network, "cpu").state_dict(keep_vars=True))
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert all(isinstance(m, SyncBatchNorm2d) for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    x = torch.randn(4, 2, 5, 5)
    assert torch.equal(network[1](x), nn.BatchNorm2d(2)(x))  # alone it is torch's own


def rows(run: Path) -> list[dict[str, float]]:
    return [
        {name: float(value) for name, value in row.items() if name != "phase"}
        for row in csv.DictReader((run / "metrics.csv").open())
    ]


def assert_same_rows(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            # A pixel of the held-out images, which rounding may turn, is 4e-4 of an IoU.
            assert value == pytest.approx(other[key], rel=1e-4, abs=1e-3 if "iou" in key else 1e-4), key


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    assert main([*RUN, "--phases", "sgd:3", "--batch-size", "4", "--out", str(out)]) == 0
    return rows(out)


def under_torchrun(rank: int, port: int, arguments: list[str]) -> None:
    """What torchrun sets for each of two processes on one machine."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    destroy = dist.destroy_process_group

    def last() -> None:
        # Where it outlives the group, its end can wait for ever.
        assert not any(type(o) is nn.parallel.DistributedDataParallel for o in gc.get_objects())
        destroy()

    dist.destroy_process_group = last
    raise SystemExit(main(arguments))


def spoilt_on_one(rank: int, port: int, arguments: list[str]) -> None:
    """The second process alone has a loss that is not finite; both must end, and alike."""
    from famseg.training.loop import Loop

    loss = Loop.loss
    if rank == 1:
        Loop.loss = lambda *given: loss(*given) * float("nan")
    try:
        under_torchrun(rank, port, arguments)
    except SystemExit as stop:
        raise SystemExit(int(stop.code != 3)) from None


def torchrun(arguments: list[str], target=under_torchrun) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_both(target, port, arguments)


def test_all_processes_stop_where_one_diverges(tmp_path):
    torchrun([*RUN, "--phases", "sgd:1", "--batch-size", "2", "--out", str(tmp_path / "run")], spoilt_on_one)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_two_processes_of_torchrun_have_the_losses_of_one(one_process, tmp_path):
    out = tmp_path / "run"
    torchrun([*RUN, "--phases", "sgd:2", "--decay-epochs", "3", "--batch-size", "2", "--out", str(out)])
    assert_same_rows(rows(out), one_process[:2])
    # And continue where they were.
    torchrun(["--resume", "auto", "--epochs", "3", "--out", str(out)])
    assert_same_rows(rows(out), one_process)


def test_two_processes_of_one_command_have_the_losses_of_one(one_process, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "famseg.cli.train", *RUN, "--phases", "sgd:3", "--batch-size", "2"]
    done = subprocess.run(
        [*command, "--devices", "2", "--device", "cpu", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    assert_same_rows(rows(out), one_process)


def test_devices_must_agree_with_torchrun(monkeypatch):
    assert this_process(3) == Processes(0, 3, 3)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert this_process(1) == this_process(4) == Processes(5, 8, 4)
    with pytest.raises(ValueError, match="torchrun started 4"):
        this_process(2)


def fail(processes: Processes, after: float) -> None:
    if processes.rank == 1:
        raise ConfigError(f"{processes.rank} of {processes.count}")
    time.sleep(after)


def test_what_one_process_raises_ends_all():
    start = time.monotonic()
    with pytest.raises(ConfigError, match="1 of 2"):
        run_processes(2, fail, 1000.0)
    assert time.monotonic() - start < 500


def test_every_process_needs_an_image(tmp_path, capsys):
    assert main(["--data", "phantom:4", "--devices", "2", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert "an image for each of 2 processes, found 1 for validation" in capsys.readouterr().err
