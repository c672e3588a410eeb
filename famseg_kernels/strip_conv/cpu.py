"""strip_conv2d on the CPU: hands tensors as addresses to the C++ kernels of csrc/strip_conv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.spec import Backend
from famseg_kernels.strip_conv import spec


def forward(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Sequence[Tensor],
    col_weights: Sequence[Tensor],
    col_biases: Sequence[Tensor],
) -> Tensor:
    """y (N, C, H, W) in x's dtype and memory format."""
    layout = checks.image_format(x)
    x = x.contiguous(memory_format=layout)
    args = spec.Arguments(x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases)
    y = torch.empty_like(x, memory_format=layout)
    dtype, shape, *rest = args.native
    channels_last = layout == torch.channels_last
    backends.native("_cpu").strip_conv2d_forward(
        dtype, shape, channels_last, *rest, y.data_ptr(), torch.get_num_threads()
    )
    return y


def backward(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Sequence[Tensor],
    col_weights: Sequence[Tensor],
    col_biases: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of the flattened tensor arguments where `needs`, None elsewhere."""
    layout = checks.image_format(x)
    x = x.contiguous(memory_format=layout)
    args = spec.Arguments(x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases)
    # Read as it lies where that is one of the two formats, whatever x's is.
    grad_layout = layout if grad.is_contiguous(memory_format=layout) else checks.image_format(grad)
    grad = grad.contiguous(memory_format=grad_layout)
    gradients = args.gradients(needs)
    of_x, of_square, of_bias, of_branches = args.grouped(gradients)
    dtype, shape, *rest = args.native
    backends.native("_cpu").strip_conv2d_backward(
        dtype,
        shape,
        (layout == torch.channels_last, grad_layout == torch.channels_last),
        *rest,
        grad.data_ptr(),
        of_x,
        (of_square, of_bias),
        of_branches,
        torch.get_num_threads(),
    )
    return gradients


strip_conv2d = Backend(forward, backward)
