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
        checks.dtype_name(x),
        softmax,
        tuple(x.shape),
        x.data_ptr(),
        weights.data_ptr(),
        (_channels_last(x), _channels_last(weights)),
        (kernel_size, scale, groups),
        y.data_ptr(),
        torch.get_num_threads(),
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
        checks.dtype_name(x),
        softmax,
        tuple(x.shape),
        sources[0].data_ptr(),
        sources[1].data_ptr(),
        (_channels_last(sources[0]), _channels_last(sources[1])),
        (kernel_size, scale, groups),
        grad.data_ptr(),
        *(backends.address(gradient) for gradient in gradients),
        torch.get_num_threads(),
    )
    return gradients


def _dense(t: Tensor) -> Tensor:
    """t in one of the two memory formats that the kernels read."""
    return t.contiguous(memory_format=checks.image_format(t))


def _channels_last(t: Tensor) -> bool:
    return checks.image_format(t) == torch.channels_last


reassemble = Backend(spec.of_logits(_forward), spec.of_logits(_backward))
carafe = Backend(spec.of_masks(_forward), spec.of_masks(_backward))
