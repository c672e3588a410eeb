"""strip_conv2d on NVIDIA GPUs: hands tensors as addresses to the CUDA kernels of csrc/strip_conv.

Channels-last tensors are copied to contiguous ones and back: one (n, c) plane to a block is what the kernels live on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks


def unsupported(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    *_: Any,
) -> str | None:
    """None when these kernels can run the call, else the reason."""
    if x.dtype == torch.float64:
        return "there is no kernel for float64"
    most = _native().strip_conv2d_max_branches()
    return f"{len(row_weights)} branches, at most {most} have a kernel" if len(row_weights) > most else None


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
    args = _Arguments(x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases)
    y = torch.empty_like(args.x, memory_format=torch.contiguous_format)
    # The launch goes to the current device, which need not be x's.
    with torch.cuda.device(x.device):
        _native().strip_conv2d_forward(*args.native, y.data_ptr(), torch.cuda.current_stream().cuda_stream)
    return y.contiguous(memory_format=checks.image_format(x))


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
    args = _Arguments(x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases)
    flat = [x, square_weight, square_bias, *row_weights, *row_biases, *col_weights, *col_biases]
    # The op's fake kernel promises the strides of empty_like; the native kernels write contiguously.
    results = [
        torch.empty_like(tensor) if need and tensor is not None else None
        for tensor, need in zip(flat, needs, strict=True)
    ]
    gradients = [
        torch.empty_like(result, memory_format=torch.contiguous_format)
        if result is not None and not result.is_contiguous()
        else result
        for result in results
    ]
    if not x.numel():  # sums over nothing
        return [None if t is None else t.zero_() for t in results]
    grad = grad.contiguous()
    weights = any(needs[1:])
    x_gradient = gradients[0]
    if x_gradient is None and weights and square_weight is not None:
        x_gradient = torch.empty_like(args.x)  # the weights' gradients need what it is made from
    addresses = [_address(gradient) for gradient in (x_gradient, *gradients[1:])]
    count = len(row_weights)
    sides = [addresses[3 + side * count : 3 + (side + 1) * count] for side in range(4)]
    with torch.cuda.device(x.device):
        middle, partial = (
            torch.empty(size, dtype=torch.float32, device=x.device) if size else None
            for size in _native().strip_conv2d_workspace(*args.native, weights)
        )
        _native().strip_conv2d_backward(
            *args.native,
            grad.data_ptr(),
            tuple(addresses[:3]),
            list(zip(*sides, strict=True)),
            (_address(middle), _address(partial)),
            torch.cuda.current_stream().cuda_stream,
        )
    for result, gradient in zip(results, gradients, strict=True):
        if result is not None and gradient is not None and result is not gradient:
            result.copy_(gradient)
    return results


class _Arguments:
    """The op's arguments as the native module takes them.

    Holds the contiguous tensors whose addresses are in `native`: keep it until the kernels are enqueued (the caching
    allocator hands their memory on only in the order of the stream).
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
        self.x = x.contiguous()
        self._kept: list[Tensor] = []
        square_size = 0 if square_weight is None else square_weight.shape[-1]
        branches = [
            (self._keep(row), self._keep(row_bias), row.shape[3], self._keep(col), self._keep(col_bias), col.shape[2])
            for row, row_bias, col, col_bias in zip(row_weights, row_biases, col_weights, col_biases, strict=True)
        ]
        self.native = (
            checks.dtype_name(x),
            tuple(x.shape),
            self.x.data_ptr(),
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
    return backends.native_module("_cuda")[0]
