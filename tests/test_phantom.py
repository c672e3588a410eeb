"""The phantom must be reproducible, and its stated truth must agree with its masks."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from famseg.data.phantom import Phantom, ellipse_perimeter
from famseg.data.phantom.pose import draw_pose
from famseg.data.phantom.samples import draw_mask, pixel_grid
from famseg.data.phantom.scanner import form_echo
from famseg.data.phantom.shapes import Bar
from famseg.data.sample import Sample

SIZE = (128, 128)
COUNT = 240


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(Phantom(COUNT, SIZE, seed=7))


def _assert_same(a: Sample, b: Sample) -> None:
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.mask, b.mask)
    assert (a.name, a.subject, a.pixel_size) == (b.name, b.subject, b.pixel_size)
    assert (a.femur_length, a.head_circumference) == (b.femur_length, b.head_circumference)


def test_same_bytes_whatever_the_instance_order_or_length(samples):
    other = Phantom(20, SIZE, seed=7)
    for index in (19, 3, 11, 3, 0):
        _assert_same(other[index], samples[index])


def test_seeds_and_indices_differ(samples):
    other = Phantom(8, SIZE, seed=8)
    images = [s.image.tobytes() for s in samples] + [other[i].image.tobytes() for i in range(8)]
    assert len(set(images)) == len(images)
    assert len({s.name for s in samples} | {other[i].name for i in range(8)}) == COUNT + 8


def test_index_protocol():
    data = Phantom(5, SIZE)
    assert len(data) == 5
    _assert_same(data[-1], data[4])
    _assert_same(data[np.int64(2)], data[2])
    for index in (5, -6):
        with pytest.raises(IndexError):
            data[index]
    with pytest.raises(TypeError):
        data[1.5]


def test_types_and_labels(samples):
    for s in samples:
        assert s.image.dtype == s.mask.dtype == np.uint8
        assert s.image.shape == s.mask.shape == SIZE
        expected = {0} | ({1} if s.femur_length else set()) | ({2} if s.head_circumference else set())
        assert set(np.unique(s.mask)) == expected
        assert len(expected) > 1
        assert type(s.pixel_size) is float
        assert s.image.max() > 60 and s.image.std() > 5.0


def test_images_are_not_square_only():
    s = Phantom(3, (96, 160), seed=1)[2]
    assert s.image.shape == s.mask.shape == (96, 160)


@pytest.mark.parametrize("index", range(6))
def test_size_changes_the_sampling_not_the_scene(index):
    small, large = Phantom(6, (128, 128))[index], Phantom(6, (256, 256))[index]
    assert small.femur_length == large.femur_length
    assert small.head_circumference == large.head_circumference
    assert small.pixel_size == pytest.approx(2.0 * large.pixel_size)
    for label in (1, 2):
        area = np.count_nonzero(large.mask == label)
        assert 4 * np.count_nonzero(small.mask == label) == pytest.approx(area, rel=0.08)
    shrunk = cv2.resize(large.image, (128, 128), interpolation=cv2.INTER_AREA)
    blurred = [cv2.GaussianBlur(i.astype(np.float32), (0, 0), 4).ravel() for i in (shrunk, small.image)]
    assert np.corrcoef(*blurred)[0, 1] > 0.9


def test_view_mix(samples):
    head = np.array([s.head_circumference is not None for s in samples])
    femur = np.array([s.femur_length is not None for s in samples])
    assert np.mean(head & ~femur) == pytest.approx(0.4, abs=0.1)
    assert np.mean(femur & ~head) == pytest.approx(0.4, abs=0.1)
    assert np.mean(femur & head) == pytest.approx(0.2, abs=0.1)


def test_physical_ranges(samples):
    for s in samples:
        assert 40.0 < s.pixel_size * SIZE[0] < 260.0
        if s.head_circumference is not None:
            assert 70.0 <= s.head_circumference <= 330.0 + 1e-6
        if s.femur_length is not None:
            assert 12.0 <= s.femur_length <= 75.0
            assert 0.19 < s.femur_length / (s.pixel_size * SIZE[1]) < 0.46
            # Largest inscribed circle: the bar is some four pixels thick.
            assert cv2.distanceTransform((s.mask == 1).astype(np.uint8), cv2.DIST_L2, 5).max() >= 2.0


def _outline(mask: np.ndarray) -> np.ndarray:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    assert len(contours) == 1
    return contours[0]


def test_head_circumference_agrees_with_the_mask(samples):
    whole = [s for s in samples if s.head_circumference is not None]
    errors = []
    for s in whole:
        # A femur shares no pixel with the head, so the head's own pixels are the whole ellipse.
        _, (d1, d2), _ = cv2.fitEllipse(_outline(s.mask == 2))
        # The contour runs through pixel centres, half a pixel inside the border on either side.
        fitted = ellipse_perimeter(0.5 * (d1 + 1.0), 0.5 * (d2 + 1.0)) * s.pixel_size
        errors.append(fitted / s.head_circumference - 1.0)
    assert len(whole) > 50
    assert np.max(np.abs(errors)) < 0.015
    assert abs(np.mean(errors)) < 0.004


def test_femur_length_agrees_with_the_mask(samples):
    errors = []
    for s in samples:
        if s.femur_length is None:
            continue
        points = np.argwhere(s.mask == 1)
        extent = pdist(points[ConvexHull(points).vertices]).max() + 1.0  # from pixel centres to borders
        errors.append(extent - s.femur_length / s.pixel_size)
    assert len(errors) > 50
    assert np.max(np.abs(errors)) < 1.5
    assert abs(np.mean(errors)) < 0.6


def test_tips_are_the_farthest_points_of_the_bar():
    for sagitta in (-0.045, 0.0, 0.045):
        for flare in (0.05, 0.4):
            bar = Bar(0.0, 0.0, 20.0, 2.0, 0.5, sagitta, flare)
            step = 0.05
            axis = np.arange(-22.0, 22.0, step)
            x, y = np.meshgrid(axis, axis)
            points = np.argwhere(bar.inside(x, y)) * step
            assert pdist(points[ConvexHull(points).vertices]).max() == pytest.approx(40.0, abs=0.1)


def test_anatomy_lies_inside_the_field_of_view():
    for index in range(100):
        rng = np.random.Generator(np.random.PCG64(index))
        pose = draw_pose(rng)
        x, y = pixel_grid(SIZE, pose.view / SIZE[0])
        mask = draw_mask(pose, x, y)
        r, theta = pose.fan.polar(x, y)
        fan = (r >= pose.fan.near) & (r <= pose.fan.far) & (np.abs(theta) <= pose.fan.half_angle)
        assert not np.any(mask.astype(bool) & ~fan)
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def test_outside_of_the_fan_is_black():
    data = Phantom(30, SIZE, seed=3)
    black = [np.mean(data[i].image == 0) for i in range(30)]
    assert np.median(black) > 0.05


def test_anatomy_is_visible(samples):
    """Bone must stand out from what surrounds it, or the label would be a guess."""
    contrast = []
    for s in samples:
        if s.femur_length is not None:
            bone = (s.mask == 1).astype(np.uint8)
            around = cv2.dilate(bone, np.ones((13, 13), np.uint8)) - cv2.dilate(bone, np.ones((5, 5), np.uint8))
            contrast.append(float(s.image[bone > 0].mean()) - float(s.image[around > 0].mean()))
    assert np.median(contrast) > 60.0
    assert np.mean(np.array(contrast) > 15.0) > 0.95


def _envelope(coherent: float) -> np.ndarray:
    rows, beams = 700, 700
    return form_echo(
        diffuse=np.ones((rows, beams), np.float32),
        coherent=np.full((rows, beams), coherent, np.float32),
        axial_sigma=1.2,
        lateral_sigma=np.linspace(1.5, 2.5, rows),
        rng=np.random.default_rng(5),
    )


def test_fully_developed_speckle_is_rayleigh():
    envelope = _envelope(0.0)
    assert envelope.mean() / envelope.std() == pytest.approx(math.sqrt(math.pi / (4.0 - math.pi)), abs=0.03)
    assert np.mean(envelope**2) == pytest.approx(1.0, abs=0.03)  # the PSF keeps the scattered power
    shares = np.mean(envelope[..., None] > np.sqrt([0.1, 1.0, 3.0]), axis=(0, 1))
    assert shares == pytest.approx(np.exp([-0.1, -1.0, -3.0]), abs=0.015)


def test_specular_echo_is_hardly_broken_up():
    envelope = _envelope(5.0)
    assert envelope.mean() / envelope.std() > 6.0


def test_speckle_is_wider_than_long_and_widens_with_depth():
    envelope = _envelope(0.0)

    def correlation(part: np.ndarray, axis: int) -> float:
        centred = part - part.mean()
        return float(np.mean(centred * np.roll(centred, 2, axis)) / part.var())

    shallow, deep = envelope[:200], envelope[-200:]
    assert correlation(shallow, 1) > correlation(shallow, 0)
    assert correlation(deep, 1) > correlation(shallow, 1) + 0.05


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (50.0, 38.0), (38.0, 50.0)])
def test_ellipse_perimeter(a, b):
    t = np.linspace(0.0, 2.0 * np.pi, 200001)
    polygon = np.hypot(np.diff(a * np.cos(t)), np.diff(b * np.sin(t))).sum()
    assert ellipse_perimeter(a, b) == pytest.approx(polygon, rel=1e-8)
