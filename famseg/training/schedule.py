"""Optimizer phases and learning rates: AdamW first, then SGD (FAMSeg section 3.4), fitted by Eq. 11–12."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

OPTIMIZERS = ("adamw", "adam", "sgd", "adadelta")
_WARMUP = 0.1  # part of a schedule, at most 3 epochs, over which the learning rate rises linearly
_STEPS = 10  # levels of the step decay


@dataclass(frozen=True)
class Phase:
    """`epochs` epochs with one optimizer, starting at epoch `start`.

    With `rates` or `limits` the phase has a schedule of its own; without, it shares that of its neighbours.
    """

    optimizer: str
    start: int
    epochs: int
    rates: tuple[float, float] | None = None  # at its beginning and its end; None: the run's
    limits: tuple[float, float] | None = None  # of Eq. 11–12, to which its rates are fitted

    @property
    def has_schedule(self) -> bool:
        return self.rates is not None or self.limits is not None


def parse_phases(text: str, total: int | None = None) -> list[Phase]:
    """ "adamw:150,sgd:50:lr=0.01..0.0001" → phases; `total` stretches them in proportion, each to at least one epoch.

    Each is OPTIMIZER:EPOCHS, then `:lr=FROM..TO` (or `:lr=RATE`) and `:limits=MIN..MAX`.

    Raises:
        ValueError: a malformed phase, an unknown optimizer, or fewer epochs than phases.
    """
    parsed = [_parse_phase(part.strip()) for part in text.split(",")]
    lengths = [phase.epochs for phase in parsed]
    if total is not None:
        if total < len(lengths):
            raise ValueError(f"epochs: expected at least {len(lengths)}, one a phase, got {total}")
        given = sum(lengths)
        bounds, done = [0], 0
        for i, epochs in enumerate(lengths):
            done += epochs
            left = len(lengths) - 1 - i
            bounds.append(min(max(round(done * total / given), bounds[-1] + 1), total - left))
        lengths = [b - a for a, b in pairwise(bounds)]
    phases: list[Phase] = []
    for phase, length in zip(parsed, lengths, strict=True):
        phases.append(dataclasses.replace(phase, start=total_epochs(phases), epochs=length))
    return phases


def _parse_phase(text: str) -> Phase:
    optimizer, count, *settings = text.split(":") if ":" in text else (text, "")
    digits = count.isascii() and count.isdecimal() and len(count) < 10
    if optimizer not in OPTIMIZERS or not digits or int(count) < 1:
        choices = ", ".join(OPTIMIZERS)
        raise ValueError(f"phases: expected OPTIMIZER:EPOCHS with optimizer {choices}, got {text!r}")
    if settings and optimizer == "adadelta":
        raise ValueError(f"phases: adadelta has no learning rate to set, got {text!r}")
    found: dict[str, tuple[float, float]] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        pair = _numbers(value)
        if name not in ("lr", "limits") or name in found or pair is None:
            raise ValueError(f"phases: expected lr=FROM..TO or limits=MIN..MAX after the epochs, got {text!r}")
        if name == "limits" and pair[0] > pair[1]:
            raise ValueError(f"phases: limits: expected the smaller one first, got {text!r}")
        if name == "lr" and pair[0] < pair[1]:
            raise ValueError(f"phases: lr: expected to fall, from the larger rate to the smaller one, got {text!r}")
        found[name] = pair
    return Phase(optimizer, 0, int(count), found.get("lr"), found.get("limits"))


def _numbers(text: str) -> tuple[float, float] | None:
    """ "0.01..0.0001" or "0.01" → two positive numbers; None for anything else."""
    try:
        numbers = [float(part) for part in text.split("..")]
    except ValueError:
        return None
    if len(numbers) > 2 or not all(0 < number < math.inf for number in numbers):
        return None
    return numbers[0], numbers[-1]


def format_phases(phases: Sequence[Phase]) -> str:
    """The text that `parse_phases` reads as these phases."""

    def setting(name: str, pair: tuple[float, float] | None) -> str:
        if pair is None:
            return ""
        return f":{name}={pair[0]!r}" + (f"..{pair[1]!r}" if pair[1] != pair[0] else "")

    return ",".join(
        f"{phase.optimizer}:{phase.epochs}{setting('lr', phase.rates)}{setting('limits', phase.limits)}"
        for phase in phases
    )


def total_epochs(phases: Sequence[Phase]) -> int:
    return sum(phase.epochs for phase in phases)


def phase_at(phases: Sequence[Phase], epoch: int) -> Phase:
    """The phase that `epoch` belongs to; the last one beyond the end."""
    return next((phase for phase in reversed(phases) if epoch >= phase.start), phases[0])


def decay_span(phases: Sequence[Phase], epoch: int, decay_epochs: int | None) -> tuple[int, int]:
    """First epoch and end of the schedule that `epoch` belongs to: of a phase, or of neighbours that share the run's.

    The schedule that goes on at `decay_epochs` ends there, or the last one where that is beyond the run.
    """
    at = phases.index(phase_at(phases, epoch))
    first = last = at
    if not phases[at].has_schedule:
        while first > 0 and not phases[first - 1].has_schedule:
            first -= 1
        while last + 1 < len(phases) and not phases[last + 1].has_schedule:
            last += 1
    start, end = phases[first].start, phases[last].start + phases[last].epochs
    if decay_epochs is not None and start < decay_epochs and (decay_epochs < end or last + 1 == len(phases)):
        end = decay_epochs
    return start, end


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
        return [*others, Phase("adadelta", last.start, last.epochs)]
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
    """The learning rate after `progress` (fractional) epochs of a schedule of `epochs` epochs.

    "constant": init_lr. The others begin with a short linear warm-up, then "cos": half a cosine from init_lr to min_lr;
    "step": ten equal factors to min_lr; "adadelta": constant (Adadelta itself, which then runs the last phase, has no
    learning rate to decay).
    """
    if decay == "constant":
        return init_lr
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
