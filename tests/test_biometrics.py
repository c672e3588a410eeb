"""Lengths in millimetres on rasterised shapes of known size, on the phantom, and on HC18."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import ellipe

from famseg.biometrics import (
    MIN_AREA,
    doubts,
    ellipse_circumference,
    femur_length,
    fit_femur,
    fit_head,
    head_circumference,
)
from famseg.data.hc18 import HC18
from famseg.data.phantom import Phantom

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


def exact_perimeter(a: float, b: float) -> float:
    return 4 * a * float(ellipe(1 - (b / a) ** 2))


def along(size: int, x: float, y: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a direction, of every pixel centre of a (size, size) image."""
    rows, columns = np.mgrid[:size, :size]
    dx, dy = columns - x, rows - y
    return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)


def ellipse(size: int, x: float, y: float, a: float, b: float, angle: float) -> np.ndarray:
    u, v = along(size, x, y, angle)
    return (u / a) ** 2 + (v / b) ** 2 <= 1


def bar(size: int, x: float, y: float, length: float, radius: float, angle: float) -> np.ndarray:
    """A bar with round ends, `length` from tip to tip."""
    u, v = along(size, x, y, angle)
    return np.hypot(np.maximum(np.abs(u) - (length / 2 - radius), 0), v) <= radius


def test_circumference_formula() -> None:
    for ratio in (1.0, 0.8, 0.6):
        assert ellipse_circumference(1.0, ratio) == pytest.approx(exact_perimeter(1.0, ratio), rel=1e-6)


@pytest.mark.parametrize(("low", "high", "spread"), [(8, 14, 0.5), (25, 60, 0.25), (60, 110, 0.2)])
def test_circumference_is_unbiased_on_rasterised_ellipses(low: int, high: int, spread: float) -> None:
    rng, errors = np.random.default_rng(0), []
    for _ in range(100):
        a = rng.uniform(low, high)
        b, angle = a * rng.uniform(0.65, 1.0), rng.uniform(0, np.pi)
        x, y = 1.2 * high + rng.uniform(-1, 1, 2)
        mask = ellipse(int(2.4 * high), x, y, a, b, angle)
        errors.append(head_circumference(mask, 1.0) - exact_perimeter(a, b))
    assert abs(np.mean(errors)) < 0.1
    assert np.std(errors) < spread


@pytest.mark.parametrize("radius", [1.5, 2.5, 4, 7])
def test_length_is_unbiased_on_rasterised_bars(radius: float) -> None:
    rng, errors = np.random.default_rng(0), []
    for _ in range(100):
        length, angle = rng.uniform(25, 110), rng.uniform(0, np.pi)
        x, y = 64 + rng.uniform(-1, 1, 2)
        errors.append(femur_length(bar(128, x, y, length, radius, angle), 1.0) - length)
    assert abs(np.mean(errors)) < 0.25
    assert np.abs(errors).max() < 1.2


def test_millimetres_scale_with_the_pixel() -> None:
    head, femur = ellipse(100, 50, 50, 40, 30, 0.3), bar(100, 50, 50, 60, 4, 0.7)
    assert head_circumference(head, 0.25) == pytest.approx(head_circumference(head, 1.0) / 4)
    assert femur_length(femur, 0.25) == pytest.approx(femur_length(femur, 1.0) / 4)


def test_only_the_largest_component_counts_and_holes_do_not() -> None:
    head, femur = ellipse(120, 70, 60, 40, 30, 0.3), bar(120, 60, 60, 60, 4, 0.7)
    clean_head, clean_femur = head_circumference(head, 1.0), femur_length(femur, 1.0)
    head[60:70, 65:80] = False
    head[:6, :6] = femur[:6, :6] = True
    assert head_circumference(head, 1.0) == pytest.approx(clean_head)
    assert femur_length(femur, 1.0) == pytest.approx(clean_femur)


@pytest.mark.parametrize(("hidden", "tolerance"), [(0.1, 0.5), (0.3, 2.0)])
def test_a_head_cut_off_by_the_image_is_completed(hidden: float, tolerance: float) -> None:
    mask = ellipse(200, 100, 100, 80, 62, 0.4)
    columns = np.nonzero(mask.any(axis=0))[0]
    cut = mask[:, columns[0] + int(hidden * np.ptp(columns)) :]
    assert head_circumference(cut, 1.0) == pytest.approx(exact_perimeter(80, 62), abs=tolerance)


@pytest.mark.parametrize("measure", [head_circumference, femur_length])
def test_absent_or_tiny_is_none(measure) -> None:
    assert measure(np.zeros((40, 40), bool), 1.0) is None
    speck = np.zeros((40, 40), bool)
    speck[5, 5 : 5 + MIN_AREA - 1] = True
    assert measure(speck, 1.0) is None
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        measure(np.zeros((1, 40, 40), bool), 1.0)


def test_masks_without_an_ellipse_are_none() -> None:
    full = np.ones((40, 40), bool)
    assert head_circumference(full, 1.0) is None
    full[:, :10] = False  # a straight border
    assert head_circumference(full, 1.0) is None
    needle = np.zeros((60, 60), bool)
    needle[30, 5:50] = True
    assert head_circumference(needle, 1.0) is None
    assert femur_length(needle, 1.0) == pytest.approx(45, abs=1)


def test_phantom_masks_give_the_phantoms_millimetres() -> None:
    heads, femurs = [], []
    for sample in Phantom(40, (256, 256), seed=11):
        if sample.femur_length is not None and not on_edge(sample.mask == 1):
            measured = femur_length(sample.mask == 1, sample.pixel_size)
            femurs.append((measured - sample.femur_length) / sample.pixel_size)
        if sample.head_circumference is not None and not on_edge(sample.mask == 2):
            measured = head_circumference(sample.mask == 2, sample.pixel_size)
            heads.append((measured - sample.head_circumference) / sample.pixel_size)
    assert len(heads) > 10
    assert len(femurs) > 10
    for errors in (heads, femurs):
        assert np.median(np.abs(errors)) <= 1
    assert abs(np.mean(heads)) < 0.2
    assert abs(np.mean(femurs)) < 0.3


def on_edge(region: np.ndarray) -> bool:
    return bool(region[[0, -1]].any() or region[:, [0, -1]].any())


def test_hc18_masks_exceed_the_table_by_its_known_bias() -> None:
    """Filled annotations include their outline and lie outside the tabled ellipse: 1.45 ± 0.55 mm (798)."""
    if not (SHARED / "hc18_half").is_dir():
        pytest.skip(f"needs the HC18 images in {SHARED / 'hc18_half'}")
    data = HC18(SHARED / "hc18_half")
    errors = [
        head_circumference(sample.mask == 2, sample.pixel_size) - sample.head_circumference
        for sample in (data[i] for i in range(0, len(data), 10))
    ]
    assert np.mean(errors) == pytest.approx(1.45, abs=0.25)
    assert np.std(errors) < 0.8


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2, 1.57, 2.0, 3.0])
def test_the_fits_lie_where_the_shapes_are(angle: float) -> None:
    head = fit_head(ellipse(200, 90, 110, 70, 50, angle))
    assert (head.x, head.y, head.a, head.b) == pytest.approx((90, 110, 70, 50), abs=0.1)
    assert abs(np.sin(np.radians(head.degrees) - angle)) < 0.01
    femur = fit_femur(bar(200, 90, 110, 80, 5, angle))
    tips = sorted(
        [(90 - 40 * np.cos(angle), 110 - 40 * np.sin(angle)), (90 + 40 * np.cos(angle), 110 + 40 * np.sin(angle))]
    )
    found = sorted([femur.start, femur.end])
    np.testing.assert_allclose(found, tips, atol=1)


def test_doubts_are_raised_and_only_with_reason() -> None:
    good = ellipse(120, 60, 60, 40, 30, 0.3)
    assert doubts(good, fit_head(good)) == []
    cut = good[:, 25:]
    assert doubts(cut, fit_head(cut)) == ["cut off"]
    pieces = good.copy()
    pieces[5:35, 100:118] = True
    assert doubts(pieces, fit_head(pieces)) == ["in pieces"]
    dented = good & ~ellipse(120, 60, 95, 35, 22, 0.0)
    assert doubts(dented, fit_head(dented)) == ["not an ellipse"]
    femur, blob = bar(120, 60, 60, 60, 4, 0.7), ellipse(120, 60, 60, 20, 18, 0.0)
    assert doubts(femur, fit_femur(femur)) == []
    assert doubts(blob, fit_femur(blob)) == ["not a bar"]
