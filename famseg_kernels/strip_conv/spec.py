"""strip_conv2d: what it takes and what it costs.

SegNeXt's multi-scale strip convolution (arXiv 2209.08575, Eq. 1; FAMSeg section 3.2.1): a square depthwise
convolution, then branches of a row and a column convolution that are added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import checks
from famseg_kernels.spec import Spec
from famseg_kernels.strip_conv import cases

MAX_KERNEL = 63

SCHEMA = (
    "(Tensor x, Tensor? square_weight, Tensor? square_bias, Tensor[] row_weights, Tensor[] row_biases, "
    "Tensor[] col_weights, Tensor[] col_biases) -> Tensor"
)


def check(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Sequence[Tensor | None],
    col_weights: Sequence[Tensor],
    col_biases: Sequence[Tensor | None],
) -> None:
    checks.data("x", x, 4)
    channels = x.shape[1]
    if square_weight is not None:
        _weight("square_weight", square_weight, x, square=True)
    elif square_bias is not None:
        raise ValueError("square_bias: expected None without a square_weight, got a tensor")
    if square_bias is not None:
        _bias("square_bias", square_bias, x, channels)
    if len(row_weights) != len(col_weights):
        raise ValueError(f"col_weights: expected {len(row_weights)} like row_weights, got {len(col_weights)}")
    for side, weights, biases in (("row", row_weights, row_biases), ("col", col_weights, col_biases)):
        if len(biases) != len(weights):
            raise ValueError(f"{side}_biases: expected {len(weights)} like {side}_weights, got {len(biases)}")
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            _weight(f"{side}_weights[{i}]", weight, x, row=side == "row")
            if bias is not None:
                _bias(f"{side}_biases[{i}]", bias, x, channels)


def packed(biases: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    """The biases of a side as the schema has them: one a branch, or none. torch.jit cannot trace a Tensor?[]."""
    given = [bias for bias in biases if bias is not None]
    if not given or len(given) == len(biases):
        return given
    return [x.new_zeros(x.shape[1]) if bias is None else bias for bias in biases]


def unpacked(biases: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """One bias a branch, or None a branch where the side has none."""
    return biases or [None] * len(weights)


def _weight(name: str, weight: Tensor, x: Tensor, *, square: bool = False, row: bool = False) -> None:
    checks.companion(name, weight, x, 4)
    size = max(weight.shape[2], weight.shape[3])
    kernel = (size, size) if square else (1, size) if row else (size, 1)
    meaning = "(channels, 1, k, k)" if square else "(channels, 1, 1, k)" if row else "(channels, 1, k, 1)"
    checks.shape(name, weight, (x.shape[1], 1, *kernel), meaning)
    checks.odd(name, size, MAX_KERNEL)


def _bias(name: str, bias: Tensor, x: Tensor, channels: int) -> None:
    checks.companion(name, bias, x, 1)
    checks.shape(name, bias, (channels,), "(channels,)")


def fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=checks.image_format(x))


def flops(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Any,
    col_weights: Sequence[Tensor],
    col_biases: Any,
) -> int:
    """Forward FLOPs: 2 · elements · (k² + Σ (row + column size)); additions of biases and branches not counted."""
    square = 0 if square_weight is None else square_weight.shape[-1] ** 2
    return 2 * x.numel() * (square + sum(max(w.shape[2:]) for w in (*row_weights, *col_weights)))


def moved_bytes(x: Tensor, *rest: Any) -> int:
    """Bytes to move: x in, y out, each weight and bias once."""
    flat = [t for item in rest for t in (item if isinstance(item, (list, tuple)) else [item]) if t is not None]
    return x.element_size() * (2 * x.numel() + sum(t.numel() for t in flat))


SPEC = Spec("strip_conv2d", SCHEMA, check, fake, flops, moved_bytes, cases.CASES)
