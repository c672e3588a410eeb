"""A run that was interrupted, however and whenever, ends as the run that was not: bit for bit on a CPU in fp32."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from famseg.cli.train import main
from famseg.models.famseg import SIZES
from famseg.training.checkpoint import CheckpointWriteError, continued, write_checkpoint
from famseg.training.config import ConfigError, TrainConfig
from famseg.training.schedule import parse_phases, resized

RUN = ["--data", "phantom:10", "--image-size", "32", "--batch-size", "4", "--device", "cpu"]
RUN += ["--ema", "0.9", "--phases", "adamw:3,sgd:2"]

# Sittings are forked from a process that has imported everything: a fresh interpreter takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["famseg.training.run", "famseg.cli.train"])


def sitting(arguments: list[str], signal_number: int, tick: int, limit: int | None = None) -> None:
    """famseg-train in this process, which sends itself a signal at the given tick: a step, or the start or end of a
    checkpoint's or table's writing. `limit` is the largest file it may write, in bytes."""
    import resource

    from famseg.training.loop import Loop

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            for step in range(2):
                count += 1
                if count == tick:
                    os.kill(os.getpid(), signal_number)
                if step == 0:
                    result = function(*args, **kwargs)
            return result

        return call

    Loop.step = counted(Loop.step)
    Loop.validate = counted(Loop.validate)
    torch.save = counted(torch.save)
    os.replace = counted(os.replace)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    raise SystemExit(main(arguments))


def run_sitting(
    arguments: list[str], signal_number: int = 0, tick: int = 0, limit: int | None = None, seconds: float = 120
) -> int:
    """The exit code; `seconds` after its start a sitting is killed."""
    process = CONTEXT.Process(target=sitting, args=(arguments, signal_number, tick, limit))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    assert (a / "figures/overlays.png").read_bytes() == (b / "figures/overlays.png").read_bytes()
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (a, b))
        for key in ("state_dict", "optimizer_states", "ema", "epoch", "global_step"):
            assert equal(one[key], other[key]), (name, key)


def epochs(run: Path) -> list[int]:
    return [int(row["epoch"]) for row in csv.DictReader((run / "metrics.csv").open())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run_sitting([*RUN, "--out", str(out)]) == 0
    assert epochs(out) == [1, 2, 3, 4, 5]
    return out


def test_kills_at_random_moments(whole, tmp_path, request):
    """At a tick, where a file may be half written, or at any moment. More of them: --kills 1000."""
    moments, kills, most = random.Random(0), 0, request.config.getoption("--kills")
    while kills < most:
        out = tmp_path / "run"
        code = -signal.SIGKILL
        while code != 0:
            tick, seconds = (moments.randint(1, 14), 120) if moments.random() < 0.5 else (0, moments.uniform(0.1, 2))
            if kills >= most:
                tick, seconds = 0, 120
            code = run_sitting([*RUN, "--out", str(out), "--resume", "auto"], signal.SIGKILL, tick, seconds=seconds)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            assert kills < most + 10, "what nobody kills does not end"
        assert_same_run(out, whole)
        shutil.rmtree(out)


def test_a_kill_in_a_phase_with_rates_of_its_own(tmp_path):
    run = [*RUN, "--phases", "adamw:1,sgd:3:lr=0.1..0.001", "--momentum", "0"]
    assert run_sitting([*run, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    assert run_sitting([*run, "--out", str(out)], signal.SIGKILL, tick=40) == -signal.SIGKILL
    assert 1 < len(epochs(out)) < 4
    assert run_sitting(["--resume", "auto", "--out", str(out)]) == 0
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_exit_code_130_and_leaves_a_good_checkpoint(whole, tmp_path, signal_number):
    out = tmp_path / "run"
    assert run_sitting([*RUN, "--out", str(out)], signal_number, tick=36) == 130
    done = torch.load(out / "checkpoints/last.ckpt", weights_only=True)["epoch"] + 1
    assert 1 <= done < 5
    if signal_number == signal.SIGTERM:
        return
    # Nothing but the folder need be named again.
    assert run_sitting(["--resume", "auto", "--out", str(out)]) == 0
    assert_same_run(out, whole)


def test_a_full_disk_ends_in_one_line_and_keeps_the_old_checkpoint(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    arguments = ["--resume", "auto", "--out", str(out), "--epochs", "6"]
    assert run_sitting(arguments, limit=100_000) == 1
    assert {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()} == before
    assert run_sitting(arguments) == 0
    assert epochs(out) == [1, 2, 3, 4, 5, 6]


def test_a_device_without_room_leaves_the_old_checkpoint(tmp_path):
    path, partial = tmp_path / "last.ckpt", tmp_path / "last.ckpt.partial"
    partial.symlink_to("/dev/full")  # every write to it is ENOSPC
    with pytest.raises(
        CheckpointWriteError, match=r"last.ckpt: .*No space left on device\)\. Make room.*--resume auto"
    ):
        write_checkpoint({"epoch": 1, "weights": torch.zeros(100_000)}, path)
    assert not list(tmp_path.iterdir())
    write_checkpoint({"epoch": 1}, path)
    partial.symlink_to("/dev/full")
    with pytest.raises(CheckpointWriteError, match=r"No space left on device\); the previous one is whole\. Make room"):
        write_checkpoint({"epoch": 2, "weights": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def copy(whole, tmp_path):
    """The finished run in another folder: nothing in it may depend on where it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the run was
    shutil.copytree(whole, tmp_path / "copy")
    yield tmp_path / "copy"
    torch.set_num_threads(threads)


def test_resuming_a_finished_run_changes_nothing(copy, whole):
    assert main(["--resume", "auto", "--out", str(copy)]) == 0
    assert_same_run(copy, whole)


def test_the_names_in_a_checkpoint_are_those_that_older_ones_have(whole):
    checkpoint = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)
    names = "epoch global_step state_dict optimizer_states config processes ema images excess callbacks"
    assert sorted(checkpoint) == sorted(names.split())
    assert {name: sorted(state) for name, state in checkpoint["callbacks"].items()} == {
        "MetricsTable": ["rows", "seconds"],
        "Checkpoints": ["best_epoch", "best_score"],
    }


def test_an_earlier_checkpoint_leads_to_the_same_end(copy, whole):
    (copy / "checkpoints/last.ckpt").unlink()
    assert main(["--resume", str(copy / "checkpoints/best.ckpt")]) == 0
    assert_same_run(copy, whole)


def test_a_finished_run_is_extended_at_its_last_learning_rate(copy):
    assert main(["--resume", str(copy / "checkpoints/last.ckpt"), "--epochs", "7"]) == 0
    rows = list(csv.DictReader((copy / "metrics.csv").open()))
    assert [row["phase"] for row in rows] == ["adamw"] * 3 + ["sgd"] * 4
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[5] == rates[6] < rates[4]
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    assert (settings["phases"], settings["epochs"], settings["decay_epochs"]) == ("adamw:3,sgd:4", None, 5)
    assert torch.load(copy / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 6


def test_patience_goes_on_counting_and_a_stale_run_trains_no_more(copy):
    best = torch.load(copy / "checkpoints/best.ckpt", weights_only=True)["epoch"]
    for patience, done in ((5 - best, 6), (1, 6)):
        assert main(["--resume", "auto", "--out", str(copy), "--epochs", "9", "--patience", str(patience)]) == 0
        assert epochs(copy) == list(range(1, done + 1))
    assert json.loads((copy / "metrics.json").read_text())["epochs"] == 6


def test_what_the_network_draws_at_random_is_drawn_again(tmp_path, monkeypatch):
    stochastic = dataclasses.replace(SIZES["famseg_nano"], drop_path=0.5)
    monkeypatch.setitem(SIZES, "famseg_nano", stochastic)
    torch.set_num_threads(1)
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--data", "phantom:5", "--image-size", "32", "--batch-size", "2", "--device", "cpu"]
    assert main([*common, "--phases", "sgd:2", "--out", str(one)]) == 0
    assert main([*common, "--phases", "sgd:1", "--decay-epochs", "2", "--out", str(two)]) == 0
    torch.rand(5)  # another sitting: another state of the generator
    assert main(["--resume", "auto", "--out", str(two), "--epochs", "2"]) == 0
    a, b = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two))
    assert equal(a, b)


def test_a_new_phase_may_follow(copy):
    assert main(["--resume", "auto", "--out", str(copy), "--phases", "adamw:3,sgd:2,adam:1"]) == 0
    rows = list(csv.DictReader((copy / "metrics.csv").open()))
    assert [row["phase"] for row in rows] == ["adamw"] * 3 + ["sgd"] * 2 + ["adam"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "1"], "seed: the run to continue has 0, got 1"),
        (["--model", "famseg_tiny"], "model: the run to continue has 'famseg_nano'"),
        (["--loss", "ce"], "loss: "),
        (["--ema", "0"], "ema: "),
        (["--batch-size", "8"], "batch_size: the run to continue has 4 images a step"),
        (["--phases", "sgd:9"], "phases: 5 epochs of adamw:3,sgd:2 are done"),
        (["--phases", "adamw:3,sgd:4:lr=0.1"], "phases: 5 epochs of adamw:3,sgd:2 are done"),
        (["--momentum", "0.5"], "momentum: the run to continue has 0.9"),
        (["--epochs", "3"], "phases: 5 epochs of adamw:3,sgd:2 are done"),
    ],
)
def test_a_changed_setting_is_named(copy, change, words, capsys):
    assert main(["--resume", "auto", "--out", str(copy), *change]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"famseg-train: {words}") and message.count("\n") == 1


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def text(path):
    path.write_text("no checkpoint")


def other_torch_file(path):
    torch.save({"weights": torch.zeros(3)}, path)


def code(path):
    torch.save({"epoch": 1, "config": os.system}, path)


def other_network(path):
    checkpoint = torch.load(path, weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = torch.zeros(7)
    torch.save(checkpoint, path)


def folder(path):
    path.unlink()
    path.mkdir()


SPOILT = [empty, truncated, flipped, text, other_torch_file, code, other_network, folder]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_checkpoint_that_cannot_be_used_is_one_line(copy, spoil, capsys):
    path = copy / "checkpoints/last.ckpt"
    spoil(path)
    before = (copy / "config.yaml").read_bytes()
    assert main(["--resume", "auto", "--out", str(copy), "--epochs", "9"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("famseg-train: resume: ") and message.count("\n") == 1 and str(path) in message
    assert (copy / "config.yaml").read_bytes() == before


def test_other_images_than_the_run_began_with_are_refused(copy, capsys):
    path = copy / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    digest, name = checkpoint["images"]["trained"].popitem()
    checkpoint["images"]["held_out"][digest] = name
    torch.save(checkpoint, path)
    assert main(["--resume", "auto", "--out", str(copy), "--epochs", "9"]) == 2
    message = capsys.readouterr().err
    assert "the images of 'phantom:10' are not those that the run began with" in message and message.count("\n") == 1


def test_resume_says_what_it_cannot_find(tmp_path, capsys):
    (tmp_path / "old").write_text("keep me")
    for arguments, words in (
        (["--resume", "auto"], "--out"),
        (["--resume", "auto", "--out", str(tmp_path)], "no run to continue"),
        (["--resume", str(tmp_path / "checkpoints/last.ckpt")], "cannot be read (No such file"),
        (["--resume", str(tmp_path / "last.ckpt")], "RUN/checkpoints/NAME.ckpt"),
        (["--resume", "a/checkpoints/last.ckpt", "--out", "b"], "copy the whole folder"),
    ):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1


def test_epochs_resize_the_last_phase_and_move_no_other():
    phases = parse_phases("adamw:3,sgd:2")
    assert resized(phases, 9) == parse_phases("adamw:3,sgd:6")
    assert resized(phases, 4) == parse_phases("adamw:3,sgd:1")
    assert resized(phases, 2) == parse_phases("adamw:2")


def test_the_same_command_continues_a_stretched_run():
    stored = TrainConfig(epochs=36)
    assert continued(stored, stored, 20, 1, 1) == stored
    longer = continued(TrainConfig(epochs=40), stored, 20, 1, 1)
    assert (longer.phases, longer.decay_epochs) == ("adamw:30,sgd:10:lr=0.01..0.0001", None)
    plain = TrainConfig(epochs=36, phases="adamw:15,sgd:3")
    longer = continued(dataclasses.replace(plain, epochs=40), plain, 20, 1, 1)
    assert (longer.phases, longer.decay_epochs) == ("adamw:30,sgd:10", 36)


@pytest.mark.parametrize(
    ("done", "before", "change", "after"),
    [
        # The decay under way ends where it was to end; a schedule that has not begun takes the new length.
        (10, "adamw:15,sgd:5:lr=0.1", {"epochs": 12}, ("adamw:12", 15)),
        (10, "adamw:15,sgd:5:lr=0.1", {"epochs": 30}, ("adamw:15,sgd:15:lr=0.1", None)),
        (17, "adamw:15,sgd:5:lr=0.1", {"epochs": 30}, ("adamw:15,sgd:15:lr=0.1", 20)),
        (17, "adamw:15,sgd:5:lr=0.1", {"epochs": 30, "decay_epochs": 25}, ("adamw:15,sgd:15:lr=0.1", 25)),
        (15, "adamw:15", {"phases": "adamw:15,sgd:5:lr=0.1"}, ("adamw:15,sgd:5:lr=0.1", None)),
        (15, "adamw:15", {"phases": "adamw:15,sgd:5"}, ("adamw:15,sgd:5", 15)),
        (10, "adamw:15", {"phases": "adamw:12,sgd:5:lr=0.1"}, None),
        (16, "adamw:15,sgd:5:lr=0.1", {"phases": "adamw:15,sgd:5:lr=0.2"}, None),
        (16, "adamw:15,sgd:5:lr=0.1", {"phases": "adamw:15,sgd:5:lr=0.1:limits=0.1..0.2"}, None),
    ],
)
def test_what_a_continued_run_does_with_schedules(done, before, change, after):
    stored = TrainConfig(phases=before)
    config = dataclasses.replace(stored, **change)
    if after is None:
        with pytest.raises(ConfigError, match=f"phases: {done} epochs of .* are done, which .* does not continue"):
            continued(config, stored, done, 1, 1)
    else:
        new = continued(config, stored, done, 1, 1)
        assert (new.phases, new.decay_epochs) == after
        again = continued(dataclasses.replace(new, epochs=40), new, done + 1, 1, 1)  # and once more
        assert sum(phase.epochs for phase in again.plan()) == 40


def test_processes_may_change_when_the_whole_batch_does_not():
    stored = TrainConfig(batch_size=8)
    assert continued(TrainConfig(batch_size=4, devices=2), stored, 3, 2, 1).devices == 2
    with pytest.raises(ConfigError, match="batch_size x processes must stay 8"):
        continued(TrainConfig(batch_size=8, devices=2), stored, 3, 2, 1)
