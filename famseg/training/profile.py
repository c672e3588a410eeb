"""Where the time of a training step goes: loader, forward, loss, backward, optimizer, and the slowest operations."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from famseg.training.config import TrainConfig
from famseg.training.distributed import ALONE
from famseg.training.loop import Loop
from famseg.training.run import prepare
from famseg.training.schedule import total_epochs

_OPERATIONS = 12  # lines of the table of operations


def profile(config: TrainConfig, steps: int = 12) -> str:
    """Train some `steps` of `config` in one process, write nothing, and return two tables as text.

    The first has the median milliseconds of a step's parts, and of a whole step with the loader and with one batch
    used over and over: their ratio is what loading costs. The second is torch.profiler's.

    Raises:
        ConfigError, DataError: as `train`.
    """
    run = prepare(config, ALONE)
    parts: dict[str, list[float]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        parts.setdefault(name, []).append(time.perf_counter() - start)

    loop = Loop(run.module, run.train_loader, run.val_loader, device=run.device, part=part)

    def epochs() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for epoch in itertools.cycle(range(total_epochs(run.module.phases))):
            loop.begin(epoch)
            yield from enumerate(run.train_loader)

    loader = iter(epochs())
    fixed = next(loader)
    traced = max(steps // 4, 1)
    for _ in range(traced):  # warm up
        loop.step(*fixed)
    parts.clear()
    # In pairs, so that a slow moment of the machine meets both.
    for _ in range(steps):
        with part("step"):
            with part("loader"):
                batch = next(loader)
            loop.step(*batch)
        with part("step with a constant batch"):
            loop.step(*fixed)

    times = {name: 1e3 * median(values) for name, values in parts.items()}
    whole, constant = times.pop("step"), times.pop("step with a constant batch")
    ratio = median(a / b for a, b in zip(parts["step"], parts["step with a constant batch"], strict=True))
    size = f"batch {len(fixed[1]['mask'])}, {config.image_size} px"
    lines = [f"{config.model}, {size}, {config.precision}, {run.device.type}"]
    lines += [f"{'part of a step':32}{'ms':>10}{'%':>8}"]
    for name in ("loader", "copy to device", "forward", "loss", "backward", "optimizer"):
        lines.append(f"{name:32}{times[name]:10.2f}{100 * times[name] / whole:8.1f}")
    lines.append(f"{'step':32}{whole:10.2f}{100.0:8.1f}")
    lines.append(f"{'step with a constant batch':32}{constant:10.2f}{100 * constant / whole:8.1f}")
    lines.append(f"the loader makes a step {ratio:.3f} times as long")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities, acc_events=True) as trace:
        for _ in range(traced):
            loop.step(*fixed)
    times_of = _kernel_times if run.device.type == "cuda" else _operation_times
    slowest = sorted(times_of(trace.key_averages()), reverse=True)
    total = sum(own for own, _, _ in slowest)
    lines += ["", f"{'operation':56}{'ms a step':>10}{'%':>8}{'calls':>8}"]
    for own, calls, name in slowest[:_OPERATIONS]:
        lines.append(f"{name[:55]:56}{own / 1e3 / traced:10.2f}{100 * own / total:8.1f}{calls // traced:8}")
    return "\n".join(lines)


def _operation_times(events: Iterable[Any]) -> Iterator[tuple[float, int, str]]:
    """(µs, calls, name): an operation's own time, but all that is inside for famseg's, which are Python around C++."""
    for event in events:
        if event.key.startswith("famseg::"):
            yield event.cpu_time_total, event.count, event.key
        elif "Differentiable" not in event.key:  # the autograd functions inside them
            yield event.self_cpu_time_total, event.count, event.key


def _kernel_times(events: Iterable[Any]) -> Iterator[tuple[float, int, str]]:
    """(µs, calls, name) of what ran on the GPU itself."""
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            yield event.self_device_time_total, event.count, event.key
