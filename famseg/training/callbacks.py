"""What a run tells while it goes: metrics.csv, TensorBoard, a line an epoch, a progress bar."""

from __future__ import annotations

import csv
import io
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from famseg.files.writing import write_atomic
from famseg.training.module import SegmentationModule


class MetricsTable(L.Callback):
    """One row an epoch: phase, learning rate, losses, validation IoU per class; rewritten after each epoch.

    The rows are part of every checkpoint, so that a resumed run neither repeats nor misses one.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        self.tensorboard = tensorboard
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0  # of training, over all sittings

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._started = time.perf_counter() - self.seconds
        if self.tensorboard is not None and trainer.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            # Hides what an interrupted sitting wrote beyond its last checkpoint.
            self._writer = SummaryWriter(str(self.tensorboard), purge_step=trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, SegmentationModule)
        phase = module.phase
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "phase": phase.optimizer,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for name in ("train_loss", "val_loss", "val_miou", *sorted(metrics)):
            if name in metrics:
                row[name] = metrics[name]
        self.rows.append(row)
        self.seconds = time.perf_counter() - self._started
        if trainer.is_global_zero:
            self.write()
            if self.tensorboard is not None:
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

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.tensorboard is not None and trainer.is_global_zero:
            self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.seconds = list(state_dict["rows"]), state_dict["seconds"]


class TimeLeft(L.Callback):
    """Guesses when the run ends, from how far it has come since this sitting began."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._started, self._from = time.perf_counter(), trainer.current_epoch

    def text(self, trainer: L.Trainer, epochs: float) -> str:
        """Hours, minutes and seconds from now to the last epoch, when `epochs` (fractional) are done."""
        assert trainer.max_epochs is not None
        done = epochs - self._from
        if done <= 0:
            return "?"
        seconds = (time.perf_counter() - self._started) * (trainer.max_epochs - epochs) / done
        return str(timedelta(seconds=round(max(seconds, 0))))


class EpochLine(L.Callback):
    """One line an epoch on standard output, so that a log without a terminal tells the story too."""

    def __init__(self, time_left: TimeLeft) -> None:
        self._time_left = time_left

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, SegmentationModule)
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        phase = module.phase
        scores = " ".join(f"{name} {metrics[f'val_iou_{name}']:.3f}" for name in ("FL", "FB"))
        print(
            f"epoch {trainer.current_epoch + 1:3d}/{trainer.max_epochs} {phase.optimizer:5} "
            f"loss {metrics['train_loss']:.4f} val {metrics['val_loss']:.4f} "
            f"mIoU {metrics['val_miou']:.3f} {scores} left {self._time_left.text(trainer, trainer.current_epoch + 1)}",
            flush=True,
        )


class ProgressBar(RichProgressBar):
    """Lightning's bar with the time left of the whole run and the training IoU of the epoch so far."""

    def __init__(self, time_left: TimeLeft, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._time_left = time_left

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, SegmentationModule)
        metrics = dict(super().get_metrics(trainer, pl_module))
        if trainer.training:
            metrics |= {f"IoU_{name}": iou for name, iou in pl_module.live_iou().items()}
            batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
            epochs = trainer.current_epoch + batches / max(trainer.num_training_batches, 1)
            metrics["left"] = self._time_left.text(trainer, epochs)
        return metrics


class StopOnTerminate(L.Callback):
    """SIGTERM ends the run as Ctrl-C does.

    Installed here and not earlier: Lightning puts a handler of its own before any other, which broadcasts to the other
    processes of a data-parallel run and waits for them, and so hangs where they have not been told.
    """

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            signal.signal(signal.SIGTERM, interrupt)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Signal handler: like Ctrl-C."""
    raise KeyboardInterrupt
