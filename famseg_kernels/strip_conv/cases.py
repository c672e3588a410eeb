"""What strip_conv2d is tested and timed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from famseg_kernels.testing.case import Case


def strip_conv2d(
    name: str,
    shape: tuple[int, int, int, int],
    square: int | None = 5,
    strips: Sequence[tuple[int, int]] = ((7, 7), (11, 11), (21, 21)),
    bias: bool = True,
    tags: str = "",
) -> Case:
    """x's shape (N, C, H, W), the size of the square or None, and the row and column size of each branch."""
    channels = shape[1]

    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        def biases() -> list[Tensor]:
            return [rand(channels) for _ in strips] if bias else []

        return (
            rand(*shape),
            None if square is None else rand(channels, 1, square, square) / square,
            rand(channels) if bias and square is not None else None,
            [rand(channels, 1, 1, k) / k**0.5 for k, _ in strips],
            biases(),
            [rand(channels, 1, k, 1) / k**0.5 for _, k in strips],
            biases(),
        )

    return Case(name, make, tags=tags)


CASES = (
    strip_conv2d("mscan", (2, 4, 24, 20), tags="ordinary"),
    strip_conv2d("wider_than_high", (1, 3, 5, 70)),
    strip_conv2d("image_smaller_than_kernel", (2, 3, 4, 3)),
    strip_conv2d("one_pixel", (3, 2, 1, 1)),
    strip_conv2d("no_bias", (1, 5, 17, 33), bias=False),
    strip_conv2d("no_square", (2, 3, 19, 16), square=None),
    strip_conv2d("no_branch", (1, 4, 9, 11), strips=()),
    strip_conv2d("unequal_strips", (1, 3, 15, 18), square=3, strips=((3, 9), (1, 5)), tags="options"),
    strip_conv2d("longest_kernels", (1, 2, 40, 34), square=63, strips=((63, 63),)),
    strip_conv2d("empty_batch", (0, 3, 8, 8)),
    strip_conv2d("empty_image", (2, 3, 0, 5)),
)
