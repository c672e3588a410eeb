"""fk.reassemble and fk.carafe: the functional forms."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from famseg_kernels.reassembly import cpu, cuda, reference
from famseg_kernels.reassembly.spec import CARAFE, REASSEMBLE
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
