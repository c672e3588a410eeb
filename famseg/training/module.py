"""The Lightning module: a model, its loss and metrics, its optimizer phases and averaged weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from famseg.data.sample import CLASSES
from famseg.metrics import SegmentationMetrics
from famseg.models import create_model
from famseg.training.config import Diverged, TrainConfig
from famseg.training.distributed import sum_over_processes
from famseg.training.finetune import freeze
from famseg.training.loss import SegmentationLoss
from famseg.training.schedule import Phase, fit_learning_rates, learning_rate, phase_at, total_epochs
from famseg_kernels import use_backend

_STEPS_UNREAD = 10  # the progress bar makes a GPU wait as often


class SegmentationModule(L.LightningModule):
    """
    Args:
        config: the run.
        processes: of a data-parallel run; the learning rates are fitted to the batch of all of them.
        class_weights: of the loss, as they come out of `config.class_weights` and the training masks.
        images: "trained" and "held_out", the name of every image under its digest; kept in every checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        processes: int = 1,
        class_weights: Sequence[float] | None = None,
        images: dict[str, dict[str, str]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.phases = config.plan()
        self.model: nn.Module = create_model(config.model, len(CLASSES), **config.model_options())
        self.frozen = freeze(self.model, config.trainable)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = SegmentationLoss(config.loss, class_weights)
        self.processes = processes
        self.images = images or {}
        # Of training alone: validation has another mode, a ragged last batch and averaged weights, each a compilation.
        self.compiled: Callable[[Tensor], Tensor] | None = None
        self.batch = config.batch_size * processes
        self.ema: dict[str, Tensor] = {}
        self.val_metrics = SegmentationMetrics(len(CLASSES))
        self.start_epoch = 0
        self._init_lr, self._min_lr = fit_learning_rates(
            self.batch,
            config.learning_rate,
            config.min_learning_rate,
            config.lr_limit_min,
            config.lr_limit_max,
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, classes, h, w) of images (N, 1, h, w); in evaluation by the averaged weights, where there are."""
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with use_backend(self.config.backend):
            if self.ema and not self.training:
                return torch.func.functional_call(self.model, self.ema, (image,))
            return (self.compiled if self.compiled and self.training else self.model)(image)

    # --- steps --------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        logits, mask = self(batch["image"]), batch["mask"]
        loss = self.loss.value(sum_over_processes(self.loss.sums(logits, mask)))
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(mask))
        self._count_overlap(logits.detach().argmax(1), mask)
        self._loss = loss.detach()
        return loss

    def _count_overlap(self, labels: Tensor, mask: Tensor) -> None:
        """This process's overlap and union of every object since the epoch began; stays on the device, unread."""
        for label in range(1, len(CLASSES)):
            found, truth = labels == label, mask == label
            self._overlap[0, label - 1] += (found & truth).sum()
            self._overlap[1, label - 1] += (found | truth).sum()

    def live_iou(self) -> dict[str, float]:
        """Training IoU of the objects over the epoch so far: of augmented images and of weights that still move."""
        overlap, union = self._overlap.tolist()
        return {name: o / u if u else math.nan for name, o, u in zip(CLASSES[1:], overlap, union, strict=True)}

    def on_validation_epoch_start(self) -> None:
        self._stop_if_diverged()
        self._require_finite_weights()
        self.val_metrics.reset()
        self._val_sums: list[Tensor] = []

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        logits = self(batch["image"])
        self.val_metrics.update(logits.argmax(1), batch["mask"])
        images = logits.new_tensor([len(batch["mask"])], dtype=torch.float32)
        self._val_sums.append(torch.cat([images, self.loss.sums(logits, batch["mask"])]))

    def on_validation_epoch_end(self) -> None:
        sums = torch.stack(self._val_sums)
        if self.processes > 1:
            # Every process has its part of each batch; the last one may have had nothing left of the last.
            batches = int(self.trainer.strategy.reduce(sums.new_tensor(len(sums)), reduce_op="max"))
            sums = nn.functional.pad(sums, (0, 0, 0, batches - len(sums)))
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
            confusion = self.val_metrics.confusion.to(self.device)
            self.val_metrics.confusion = self.trainer.strategy.reduce(confusion, reduce_op="sum").cpu()
        losses = torch.stack([self.loss.value(row[1:]) for row in sums])
        loss = (losses * sums[:, 0]).sum() / sums[:, 0].sum()
        if not loss.isfinite():
            raise self._diverged(f"the loss of the validation images is {loss:g}")
        self.log("val_loss", loss)
        scores = self.val_metrics.compute()
        self.log("val_miou", scores["miou"], prog_bar=True)
        for name, iou in zip(CLASSES, scores["iou"], strict=True):
            self.log(f"val_iou_{name}", iou, prog_bar=name != "background")

    # --- divergence -----------------------------------------------------------------------------------

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip, and stop the run where the loss or the gradient is not finite: here every process has the same one."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradient_clip_val:
            norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:  # the scaler skips the step and tries a smaller scale
            norm = torch.zeros_like(norm)
        self._watched.append(torch.stack((self._loss.float(), norm.float())))
        # A GPU would have to finish every step before the next is launched; so it is asked only now and then.
        if self.device.type == "cpu" or len(self._watched) == _STEPS_UNREAD:
            self._stop_if_diverged()

    def _stop_if_diverged(self) -> None:
        if not self._watched:
            return
        values = torch.stack(self._watched).cpu()
        first = self._steps_read
        self._steps_read += len(values)
        self._watched.clear()
        if values.isfinite().all():
            return
        step = int(values.isfinite().all(1).int().argmin())
        loss, norm = values[step].tolist()
        raise self._diverged(f"the loss is {loss:g}, the norm of its gradient {norm:g}", first + step)

    def _diverged(self, what: str, step: int | None = None) -> Diverged:
        """`what` happened in a step of this epoch, counting from 0, or at its end."""
        steps = int(self.trainer.num_training_batches)
        at = "its end" if step is None else f"step {step + 1} of {steps}"
        rate = self._rate(steps - 1 if step is None else step)
        return Diverged(f"diverged in epoch {self.current_epoch + 1}, at {at}, learning rate {rate:.3g}: {what}")

    def _require_finite_weights(self) -> None:
        """What validation judges and a checkpoint keeps: weights, statistics, averages, the optimizer's state."""
        states = [{**self.model.state_dict(), **{f"average of {name}": v for name, v in self.ema.items()}}]
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.trainer.optimizers[0].state.items():
            states.append({f"{key} of {names[parameter]}": value for key, value in state.items()})
        tensors = {name: v for state in states for name, v in state.items() if torch.is_tensor(v)}
        finite = torch.stack([value.isfinite().all().to(self.device) for value in tensors.values()]).cpu()
        if not finite.all():
            name = list(tensors)[int(finite.int().argmin())]
            raise self._diverged(f"{name} is not finite")

    # --- optimizer phases -----------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        name = phase_at(self.phases, self.start_epoch).optimizer
        groups = [
            {"params": parameters, "weight_decay": self.config.weight_decay if decayed else 0.0}
            for decayed, parameters in zip((True, False), _split_by_decay(self.model), strict=True)
        ]
        if name == "adadelta":
            return torch.optim.Adadelta(groups)  # its learning rate is 1: it has none (Zeiler 2012)
        if name == "sgd":
            return torch.optim.SGD(groups, lr=self._init_lr, momentum=0.9, nesterov=True)
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return kind(groups, lr=self._init_lr)

    @property
    def phase(self) -> Phase:
        return phase_at(self.phases, self.current_epoch)

    def on_train_start(self) -> None:
        if self.config.ema and not self.ema:
            self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.ema = {name: value.to(self.device) for name, value in self.ema.items()}

    def on_train_epoch_start(self) -> None:
        for module in self.frozen:
            module.eval()
        phase = self.phase
        if self.current_epoch == phase.start and phase.start > 0:
            self.start_epoch = self.current_epoch
            self.trainer.strategy.setup_optimizers(self.trainer)
        self._overlap = torch.zeros(2, len(CLASSES) - 1, dtype=torch.int64, device=self.device)
        self._watched: list[Tensor] = []  # loss and norm of the gradient of the steps not looked at yet
        self._steps_read = 0

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # What the network draws (stochastic depth) is a function of seed, epoch, step and process, like order and
        # augmentation: an epoch can be repeated from its beginning without a stored generator state. Once an epoch
        # would not do: Lightning makes the loader's iterator, which draws too, at another moment after a restart.
        entropy = np.random.SeedSequence([self.config.seed, self.current_epoch, batch_index, self.global_rank])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        rate = self._rate(batch_index)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def _rate(self, batch_index: int) -> float:
        """The learning rate of a step of this epoch."""
        if self.phase.optimizer == "adadelta":
            return 1.0  # it has none
        progress = self.current_epoch + batch_index / self.trainer.num_training_batches
        epochs = self.config.decay_epochs or total_epochs(self.phases)
        return learning_rate(progress, epochs, self.config.decay, self._init_lr, self._min_lr)

    # --- averaged weights -----------------------------------------------------------------------------

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        if not self.ema:
            return
        # Short memory at first, or the average would long be that of the random start.
        decay = min(self.config.ema, (1 + self.global_step) / (10 + self.global_step))
        current = self.model.state_dict()
        floats = [name for name, value in self.ema.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[n] for n in floats], [current[n] for n in floats], 1 - decay)
        for name in self.ema.keys() - set(floats):  # batch counters
            self.ema[name].copy_(current[name])

    # --- checkpoints ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = dataclasses.asdict(self.config)  # plain values: loads with weights_only=True
        checkpoint["processes"] = self.processes
        checkpoint["images"] = self.images
        if self.ema:
            checkpoint["ema"] = dict(self.ema)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Called before the optimizer is made: its state belongs to the optimizer of the last finished epoch. Where the
        # next epoch starts another phase, on_train_epoch_start replaces it as it would have done without a pause.
        self.start_epoch = checkpoint["epoch"]
        self.ema = checkpoint.get("ema", {})


def _split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay: matrices and kernels have it; biases, norms, scales do not."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        small = parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False)
        (exempt if small else decayed).append(parameter)
    return decayed, exempt
