"""The table as CSV, Markdown and a plot; and beside measurements, where there are some."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# In the order in which a reader asks.
KERNEL_COLUMNS = (
    *("op", "case", "dtype", "backend", "pass", "launch", "kernel", "chip", "us", "binds", "blocks", "threads"),
    *("registers", "shared", "blocks a multiprocessor", "MB", "instructions", "tensor GFLOP", "FMA GFLOP"),
    *("trips to memory",),
)
OPERATION_COLUMNS = (
    *("op", "case", "dtype", "backend", "pass", "chip", "us", "binds", "share of it %", "bound us", "bound by"),
    *("% of bound", "launches", "MB"),
)
MEASURED_COLUMNS = ("measured us", "corrected us", "residual %")


def write_csv(path: Path, rows: Sequence[Row], columns: Iterable[str]) -> None:
    wanted = list(columns)
    wanted += dict.fromkeys(k for row in rows for k in row if k not in wanted and k != "refusal")
    columns = [*wanted, "refusal"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(columns), restval="")
        writer.writeheader()
        writer.writerows({k: _rounded(v) for k, v in row.items()} for row in rows)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else float(f"{value:.4g}")
    return value


def markdown(rows: Sequence[Row], chips: Sequence[str]) -> str:
    """One line an operation, dtype, pass and backend; for each chip the prediction, what binds, and % of the bound."""
    measured = any("measured us" in row for row in rows)
    head = ["operation", "dtype", "pass", "backend"]
    for chip in chips:
        head += [f"{chip}, µs", "binds", "% of the work's bound", *(["measured, µs"] if measured else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    groups: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        groups[(f"{row['op']} {row['case']}", row["dtype"], row["pass"], row["backend"])][row["chip"]] = row
    for key, by_chip in groups.items():
        cells = list(key)
        for chip in chips:
            row = by_chip.get(chip, {})
            if not row or math.isnan(row["us"]):
                cells += ["–", "refused" if row else "–", "–", *(["–"] if measured else [])]
                continue
            cells += [f"{row['us']:.0f}", str(row["binds"]), f"{row['% of bound']:.0f}"]
            cells += [f"{row['measured us']:.0f}" if "measured us" in row else "–"] if measured else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def join(rows: list[Row], paths: Sequence[Path]) -> dict[str, float]:
    """Put the medians of `python -m benchmarks.gpu` or `python -m benchmarks` beside the predictions, and fit.

    Returns the fitted factors by what binds. The device column tells the chip.
    """
    times: dict[tuple[str, ...], float] = {}
    for path in paths:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                device = line.get("device") or ""
                chip = next((name for name in ("A100", "H100", "H200") if name in device), None)
                backend = (line.get("contestant") or "").removeprefix("famseg ")
                if chip and line.get("ms"):
                    key = (line["op"], line["case"], line["dtype"], backend, chip, line["pass"])
                    times[key] = float(line["ms"])
    found = []
    for row in rows:
        key = tuple(row[k] for k in ("op", "case", "dtype", "backend", "chip", "pass"))
        if key in times and not math.isnan(row["us"]):
            row["measured us"] = 1e3 * times[key]
            found.append(row)
    factors = fitted(found)
    for row in found:
        row["corrected us"] = row["us"] * factors[row["binds"]]
        row["residual %"] = 100 * (row["measured us"] / row["corrected us"] - 1)
    return factors


def fitted(rows: Sequence[Row]) -> dict[str, float]:
    """By what binds, the factor between prediction and measurement that leaves the least squares of relative errors."""
    logs: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        logs[row["binds"]].append(math.log(row["measured us"] / row["us"]))
    return {binds: math.exp(sum(values) / len(values)) for binds, values in logs.items()}


def plot(path: Path, rows: Sequence[Row], units: Sequence[str], chip: str) -> None:
    """How far each kernel of one chip is from its bound by each unit: where a bar ends at 1, that binds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    some = [row for row in rows if row["chip"] == chip and row["kernel"][:5] != "torch" and not row["refusal"]]
    # The launches of a kernel name, dtype and operation as one: the sum of their times.
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in some:
        groups[f"{row['op']} {row['kernel']} {row['dtype']} ({row['backend']})"].append(row)
    names = sorted(groups)
    grid = np.array(
        [[sum(r[f"{u} us"] for r in groups[n]) / sum(r["us"] for r in groups[n]) for u in units] for n in names]
    )
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(names) + 1.6))
    image = axes.imshow(grid, aspect="auto", cmap="magma_r", vmin=0, vmax=1)
    axes.set_xticks(range(len(units)), units, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title(f"{chip}: time by each bound / predicted time, all shapes of a kernel", fontsize=9)
    figure.colorbar(image, shrink=0.5)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
