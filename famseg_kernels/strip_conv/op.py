"""fk.strip_conv2d: the functional form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from famseg_kernels import checks
from famseg_kernels.spec import Later
from famseg_kernels.strip_conv import cpu, cuda, reference
from famseg_kernels.strip_conv.spec import SPEC, packed
from famseg_kernels.torch_op import Operation, autocast, wants_autocast

OPERATION = Operation(
    SPEC,
    {
        "reference": reference.strip_conv2d,
        "cpu": cpu.strip_conv2d,
        "triton": Later("famseg_kernels.strip_conv.triton", "strip_conv2d"),
        "cuda": cuda.strip_conv2d,
    },
)


def strip_conv2d(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Sequence[Tensor | None] | None,
    col_weights: Sequence[Tensor],
    col_biases: Sequence[Tensor | None] | None,
) -> Tensor:
    """Multi-branch directional strip depthwise convolution: y = a + Σ_i col_i(row_i(a)), a = square(x).

    SegNeXt's multi-scale convolutional attention core and FAMSeg section 3.2.1. Every stage is zero-padded to
    "same" size: a and each row result, biases included, are zero outside the image.

    Args:
        x: (N, C, H, W), contiguous or channels_last; fp32, bf16, fp16 or fp64.
        square_weight: (C, 1, k, k), k odd ≤ 63, or None (then a = x).
        square_bias: (C,) or None; None without a square_weight.
        row_weights: one (C, 1, 1, K) a branch, K odd ≤ 63; may be empty.
        row_biases: None, or one (C,) or None a branch.
        col_weights: one (C, 1, K, 1) a branch; K may differ from the branch's row size.
        col_biases: like row_biases.

    Returns:
        (N, C, H, W) in x's dtype and memory format.

    Raises:
        TypeError: a tensor of another dtype than x (outside autocast), or no tensor.
        ValueError: a wrong shape or device, an even kernel or one above 63, a bias without its weight.
    """
    rows, cols = checks.items("row_weights", row_weights), checks.items("col_weights", col_weights)
    of_rows = [None] * len(rows) if row_biases is None else checks.items("row_biases", row_biases)
    of_cols = [None] * len(cols) if col_biases is None else checks.items("col_biases", col_biases)
    args: Sequence[Any] = (x, square_weight, square_bias, rows, of_rows, cols, of_cols)
    flat = (x, square_weight, square_bias, *rows, *of_rows, *cols, *of_cols)
    if has_torch_function(flat):
        return handle_torch_function(strip_conv2d, flat, *args)
    if wants_autocast(x):
        args = OPERATION.replace(args, autocast(flat))
    SPEC.check(*args)
    x, square_weight, square_bias, rows, of_rows, cols, of_cols = args
    return OPERATION(x, square_weight, square_bias, rows, packed(of_rows, x), cols, packed(of_cols, x))
