"""reassemble and carafe on the CPU: hand tensors as addresses to the C++ kernels of csrc/reassembly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.reassembly import spec
from famseg_kernels.spec import Backend


def _forward(softmax: bool, x: Tensor, weights: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    """y (N, C, sH, sW) in x's dtype and memory format."""
    n, c, h, w = x.shape
    x, weights = _dense(x), _dense(weights)
    y = torch.empty((n, c, scale * h, scale * w), dtype=x.dtype, memory_format=checks.image_format(x))
    backends.native("_cpu").reassembly_forward(
        **spec.native_problem(softmax, x, weights, kernel_size, scale, groups),
        y=y.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y


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
    sources = [_dense(x), _dense(weights)]
    grad = grad.contiguous(memory_format=checks.image_format(sources[0]))
    gradients = [
        torch.empty_like(t, memory_format=checks.image_format(t)) if need else None
        for t, need in zip(sources, needs, strict=True)
    ]
    backends.native("_cpu").reassembly_backward(
        **spec.native_problem(softmax, *sources, kernel_size, scale, groups),
        y_gradient=grad.data_ptr(),
        x_gradient=backends.address(gradients[0]),
        weights_gradient=backends.address(gradients[1]),
        threads=torch.get_num_threads(),
    )
    return gradients


def _dense(t: Tensor) -> Tensor:
    """t in one of the two memory formats that the kernels read."""
    return t.contiguous(memory_format=checks.image_format(t))


reassemble = Backend(spec.of_logits(_forward), spec.of_logits(_backward))
carafe = Backend(spec.of_masks(_forward), spec.of_masks(_backward))
