"""What a run leaves behind while it goes: metrics.csv and checkpoints, each written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from famseg.data.files import write_atomic
from famseg.training.module import SegmentationModule


class MetricsTable(L.Callback):
    """One row an epoch: phase, learning rate, losses, validation IoU per class; rewritten after each epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

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
        text = io.StringIO()
        table = csv.DictWriter(text, row.keys(), lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in self.rows)
        write_atomic(self.path, text.getvalue().encode())


class EpochLine(L.Callback):
    """One line an epoch on standard output, so that a log without a terminal tells the story too."""

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
            f"mIoU {metrics['val_miou']:.3f} {scores}",
            flush=True,
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: an interrupted or full disk leaves the previous checkpoint whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
