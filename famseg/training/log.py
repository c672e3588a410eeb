"""What a run tells while it goes: metrics.csv, TensorBoard, a line an epoch, a progress bar."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from famseg.files.writing import write_atomic
from famseg.training.loop import Loop


class MetricsTable:
    """One row an epoch: phase, learning rate, losses, validation IoU per class; rewritten after each epoch.

    The rows are part of every checkpoint, so that a resumed run neither repeats nor misses one.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        self.tensorboard = tensorboard
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0  # of training, over all sittings
        self._started = time.perf_counter()
        self._writer: Any = None

    def add(self, row: dict[str, Any]) -> None:
        """Write a row more; numbers that are floats go to TensorBoard too."""
        self.rows.append(row)
        self.seconds = time.perf_counter() - self._started
        self.write()
        if self.tensorboard is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Hides what an interrupted sitting wrote beyond its last checkpoint.
            self._writer = SummaryWriter(str(self.tensorboard), purge_step=row["epoch"])
        for name, value in row.items():
            if isinstance(value, float):
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def write(self) -> None:
        """Write the rows so far."""
        if not self.rows:
            return
        text = io.StringIO()
        table = csv.DictWriter(text, self.rows[-1].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in self.rows)
        write_atomic(self.path, text.getvalue().encode())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def state(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rows, self.seconds = list(state["rows"]), state["seconds"]
        self._started = time.perf_counter() - self.seconds


class TimeLeft:
    """Guesses when the run ends, from how far it has come since this sitting began, after `done` of `total` epochs."""

    def __init__(self, done: int, total: int) -> None:
        self.total = total
        self._done = done
        self._started = time.perf_counter()

    def text(self, epochs: float) -> str:
        """Hours, minutes and seconds from now to the last epoch, when `epochs` (fractional) are done."""
        done = epochs - self._done
        if done <= 0:
            return "?"
        seconds = (time.perf_counter() - self._started) * (self.total - epochs) / done
        return str(timedelta(seconds=round(max(seconds, 0))))


def epoch_line(row: Mapping[str, Any], time_left: TimeLeft, objects: Sequence[str]) -> str:
    """A row of the table as a line with the IoU of `objects`, so that a log without a terminal tells the story too."""
    scores = " ".join(f"{name} {row[f'val_iou_{name}']:.3f}" for name in objects)
    return (
        f"epoch {row['epoch']:3d}/{time_left.total} {row['phase']:5} "
        f"loss {row['train_loss']:.4f} val {row['val_loss']:.4f} "
        f"mIoU {row['val_miou']:.3f} {scores} left {time_left.text(row['epoch'])}"
    )


class ProgressBar:
    """The steps of an epoch and of its validation on a terminal: time left of the whole run, scores of the epoch
    before, training IoU of the epoch so far."""

    def __init__(self, loop: Loop, time_left: TimeLeft, *, disable: bool) -> None:
        self.scores: Mapping[str, Any] = {}  # the last row of the table
        self._loop, self._time_left = loop, time_left
        self._every = 10 if loop.device.type == "cuda" else 1  # reading the IoU waits for the GPU
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
        )
        self._bar = Progress(*columns, disable=disable)
        self._task = self._bar.add_task("", total=len(loop.train_loader), words="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def trained(self, index: int) -> None:
        """Step `index` of an epoch is done."""
        steps = len(self._loop.train_loader)
        if self._bar.disable or ((index + 1) % self._every and index + 1 < steps):
            return
        numbers = {name: self.scores[name] for name in ("train_loss", "val_miou") if name in self.scores}
        numbers |= {f"IoU_{name}": iou for name, iou in self._loop.live_iou().items()}
        words = " ".join(f"{name} {number:.3f}" for name, number in numbers.items())
        left = self._time_left.text(self._loop.epoch + (index + 1) / steps)
        epoch = f"epoch {self._loop.epoch + 1}/{self._time_left.total}"
        self._bar.update(self._task, description=epoch, total=steps, completed=index + 1, words=f"{words} left {left}")

    def validated(self, index: int) -> None:
        """Step `index` of a validation is done."""
        if not self._bar.disable:
            steps = len(self._loop.val_loader)
            self._bar.update(self._task, description="validation", total=steps, completed=index + 1)
