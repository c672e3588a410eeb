"""What reassemble, carafe and feature_aware_upsample are tested and timed on."""

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


def feature_aware_upsample(
    name: str,
    shape: tuple[int, int, int, int],
    k: int = 5,
    s: int = 2,
    g: int = 1,
    tags: str = "",
    compressed: int = 8,
    encoder: int = 3,
    dilation: int = 1,
    bias: bool = True,
) -> Case:
    """As `reassemble`; then the compressed channels and the encoder's kernel size, dilation and bias."""

    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        n, _, h, w = shape
        logits = g * k * k * s * s
        weight = rand(logits, compressed, encoder, encoder) / max(compressed**0.5 * encoder, 1)
        return rand(*shape), 2 * rand(n, compressed, h, w), weight, rand(logits) if bias else None, k, s, g, dilation

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
UPSAMPLE = (
    *(feature_aware_upsample(*row) for row in _BOTH),
    feature_aware_upsample("wide", (1, 4, 3, 41), compressed=20),
    feature_aware_upsample("dilated", (2, 4, 9, 11), dilation=3, g=2, compressed=3, tags="options"),
    feature_aware_upsample("dilation_beyond_the_image", (1, 4, 4, 5), encoder=5, dilation=4),
    feature_aware_upsample("encoder_beyond_the_window", (1, 2, 5, 12), k=3, encoder=5, compressed=2),
    feature_aware_upsample("pointwise", (1, 6, 7, 5), k=3, encoder=1, compressed=5, bias=False, tags="options"),
    feature_aware_upsample("no_compressed_channels", (1, 4, 3, 5), k=3, compressed=0),
)
