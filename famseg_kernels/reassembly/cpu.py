"""reassemble and carafe on the CPU: hand tensors as addresses to the C++ kernels of csrc/reassembly."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks


def _forward(softmax: bool, x: Tensor, weights: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    """y (N, C, sH, sW) in x's dtype and memory format."""
    n, c, h, w = x.shape
    x, weights = _dense(x), _dense(weights)
    y = torch.empty((n, c, scale * h, scale * w), dtype=x.dtype, memory_format=checks.image_format(x))
    _native().reassembly_forward(
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
    _native().reassembly_backward(
        checks.dtype_name(x),
        softmax,
        tuple(x.shape),
        sources[0].data_ptr(),
        sources[1].data_ptr(),
        (_channels_last(sources[0]), _channels_last(sources[1])),
        (kernel_size, scale, groups),
        grad.data_ptr(),
        *(0 if gradient is None else gradient.data_ptr() for gradient in gradients),
        torch.get_num_threads(),
    )
    # Strides are those of empty_like, which is what the op's fake kernel promises.
    return [
        gradient if gradient is None or t is source else torch.empty_like(t).copy_(gradient)
        for t, source, gradient in zip((x, weights), sources, gradients, strict=True)
    ]


def _dense(t: Tensor) -> Tensor:
    """t in one of the two memory formats that the kernels read."""
    return t.contiguous(memory_format=checks.image_format(t))


def _channels_last(t: Tensor) -> bool:
    return checks.image_format(t) == torch.channels_last


def _native() -> Any:
    """The native module; the registry has asked for it before."""
    return backends.native_module("_cpu")[0]


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


reassemble = SimpleNamespace(forward=_reassemble, backward=_reassemble_backward)
carafe = SimpleNamespace(forward=_carafe, backward=_carafe_backward)
