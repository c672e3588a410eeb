"""fk.reassemble, fk.carafe and fk.feature_aware_upsample: the functional forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from famseg_kernels.reassembly import cpu, cuda, reference
from famseg_kernels.reassembly.spec import CARAFE, REASSEMBLE, UPSAMPLE
from famseg_kernels.spec import Later
from famseg_kernels.torch_op import Operation, autocast

REASSEMBLE_OPERATION = Operation(
    REASSEMBLE,
    {
        "reference": reference.reassemble,
        "cpu": cpu.reassemble,
        "triton": Later("famseg_kernels.reassembly.triton", "reassemble"),
        "cuda": cuda.reassemble,
    },
)
CARAFE_OPERATION = Operation(
    CARAFE,
    {
        "reference": reference.carafe,
        "cpu": cpu.carafe,
        "triton": Later("famseg_kernels.reassembly.triton", "carafe"),
        "cuda": cuda.carafe,
    },
)
UPSAMPLE_OPERATION = Operation(
    UPSAMPLE,
    {
        "reference": reference.feature_aware_upsample,
        "cpu": cpu.feature_aware_upsample,
        "triton": Later("famseg_kernels.reassembly.triton", "feature_aware_upsample"),
        "cuda": cuda.feature_aware_upsample,
    },
)


def reassemble(x: Tensor, logits: Tensor, kernel_size: int = 5, scale: int = 2, groups: int = 1) -> Tensor:
    """Content-aware upsampling: softmax over the taps of each predicted kernel, then a weighted sum of x.

    y[n, c, s·i+dy, s·j+dx] = Σ_tap w · x[n, c, i+ky−r, j+kx−r], zero outside, no renormalisation; tap = ky·k + kx.
    CARAFE (arXiv 1905.02188, Eq. 1–2); FAMSeg Fig. 3 (kernel normalisation and reorganisation).

    Args:
        x: (N, C, H, W), contiguous or channels_last; fp32, bf16, fp16 or fp64.
        logits: (N, groups·k²·s², H, W) as they leave the encoder, channel (g·k² + tap)·s² + dy·s + dx.
        kernel_size: odd window size k.
        scale: upsampling factor s ≥ 1.
        groups: kernel groups, a divisor of C; channel c uses group c // (C / groups).

    Returns:
        (N, C, s·H, s·W) in x's dtype and memory format.

    Raises:
        TypeError, ValueError: arguments of another dtype, device or shape; an even kernel.
    """
    if has_torch_function_variadic(x, logits):
        return handle_torch_function(reassemble, (x, logits), x, logits, kernel_size, scale, groups)
    x, logits = autocast((x, logits))
    REASSEMBLE.check(x, logits, kernel_size, scale, groups)
    return REASSEMBLE_OPERATION(x, logits, kernel_size, scale, groups)


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int = 1, scale_factor: int = 1) -> Tensor:
    """Reassembly with finished masks: mmcv's `carafe` by name, meaning and argument order, on any device.

    Args:
        features: (N, C, H, W).
        masks: (N, k²·group_size, s·H, s·W), normalised by the caller; channel (g·k + ky)·k + kx.
        kernel_size: odd window size k.
        group_size: number of kernel groups, a divisor of C.
        scale_factor: upsampling factor s ≥ 1.

    Returns:
        (N, C, s·H, s·W) in features' dtype and memory format.

    Raises:
        TypeError, ValueError: arguments of another dtype, device or shape; an even kernel.
    """
    if has_torch_function_variadic(features, masks):
        return handle_torch_function(carafe, (features, masks), features, masks, kernel_size, group_size, scale_factor)
    features, masks = autocast((features, masks))
    CARAFE.check(features, masks, kernel_size, group_size, scale_factor)
    return CARAFE_OPERATION(features, masks, kernel_size, group_size, scale_factor)


def feature_aware_upsample(
    x: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int = 5,
    scale: int = 2,
    groups: int = 1,
    dilation: int = 1,
) -> Tensor:
    """The content encoder and the reassembly in one: `reassemble(x, conv2d(compressed, weight, bias), …)`.

    FAMSeg section 3.3 behind its channel compressor; CARAFE (arXiv 1905.02188, Eq. 1–2). The convolution is
    zero-padded to "same" size. Its logits are groups·k²·s² channels where x has a few: kernels make them where they
    are used, and no tensor of them is written or read.

    Args:
        x: (N, C, H, W), contiguous or channels_last; fp32, bf16, fp16 or fp64.
        compressed: (N, C_d, H, W), what the encoder reads.
        weight: (groups·k²·s², C_d, k_e, k_e) of the encoder, k_e odd; output channels as `reassemble`'s logits.
        bias: (groups·k²·s²,) or None.
        kernel_size: odd window size k.
        scale: upsampling factor s ≥ 1.
        groups: kernel groups, a divisor of C; channel c uses group c // (C / groups).
        dilation: of the encoder, ≥ 1.

    Returns:
        (N, C, s·H, s·W) in x's dtype and memory format.

    Raises:
        TypeError, ValueError: arguments of another dtype, device or shape; an even kernel.
    """
    flat: Sequence[Any] = (x, compressed, weight, bias)
    options = (kernel_size, scale, groups, dilation)
    if has_torch_function(flat):
        return handle_torch_function(feature_aware_upsample, flat, *flat, *options)
    x, compressed, weight, bias = autocast(flat)
    UPSAMPLE.check(x, compressed, weight, bias, *options)
    return UPSAMPLE_OPERATION(x, compressed, weight, bias, *options)
