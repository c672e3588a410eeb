"""Checkpoints that survive an interruption, and what a run may change when it continues from one.

A checkpoint is written after every epoch and holds all that the next epoch depends on: weights, the optimizer of the
current phase, averaged weights, the best score so far, the rows of metrics.csv. Order, augmentation and what the
network draws at random are functions of (seed, epoch), so they need no state: whatever the moment of an interruption,
the run continues from the beginning of the epoch that was interrupted.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import torch

from famseg.training.config import ConfigError, TrainConfig
from famseg.training.schedule import Phase, decay_span, format_phases, resized

# What a resumed run may do otherwise: where and how fast it computes, and when it ends.
_FREE = frozenset(
    {
        *("epochs", "phases", "decay_epochs", "patience", "out", "resume", "tensorboard", "workers", "cache"),
        *("device", "devices", "batch_size", "backend", "compile", "channels_last", "cuda_graph"),
    }
)


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the previous one is untouched."""


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write beside the target and rename: an interruption or a full disk leaves the previous checkpoint whole.

    Raises:
        CheckpointWriteError: the disk is full, or the folder cannot be written to.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # torch reports a failed write as RuntimeError, with the reason in its context.
        if isinstance(error, (OSError, RuntimeError)):
            reason = next((e.strerror for e in (error, error.__context__) if isinstance(e, OSError)), None)
            kept = "; the previous one is whole" if path.exists() else ""
            raise CheckpointWriteError(
                f"{path}: the checkpoint cannot be written ({reason or error}){kept}. "
                "Make room, then continue with --resume auto"
            ) from error
        raise


def checkpoint_to_resume(resume: str, out: str | None) -> Path | None:
    """The checkpoint that `--resume` means; None where "auto" finds a run without one, or no run at all.

    Raises:
        ConfigError: "auto" without `out`, or a checkpoint outside of `out`.
    """
    if resume == "auto":
        if out is None:
            raise ConfigError("resume: auto continues the run in --out; name the folder with --out")
        last = Path(out) / "checkpoints" / "last.ckpt"
        return last if last.exists() else None
    path = Path(resume)
    if path.parent.name != "checkpoints":
        raise ConfigError(f"resume: expected auto or RUN/checkpoints/NAME.ckpt, got {resume!r}")
    if out is not None and Path(out).resolve() != path.resolve().parent.parent:
        raise ConfigError(
            f"resume: {path} belongs to the run in {path.parent.parent}, --out is {out}; leave --out away, "
            "or copy the whole folder and continue the copy"
        )
    return path


def stored_config(settings: dict[str, Any], source: Path) -> TrainConfig:
    """The configuration that a run has written down. Raises ConfigError when it is not one of this version."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    try:
        return TrainConfig(**{name: value for name, value in settings.items() if name in known})
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"resume: the settings in {source} cannot be used: {error}") from error


def continued(
    config: TrainConfig, stored: TrainConfig, epochs_done: int, processes: int, stored_processes: int
) -> TrainConfig:
    """`config` as the continuation of a run: its phases with what `config` adds to them.

    `epochs` continues or cuts the last phase (and moves no earlier one). The decay under way ends where it was to end,
    and the rate is constant after it, unless `decay_epochs` says otherwise.

    Raises:
        ConfigError: a setting differs that the epochs done depend on; the message names it.
    """
    for field in dataclasses.fields(TrainConfig):
        new, old = getattr(config, field.name), getattr(stored, field.name)
        if field.name not in _FREE and new != old:
            raise ConfigError(
                f"{field.name}: the run to continue has {old!r}, got {new!r}; leave it away, or start anew in another "
                "--out"
            )
    batch, old_batch = config.batch_size * processes, stored.batch_size * stored_processes
    if batch != old_batch:
        raise ConfigError(
            f"batch_size: the run to continue has {old_batch} images a step ({stored.batch_size} a process), got "
            f"{batch} ({config.batch_size} in each of {processes}); batch_size x processes must stay {old_batch}"
        )
    before, after = stored.plan(), config.plan()
    if after == before:
        return dataclasses.replace(config, phases=stored.phases, epochs=stored.epochs)
    if config.epochs is not None and config.phases in (stored.phases, format_phases(before)):
        after = resized(before, config.epochs)
    decay_epochs = config.decay_epochs
    kept = _steps(after, epochs_done) == _steps(before, epochs_done)
    if kept and decay_epochs == stored.decay_epochs and config.decay != "constant":
        spans = _spans(before, epochs_done, decay_epochs)
        ends = [end for end in (decay_epochs, spans[-1][1]) if _spans(after, epochs_done, end) == spans]
        kept, decay_epochs = bool(ends), ends[0] if ends else None
    if not kept:
        raise ConfigError(
            f"phases: {epochs_done} epochs of {format_phases(before)} are done, which {format_phases(after)} does not "
            "continue; keep what is done and change what follows"
        )
    return dataclasses.replace(config, phases=format_phases(after), epochs=None, decay_epochs=decay_epochs)


def _steps(phases: list[Phase], epochs: int) -> list[tuple[object, ...]]:
    """What decides how each of the first `epochs` epochs steps, but for where its decay ends."""
    done = (phase for phase in phases for _ in range(phase.epochs))
    return [(phase.optimizer, phase.start, phase.rates, phase.limits) for phase in itertools.islice(done, epochs)]


def _spans(phases: list[Phase], epochs: int, decay_epochs: int | None) -> list[tuple[int, int]]:
    return [decay_span(phases, epoch, decay_epochs) for epoch in range(max(epochs, 1))]


class Checkpoints:
    """checkpoints/best.ckpt where the validation mIoU is the highest so far, checkpoints/last.ckpt after every epoch.

    `patience` epochs without a better score make a run stale; 0: never.
    """

    def __init__(self, folder: Path, patience: int) -> None:
        self.best = folder / "best.ckpt"
        self.last = folder / "last.ckpt"
        self.patience = patience
        self.best_score = -1.0
        self.best_epoch = -1

    def better(self, epoch: int, score: float) -> bool:
        """Whether the score of `epoch`, which counts from now on, is the highest so far."""
        if not score > self.best_score:
            return False
        self.best_score, self.best_epoch = score, epoch
        return True

    def stale(self, epoch: int) -> bool:
        """Whether the run is to stop after `epoch`."""
        return 0 < self.patience <= epoch - self.best_epoch and self.best_epoch >= 0

    def state(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        self.best_score, self.best_epoch = state["best_score"], state["best_epoch"]
