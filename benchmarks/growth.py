"""`python -m benchmarks.growth`: how time and memory grow with the size of the work, and the fitted exponents.

The scan against tokens (an attention over the same tokens beside it), the strips against their length K (a dense K×K
depthwise convolution beside them), reassembly against its scale, and all three against the batch. Writes a CSV and
docs/figures/growth.png.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import famseg_kernels as fk
from benchmarks import measure


@dataclass(frozen=True)
class Series:
    """One line of a plot: the same work at growing sizes."""

    panel: str  # what grows
    name: str
    sizes: tuple[int, ...]
    make: Callable[[int, str], Callable[[], Tensor]]
    ours: bool = True


def scan(side: int, device: str) -> Callable[[], Tensor]:
    x, dt = torch.randn(1, side, side, 2, 32, device=device), torch.rand(1, side, side, 4, 2, device=device)
    B, C = (torch.randn(1, side, side, 1, 1, 32, device=device) for _ in range(2))
    return functools.partial(fk.ssd_scan_2d, x, dt, -torch.ones(4, 2, device=device), B, C)


def attention(side: int, device: str) -> Callable[[], Tensor]:
    q = torch.randn(1, 2, side * side, 32, device=device)
    return functools.partial(F.scaled_dot_product_attention, q, q, q)


def strips(size: int, device: str) -> Callable[[], Tensor]:
    x = torch.randn(1, 64, 64, 64, device=device)
    row, col = torch.randn(64, 1, 1, size, device=device), torch.randn(64, 1, size, 1, device=device)
    return functools.partial(fk.strip_conv2d, x, None, None, [row], None, [col], None)


def square(size: int, device: str) -> Callable[[], Tensor]:
    x, weight = torch.randn(1, 64, 64, 64, device=device), torch.randn(64, 1, size, size, device=device)
    return functools.partial(F.conv2d, x, weight, padding=size // 2, groups=64)


def reassembly(scale: int, device: str) -> Callable[[], Tensor]:
    x, logits = torch.randn(1, 64, 32, 32, device=device), torch.randn(1, 25 * scale**2, 32, 32, device=device)
    return functools.partial(fk.reassemble, x, logits, 5, scale)


def batched_strips(batch: int, device: str) -> Callable[[], Tensor]:
    x = torch.randn(batch, 64, 64, 64, device=device)
    rows = [torch.randn(64, 1, 1, k, device=device) for k in (7, 11, 21)]
    cols = [row.transpose(2, 3).contiguous() for row in rows]
    weight = torch.randn(64, 1, 5, 5, device=device)
    return functools.partial(fk.strip_conv2d, x, weight, None, rows, None, cols, None)


SIDES = (32, 64, 128, 256, 512, 1024)
SERIES = (
    Series("image side (px)", "scan, 4 directions", SIDES, scan),
    Series("image side (px)", "attention", SIDES[:3], attention, ours=False),
    Series("kernel size K", "strips 1×K + K×1", (3, 7, 11, 21, 31, 47, 63), strips),
    Series("kernel size K", "dense depthwise K×K", (3, 7, 11, 21, 31), square, ours=False),
    Series("upsampling scale", "reassembly", (1, 2, 3, 4, 6, 8), reassembly),
    Series("batch", "strips 5+(7,11,21)", (1, 2, 4, 8, 16), batched_strips),
)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log(value) over log(size), by least squares, over the upper half of the sizes."""
    points = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if v > 0][
        -max(2, len(sizes) // 2 + 1) :
    ]
    mx, my = (sum(c) / len(points) for c in zip(*points, strict=True))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time a point")
    parser.add_argument("--csv", type=Path, help="result file (default benchmarks/results/<device>-growth.csv)")
    parser.add_argument("--plot", type=Path, help="PNG file (default docs/figures/growth.png)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    where = measure.provenance(options.device)
    rows: list[dict[str, Any]] = []
    for series in SERIES:
        for size in series.sizes:
            call = series.make(size, options.device)
            call()
            run = {"it": lambda _, call=call: call()}
            ms = measure.interleaved(run, options.device, options.seconds, buffers=1)["it"].median
            megabytes = measure.peak_megabytes(run["it"], options.device)
            rows.append(
                {"grows": series.panel, "work": series.name, "size": size, "ms": round(ms, 4), "peak_mb": megabytes}
                | where
            )
    table = Table(title="growth")
    for heading in ("work", "grows with", "from", "to", "ms from", "ms to", "time exponent", "memory exponent"):
        table.add_column(heading)
    for series in SERIES:
        mine = [row for row in rows if row["work"] == series.name]
        sizes = [row["size"] for row in mine]
        slopes = [exponent(sizes, [row[column] for row in mine]) for column in ("ms", "peak_mb")]
        ends = (mine[0]["ms"], mine[-1]["ms"])
        cells = (*(str(s) for s in (sizes[0], sizes[-1])), *(f"{ms:.2f}" for ms in ends), *(f"{s:.2f}" for s in slopes))
        table.add_row(series.name, series.panel, *cells)
    console.print(table)
    path = options.csv or measure.result_path(where, "growth")
    measure.write_csv(path, rows)
    figure = options.plot or Path(__file__).parent.parent / "docs" / "figures" / "growth.png"
    plot(rows, figure)
    console.print(f"written: {path}, {figure}")
    return 0


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(series.panel for series in SERIES))
    figure = Figure(figsize=(3.4 * len(panels), 5.6), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, panel in enumerate(panels):
        for series in (s for s in SERIES if s.panel == panel):
            mine = [row for row in rows if row["work"] == series.name]
            sizes = [row["size"] for row in mine]
            for axis, key in zip(axes[:, column], ("ms", "peak_mb"), strict=True):
                slope = exponent(sizes, [row[key] for row in mine])
                style = "-o" if series.ours else "--s"
                axis.loglog(sizes, [row[key] for row in mine], style, ms=4, label=f"{series.name}  ~ size^{slope:.2f}")
        ticks = sorted({size for series in SERIES if series.panel == panel for size in series.sizes})
        for axis, label in zip(axes[:, column], ("ms", "peak memory, MB"), strict=True):
            axis.set_ylabel(label if column == 0 else "")
            axis.set_xlabel(panel, fontsize=9)
            axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axis.tick_params(axis="y", which="both", labelsize=7)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(f"Cost of a forward call, fp32, {rows[0]['device']}, {rows[0]['threads']} threads", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
