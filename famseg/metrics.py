"""Overlap metrics from one confusion matrix over the whole set."""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np
import torch


class Scores(TypedDict):
    """Fractions in [0, 1], or NaN where nothing can be said."""

    iou: list[float]  # per class, TP / (TP + FP + FN)
    dice: list[float]  # per class, 2 TP / (2 TP + FP + FN)
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
            "miou": _mean(iou),
            "mdice": _mean(dice),
            "pixel_accuracy": _ratio(sum(hits), sum(truth)),
        }


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
