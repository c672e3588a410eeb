"""What reassemble and carafe are tested and timed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from famseg_kernels.testing.case import Case


def reassemble(name: str, shape: tuple[int, int, int, int], k: int = 5, s: int = 2, g: int = 1, tags: str = "") -> Case:
    """x's shape (N, C, H, W), the kernel's size, scale and groups."""

    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        n, _, h, w = shape
        return rand(*shape), 2 * rand(n, g * k * k * s * s, h, w), k, s, g

    return Case(name, make, tags=tags)


def carafe(name: str, shape: tuple[int, int, int, int], k: int = 5, s: int = 2, g: int = 1, tags: str = "") -> Case:
    """As `reassemble`."""

    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        n, _, h, w = shape
        masks = rand(n, g, k * k, s * h, s * w).softmax(2).flatten(1, 2)
        return rand(*shape), masks, k, g, s

    return Case(name, make, tags=tags)


# Name, x's shape, kernel, scale, groups, tags.
_BOTH: tuple[tuple[str, tuple[int, int, int, int], int, int, int, str], ...] = (
    ("famseg", (2, 8, 12, 10), 5, 2, 1, "ordinary"),
    ("groups", (1, 12, 7, 9), 3, 2, 4, "ordinary options"),
    ("no_upsampling", (2, 6, 8, 5), 5, 1, 2, ""),
    ("threefold", (1, 3, 6, 4), 3, 3, 1, ""),
    ("image_smaller_than_kernel", (2, 4, 2, 3), 7, 2, 1, ""),
    ("one_tap", (1, 5, 4, 6), 1, 2, 5, ""),
    ("one_pixel", (3, 2, 1, 1), 5, 4, 1, ""),
    ("empty_batch", (0, 4, 3, 3), 5, 2, 1, ""),
    ("empty_image", (2, 4, 0, 3), 5, 2, 1, ""),
)
REASSEMBLE = tuple(reassemble(*row) for row in _BOTH)
CARAFE = tuple(carafe(*row) for row in _BOTH)
