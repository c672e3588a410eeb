"""The training loss, in two halves: sums over pixels, and the loss of those sums.

The Dice of a class is a ratio of sums over the whole batch, so a mean of the losses of a batch's parts is not the loss
of the batch. Sums can be added over the processes of a data-parallel run, and the loss is then the whole batch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg.data.dataset import OPEN

TERMS = ("ce", "focal", "dice", "edge")
_FOCUS = 2.0  # exponent of the focal loss, as Lin et al. 2017


def parse_loss(text: str) -> tuple[str, ...]:
    """ "ce+dice" → its terms. Raises ValueError for an unknown or repeated term."""
    terms = tuple(text.split("+"))
    if not set(terms) <= set(TERMS) or len(set(terms)) != len(terms):
        raise ValueError(f"loss: expected some of {', '.join(TERMS)} joined by +, got {text!r}")
    return terms


def parse_class_weights(text: str, names: Sequence[str]) -> list[float] | None:
    """Numbers joined by commas, one a class; None for "none" and "balanced". Raises ValueError for anything else.

    Args:
        names: of the classes, background first.
    """
    if text in ("none", "balanced"):
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    usable = all(weight == 0 or 1e-6 <= weight <= 1e6 for weight in weights)  # sums over pixels stay fp32 numbers
    if len(weights) != len(names) or not usable or not any(weights):
        raise ValueError(
            f"class_weights: expected none, balanced, or {len(names)} numbers (0, or 1e-6 to 1e6) joined by commas "
            f"({', '.join(names)}), got {text!r}"
        )
    return weights


def _closed(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and target without what an image does not label: its classes' probability is the background's."""
    is_open = target >= OPEN
    bits = torch.where(is_open, target - OPEN, 0).amax((1, 2))
    labels = torch.arange(logits.shape[1], device=logits.device)
    unlabelled = ((bits[:, None] >> labels) & 1).bool()[:, :, None, None]
    background = unlabelled | (labels == 0)[None, :, None, None]
    merged = logits.masked_fill(~background, -torch.inf).logsumexp(1, keepdim=True)
    rest = logits.masked_fill(unlabelled, -torch.inf)[:, 1:]
    return torch.cat([merged, rest], 1), torch.where(is_open, 0, target)


def settled(labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Labels found and true ones, (N, H, W), both background where the image says nothing of the class found."""
    is_open = target >= OPEN
    bits = torch.where(is_open, target - OPEN, 0)
    unknown = ((bits >> labels) & 1).bool()
    return labels.masked_fill(unknown, 0), torch.where(is_open, 0, target)


class SegmentationLoss(nn.Module):
    """The sum of some of these terms, in fp32:

    - ce: (weighted) mean cross-entropy of the pixels;
    - focal: the same with each pixel's term times (1 − p)², which fades what is right already (Lin et al. 2017);
    - dice: 1 − mean soft Dice of the objects in the batch. Background has no Dice term: it is nearly 1 from the start
      and would take a third of the femur's weight. Neither has a class that no image of the batch contains; the pixel
      terms alone speak against its false alarms. The Dice of a class is taken over the whole batch: a femur covers 1 %
      of the pixels, and an image without one would make its own Dice 0/0.
    - edge: mean cross-entropy of the pixels at the objects' outlines, those whose 3×3 neighbourhood holds another class
      (the joint loss of SC-UNeXt, whose paper does not define its edges).

    Args:
        terms: as "ce+dice".
        class_weights: one per class, of ce and focal; None: all 1.
        partly: masks may be open (`famseg.data.dataset.OPEN`): classes that an image does not label are left out of
            its loss. A pixel of its background is right as long as it is called background or one of those.
    """

    weight: Tensor | None

    def __init__(
        self, terms: str = "ce+dice", class_weights: Sequence[float] | None = None, partly: bool = False
    ) -> None:
        super().__init__()
        self.partly = partly
        self.terms = parse_loss(terms)
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)

    def sums(self, logits: Tensor, target: Tensor) -> Tensor:
        """What `value` needs of logits (N, C, H, W) and target (N, H, W) int64, as one fp32 vector that adds up."""
        logits = logits.float()
        if self.partly:
            logits, target = _closed(logits, target)
        parts = []
        if self.weight is None:
            parts.append(logits.new_full((1,), target.numel()))
        else:
            parts.append(self.weight[target].sum().reshape(1))
        if "ce" in self.terms:
            parts.append(F.cross_entropy(logits, target, self.weight, reduction="sum").reshape(1))
        if "focal" in self.terms:
            entropy = F.cross_entropy(logits, target, reduction="none")
            focal = -torch.expm1(-entropy)  # 1 − p of the true class
            weight = 1.0 if self.weight is None else self.weight[target]
            parts.append((weight * focal**_FOCUS * entropy).sum().reshape(1))
        if "dice" in self.terms:
            # Not one_hot: its int64 is the largest tensor of a training step.
            classes = torch.arange(logits.shape[1], device=target.device)
            truth = (target[:, None] == classes[:, None, None]).to(logits.dtype)
            probability = logits.softmax(1)
            parts.append((probability * truth).sum((0, 2, 3)))
            parts.append((probability + truth).sum((0, 2, 3)))
            parts.append(truth.sum((0, 2, 3)))
        if "edge" in self.terms:
            labels = target[:, None].float()
            edge = (F.max_pool2d(labels, 3, 1, 1) != -F.max_pool2d(-labels, 3, 1, 1))[:, 0]
            entropy = F.cross_entropy(logits, target, reduction="none")
            parts.append(torch.stack([(entropy * edge).sum(), edge.sum().to(entropy.dtype)]))
        return torch.cat(parts)

    def value(self, sums: Tensor) -> Tensor:
        """The loss of all the pixels in `sums`."""
        pixels, rest = sums[0], sums[1:]
        loss = sums.new_zeros(())
        for term in ("ce", "focal"):
            if term in self.terms:
                # The weights of all pixels are 0 where a batch has only classes of weight 0.
                loss, rest = loss + rest[0] / pixels.clamp(min=1e-12), rest[1:]
        if "dice" in self.terms:
            classes = len(rest) // 3  # "edge" has two sums more
            overlap, size, truth = rest[: 3 * classes].chunk(3)
            rest = rest[3 * classes :]
            present = (truth > 0)[1:].to(sums.dtype)
            missing = 1.0 - (2 * overlap[1:] + 1.0) / (size[1:] + 1.0)
            loss = loss + (missing * present).sum() / present.sum().clamp(min=1.0)
        if "edge" in self.terms:
            loss = loss + rest[0] / rest[1].clamp(min=1.0)
        return loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.value(self.sums(logits, target))
