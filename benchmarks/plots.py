"""`python -m benchmarks.plots RESULTS.csv`: the bars and the roofline of a result file, as PNG in docs/figures/."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def bars(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times faster than the best peer, one bar a row of ours; the peer is the line at 1."""
    from matplotlib.figure import Figure

    ours = [row for row in rows if row["speedup"] and "one thread" not in row["contestant"]]
    groups = list(dict.fromkeys((row["op"], row["case"], row["dtype"]) for row in ours))
    figure = Figure(figsize=(9, 0.34 * len(groups) + 1.6), layout="constrained")
    axis = figure.subplots()
    colors = {"fwd": "#2b7bba", "fwd+bwd": "#e07b39"}
    for place, group in enumerate(groups):
        for offset, kind in ((-0.2, "fwd"), (0.2, "fwd+bwd")):
            mine = [r for r in ours if (r["op"], r["case"], r["dtype"]) == group and r["pass"] == kind]
            if mine:
                value = max(float(r["speedup"]) for r in mine)
                axis.barh(place + offset, value, 0.38, color=colors[kind], label=kind if place == 0 else None)
                axis.text(value * 1.03, place + offset, f"{value:.1f}", va="center", fontsize=7)
    axis.set_yticks(range(len(groups)), [" ".join(group) for group in groups], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.axvline(1.0, color="black", lw=0.8)
    compiled = {row["dtype"] for row in rows if row["contestant"].startswith("compiled")}
    eager_only = [dtype for dtype in dict.fromkeys(row["dtype"] for row in rows) if dtype not in compiled]
    note = f"; {', '.join(eager_only)}: eager peers only" if eager_only else ""
    axis.set_xlabel(f"times faster than the best peer, either's better layout (eager and compiled{note})", fontsize=9)
    axis.set_title(f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}", fontsize=10)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


def roofline(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward passes: FLOP/s over FLOP per byte, ours and the best peer of each case, under the machine's roofs."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5.2 * len(dtypes), 4.4), layout="constrained")
    axes = figure.subplots(1, len(dtypes), squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        mine = [row for row in rows if row["dtype"] == dtype and row["pass"] == "fwd"]
        matrix, copy = float(mine[0]["matrix_gflops"]), float(mine[0]["copy_gb_s"])
        intensities = sorted([*(0.5 * 1.3**i for i in range(28)), matrix / copy])  # with the corner of the roof
        axis.loglog(intensities, [min(matrix, copy * i) for i in intensities], "k-", lw=1)
        axis.text(intensities[-1], matrix * 1.08, f"matrix product {matrix:.0f} GFLOP/s", ha="right", fontsize=7)
        for number, op in enumerate(dict.fromkeys(row["op"] for row in mine)):
            color = f"C{number}"
            for case in dict.fromkeys(row["case"] for row in mine if row["op"] == op):
                group = [row for row in mine if row["op"] == op and row["case"] == case]
                ours = [r for r in group if r["speedup"] and "one thread" not in r["contestant"]]
                peers = [r for r in group if not r["speedup"]]
                for kind, style in ((ours, "o"), (peers, "x")):
                    if kind:
                        best = min(kind, key=lambda row: float(row["ms"]))
                        intensity = float(best["gflops"]) / max(float(best["gb_s"]), 1e-9)
                        axis.plot(intensity, float(best["gflops"]), style, color=color, ms=6)
            axis.plot([], [], "o", color=color, label=op)
        axis.plot([], [], "kx", label="best peer")
        axis.set_xlabel("FLOP per byte that must be moved")
        axis.set_ylabel("GFLOP/s")
        axis.set_title(f"forward, {dtype}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("results", type=Path, help="CSV written by python -m benchmarks")
    options = parser.parse_args()
    with options.results.open() as file:
        rows = list(csv.DictReader(file))
    kind = "gpu" if rows[0].get("cuda") else "cpu"
    for name, draw in (("speedup", bars), ("roofline", roofline)):
        path = FIGURES / f"{name}_{kind}.png"
        draw(rows, path)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
