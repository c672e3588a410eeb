"""What speaks for an error, and what is expected of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from famseg.biometrics import fit_head
from famseg.uncertainty import fit_expectation, signs_of


def disc(radius: float, soft: float) -> tuple[np.ndarray, np.ndarray]:
    """Mask and probability of a disc whose border is `soft` px wide between 0.1 and 0.9."""
    rows, columns = np.mgrid[:200, :200]
    inside = radius - np.hypot(rows - 99.5, columns - 99.5)
    return inside > 0, 1 / (1 + np.exp(-inside * 2 * math.log(9) / soft))


def test_signs_are_lengths_in_px() -> None:
    mask, probability = disc(60, soft=4.0)
    shape = fit_head(mask)
    assert shape is not None
    spread, border, apart = signs_of(shape, mask, probability, [370.0, 380.0])
    assert spread == pytest.approx(5.0)
    assert border == pytest.approx(4.0, rel=0.05)
    assert apart < 0.3
    dented = mask.copy()
    dented[:, 130:] = False
    assert signs_of(shape, dented, probability, [370.0])[2] > 3


def test_the_expectation_finds_what_errors_are_made_of() -> None:
    rng = np.random.default_rng(0)
    signs = rng.exponential(1, (500, 3))
    errors = signs @ [2.0, 0.0, 1.0] + rng.normal(0, 0.1, 500)
    expectation = fit_expectation(signs, errors)
    np.testing.assert_allclose(expectation.weights, [2.0, 0.0, 1.0], atol=0.2)
    expected = np.array([expectation.error(row) for row in signs])
    flagged = expected > expectation.doubtful
    assert flagged.sum() == 50
    assert errors[flagged].mean() > 2 * errors[~flagged].mean()


def test_no_sign_speaks_against_an_error() -> None:
    signs = np.random.default_rng(1).exponential(1, (200, 3))
    assert min(fit_expectation(signs, np.maximum(3.0 - 0.5 * signs[:, 1], 0)).weights) >= 0
    with pytest.raises(ValueError, match=r"signs: expected shape \(3, 3\), got \(3, 2\)"):
        fit_expectation(np.ones((3, 2)), np.ones(3))
