"""One strip convolution as every kernel takes it, and what a native call makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from famseg_kernels import backends, checks


class Problem(NamedTuple):
    """A call of strip_conv2d, as its schema has it: a side of the branches has a bias a branch or none."""

    x: Tensor  # (N, C, H, W)
    square_weight: Tensor | None  # (C, 1, k, k)
    square_bias: Tensor | None  # (C,)
    row_weights: Sequence[Tensor]  # (C, 1, 1, k)
    row_biases: Sequence[Tensor]
    col_weights: Sequence[Tensor]  # (C, 1, k, 1)
    col_biases: Sequence[Tensor]


class Native:
    """A problem's tensors as the native modules take them: weights and biases contiguous, x as it lies.

    Keep it until the native call is over (on a GPU: until its kernels are enqueued, since the caching allocator hands
    memory on in the order of the stream): `arguments`, those of a native call by name, are addresses only.
    """

    def __init__(self, problem: Problem) -> None:
        x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases = problem
        given = [square_weight, square_bias, *row_weights, *row_biases, *col_weights, *col_biases]
        self._tensors = [x, *(None if t is None else t.contiguous() for t in given)]
        self._counts = (len(row_weights), len(row_biases), len(col_weights), len(col_biases))
        x_address, square, bias, *sides = self._addresses(self._tensors)
        self.arguments = {
            "dtype": checks.dtype_name(x),
            "shape": x.shape,
            "x": x_address,
            "square_weight": square,
            "square_bias": bias,
            "square_size": 0 if square_weight is None else square_weight.shape[3],
            "row_weights": sides[0],
            "row_biases": sides[1],
            "row_sizes": [weight.shape[3] for weight in row_weights],
            "col_weights": sides[2],
            "col_biases": sides[3],
            "col_sizes": [weight.shape[2] for weight in col_weights],
        }

    def gradients(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """Room for the gradients of the flattened arguments that need one, laid out as these are."""
        return [
            torch.empty_like(t) if need and t is not None else None
            for t, need in zip(self._tensors, needs, strict=True)
        ]

    def native_gradients(self, gradients: Sequence[Tensor | None]) -> dict[str, Any]:
        """Where the gradients of the flattened arguments go, as the native modules name them."""
        x, square, bias, *sides = self._addresses(gradients)
        return {
            "x_gradient": x,
            "square_weight_gradient": square,
            "square_bias_gradient": bias,
            "row_weight_gradients": sides[0],
            "row_bias_gradients": sides[1],
            "col_weight_gradients": sides[2],
            "col_bias_gradients": sides[3],
        }

    def _addresses(self, flat: Sequence[Tensor | None]) -> list[Any]:
        """Addresses of x, of the square's weight and bias, then a list for each of the four sides of the branches."""
        rest = [backends.address(t) for t in flat]
        grouped: list[Any] = rest[:3]
        start = 3
        for count in self._counts:
            grouped.append(rest[start : start + count])
            start += count
        return grouped
