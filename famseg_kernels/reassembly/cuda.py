"""reassemble and carafe on NVIDIA GPUs: hand tensors as addresses to the CUDA kernels of csrc/reassembly.

Channels-last tensors are copied to contiguous ones and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks


def _unsupported(x: Tensor, *_: Any) -> str | None:
    """None when these kernels can run the call, else the reason."""
    return "there is no kernel for float64" if x.dtype == torch.float64 else None


def _forward(softmax: bool, x: Tensor, weights: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    """y (N, C, sH, sW) in x's dtype and memory format."""
    n, c, h, w = x.shape
    source, weights = x.contiguous(), weights.contiguous()
    y = torch.empty((n, c, scale * h, scale * w), dtype=x.dtype, device=x.device)
    # The launch goes to the current device, which need not be x's.
    with torch.cuda.device(x.device):
        _native().reassembly_forward(
            checks.dtype_name(x),
            softmax,
            tuple(x.shape),
            source.data_ptr(),
            weights.data_ptr(),
            (kernel_size, scale, groups),
            y.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return y.contiguous(memory_format=checks.image_format(x))


def _backward(
    softmax: bool,
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    weights: Tensor,
    kernel_size: int,
    scale: int,
    groups: int,
) -> list[Tensor | None]:
    """Gradients of x and of the logits or masks where `needs`, None elsewhere."""
    n, _, h, w = x.shape
    grad, *sources = (t.contiguous() for t in (grad, x, weights))
    gradients = [torch.empty_like(t) if need else None for t, need in zip(sources, needs, strict=True)]
    sums = torch.empty(n * groups * scale**2 * h * w if softmax else 0, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        _native().reassembly_backward(
            checks.dtype_name(x),
            softmax,
            tuple(x.shape),
            sources[0].data_ptr(),
            sources[1].data_ptr(),
            (kernel_size, scale, groups),
            grad.data_ptr(),
            *(0 if gradient is None else gradient.data_ptr() for gradient in gradients),
            sums.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    # Strides are those of empty_like, which is what the op's fake kernel promises.
    return [
        gradient if gradient is None or t.is_contiguous() else torch.empty_like(t).copy_(gradient)
        for t, gradient in zip((x, weights), gradients, strict=True)
    ]


def _native() -> Any:
    """The native module; the registry has asked for it before."""
    return backends.native_module("_cuda")[0]


def _reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    return _forward(True, x, logits, kernel_size, scale, groups)


def _reassemble_backward(
    grad: Tensor, needs: Sequence[bool], x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int
) -> list[Tensor | None]:
    return _backward(True, grad, needs, x, logits, kernel_size, scale, groups)


def _carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    return _forward(False, features, masks, kernel_size, scale_factor, group_size)


def _carafe_backward(
    grad: Tensor,
    needs: Sequence[bool],
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> list[Tensor | None]:
    return _backward(False, grad, needs, features, masks, kernel_size, scale_factor, group_size)


reassemble = SimpleNamespace(unsupported=_unsupported, forward=_reassemble, backward=_reassemble_backward)
carafe = SimpleNamespace(unsupported=_unsupported, forward=_carafe, backward=_carafe_backward)
