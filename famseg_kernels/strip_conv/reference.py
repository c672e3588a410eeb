"""strip_conv2d in plain PyTorch: the definition that every kernel is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from famseg_kernels import checks
from famseg_kernels.spec import Backend
from famseg_kernels.strip_conv import spec


def forward(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: list[Tensor],
    row_biases: list[Tensor],
    col_weights: list[Tensor],
    col_biases: list[Tensor],
) -> Tensor:
    """y = a + Σ col_i(row_i(a)), a = square(x); every stage zero-padded to "same" size, in fp32 or better."""
    a = _depthwise(_wide(x), square_weight, square_bias)
    y = a.clone()
    row_sides = zip(row_weights, spec.unpacked(row_biases, row_weights), strict=True)
    col_sides = zip(col_weights, spec.unpacked(col_biases, col_weights), strict=True)
    for (row, row_bias), (col, col_bias) in zip(row_sides, col_sides, strict=True):
        y = y + _depthwise(_depthwise(a, row, row_bias), col, col_bias)
    return y.to(x.dtype).contiguous(memory_format=checks.image_format(x))


def _depthwise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None or not x.numel():  # conv2d refuses an image without pixels
        return x
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, _wide(weight), None if bias is None else _wide(bias), padding=padding, groups=x.shape[1])


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


strip_conv2d = Backend(forward)
