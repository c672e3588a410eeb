"""Data-parallel training whose result does not depend on how a batch is divided over processes, and the processes.

Torch's DistributedDataParallel averages gradients. For a run of W processes with B images each to take the steps of
one process with W·B images, two more things must be those of the whole batch: the statistics of batch normalisation
and the loss (a Dice is no mean over images). Both are sums over pixels, added by a differentiable all-reduce. Its
backward adds the gradients of all processes' (equal) losses, W times the wanted one, and the averaging divides by W.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes
from torch.utils.data import Sampler

_GRACE = 5.0  # seconds for processes to end by themselves where one has failed, and again once they are told to


@dataclass(frozen=True)
class Processes:
    """Which of how many training processes this is; `local` of them run on this machine."""

    rank: int
    count: int
    local: int

    def device(self, kind: str) -> torch.device:
        """This process's own, of "cpu" or "cuda"."""
        return torch.device("cuda", self.rank % self.local) if kind == "cuda" else torch.device("cpu")


ALONE = Processes(0, 1, 1)


def this_process(devices: int) -> Processes:
    """As torchrun says; without it, the first of `devices`, which `run_processes` starts.

    Raises:
        ValueError: torchrun started another number of processes on this machine than `devices` (unless that is 1).
    """
    if dist.is_torchelastic_launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if devices not in (1, local):
            raise ValueError(
                f"devices: torchrun started {local} process(es) on this machine, got {devices}; leave it out"
            )
        return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local)
    return Processes(0, devices, devices)


def run_processes(count: int, work: Callable[..., object], *arguments: Any) -> None:
    """Call `work(processes, *arguments)` in `count` new processes of this machine; returns when all have ended.

    This process only watches: where one fails, the others would wait for it in vain, on a GPU beyond any signal.

    Raises:
        What the first one to fail raised, once none is left; KeyboardInterrupt if that was a signal's.
    """
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = start_processes(_work, (count, port, failures, work, arguments), count, join=False, start_method="spawn")
    try:
        while not context.join(grace_period=_GRACE):
            pass
    except (ProcessRaisedException, ProcessExitedException) as error:
        if not failures.empty():
            raise failures.get() from error
        raise
    finally:  # of an interruption: whoever is left
        for process in context.processes:
            process.terminate()
        for process in context.processes:
            process.join(_GRACE)
            process.kill()
            process.join()


def _work(
    rank: int, count: int, port: int, failures: Any, work: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // count, 1))
    try:
        work(Processes(rank, count, count), *arguments)
    except KeyboardInterrupt as error:
        for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches every process, and then its parent's signal
            signal.signal(number, signal.SIG_IGN)
        failures.put(error)
        raise SystemExit(130) from None
    except Exception as error:
        failures.put(error)
        raise


def join_processes(processes: Processes, device: torch.device) -> None:
    """Make `device` this process's, and wait until all of them can talk to each other."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if processes.count > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=processes.rank,
            world_size=processes.count,
            device_id=device if device.type == "cuda" else None,
        )


def _parallel() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(values: Tensor) -> Tensor:
    """The elementwise sum over all processes, differentiable; `values` itself in a single process."""
    return all_reduce(values) if _parallel() else values


class RankBatches(Sampler[list[int]]):
    """Batches of batch_size·count positions in `sampler`'s order, of which this process gets its own part.

    Args:
        drop_last: leave out a last batch that is not full. Otherwise its parts differ in size by one at most, and a
            process with nothing in it ends one step earlier.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, processes: Processes, *, drop_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.processes = processes
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        rank, count = self.processes.rank, self.processes.count
        whole = self.batch_size * count
        for start in range(0, len(order), whole):
            batch = order[start : start + whole]
            if self.drop_last and len(batch) < whole:
                return
            if part := batch[len(batch) * rank // count : len(batch) * (rank + 1) // count]:
                yield part

    def __len__(self) -> int:
        length, whole = len(self.sampler), self.batch_size * self.processes.count  # type: ignore[arg-type]
        full, rest = divmod(length, whole)
        rank, count = self.processes.rank, self.processes.count
        last = rest * (rank + 1) // count > rest * rank // count
        return full + (last and not self.drop_last)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes' images; on any device (torch's own needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and _parallel()):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        values = x.float()
        count = sum_over_processes(values.new_tensor([x.numel() / x.shape[1]]))
        mean = sum_over_processes(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        # A second sum, of squares about the mean: E[x²] − mean² would cancel where the mean is large.
        variance = sum_over_processes(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise_batch_norm(model: nn.Module, device_type: str) -> nn.Module:
    """Replace every BatchNorm2d inside `model` by one over all processes, with the same parameters and names."""
    if device_type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                synced = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
                synced.weight, synced.bias = child.weight, child.bias
                synced.running_mean, synced.running_var = child.running_mean, child.running_var
                synced.num_batches_tracked = child.num_batches_tracked
                setattr(parent, name, synced)
    return model
