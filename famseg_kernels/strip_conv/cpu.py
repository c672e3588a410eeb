"""strip_conv2d on the CPU: hands tensors as addresses to the C++ kernels of csrc/strip_conv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.spec import Backend
from famseg_kernels.strip_conv.problem import Native, Problem


def forward(x: Tensor, *weights: Any) -> Tensor:
    """y (N, C, H, W) in x's dtype and memory format."""
    layout = checks.image_format(x)
    x = x.contiguous(memory_format=layout)
    call = Native(Problem(x, *weights))
    y = torch.empty_like(x, memory_format=layout)
    backends.native("_cpu").strip_conv2d_forward(
        **call.arguments, channels_last=layout == torch.channels_last, y=y.data_ptr(), threads=torch.get_num_threads()
    )
    return y


def backward(grad: Tensor, needs: Sequence[bool], x: Tensor, *weights: Any) -> list[Tensor | None]:
    """Gradients of the flattened tensor arguments where `needs`, None elsewhere."""
    layout = checks.image_format(x)
    x = x.contiguous(memory_format=layout)
    call = Native(Problem(x, *weights))
    # Read as it lies where that is one of the two formats, whatever x's is.
    grad_layout = layout if grad.is_contiguous(memory_format=layout) else checks.image_format(grad)
    grad = grad.contiguous(memory_format=grad_layout)
    gradients = call.gradients(needs)
    backends.native("_cpu").strip_conv2d_backward(
        **call.arguments,
        channels_last=layout == torch.channels_last,
        y_gradient=grad.data_ptr(),
        y_gradient_channels_last=grad_layout == torch.channels_last,
        **call.native_gradients(gradients),
        threads=torch.get_num_threads(),
    )
    return gradients


strip_conv2d = Backend(forward, backward)
