"""How far off a measurement may be, judged without the truth: by how the network's views of an image disagree, by how
soft the border is that it draws, and by how well the shape fits.

Which sign means how much is fitted to errors on images that a network was not trained on (`fit_expectation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from famseg.biometrics import Axis, Ellipse

_SOFT = (0.1, 0.9)  # probabilities between which a pixel belongs to the border
_SIGNS = 3


@dataclass(frozen=True)
class Expectation:
    """Absolute errors of one measure, as they are expected by its signs."""

    weights: tuple[float, ...]  # of the signs
    doubtful: float  # mm; what is expected to be off by more is flagged

    def __post_init__(self) -> None:
        numbers = (*self.weights, self.doubtful)
        if len(self.weights) != _SIGNS or not all(isinstance(n, float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"expected {_SIGNS} weights and an error, got {self.weights} and {self.doubtful}")

    def error(self, signs: np.ndarray) -> float:
        """In the unit of the signs."""
        return float(np.dot(self.weights, signs))


def signs_of(
    shape: Ellipse | Axis,
    mask: np.ndarray,
    probability: np.ndarray,
    lengths: Sequence[float],
) -> np.ndarray:
    """What speaks for an error: the views' spread, the width of the soft border, the shape's distance; px.

    Args:
        shape: fitted to `mask`, in the image's pixels.
        mask: (H, W) bool, what was found.
        probability: (H, W), of the class.
        lengths: in each view alone, px; 0 where it is not found.
    """
    border = ((probability > _SOFT[0]) & (probability < _SOFT[1])).sum() / shape.length
    apart = (shape.inside(*mask.shape) ^ mask).sum() / shape.length if isinstance(shape, Ellipse) else 0.0
    return np.array([np.std(lengths), border, apart])


def fit_expectation(signs: np.ndarray, errors: np.ndarray, doubtful: float = 0.1) -> Expectation:
    """The expectation that fits best (least squares, no sign counts against an error).

    Args:
        signs: (n, 3), of measurements on held-out images, mm.
        errors: (n,), their absolute errors, mm.
        doubtful: the part of them that is to be flagged.
    """
    if signs.shape != (len(errors), _SIGNS):
        raise ValueError(f"signs: expected shape ({len(errors)}, {_SIGNS}), got {signs.shape}")
    # A few gross errors would decide a fit of squares alone.
    weights, _ = nnls(signs, np.minimum(errors, np.quantile(errors, 0.98)))
    return Expectation(tuple(weights.tolist()), float(np.quantile(signs @ weights, 1 - doubtful)))
