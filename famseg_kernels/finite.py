"""What the Triton kernels share about values that are not finite.

A product of matrices multiplies by zeros what an element of the result must not read, and 0 times NaN or infinity is
NaN. So a kernel leaves such values out of its products where it sees them, and puts them in their places by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite(tile, run):
    """The tile, from the second run on (run > 0) with zeros for what is not finite in it."""
    if run > 0:
        tile = tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, 0.0)
    return tile


@triton.jit
def nan_unless_finite(tile):
    """NaN if anything in the tile [., .] is not finite, else 0."""
    return tl.sum(tl.sum(tile * 0.0, 1), 0)
