"""The Lightning module: a model, its loss and metrics, and its optimizer phases."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from famseg.data.sample import CLASSES
from famseg.metrics import SegmentationMetrics
from famseg.models import create_model
from famseg.training.config import TrainConfig
from famseg.training.loss import segmentation_loss
from famseg.training.schedule import Phase, fit_learning_rates, learning_rate, phase_at
from famseg_kernels import use_backend


class SegmentationModule(L.LightningModule):
    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.phases = config.plan()
        self.model = create_model(config.model, len(CLASSES), **config.model_options())
        self.val_metrics = SegmentationMetrics(len(CLASSES))
        self.start_epoch = 0
        self._init_lr, self._min_lr = fit_learning_rates(
            config.batch_size,
            config.learning_rate,
            config.min_learning_rate,
            config.lr_limit_min,
            config.lr_limit_max,
        )

    def forward(self, image: Tensor) -> Tensor:
        with use_backend(self.config.backend):
            return self.model(image)

    # --- steps --------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = segmentation_loss(self(batch["image"]), batch["mask"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch["mask"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        logits = self(batch["image"])
        self.val_metrics.update(logits.argmax(1), batch["mask"])
        self.log("val_loss", segmentation_loss(logits, batch["mask"]), batch_size=len(batch["mask"]))

    def on_validation_epoch_end(self) -> None:
        scores = self.val_metrics.compute()
        self.log("val_miou", scores["miou"], prog_bar=True)
        for name, iou in zip(CLASSES, scores["iou"], strict=True):
            self.log(f"val_iou_{name}", iou, prog_bar=name != "background")

    # --- optimizer phases -----------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        name = phase_at(self.phases, self.start_epoch).optimizer
        groups = [
            {"params": parameters, "weight_decay": self.config.weight_decay if decayed else 0.0}
            for decayed, parameters in zip((True, False), _split_by_decay(self.model), strict=True)
        ]
        if name == "sgd":
            return torch.optim.SGD(groups, lr=self._init_lr, momentum=0.9, nesterov=True)
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return kind(groups, lr=self._init_lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = dataclasses.asdict(self.config)  # plain values: loads with weights_only=True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Called before the optimizer is made, so that its state meets the optimizer of its own phase.
        self.start_epoch = checkpoint["epoch"] + 1

    @property
    def phase(self) -> Phase:
        return phase_at(self.phases, self.current_epoch)

    def on_train_epoch_start(self) -> None:
        phase = self.phase
        if self.current_epoch == phase.start and phase.start > 0:
            self.start_epoch = self.current_epoch
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        progress = self.current_epoch + batch_index / self.trainer.num_training_batches
        epochs = sum(phase.epochs for phase in self.phases)
        rate = learning_rate(progress, epochs, self.config.decay, self._init_lr, self._min_lr)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate


def _split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay: matrices and kernels have it; biases, norms, scales do not."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in model.parameters():
        small = parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False)
        (exempt if small else decayed).append(parameter)
    return decayed, exempt
