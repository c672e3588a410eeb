"""The training loss: cross-entropy plus soft Dice."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy + (1 − mean soft Dice of the objects in the batch), in fp32.

    Background has no Dice term: it is nearly 1 from the start and would take a third of the femur's weight. Neither
    has a class that no image of the batch contains; cross-entropy alone speaks against its false alarms.

    The Dice of a class is taken over the whole batch: a femur covers 1 % of the pixels, and an image without one
    would make its own Dice 0/0.

    Args:
        logits: (N, classes, H, W).
        target: (N, H, W) int64 labels.
    """
    logits = logits.float()
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    probability = logits.softmax(1)
    overlap = (probability * truth).sum((0, 2, 3))
    size = (probability + truth).sum((0, 2, 3))
    present = (truth.sum((0, 2, 3)) > 0)[1:].to(logits.dtype)
    missing = 1.0 - (2 * overlap[1:] + 1.0) / (size[1:] + 1.0)
    return F.cross_entropy(logits, target) + (missing * present).sum() / present.sum().clamp(min=1.0)
