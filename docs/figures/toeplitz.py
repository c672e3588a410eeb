"""Draws docs/figures/toeplitz.png: a row convolution as a product with banded Toeplitz matrices.

python docs/figures/toeplitz.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

LEAD = 12  # the first of the 32 inputs is 12 columns left of the first of 8 outputs
KERNELS = (7, 11, 21)
COLORS = ("#4c72b0", "#dd8452", "#55a868")


def band(size: int) -> np.ndarray:
    """(32, 8): which tap takes input row k to output column n; NaN outside the kernel."""
    tap = np.arange(32)[:, None] - LEAD - np.arange(8)[None, :] + size // 2
    return np.where((tap >= 0) & (tap < size), tap.astype(float), np.nan)


def main() -> None:
    figure, axes = plt.subplots(1, 5, figsize=(11, 5.2), width_ratios=(32, 9, 9, 9, 15), layout="constrained")
    line = axes[0]
    line.imshow(np.random.default_rng(0).normal(size=(16, 32)), cmap="Greys", alpha=0.45, aspect="equal")
    line.set_title("a: 16 rows × 32 columns,\n8 of them new for every 8 outputs")
    for start, text in ((0, "k 0–15"), (16, "k 16–31")):
        line.add_patch(Rectangle((start - 0.5, -0.5), 16, 16, fill=False, linewidth=2))
        line.text(start + 7.5, 17.6, text, ha="center")
    line.add_patch(Rectangle((LEAD - 0.5, -0.5), 8, 16, fill=False, linewidth=2, edgecolor="#c44e52"))
    line.text(15.5, 19.6, "red: columns of the 8 outputs", ha="center", color="#c44e52", fontsize=9)
    line.text(15.5, 21.4, "kernel of 7: only k 8–23, one product", ha="center", color=COLORS[0], fontsize=9)

    for axis, size, color in zip(axes[1:4], KERNELS, COLORS, strict=True):
        matrix = band(size)
        for k, n in zip(*np.nonzero(~np.isnan(matrix)), strict=True):
            axis.add_patch(Rectangle((n - 0.5, k - 0.5), 1, 1, color=color, alpha=0.25 + 0.7 * matrix[k, n] / size))
        first, last = (8, 24) if size == 7 else (0, 32)
        axis.add_patch(Rectangle((-0.5, first - 0.5), 8, last - first, fill=False, linewidth=2))
        if size > 7:
            axis.plot((-0.5, 7.5), (15.5, 15.5), color="black", linewidth=1)
        axis.set_xlim(-0.6, 7.6)
        axis.set_ylim(31.6, -0.6)
        axis.set_aspect("equal")
        axis.set_title(f"kernel of {size}:\n{(last - first) // 16} × (16 × 8)", color=color)
    axes[1].set_ylabel("input k, from 12 columns left of the outputs", labelpad=8)

    totals = axes[4]
    totals.bar(("FMA", "mma"), (103, 240), color=("#8c8c8c", "#c44e52"))
    for x, (count, time) in enumerate(((103, "3.1 ps"), (240, "0.5 ps"))):
        totals.text(x, count + 5, f"{count}\n{time}", ha="center")
    totals.set_ylim(0, 290)
    totals.set_title("multiply–adds an element\n(time by arithmetic, H200)", fontsize=10)
    for axis in axes[:4]:
        axis.set_xticks([])
        axis.set_yticks([])
    for side in ("top", "right", "left"):
        totals.spines[side].set_visible(False)
    totals.set_yticks([])
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
