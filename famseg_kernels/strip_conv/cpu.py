"""strip_conv2d on the CPU: hands tensors as addresses to the C++ kernels of csrc/strip_conv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks


def forward(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Sequence[Tensor | None],
    col_weights: Sequence[Tensor],
    col_biases: Sequence[Tensor | None],
) -> Tensor:
    """y (N, C, H, W) in x's dtype and memory format."""
    layout = checks.image_format(x)
    x = x.contiguous(memory_format=layout)
    args = _Arguments(x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases)
    y = torch.empty_like(x, memory_format=layout)
    dtype, shape, *rest = args.native
    channels_last = layout == torch.channels_last
    _native().strip_conv2d_forward(dtype, shape, channels_last, *rest, y.data_ptr(), torch.get_num_threads())
    return y


def backward(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Sequence[Tensor | None],
    col_weights: Sequence[Tensor],
    col_biases: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the flattened tensor arguments where `needs`, None elsewhere."""
    layout = checks.image_format(x)
    args = _Arguments(
        x.contiguous(memory_format=layout), square_weight, square_bias, row_weights, row_biases, col_weights, col_biases
    )
    # Read as it lies where that is one of the two formats, whatever x's is.
    grad_layout = layout if grad.is_contiguous(memory_format=layout) else checks.image_format(grad)
    grad = grad.contiguous(memory_format=grad_layout)
    flat = [x, square_weight, square_bias, *row_weights, *row_biases, *col_weights, *col_biases]
    # The op's fake kernel promises the strides of empty_like; the native kernels write contiguously.
    results = [
        torch.empty_like(tensor) if need and tensor is not None else None
        for tensor, need in zip(flat, needs, strict=True)
    ]
    formats = [layout] + [torch.contiguous_format] * (len(flat) - 1)
    gradients = [
        torch.empty_like(result, memory_format=memory_format)
        if result is not None and not result.is_contiguous(memory_format=memory_format)
        else result
        for result, memory_format in zip(results, formats, strict=True)
    ]
    addresses = [_address(gradient) for gradient in gradients]
    count = len(row_weights)
    sides = [addresses[3 + side * count : 3 + (side + 1) * count] for side in range(4)]
    dtype, shape, *rest = args.native
    _native().strip_conv2d_backward(
        dtype,
        shape,
        (layout == torch.channels_last, grad_layout == torch.channels_last),
        *rest,
        grad.data_ptr(),
        addresses[0],
        tuple(addresses[1:3]),
        list(zip(*sides, strict=True)),
        torch.get_num_threads(),
    )
    for result, gradient in zip(results, gradients, strict=True):
        if result is not None and gradient is not None and result is not gradient:
            result.copy_(gradient)
    return results


class _Arguments:
    """The op's arguments as the native module takes them.

    Holds the contiguous tensors whose addresses are in `native`: keep it until the native call is over.
    """

    def __init__(
        self,
        x: Tensor,
        square_weight: Tensor | None,
        square_bias: Tensor | None,
        row_weights: Sequence[Tensor],
        row_biases: Sequence[Tensor | None],
        col_weights: Sequence[Tensor],
        col_biases: Sequence[Tensor | None],
    ) -> None:
        self._kept = [x]
        square_size = 0 if square_weight is None else square_weight.shape[-1]
        branches = [
            (
                self._keep(row),
                self._keep(row_bias),
                row.shape[3],
                self._keep(col),
                self._keep(col_bias),
                col.shape[2],
            )
            for row, row_bias, col, col_bias in zip(row_weights, row_biases, col_weights, col_biases, strict=True)
        ]
        self.native = (
            checks.dtype_name(x),
            tuple(x.shape),
            x.data_ptr(),
            (self._keep(square_weight), self._keep(square_bias), square_size),
            branches,
        )

    def _keep(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native() -> Any:
    """The native module; the registry has asked for it before."""
    return backends.native_module("_cpu")[0]
