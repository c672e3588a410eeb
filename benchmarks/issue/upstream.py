"""`python -m benchmarks.issue.upstream DIR`: our 2D scan's predicted time beside that of Mamba-2's own kernels.

DIR holds the sources of mamba_ssm (`pip download --no-deps --no-binary :all: mamba_ssm==2.2.6.post3`, unpacked);
nothing of it is built; its modules import einops. Its Triton kernels are compiled for an H100 and counted as ours are.
Of what it leaves to its tuner the configuration with the shortest prediction is taken, launch by launch. Before and
after them come a cross-scan and a cross-merge at the bandwidth of a copy, which no real one beats.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import ahead
from benchmarks.issue import chips, launches, report, table
from benchmarks.issue.launches import Addresses, Launch
from benchmarks.shapes import GPU_SHAPES

CHIP = next(chip for chip in chips.CHIPS if chip.name == "H100")
CHUNK = 256  # its own default
# Times that our kernel shall be faster, by the name of a shape and the pass.
TARGETS = {("vmamba_56x56_n16", "fwd"): 2.5, ("heads8_16x16_n16", "fwd"): 4.0}
TARGETS |= {(case, "bwd"): 2.0 for case, _ in TARGETS}
COLUMNS = (
    *("case", "dtype", "pass", "chip", "us", "binds", "launches", "cross us", "ours us", "ratio"),
    *("target", "verdict"),
)


@dataclass(frozen=True)
class Call:
    """One launch of Triton, and what its tuner may add to the arguments."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    choices: tuple[dict[str, Any], ...]


def imported(folder: Path) -> Any:
    """mamba_ssm.ops.triton.ssd_combined of the sources in `folder`, without the package's own imports of compiled code.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not (folder / "mamba_ssm/ops/triton/ssd_combined.py").exists():
        raise FileNotFoundError(f"{folder}: expected the unpacked sources of mamba_ssm, with mamba_ssm/ops/triton")
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    import importlib

    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


def caught(run: Callable[[], Any]) -> tuple[Any, list[Call | Launch]]:
    """What `run` gives, and what it launches, in order: kernels of Triton and what torch does between them."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    found: list[Call | Launch] = []
    compile_only = JITFunction.run

    def tuned(self: Any, *arguments: Any, **keywords: Any) -> None:
        self.best_config = self.configs[0]  # its callers size what comes after by it
        choices = tuple(config.all_kwargs() for config in self.configs)
        found.append(Call(self.fn, arguments, keywords, choices))

    def plain(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if keywords.get("warmup"):
            return compile_only(self, *arguments, **keywords)
        found.append(Call(self, arguments, keywords, ({},)))
        return None

    processors = types.SimpleNamespace(multi_processor_count=CHIP.processors)
    with (
        mock.patch.object(Autotuner, "run", tuned),
        mock.patch.object(JITFunction, "run", plain),
        mock.patch.object(torch.cuda, "device", lambda *_: nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: processors),
        launches.Torch(found.append),
    ):
        return run(), found


def predicted(call: Call | Launch, addresses: Addresses) -> table.Row:
    """The row of the fastest choice, or of the first one that says why it is refused."""
    if isinstance(call, Launch):
        return table.predicted(call, None, CHIP)
    rows = []
    for choice in call.choices:
        keywords = call.keywords | choice
        grid = keywords.pop("grid")
        keywords.pop("warmup")
        named = dict(zip(call.kernel.arg_names, call.arguments, strict=False)) | keywords
        grid = grid(named) if callable(grid) else grid
        try:
            result = call.kernel.warmup(*call.arguments, grid=grid, **keywords)
        except Exception as error:  # a choice that does not compile is none
            print(f"{call.kernel.__name__} {choice}: {type(error).__name__}", file=sys.stderr)
            continue
        launch = launches.triton_launch(call.kernel, result, grid, named, addresses)
        known = table.counted_or_refused(launch, CHIP.capability)
        rows.append({"kernel": launch.kernel} | table.predicted(launch, known, CHIP))
    return min(rows, key=lambda row: (math.isnan(row["us"]), row["us"]))


def rows_of(module: Any, case: Any, dtype: torch.dtype) -> dict[str, list[table.Row]]:
    """By pass."""
    from triton.runtime import driver

    driver.set_active(ahead.Chip(CHIP.capability))
    x, dt, A, B, C, *_ = ahead.without_data(table.OPERATIONS["ssd_scan_2d"], case, dtype)
    n, h, w, heads, headdim = x.shape
    directions = dt.shape[3]

    def sequences(t: torch.Tensor, *rest: int) -> torch.Tensor:
        return torch.empty((n, h * w, *rest), dtype=t.dtype, device="meta")

    xs, steps = sequences(x, directions * heads, headdim), sequences(dt, directions * heads)
    Bs, Cs = (sequences(t, directions * t.shape[4], t.shape[5]) for t in (B, C))
    bias = torch.empty(directions * heads, device="meta")
    options = {"dt_bias": bias, "dt_softplus": True}
    forward, backward = module._mamba_chunk_scan_combined_fwd, module._mamba_chunk_scan_combined_bwd
    given = xs, steps, A.flatten(), Bs, Cs
    (out, *_), made = caught(lambda: forward(*given, CHUNK, **options))
    _, made_backward = caught(lambda: backward(torch.empty_like(out), *given, out, CHUNK, **options))
    addresses = Addresses()
    # Every image read, every sequence written; the results' the other way round. In the backward likewise, each by the
    # other: the result's gradient becomes sequences, and the arguments' are added up.
    images, unrolled = (sum(t.nbytes for t in ts) for ts in ((x, dt, B, C), (xs, steps, Bs, Cs)))
    moved = {"fwd": images + unrolled + out.nbytes + x.nbytes, "bwd": x.nbytes + out.nbytes + unrolled + images}
    found = {}
    for passed, calls in (("fwd", made), ("bwd", made_backward)):
        cross = {"kernel": "cross-scan and cross-merge", "binds": "memory", "refusal": ""}
        cross["us"] = 1e6 * moved[passed] / (CHIP.memory * chips.COPY)
        found[passed] = [cross, *(predicted(call, addresses) for call in calls)]
        for row in found[passed]:
            print(f"  {passed} {row.get('kernel', 'torch'):36} {row['us']:8.1f} us, {row['binds']} {row['refusal']}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.issue.upstream", description=__doc__)
    parser.add_argument("folder", type=Path, help="unpacked sources of mamba_ssm")
    parser.add_argument("--out", type=Path, default=report.COMMITTED, help="folder of operations.csv, for upstream.csv")
    options = parser.parse_args(arguments)
    module = imported(options.folder)
    with (options.out / "operations.csv").open(newline="") as file:
        ours = [row for row in csv.DictReader(file) if (row["op"], row["chip"]) == ("ssd_scan_2d", CHIP.name)]
    found = []
    for case in GPU_SHAPES["ssd_scan_2d"][1:]:
        for passed, rows in rows_of(module, case, torch.bfloat16).items() if (case.name, "fwd") in TARGETS else ():
            us = sum(row["us"] for row in rows if not row["refusal"])  # without what could not be counted: at least
            where = {"case": case.name, "dtype": "bf16", "pass": passed}
            mine = next(float(row["us"]) for row in ours if row.items() >= where.items())
            target = TARGETS[case.name, passed]
            found.append(
                where
                | {"chip": CHIP.name, "us": us, "binds": max(rows, key=lambda row: row["us"])["binds"]}
                | {"launches": len(rows), "cross us": rows[0]["us"], "ours us": mine, "ratio": us / mine}
                | {"target": target, "verdict": "met" if us >= target * mine else "missed"}
                | {"refusal": "; ".join(f"{row['kernel']}: {row['refusal']}" for row in rows if row["refusal"])}
            )
            print(f"{case.name} {passed}: {us:.0f} us, ours {mine:.0f}: {us / mine:.2f} times (wanted {target})")
    report.write_csv(options.out / "upstream.csv", found, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
