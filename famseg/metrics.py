"""Overlap from one confusion matrix over the whole set; boundary distances and jaggedness of one mask.

A measure says what it measured and nothing about what is not there: where a mask is empty it raises or is NaN, and
the policy for missed and invented objects is written down once, in `famseg.evaluation`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import cv2
import numpy as np
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

# Jaggedness counts what a border does on arcs shorter than this many pixels. The teeth of an enlarged label map are as
# long as its stride, 2 to 8 px in practice; anatomy bends more slowly.
SMOOTH_WAVELENGTH = 16.0
_MIN_BORDER = 16  # pixels; a shorter border is all corners


class Scores(TypedDict):
    """Fractions in [0, 1], or NaN where nothing can be said."""

    iou: list[float]  # per class, TP / (TP + FP + FN)
    dice: list[float]  # per class, 2 TP / (2 TP + FP + FN)
    accuracy: list[float]  # per class, TP / (TP + FN): the part of the class that was found; NaN where never true
    miou: float  # means over the classes that occur, background included as in the paper's tables
    mdice: float
    pixel_accuracy: float


class SegmentationMetrics:
    """Accumulates a confusion matrix of pixels and derives IoU, Dice and accuracy from its sums.

    One matrix over all images, not a mean over batches: the result does not depend on the batch size, and an
    image without a femur cannot turn the femur's score into 0/0.

    A class that occurs in neither truth nor prediction has no IoU: it is NaN and left out of the means. Zero
    would punish a correct empty answer, one would reward a data set that lacks the class. A class that is
    predicted but never true scores 0 and counts.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes: expected 2 or more, found {num_classes}")
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        # (truth, prediction); int64 holds 9e18 pixels.
        self.confusion = torch.zeros((self.num_classes, self.num_classes), dtype=torch.int64)

    def update(self, pred: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray) -> None:
        """Add labels of equal shape, (H, W) or (N, H, W), any integer dtype; on a GPU they are counted there.

        Raises:
            TypeError: the labels are not integers.
            ValueError: the shapes differ, or a label is outside 0..num_classes-1.
        """
        pred, target = _labels(pred, "pred"), _labels(target, "target")
        if pred.shape != target.shape:
            raise ValueError(
                f"pred and target: expected equal shapes, found {tuple(pred.shape)}, {tuple(target.shape)}"
            )
        if pred.numel() == 0:
            return
        for name, labels in (("pred", pred), ("target", target)):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"{name}: expected labels 0 to {self.num_classes - 1}, found {low} to {high}")
        cells = target.flatten() * self.num_classes + pred.to(target.device).flatten()
        # bincount without weights counts in integers, so it is exact and deterministic on every device.
        counts = torch.bincount(cells, minlength=self.num_classes**2)
        self.confusion += counts.reshape(self.num_classes, self.num_classes).cpu()

    def compute(self) -> Scores:
        """All metrics of everything seen so far."""
        matrix = self.confusion.tolist()
        hits = [matrix[c][c] for c in range(self.num_classes)]
        truth = [sum(row) for row in matrix]
        found = [sum(column) for column in zip(*matrix, strict=True)]
        iou = [_ratio(hit, t + f - hit) for hit, t, f in zip(hits, truth, found, strict=True)]
        dice = [_ratio(2 * hit, t + f) for hit, t, f in zip(hits, truth, found, strict=True)]
        return {
            "iou": iou,
            "dice": dice,
            "accuracy": [_ratio(hit, t) for hit, t in zip(hits, truth, strict=True)],
            "miou": _mean(iou),
            "mdice": _mean(dice),
            "pixel_accuracy": _ratio(sum(hits), sum(truth)),
        }


class BoundaryDistances(NamedTuple):
    """Distances between two borders, in pixels."""

    hd95: float  # the larger of the two directed 95th percentiles (Hausdorff distance without its outliers)
    assd: float  # average symmetric surface distance: the mean over both borders' pixels


def boundary_distances(pred: np.ndarray, target: np.ndarray) -> BoundaryDistances:
    """HD95 and ASSD of two masks (H, W), in pixels; times the pixel size they are millimetres.

    The border of a mask are its pixels with a 4-neighbour outside; outside the image counts as outside.

    Raises:
        ValueError: the shapes differ, or a mask is empty: there is no distance to nothing.
    """
    pred, target = np.asarray(pred, bool), np.asarray(target, bool)
    if pred.shape != target.shape or pred.ndim != 2:
        raise ValueError(f"pred and target: expected one shape (H, W), found {pred.shape}, {target.shape}")
    if not (pred.any() and target.any()):
        raise ValueError("pred and target: expected objects in both, found an empty mask; decide what a miss costs")
    first, second = (np.argwhere(mask & ~binary_erosion(mask)) for mask in (pred, target))
    there, back = KDTree(second).query(first)[0], KDTree(first).query(second)[0]
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return BoundaryDistances(float(hd95), float(np.concatenate([there, back]).mean()))


def jaggedness(mask: np.ndarray) -> float:
    """Length of a mask's outer borders over their length without detail finer than `SMOOTH_WAVELENGTH`.

    The paper claims to reduce a "jagged effect" and gives no measure of it. This one takes each outer border as a
    closed polygon through its pixels, resampled at equal steps of arc length, and damps the harmonics whose
    wavelength along the border is below 16 px (Butterworth gain 1 / (1 + (16 px / wavelength)⁴), which leaves a head
    or a femur as it is). A smooth shape on a pixel grid scores about 1.06 (the grid's own steps, up to 1.08 by
    angle); labels enlarged 2, 4, 8 times score 1.16, 1.20, 1.13. Compare with the truth's value on the same image.

    Args:
        mask: non-zero inside; (H, W).

    Returns:
        1 or more; NaN where no border is long enough to say anything.
    """
    contours, _ = cv2.findContours((np.asarray(mask) != 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    rough = smooth = 0.0
    for contour in contours:
        points = contour[:, 0].astype(np.float64)
        length, around = _smoothed(points)
        if length >= _MIN_BORDER:
            rough += length
            smooth += around
    return rough / smooth if smooth else math.nan


def _smoothed(points: np.ndarray) -> tuple[float, float]:
    """Length of a closed polygon (K, 2), and its length without short waves."""
    closed = np.concatenate([points, points[:1]])
    steps = np.hypot(*np.diff(closed, axis=0).T)
    length = float(steps.sum())
    if length < _MIN_BORDER:
        return length, length
    count = 4 * math.ceil(length)  # four samples a pixel: the polygon's own corners survive the resampling
    at = np.linspace(0, length, count, endpoint=False)
    arc = np.concatenate([[0.0], np.cumsum(steps)])
    curve = np.interp(at, arc, closed[:, 0]) + 1j * np.interp(at, arc, closed[:, 1])
    frequency = np.fft.fftfreq(count, length / count)  # waves a pixel
    gain = 1 / (1 + (SMOOTH_WAVELENGTH * frequency) ** 4)
    filtered = np.fft.ifft(np.fft.fft(curve) * gain)
    return length, float(np.abs(np.diff(filtered, append=filtered[:1])).sum())


def _labels(labels: torch.Tensor | np.ndarray, name: str) -> torch.Tensor:
    tensor = torch.as_tensor(labels)
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: expected integer labels, found {tensor.dtype}; take the argmax first")
    return tensor.to(torch.int64)


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _mean(values: list[float]) -> float:
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan
