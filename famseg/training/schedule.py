"""Optimizer phases and learning rates: AdamW first, then SGD (FAMSeg section 3.4), fitted by Eq. 11–12."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

OPTIMIZERS = ("adamw", "adam", "sgd", "adadelta")
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
        digits = count.isascii() and count.isdecimal() and len(count) < 10
        if optimizer not in OPTIMIZERS or not digits or int(count) < 1:
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
        phases.append(Phase(optimizer, total_epochs(phases), length))
    return phases


def format_phases(phases: Sequence[Phase]) -> str:
    """The text that `parse_phases` reads as these phases."""
    return ",".join(f"{phase.optimizer}:{phase.epochs}" for phase in phases)


def total_epochs(phases: Sequence[Phase]) -> int:
    return sum(phase.epochs for phase in phases)


def phase_at(phases: Sequence[Phase], epoch: int) -> Phase:
    """The phase that `epoch` belongs to; the last one beyond the end."""
    return next((phase for phase in reversed(phases) if epoch >= phase.start), phases[0])


def resized(phases: Sequence[Phase], total: int) -> list[Phase]:
    """The same run with `total` epochs: cut off there, or its last phase continued, so that no earlier epoch moves."""
    kept = [phase for phase in phases if phase.start < total]
    return [*kept[:-1], dataclasses.replace(kept[-1], epochs=total - kept[-1].start)]


def with_adadelta(phases: Sequence[Phase]) -> list[Phase]:
    """The paper's "Adadelta" column (Table 2), which it lists as a loss decay beside Step and COS.

    Adadelta (Zeiler 2012) is an optimizer that sets every parameter's step from the history of its gradients, so no
    schedule decays it. Section 4.4 speaks of "the AdamW and Adadelta combined optimization method", and the table's
    AdamW × Adadelta row carries the figures of the proposed method, which section 3.4 describes as AdamW and then
    another optimizer for the last quarter. So the column is read as that alternation: the row's optimizer at its
    constant fitted rate, then Adadelta in place of the last phase, or of the last quarter of a single one.
    """
    *others, last = phases
    if last.optimizer == "adadelta":
        return list(phases)
    if others:
        return [*others, dataclasses.replace(last, optimizer="adadelta")]
    quarter = max(round(last.epochs / 4), 1)
    if last.epochs == quarter:
        return [Phase("adadelta", last.start, quarter)]
    first = last.epochs - quarter
    return [dataclasses.replace(last, epochs=first), Phase("adadelta", last.start + first, quarter)]


def fit_learning_rates(
    batch_size: int, init_lr: float, min_lr: float, limit_min: float, limit_max: float
) -> tuple[float, float]:
    """Eq. 11 and Eq. 12: initial and minimal learning rate in proportion to batch size / 64, between the limits."""
    scale = batch_size / 64
    init_fit = min(max(scale * init_lr, limit_min), limit_max)
    min_fit = min(max(scale * min_lr, limit_min / 100), limit_max / 100)
    return init_fit, min_fit


def learning_rate(progress: float, epochs: int, decay: str, init_lr: float, min_lr: float) -> float:
    """The learning rate after `progress` (fractional) epochs of a decay over `epochs` epochs.

    A short linear warm-up, then "cos": half a cosine from init_lr to min_lr; "step": ten equal factors to min_lr;
    "adadelta": constant (Adadelta itself, which then runs the last phase, has no learning rate to decay).
    One decay spans all phases: SGD takes over at the low end, to fine-tune (section 3.4) and not to start anew.
    """
    warmup = min(_WARMUP * epochs, 3.0)
    if progress < warmup:
        return min_lr + (init_lr - min_lr) * progress / warmup
    if decay == "adadelta":
        return init_lr
    done = min((progress - warmup) / max(epochs - warmup, 1e-9), 1.0)
    if decay == "cos":
        return min_lr + (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    level = min(int(done * _STEPS), _STEPS - 1)
    return init_lr * (min_lr / init_lr) ** (level / (_STEPS - 1))
