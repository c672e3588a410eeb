"""Optimizer phases and learning rates: AdamW first, then SGD (FAMSeg section 3.4), fitted by Eq. 11–12."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

OPTIMIZERS = ("adamw", "adam", "sgd")
_WARMUP = 0.1  # part of the run, at most 3 epochs, over which the learning rate rises linearly
_STEPS = 10  # levels of the step decay


@dataclass(frozen=True)
class Phase:
    """`epochs` epochs with one optimizer, starting at epoch `start`."""

    optimizer: str
    start: int
    epochs: int


def parse_phases(text: str, total: int | None = None) -> list[Phase]:
    """ "adamw:150,sgd:50" → phases; `total` stretches them in proportion, each to at least one epoch.

    Raises:
        ValueError: a malformed phase, an unknown optimizer, or fewer epochs than phases.
    """
    parsed: list[tuple[str, int]] = []
    for part in text.split(","):
        optimizer, _, count = part.strip().partition(":")
        if optimizer not in OPTIMIZERS or not count.isdecimal() or int(count) < 1:
            choices = ", ".join(OPTIMIZERS)
            raise ValueError(f"phases: expected OPTIMIZER:EPOCHS with optimizer {choices}, got {part.strip()!r}")
        parsed.append((optimizer, int(count)))
    if total is not None:
        if total < len(parsed):
            raise ValueError(f"epochs: expected at least {len(parsed)}, one a phase, got {total}")
        given = sum(epochs for _, epochs in parsed)
        bounds, done = [0], 0
        for i, (_, epochs) in enumerate(parsed):
            done += epochs
            left = len(parsed) - 1 - i
            bounds.append(min(max(round(done * total / given), bounds[-1] + 1), total - left))
        parsed = [(name, b - a) for (name, _), (a, b) in zip(parsed, pairwise(bounds), strict=True)]
    phases: list[Phase] = []
    for optimizer, length in parsed:
        phases.append(Phase(optimizer, phases[-1].start + phases[-1].epochs if phases else 0, length))
    return phases


def phase_at(phases: list[Phase], epoch: int) -> Phase:
    """The phase that `epoch` belongs to; the last one beyond the end."""
    return next((phase for phase in reversed(phases) if epoch >= phase.start), phases[0])


def fit_learning_rates(
    batch_size: int, init_lr: float, min_lr: float, limit_min: float, limit_max: float
) -> tuple[float, float]:
    """Eq. 11 and Eq. 12: initial and minimal learning rate in proportion to batch size / 64, between the limits."""
    scale = batch_size / 64
    init_fit = min(max(scale * init_lr, limit_min), limit_max)
    min_fit = min(max(scale * min_lr, limit_min / 100), limit_max / 100)
    return init_fit, min_fit


def learning_rate(progress: float, epochs: int, decay: str, init_lr: float, min_lr: float) -> float:
    """The learning rate after `progress` (fractional) epochs of a run of `epochs` epochs.

    A short linear warm-up, then "cos": half a cosine from init_lr to min_lr; "step": ten equal factors to min_lr.
    One decay spans all phases: SGD takes over at the low end, to fine-tune (section 3.4) and not to start anew.
    """
    warmup = min(_WARMUP * epochs, 3.0)
    if progress < warmup:
        return min_lr + (init_lr - min_lr) * progress / warmup
    done = min((progress - warmup) / max(epochs - warmup, 1e-9), 1.0)
    if decay == "cos":
        return min_lr + (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    level = min(int(done * _STEPS), _STEPS - 1)
    return init_lr * (min_lr / init_lr) ** (level / (_STEPS - 1))
