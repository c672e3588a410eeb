"""Overlap and boundary measures against independent implementations and their own definitions."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import ConfusionMatrixMetric, compute_average_surface_distance, compute_hausdorff_distance
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassRecall,
)

from famseg.metrics import SegmentationMetrics, boundary_distances, jaggedness


def masks(seed: int, shape: tuple[int, ...], classes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random truth from `classes`, and a prediction that agrees with about 70 % of it."""
    rng = np.random.default_rng(seed)
    truth, guess = rng.choice(classes, shape), rng.choice(classes, shape)
    return torch.from_numpy(np.where(rng.random(shape) < 0.7, truth, guess)), torch.from_numpy(truth)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    classes=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
)
def test_agrees_with_torchmetrics(seed: int, shape: tuple[int, ...], classes: list[int]) -> None:
    pred, truth = masks(seed, shape, classes)
    metrics = SegmentationMetrics(3)
    metrics.update(pred, truth)
    ours = metrics.compute()
    occurs = [bool(((pred == c) | (truth == c)).any()) for c in range(3)]
    for key, oracle in (("iou", MulticlassJaccardIndex), ("dice", MulticlassF1Score)):
        theirs = oracle(num_classes=3, average="none")(pred, truth)
        for c in range(3):
            if occurs[c]:
                assert ours[key][c] == pytest.approx(float(theirs[c]), abs=1e-6)
            else:
                assert math.isnan(ours[key][c])
        mean = np.mean([float(value) for value, here in zip(theirs, occurs, strict=True) if here])
        assert ours["m" + key] == pytest.approx(mean, abs=1e-6)
    accuracy = MulticlassAccuracy(num_classes=3, average="micro")(pred, truth)
    assert ours["pixel_accuracy"] == pytest.approx(float(accuracy), abs=1e-6)


def test_agrees_with_monai() -> None:
    pred, truth = masks(0, (4, 20, 30), [0, 1, 2])
    metrics = SegmentationMetrics(3)
    metrics.update(pred, truth)
    oracle = ConfusionMatrixMetric(metric_name=["threat score", "f1 score"], reduction="none")
    # monai reduces images itself; as one tall image, its counts are those of the whole set.
    one_hot = [torch.nn.functional.one_hot(m.reshape(1, -1, 30), 3).movedim(-1, 1) for m in (pred, truth)]
    oracle(*one_hot)
    iou, dice = oracle.aggregate()
    assert metrics.compute()["iou"] == pytest.approx(iou[0].tolist(), abs=1e-6)
    assert metrics.compute()["dice"] == pytest.approx(dice[0].tolist(), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), cut=st.integers(1, 7))
def test_batching_changes_nothing(seed: int, cut: int) -> None:
    pred, truth = masks(seed, (8, 6, 5), [0, 1, 2])
    whole, parts = SegmentationMetrics(3), SegmentationMetrics(3)
    whole.update(pred, truth)
    parts.update(pred[:cut], truth[:cut])
    parts.update(pred[cut:].numpy().astype(np.uint8), truth[cut:].numpy().astype(np.uint8))
    assert whole.compute() == parts.compute()


def test_absent_classes_are_nan_and_invented_ones_are_zero() -> None:
    truth = np.zeros((4, 4), np.uint8)
    metrics = SegmentationMetrics(3)
    metrics.update(truth, truth)
    result = metrics.compute()
    assert result["iou"][0] == result["miou"] == result["mdice"] == result["pixel_accuracy"] == 1
    assert math.isnan(result["iou"][1])
    assert math.isnan(result["dice"][2])
    invented = truth.copy()
    invented[0, 0] = 1
    metrics.update(invented, truth)
    result = metrics.compute()
    assert result["iou"][1] == 0
    assert result["miou"] == pytest.approx((31 / 32) / 2)
    assert math.isnan(result["iou"][2])


def test_nothing_seen_is_nan_and_reset_forgets() -> None:
    metrics = SegmentationMetrics(3)
    metrics.update(*masks(0, (5, 5), [0, 1]))
    metrics.update(np.zeros((0, 4, 4), int), np.zeros((0, 4, 4), int))
    assert metrics.confusion.sum() == 25
    metrics.reset()
    assert all(math.isnan(metrics.compute()[key]) for key in ("miou", "mdice", "pixel_accuracy"))


def test_wrong_arguments_are_refused() -> None:
    metrics, labels = SegmentationMetrics(3), torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"pred.*float32"):
        metrics.update(labels.float(), labels)
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.update(labels[:3], labels)
    with pytest.raises(ValueError, match="target: expected labels 0 to 2"):
        metrics.update(labels, labels + 3)
    with pytest.raises(ValueError, match="pred: expected labels 0 to 2"):
        metrics.update(labels - 1, labels)
    with pytest.raises(ValueError, match="num_classes"):
        SegmentationMetrics(1)


def test_class_accuracy_agrees_with_torchmetrics() -> None:
    pred, truth = masks(3, (30, 40), [0, 1, 2])
    metrics = SegmentationMetrics(3)
    metrics.update(pred, truth)
    theirs = MulticlassRecall(num_classes=3, average="none")(pred, truth)
    assert metrics.compute()["accuracy"] == pytest.approx(theirs.tolist(), abs=1e-6)


def blobs(seed: int, shape: tuple[int, int] = (40, 56)) -> np.ndarray:
    """A random mask of a few smooth pieces, some at the edge of the image."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), (0, 0), 4)
    return noise > np.quantile(noise, 0.7)


@pytest.mark.parametrize("seed", range(6))
def test_boundary_distances_agree_with_monai(seed: int) -> None:
    pred, truth = blobs(seed), blobs(seed + 100)
    found = boundary_distances(pred, truth)
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (pred, truth)]
    hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95)
    assd = compute_average_surface_distance(*pair, include_background=True, symmetric=True)
    assert found.hd95 == pytest.approx(float(hd95), abs=1e-4)
    assert found.assd == pytest.approx(float(assd), abs=1e-4)


def test_boundary_distances_of_a_shift_are_the_shift() -> None:
    mask = np.zeros((60, 60), bool)
    mask[20:40, 10:50] = True
    assert boundary_distances(mask, mask) == (0, 0)
    found = boundary_distances(np.roll(mask, 5, axis=0), mask)
    assert found.hd95 == 5
    assert 2 < found.assd < 5  # the short sides lie on each other
    for empty in ((mask, ~mask & mask), (~mask & mask, mask)):
        with pytest.raises(ValueError, match="empty mask"):
            boundary_distances(*empty)
    with pytest.raises(ValueError, match="one shape"):
        boundary_distances(mask, mask[1:])


def ellipse(size: int, a: float, b: float, angle: float, shift: float) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    dx, dy = columns - size / 2 - shift, rows - size / 2
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return (u / a) ** 2 + (v / b) ** 2 <= 1


@pytest.mark.parametrize(("a", "b"), [(100, 75), (50, 40), (20, 15)])
def test_jaggedness_sees_the_teeth_of_a_coarse_grid_and_not_the_shape(a: float, b: float) -> None:
    for k in range(4):
        angle, shift = 0.4 * k, 0.3 * k
        fine = jaggedness(ellipse(256, a, b, angle, shift))
        assert 1.04 < fine < 1.1
        for stride in (2, 4):
            coarse = ellipse(256 // stride, a / stride, b / stride, angle, shift / stride)
            assert jaggedness(np.kron(coarse, np.ones((stride, stride)))) > fine + 0.03


def test_jaggedness_of_known_teeth() -> None:
    """Teeth 2 px wide and 2 px high every 4 px on one side of a bar: each adds 2√2 px to the line of pixel centres."""
    bar = np.zeros((60, 420), np.uint8)
    bar[20:40, 10:410] = 1
    length = 2 * 399 + 2 * 19
    assert jaggedness(bar) == pytest.approx(1, abs=0.01)
    for start in range(10, 410, 4):
        bar[18:20, start : start + 2] = 1
    assert jaggedness(bar) == pytest.approx(1 + 100 * 2 * math.sqrt(2) / length, rel=0.02)


def test_jaggedness_of_nothing_is_nan() -> None:
    speck = np.zeros((20, 20), bool)
    assert math.isnan(jaggedness(speck))
    speck[4:7, 4:7] = True
    assert math.isnan(jaggedness(speck))
