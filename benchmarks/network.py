"""`python -m benchmarks.network`: FAMSeg end to end, and fk.accelerate on models of others.

The network with our kernels, beside the same network from standard parts (depthwise convolutions one by one,
cross-scanned sequences through an SSD scan, CARAFE by unfold or, on a GPU, by a loop over taps; mamba_ssm and mmcv take
over where they are installed), beside its ONNX file in onnxruntime and OpenVINO (inference in fp32 on a CPU), and
beside U-Net from segmentation-models-pytorch. All take turns in one run; every contestant starts from the same weights,
and each build's output is compared with the reference's before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import famseg_kernels as fk
from benchmarks import measure, peers, rivals
from benchmarks.exported import Exported, runtimes
from benchmarks.models import MSCAN, CarafeNeck, VMambaStage
from benchmarks.rivals import CLASSES, fresh_network
from benchmarks.timing import without_tf32
from famseg.models import create_model, optimize_for_inference
from famseg_kernels.torch_op import Operation

ROUNDS = 3  # at least; a round of famseg_base takes a minute on two cores


@contextmanager
def standard_parts(gpu: bool | None = None) -> Iterator[None]:
    """Inside, every operation is what one would write without this library (in the calling thread and all others).

    As for a GPU or not; None: as this machine has one.
    """
    cuda = torch.cuda.is_available() if gpu is None else gpu
    mamba = cuda and peers.missing_module(peers.MAMBA) is None
    mmcv = cuda and peers.missing_module(peers.MMCV) is None
    # Unfolded, the last upsampling of 16 images of 512 px has 3.4 G elements: too many for some of torch's kernels.
    reassemble, carafe, upsample = peers.reassemble_unfold, peers.carafe_unfold, peers.upsample_unfold
    if cuda:
        reassemble, carafe, upsample = peers.reassemble_taps, peers.carafe_taps, peers.upsample_taps
    parts: dict[str, Callable[..., Any]] = {
        "strip_conv2d": peers.strip_convolutions,
        "ssd_scan_2d": peers.scan_2d_mamba_ssm if mamba else peers.scan_2d_matmul,
        "reassemble": peers.reassemble_mmcv if mmcv else reassemble,
        "carafe": peers.carafe_mmcv if mmcv else carafe,
        "feature_aware_upsample": peers.upsample_mmcv if mmcv else upsample,
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


@dataclass(frozen=True)
class Setting:
    """What is measured: `seconds` a kind for all builds together, 0 for one round (a dry run)."""

    device: str
    model: str
    batch: int
    size: int
    dtype: str  # fp32, or bf16: FAMSeg under autocast
    seconds: float
    say: Callable[[str], None] = print


Context = Callable[[], AbstractContextManager[None]]
OURS, TRUTH, OTHER = "famseg", "reference backend", "U-Net (ResNet-34)"
OPTIMIZED = f"{OURS}, optimised"  # for inference alone


class Contest:
    """One model and shape in all builds, from the same weights; a build that fails is out, with its reason."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.wrong: list[str] = []  # builds of ours whose output is not what it should be
        device, size = setting.device, setting.size
        ours = functools.partial(fk.use_backend, "auto" if device == "cuda" else "cpu")
        builds: dict[str, tuple[Context, torch.memory_format]] = {
            OURS: (ours, torch.contiguous_format),
            f"{OURS}, channels_last": (ours, torch.channels_last),
            OPTIMIZED: (ours, torch.contiguous_format),
            "standard parts": (standard_parts, torch.contiguous_format),
            "standard parts, channels_last": (standard_parts, torch.channels_last),
            TRUTH: (functools.partial(fk.use_backend, "reference"), torch.contiguous_format),
        }
        if not setting.seconds:
            builds = {name: build for name, build in builds.items() if "channels_last" not in name}
        state = fresh_network(setting.model).state_dict()
        x = torch.randn(setting.batch, 1, size, size, device=device)
        self.target = torch.randint(CLASSES, (setting.batch, size, size), device=device)
        self.builds: dict[str, tuple[Context, nn.Module, Tensor]] = {}
        for build, (context, layout) in builds.items():
            model = create_model(setting.model, CLASSES).to(device)
            model.load_state_dict(state)
            model = optimize_for_inference(model) if build == OPTIMIZED else model.to(memory_format=layout)
            self.builds[build] = (context, model, x.to(memory_format=layout))
        if not setting.seconds:
            reason: str | None = "this is a dry run"
        else:
            reason = peers.missing_module("segmentation_models_pytorch")
        if reason is None:
            import segmentation_models_pytorch as smp

            unet = smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=CLASSES).to(device)
            self.builds[OTHER] = (functools.partial(fk.use_backend, "auto"), unet, x)
        else:
            setting.say(f"{OTHER} left out: {reason}")
        if setting.seconds and device == "cpu" and setting.dtype == "fp32":
            for runtime, exported in runtimes(self.builds[OURS][1], setting.say):
                self.builds[f"{OURS} in {runtime}"] = (ours, exported, x)
        self._same_output()

    @property
    def kinds(self) -> list[str]:
        graphs = ["inference without CUDA graph"] if self.setting.device == "cuda" else []
        return ["inference", *graphs, "training step"]

    def _told(self, build: str, error: Exception) -> list[str]:
        """Why a build is out, said; of ours it is also a failure."""
        reason = f"{build}: {type(error).__name__}: {error}"
        self.setting.say(f"out: {reason}")
        return [reason] if build.startswith(OURS) else []

    def _same_output(self) -> None:
        expected = None
        for build in (TRUTH, *(build for build in self.builds if build not in (TRUTH, OTHER))):
            context, model, x = self.builds[build]
            model.eval()
            try:
                with context(), torch.no_grad():
                    y = model(x).float()
                expected = y if expected is None else expected
                wrong = float((y - expected).norm() / expected.norm())
                if not wrong <= 1e-3:
                    raise AssertionError(f"output differs from the {TRUTH}'s by {wrong:.1e}")
            except Exception as error:  # the others can be measured all the same
                self.wrong += self._told(build, error)
                del self.builds[build]

    def rows(self, kind: str) -> Iterator[dict[str, Any]]:
        """A row a build.

        Raises:
            RuntimeError: after the rows of the others, if one of ours failed.
        """
        setting, failed = self.setting, list(self.wrong)
        calls: dict[str, measure.Call] = {}
        for build, (context, model, image) in self.builds.items():
            if kind == "training step" and (build == OPTIMIZED or isinstance(model, Exported)):
                continue
            model.train(kind == "training step")
            if kind != "training step":
                run: Callable[[], Any] = functools.partial(infer, model, image)
            else:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
                run = functools.partial(train_step, model, optimizer, image, self.target)
            call = functools.partial(within, context, setting.device, setting.dtype, run)
            try:
                call(0)
                calls[build] = call
            except Exception as error:  # out of memory, say
                failed += self._told(build, error)
        # A training step is not replayed from a graph: nobody trains so, and its optimizer cannot be recorded.
        times: dict[str, measure.Time] = {}
        apart = {"device": setting.device, "buffers": 1, "least": ROUNDS, "graphs": kind == "inference"}
        try:
            times = measure.interleaved(calls, seconds=setting.seconds, **apart)
        except RuntimeError as error:  # together they do not fit: one by one, each with its share of the time
            setting.say(f"all in turns: {error}; one after the other")
            for build, call in list(calls.items()):
                try:
                    times |= measure.interleaved({build: call}, seconds=setting.seconds / len(calls), **apart)
                except RuntimeError as reason:
                    failed += self._told(build, reason)
        calls = {build: calls[build] for build in times}
        ours = times[OURS].median if OURS in times else float("nan")
        for build, call in calls.items():
            exported = isinstance(self.builds[build][1], Exported)
            yield {
                "model": setting.model if build != OTHER else "unet_resnet34",
                "batch": setting.batch,
                "size": setting.size,
                "dtype": setting.dtype,
                "kind": kind,
                "build": build,
                "ms": round(times[build].median, 2),
                "graph": times[build].graph,
                "images_s": round(1e3 * setting.batch / times[build].median, 2),
                # Only what torch allocates is seen.
                "peak_mb": "" if exported else round(measure.peak_megabytes(call, setting.device), 1),
                "famseg_speedup": round(times[build].median / ours, 2),
            }
        for build in (OURS, TRUTH):
            if build in calls:
                setting.say(f"{build}, {kind}: {profiled(calls[build], setting.device)}")
        if failed:
            raise RuntimeError("; ".join(failed))


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
    total = sum(times.values()) or 1.0  # nothing was seen
    return ", ".join(f"{name} {100 * times[name] / total:.0f} %" for name in largest)


def accelerate_rows(device: str, seconds: float, say: Callable[[str], None]) -> Iterator[list[dict[str, Any]]]:
    """`fk.accelerate(model)`: one line of the user's code, before and after, on models built as they are published."""
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
        say(f"{name}: {len(report.swapped)} modules swapped")
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
            times = measure.interleaved(calls, device, seconds, buffers=1)
            yield [
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


def forward_backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    title = f"{first['model']} {first['kind']}, batch {first['batch']}, {first['size']} px, {first['dtype']}"
    table = Table(title=title, title_justify="left")
    table.add_column("", min_width=32)
    for heading in ("ms", "images/s", "peak MB", "× slower than the first"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["build"], *(str(row[c]) for c in ("ms", "images_s", "peak_mb", "famseg_speedup")))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


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
    add("--rivals", action="store_true", help="inference beside U-Nets and SegNeXt in every runtime; on a CPU")
    add("--tf32", action="store_true", help="let torch's fp32 convolutions and products use TF32 (default off)")
    options = parser.parse_args()
    without_tf32(options.tf32)
    if options.rivals:
        return _rivals(options)
    shapes = options.shapes or ([(16, 512), (1, 512)] if options.device == "cuda" else [(2, 256), (1, 256)])
    where = measure.provenance(options.device)
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    path = options.csv or measure.result_path(where, "network")
    rows: list[dict[str, Any]] = []
    failures = []

    def groups() -> Iterator[Callable[[], Iterator[list[dict[str, Any]]]]]:
        yield lambda: accelerate_rows(options.device, options.seconds, print)
        for model, (batch, size) in itertools.product(options.model or ["famseg_nano", "famseg_tiny"], shapes):
            contest = Contest(Setting(options.device, model, batch, size, options.dtype, options.seconds))
            for kind in contest.kinds:
                yield lambda contest=contest, kind=kind: iter([list(contest.rows(kind))])

    for group in groups():
        try:
            for measured in group():
                show(measured)
                rows += [row | where for row in measured]
                measure.write_csv(path, rows)  # as they come: a run that is cut off leaves what it has measured
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            traceback.print_exc()
    print(f"written: {path}" if rows else "nothing was measured")
    if failures:
        print("failed, see above:", *failures, sep="\n  ")
    return 1 if failures else 0


def _rivals(options: argparse.Namespace) -> int:
    where = measure.provenance("cpu")
    path = options.csv or measure.result_path(where, "rivals")
    rows: list[dict[str, Any]] = []
    for batch, size in options.shapes or [(1, 256), (8, 256)]:
        for row in rivals.rows(options.model or rivals.MODELS, batch, size, options.seconds, print):
            rows.append(row | where)
            print(
                *(f"{row[name]:>12}" for name in ("ms", "peak_mb")),
                row["model"],
                row["build"],
                f"batch {batch}",
                flush=True,
            )
            measure.write_csv(path, rows)
    print(f"written: {path}" if rows else "nothing was measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
