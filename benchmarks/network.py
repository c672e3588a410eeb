"""`python -m benchmarks.network`: FAMSeg end to end, and fk.accelerate on models of others.

The network with our kernels, beside the same network from standard parts (depthwise convolutions one by one,
cross-scanned sequences through an SSD scan, CARAFE by unfold; mamba_ssm and mmcv take over where they are installed)
and beside U-Net from segmentation-models-pytorch. All take turns in one run; every contestant starts from the same
weights, and the standard build's output is compared with ours before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import famseg_kernels as fk
from benchmarks import measure, peers
from benchmarks.models import MSCAN, CarafeNeck, VMambaStage
from famseg.models import create_model
from famseg_kernels.registry import Operation

CLASSES = 3
ROUNDS = 3  # at least; a round of famseg_base takes a minute on two cores


@contextmanager
def standard_parts() -> Iterator[None]:
    """Inside, every operation is what one would write without this library (in the calling thread and all others)."""
    cuda = torch.cuda.is_available()
    mamba = cuda and importlib.util.find_spec("mamba_ssm") is not None
    mmcv = cuda and importlib.util.find_spec("mmcv") is not None
    parts: dict[str, Callable[..., Any]] = {
        "strip_conv2d": peers.strip_convolutions,
        "ssd_scan_2d": peers.scan_2d_mamba_ssm if mamba else peers.scan_2d_matmul,
        "reassemble": peers.reassemble_mmcv if mmcv else peers.reassemble_unfold,
        "carafe": peers.carafe_mmcv if mmcv else peers.carafe_unfold,
    }

    def call(operation: Operation, *args: Any) -> Any:
        return parts[operation.spec.name](*args)

    with mock.patch.object(Operation, "__call__", call):
        yield


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    optimizer.step()


@torch.no_grad()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def famseg_rows(options: argparse.Namespace, where: dict[str, str], console: Console) -> Iterator[dict[str, Any]]:
    device = options.device
    ours = "auto" if device == "cuda" else "cpu"
    builds: dict[str, tuple[Callable[[], AbstractContextManager[None]], torch.memory_format]] = {
        "famseg": (functools.partial(fk.use_backend, ours), torch.contiguous_format),
        "famseg, channels_last": (functools.partial(fk.use_backend, ours), torch.channels_last),
        "standard parts": (standard_parts, torch.contiguous_format),
        "standard parts, channels_last": (standard_parts, torch.channels_last),
        "reference backend": (functools.partial(fk.use_backend, "reference"), torch.contiguous_format),
    }
    for name in options.model:
        for batch, size in options.shapes:
            contestants: dict[str, tuple[Callable[[], AbstractContextManager[None]], nn.Module, Tensor]] = {}
            torch.manual_seed(0)
            state = create_model(name, CLASSES).state_dict()
            x = torch.randn(batch, 1, size, size, device=device)
            target = torch.randint(CLASSES, (batch, size, size), device=device)
            for build, (context, layout) in builds.items():
                model = create_model(name, CLASSES).to(device)
                model.load_state_dict(state)
                contestants[build] = (context, model.to(memory_format=layout), x.to(memory_format=layout))
            if importlib.util.find_spec("segmentation_models_pytorch") is not None:
                import segmentation_models_pytorch as smp

                unet = smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=CLASSES).to(device)
                contestants["U-Net (ResNet-34)"] = (functools.partial(fk.use_backend, "auto"), unet, x)
            check_same_output(contestants)
            kinds = ["inference", "training step"]
            if device == "cuda":
                kinds.insert(1, "inference without CUDA graph")
            for kind in kinds:
                calls: dict[str, measure.Call] = {}
                for build, (context, model, image) in contestants.items():
                    model.train(kind == "training step")
                    if kind != "training step":
                        run = functools.partial(infer, model, image)
                    else:
                        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
                        run = functools.partial(train_step, model, optimizer, image, target)
                    calls[build] = functools.partial(within, context, device, options.dtype, run)
                    calls[build](0)
                # A training step is not replayed from a graph: nobody trains so, and its optimizer cannot be recorded.
                times = measure.interleaved(calls, device, options.seconds, 1, ROUNDS, graphs=kind == "inference")
                memory = {build: measure.peak_megabytes(call, device) for build, call in calls.items()}
                rows = [
                    {
                        "model": name if not build.startswith("U-Net") else "unet_resnet34",
                        "batch": batch,
                        "size": size,
                        "dtype": options.dtype,
                        "kind": kind,
                        "build": build,
                        "ms": round(times[build].median, 2),
                        "images_s": round(1e3 * batch / times[build].median, 2),
                        "peak_mb": round(memory[build], 1),
                        "famseg_speedup": round(times[build].median / times["famseg"].median, 2),
                    }
                    for build in calls
                ]
                show(console, f"{name} {kind}, batch {batch}, {size}x{size}, {options.dtype}", rows)
                for build in ("famseg", "reference backend"):
                    console.print(f"{build}: {profiled(calls[build], device)}")
                yield from (row | where for row in rows)


def within(
    context: Callable[[], AbstractContextManager[None]], device: str, dtype: str, run: Callable[[], Any], _: int
) -> Any:
    with context(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False):
        return run()


def profiled(call: measure.Call, device: str) -> str:
    """The operations that take most of a call's time, and their shares."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        call(0)
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, field) for event in profiler.key_averages()}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:8]
    total = sum(times.values())
    return ", ".join(f"{name} {100 * times[name] / total:.0f} %" for name in largest)


@torch.no_grad()
def check_same_output(contestants: dict[str, Any]) -> None:
    expected = None
    for build, (context, model, x) in contestants.items():
        if build.startswith("U-Net"):
            continue
        model.eval()
        with context():
            y = model(x)
        expected = y if expected is None else expected
        wrong = float((y - expected).norm() / expected.norm())
        if wrong > 1e-3:
            raise AssertionError(f"{build}: output differs from famseg's by {wrong:.1e}")


def accelerate_rows(options: argparse.Namespace, where: dict[str, str], console: Console) -> Iterator[dict[str, Any]]:
    """`fk.accelerate(model)`: one line of the user's code, before and after, on models built as they are published."""
    device = options.device
    for name, make, shape in (
        ("SegNeXt MSCAN-T", functools.partial(MSCAN, (32, 64, 160, 256), (3, 3, 5, 2)), (2, 3, 256, 256)),
        ("CARAFE neck", functools.partial(CarafeNeck, 64), (1, 64, 32, 32)),
        ("VMamba stage (m0)", functools.partial(VMambaStage, 96, 32), (2, 96, 32, 32)),
    ):
        torch.manual_seed(0)
        plain = make().to(device)
        swapped = make().to(device)
        swapped.load_state_dict(plain.state_dict())
        report = fk.accelerate(swapped)
        console.print(f"{name}: {len(report.swapped)} modules swapped")
        x = torch.randn(*shape, device=device)
        with torch.no_grad():
            expected, y = plain.eval()(x), swapped.eval()(x)
        wrong = float((y - expected).norm() / expected.norm())
        if wrong > 1e-3:
            raise AssertionError(f"{name}: accelerated output differs by {wrong:.1e}")
        for kind in ("inference", "forward and backward"):
            calls: dict[str, measure.Call] = {}
            for build, model in (("accelerated", swapped), ("as published", plain)):
                model.train(kind != "inference")
                run = functools.partial(infer if kind == "inference" else forward_backward, model, x)
                calls[build] = lambda _, run=run: run()
                calls[build](0)
            times = measure.interleaved(calls, device, options.seconds, buffers=1)
            rows = [
                {
                    "model": name,
                    "batch": shape[0],
                    "size": shape[-1],
                    "dtype": "fp32",
                    "kind": kind,
                    "build": build,
                    "ms": round(times[build].median, 2),
                    "images_s": round(1e3 * shape[0] / times[build].median, 2),
                    "peak_mb": round(measure.peak_megabytes(call, device), 1),
                    "famseg_speedup": round(times[build].median / times["accelerated"].median, 2),
                }
                for build, call in calls.items()
            ]
            show(console, f"{name}, {kind}", rows)
            yield from (row | where for row in rows)


def forward_backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("", min_width=32)
    for heading in ("ms", "images/s", "peak MB", "× slower than the first"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["build"], *(str(row[c]) for c in ("ms", "images_s", "peak_mb", "famseg_speedup")))
    console.print(table)


def shape(text: str) -> tuple[int, int]:
    batch, _, size = text.partition("x")
    return int(batch), int(size)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--model", action="append", help="FAMSeg size (may be repeated; default famseg_nano and famseg_tiny)")
    add("--shapes", type=shape, nargs="+", metavar="BATCHxSIZE", help="default 2x256 and 1x256 (cuda: 16x512, 1x512)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: FAMSeg under autocast")
    add("--seconds", type=float, default=20.0, help="measuring time a group")
    add("--csv", type=Path, help="result file (default benchmarks/results/<device>-network.csv)")
    options = parser.parse_args()
    options.model = options.model or ["famseg_nano", "famseg_tiny"]
    options.shapes = options.shapes or ([(16, 512), (1, 512)] if options.device == "cuda" else [(2, 256), (1, 256)])
    console = Console(width=None if sys.stdout.isatty() else 140)
    where = measure.provenance(options.device)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows = [*accelerate_rows(options, where, console), *famseg_rows(options, where, console)]
    path = options.csv or measure.result_path(where, "network")
    measure.write_csv(path, rows)
    console.print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
