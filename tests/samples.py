"""Samples and shapes for the tests of the data layer."""

from __future__ import annotations

import numpy as np

from famseg.data.sample import Sample


def disc(height: int, width: int, x: float, y: float, a: float, b: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def three_samples() -> list[Sample]:
    """Of two subjects: with both objects, the same upside down, and empty."""
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 40), np.uint8)
    mask[3:6, 5:20] = 1
    mask[10:25, 10:30] = 2

    def image() -> np.ndarray:
        return rng.integers(0, 255, (30, 40), np.uint8)

    return [
        Sample("a", "s1", image(), mask, 0.25, 12.5, 80.125),
        Sample("b", "s1", image(), mask[::-1].copy()),
        Sample("c", "s2", image(), np.zeros_like(mask), 0.5, None, 90.0),
    ]
