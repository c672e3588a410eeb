"""strip_conv2d on the CPU: hands tensors as addresses to the C++ kernels of csrc/strip_conv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.spec import Backend
from famseg_kernels.strip_conv import spec


def forward(x: Tensor, *weights: Any) -> Tensor:
    """y (N, C, H, W) in x's dtype and memory format."""
    layout = checks.image_format(x)
    x = x.contiguous(memory_format=layout)
    args = spec.Arguments(x, *weights)
    y = torch.empty_like(x, memory_format=layout)
    backends.native("_cpu").strip_conv2d_forward(
        **args.native, channels_last=layout == torch.channels_last, y=y.data_ptr(), threads=torch.get_num_threads()
    )
    return y


def backward(grad: Tensor, needs: Sequence[bool], x: Tensor, *weights: Any) -> list[Tensor | None]:
    """Gradients of the flattened tensor arguments where `needs`, None elsewhere."""
    layout = checks.image_format(x)
    x = x.contiguous(memory_format=layout)
    args = spec.Arguments(x, *weights)
    # Read as it lies where that is one of the two formats, whatever x's is.
    grad_layout = layout if grad.is_contiguous(memory_format=layout) else checks.image_format(grad)
    grad = grad.contiguous(memory_format=grad_layout)
    gradients = args.gradients(needs)
    backends.native("_cpu").strip_conv2d_backward(
        **args.native,
        channels_last=layout == torch.channels_last,
        y_gradient=grad.data_ptr(),
        y_gradient_channels_last=grad_layout == torch.channels_last,
        **args.native_gradients(gradients),
        threads=torch.get_num_threads(),
    )
    return gradients


strip_conv2d = Backend(forward, backward)
