"""What the operations cost: FLOPs and bytes from their arguments, and the paper's Eq. 1–5.

Each function takes the arguments of the operation of its name. FLOPs are those of one forward call, 2 per
multiply–add; softmax, exp, softplus and gates are not counted. `torch.utils.flop_counter.FlopCounterMode` counts the
same numbers on every backend, and twice as many for a backward (each multiply–add has one partner per factor).
Bytes are what any implementation must move: every argument read once, the result written once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from famseg_kernels.reassembly import spec as _reassembly
from famseg_kernels.ssd_scan import spec as _ssd_scan
from famseg_kernels.strip_conv import spec as _strip_conv

# --- operations -----------------------------------------------------------------------------------------------------


def strip_conv2d(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Any,
    row_biases: Any,
    col_weights: Any,
    col_biases: Any,
) -> int:
    """2 · elements · (k² + Σ (row + column size))."""
    args = (square_weight, square_bias, row_weights, row_biases, col_weights, col_biases)
    return _strip_conv.flops(x, *args)


def strip_conv2d_bytes(x: Tensor, *args: Any) -> int:
    """x in, y out, each weight and bias once."""
    return _strip_conv.moved_bytes(x, *args)


def ssd_scan_2d(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, **options: Any) -> int:
    """4 · headdim · state a token, head and direction (the recurrence's update and read-out), 2 · headdim for D."""
    return _ssd_scan.flops_scan_2d(x, dt, A, B, C, D)


def ssd_scan_2d_bytes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, **options: Any
) -> int:
    """x, dt, A, B, C, D and dt_bias in, y out."""
    return _ssd_scan.moved_bytes(x, dt, A, B, C, D, options.get("dt_bias"))


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> int:
    """4 · headdim · state a token and head (the recurrence's update and read-out), 2 · headdim for D."""
    return _ssd_scan.flops_scan(x, dt, A, B, C, D)


def ssd_scan_bytes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    *args: Any,
    **options: Any,
) -> int:
    """Every tensor argument in, y out."""
    return _ssd_scan.moved_bytes(x, dt, A, B, C, *args, *options.values())


def reassemble(x: Tensor, logits: Tensor, kernel_size: int = 5, scale: int = 2, groups: int = 1) -> int:
    """2 · N·C·sH·sW · k²."""
    return _reassembly.flops_reassemble(x, logits, kernel_size, scale, groups)


def reassemble_bytes(x: Tensor, logits: Tensor, kernel_size: int = 5, scale: int = 2, groups: int = 1) -> int:
    """x and logits in, y out."""
    return _reassembly.bytes_reassemble(x, logits, kernel_size, scale, groups)


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int = 1, scale_factor: int = 1) -> int:
    """2 · N·C·sH·sW · k²."""
    return _reassembly.flops_carafe(features, masks, kernel_size, group_size, scale_factor)


def carafe_bytes(features: Tensor, masks: Tensor, kernel_size: int, group_size: int = 1, scale_factor: int = 1) -> int:
    """features and masks in, y out."""
    return _reassembly.bytes_carafe(features, masks, kernel_size, group_size, scale_factor)


def feature_aware_upsample(
    x: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int = 5,
    scale: int = 2,
    groups: int = 1,
    dilation: int = 1,
) -> int:
    """2 · N·H·W · elements of weight + 2 · N·C·sH·sW · k²."""
    return _reassembly.flops_upsample(x, compressed, weight, bias, kernel_size, scale, groups, dilation)


def feature_aware_upsample_bytes(
    x: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int = 5,
    scale: int = 2,
    groups: int = 1,
    dilation: int = 1,
) -> int:
    """x, compressed, weight and bias in, y out."""
    return _reassembly.bytes_upsample(x, compressed, weight, bias, kernel_size, scale, groups, dilation)


# --- FAMSeg, Eq. 1–5 ------------------------------------------------------------------------------------------------
# The paper calls Eq. 1–2 "parameters"; they count multiplications of one channel (output positions × taps).


def eq1(kernel: int, height: int, width: int) -> int:
    """Eq. 1: multiplications of a K×K depthwise convolution, K · H_o · W_o · K."""
    return kernel * height * width * kernel


def eq2(kernel: int, height: int, width: int) -> int:
    """Eq. 2: multiplications of a 1×K and a K×1 strip, 2 · H_o · W_o · K."""
    return 2 * height * width * kernel


def eq3(height: int, width: int) -> int:
    """Eq. 3: Eq. 2 with K = 7."""
    return eq2(7, height, width)


def eq4(height: int, width: int) -> int:
    """Eq. 4: Eq. 1 with K = 7; 3.5 times Eq. 3."""
    return eq1(7, height, width)


def eq5(height: int, width: int) -> int:
    """Eq. 5: two 3×3 convolutions, 2 · H_o · W_o · 9 (the text speaks of one; two see 5×5, not 7×7)."""
    return 2 * height * width * 9
