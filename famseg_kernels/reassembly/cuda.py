"""reassemble and carafe on NVIDIA GPUs: hand tensors as addresses to the CUDA kernels of csrc/reassembly.

Channels-last tensors are copied to contiguous ones and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.reassembly import spec
from famseg_kernels.spec import Backend


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
        backends.native("_cuda").reassembly_forward(
            **spec.native_problem(softmax, source, weights, kernel_size, scale, groups),
            y=y.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
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
    # The kernels read dy two elements at once. A gradient that is a part of a larger tensor may begin between two; for
    # a GPU that is a fault that no later call survives. What is allocated begins at a multiple of 256 bytes.
    if grad.data_ptr() % (2 * grad.element_size()) != 0:
        grad = grad.clone()
    gradients = [torch.empty_like(t) if need else None for t, need in zip(sources, needs, strict=True)]
    log_sums = torch.empty(n * groups * scale**2 * h * w if softmax else 0, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        backends.native("_cuda").reassembly_backward(
            **spec.native_problem(softmax, *sources, kernel_size, scale, groups),
            y_gradient=grad.data_ptr(),
            x_gradient=backends.address(gradients[0]),
            weights_gradient=backends.address(gradients[1]),
            log_sums=log_sums.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return gradients


reassemble = Backend(spec.of_logits(_forward), spec.of_logits(_backward), _unsupported)
carafe = Backend(spec.of_masks(_forward), spec.of_masks(_backward), _unsupported)
