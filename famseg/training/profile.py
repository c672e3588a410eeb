"""Where the time of a training step goes: loader, forward, loss, backward, optimizer, and the slowest operations."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from famseg.training.config import TrainConfig
from famseg.training.distributed import Processes
from famseg.training.run import prepare

_OPERATIONS = 12  # lines of the table of operations


def profile(config: TrainConfig, steps: int = 12) -> str:
    """Train some `steps` of `config` in one process, write nothing, and return two tables as text.

    The first has the median milliseconds of a step's parts, and of a whole step with the loader and with one batch
    used over and over: their ratio is what loading costs. The second is torch.profiler's.

    Raises:
        ConfigError, DataError: as `train`.
    """
    run = prepare(config, Processes(0, 1, 1))
    device = torch.device(run.accelerator)
    module = run.module.to(device).train()
    optimizer = module.configure_optimizers()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        parts.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def step(batch: dict[str, Tensor]) -> None:
        image, mask = timed(
            "copy to device", lambda: [batch[k].to(device, non_blocking=True) for k in ("image", "mask")]
        )
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = timed("forward", lambda: module(image))
            loss = timed("loss", lambda: module.loss(logits, mask))
        timed("backward", lambda: scaler.scale(loss).backward())
        timed("optimizer", update)

    def update() -> None:
        scaler.unscale_(optimizer)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def epochs() -> Any:
        for epoch in itertools.count():
            run.train_loader.batch_sampler.sampler.set_epoch(epoch)  # type: ignore[union-attr]
            yield from run.train_loader

    loader = iter(epochs())
    fixed = next(loader)
    traced = max(steps // 4, 1)
    for _ in range(traced):  # warm up
        step(fixed)
    parts.clear()
    # In pairs, so that a slow moment of the machine meets both.
    for _ in range(steps):
        timed("step", lambda: step(timed("loader", lambda: next(loader))))
        timed("step with a constant batch", lambda: step(fixed))

    times = {name: 1e3 * median(values) for name, values in parts.items()}
    whole, constant = times.pop("step"), times.pop("step with a constant batch")
    ratio = median(a / b for a, b in zip(parts["step"], parts["step with a constant batch"], strict=True))
    lines = [f"{config.model}, batch {len(fixed['mask'])}, {config.image_size} px, {config.precision}, {device.type}"]
    lines += [f"{'part of a step':32}{'ms':>10}{'%':>8}"]
    for name in ("loader", "copy to device", "forward", "loss", "backward", "optimizer"):
        lines.append(f"{name:32}{times[name]:10.2f}{100 * times[name] / whole:8.1f}")
    lines.append(f"{'step':32}{whole:10.2f}{100.0:8.1f}")
    lines.append(f"{'step with a constant batch':32}{constant:10.2f}{100 * constant / whole:8.1f}")
    lines.append(f"the loader makes a step {ratio:.3f} times as long")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities, acc_events=True) as trace:
        for _ in range(traced):
            step(fixed)
    times_of = _kernel_times if device.type == "cuda" else _operation_times
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
