"""The training loop: a step, an epoch of steps, validation, and what the next epoch depends on."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from famseg.anatomy import names_of
from famseg.data.dataset import OPEN
from famseg.metrics import SegmentationMetrics
from famseg.training.config import Diverged
from famseg.training.distributed import ALONE, Processes, sum_over_processes
from famseg.training.graph import RecordedStep
from famseg.training.loss import settled
from famseg.training.module import SegmentationModule
from famseg.training.schedule import phase_at

_STEPS_UNREAD = 10  # the progress bar makes a GPU wait as often
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Loop:
    """
    Args:
        module: what learns; moved to `device`.
        train_loader, val_loader: batches with "image" and "mask"; the former's sampler has `set_epoch`.
        part: `with part(name)` stands around each part of a step, for whoever times them.
    """

    def __init__(
        self,
        module: SegmentationModule,
        train_loader: Any,
        val_loader: Any,
        *,
        device: torch.device,
        processes: Processes = ALONE,
        part: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> None:
        self.module = module.to(device)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.device, self.processes, self.part = device, processes, part
        self.classes = names_of(module.config.structures())
        self.epoch = 0  # the one at work, or the last one done
        self.steps = 0  # done in all epochs
        self.optimizer = module.optimizer(module.phases[0])
        self.scaler = torch.amp.GradScaler(device.type, enabled=module.config.precision == "fp16")
        module.start_average()
        self._overlap = torch.zeros(2, len(self.classes) - 1, dtype=torch.int64, device=device)
        self._recorded: RecordedStep | None = None
        self.network: nn.Module = module
        if processes.count > 1:
            # Of depthwise kernels (C, 1, k, k): their strides are written in two ways and mean the same memory.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # Statistics of batch normalisation are the same everywhere: there is nothing to broadcast.
            self.network = DistributedDataParallel(
                module,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    # --- state --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, under the names that checkpoints have had from the beginning."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "global_step": self.steps,
            "state_dict": self.module.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "config": dataclasses.asdict(self.module.config),  # plain values: loads with weights_only=True
            "processes": self.processes.count,
        }
        if self.module.ema:
            state["ema"] = dict(self.module.ema)
        if self.scaler.is_enabled():
            state["MixedPrecision"] = self.scaler.state_dict()
        return state

    def resume(self, state: dict[str, Any]) -> None:
        """Go on after the epoch that `state` is of; the module has its weights already."""
        self.module.ema = {name: value.to(self.device) for name, value in state.get("ema", {}).items()}
        self.module.start_average()
        self.epoch, self.steps = state["epoch"], state["global_step"]
        self.optimizer = self.module.optimizer(phase_at(self.module.phases, self.epoch))
        self.optimizer.load_state_dict(state["optimizer_states"][0])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["MixedPrecision"])

    # --- training -----------------------------------------------------------------------------------

    def begin(self, epoch: int) -> None:
        """Make ready for the steps of `epoch`, counting from 0."""
        self.epoch = epoch
        phase = phase_at(self.module.phases, epoch)
        if epoch == phase.start > 0:
            self.optimizer = self.module.optimizer(phase)
        if self.module.config.cuda_graph and (epoch == phase.start or self._recorded is None):
            # Adadelta counts its steps on the host.
            fused = phase.optimizer != "adadelta"
            self._recorded = RecordedStep(self._compute, self.optimizer, self.device) if fused else None
        self.train_loader.batch_sampler.sampler.set_epoch(epoch)
        self.module.train()
        self._loss, self._images = torch.zeros((), device=self.device), 0
        self._overlap.zero_()
        self._watched: list[Tensor] = []  # loss and norm of the gradient of the steps not looked at yet
        self._steps_read = 0

    def train_epoch(self, epoch: int, after_step: Callable[[int], None] | None = None) -> float:
        """The steps of `epoch`; returns the mean loss of its images."""
        self.begin(epoch)
        for index, batch in enumerate(self.train_loader):
            self.step(index, batch)
            if after_step is not None:
                after_step(index)
        return (self._loss / self._images).item()

    def step(self, index: int, batch: dict[str, Tensor]) -> None:
        # What the network draws (stochastic depth) is a function of seed, epoch, step and process, like order and
        # augmentation: an epoch can be repeated from its beginning without a stored generator state.
        entropy = np.random.SeedSequence([self.module.config.seed, self.epoch, index, self.processes.rank])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        rate = self._rate(index)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.part("copy to device"):
            image, mask = self._to_device(batch)
        scale = self.scaler.get_scale()
        loss, norm = (self._recorded or self._compute)(image, mask)
        self._loss = self._loss + loss * len(mask)
        self._images += len(mask)
        self.finish(loss, norm, scale)

    def finish(self, loss: Tensor, norm: Tensor, scale: float) -> None:
        """Look at the loss and the norm of the gradient, and take the weights into their average."""
        # What was scaled is skipped where it is not finite, and tried with a smaller scale.
        self._watch(loss, torch.zeros_like(norm) if scale > 1 else norm)
        self.steps += 1
        self.module.average(self.steps)

    def _compute(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """All that a step does on the device; returns the loss and the norm of its gradient."""
        with self._autocast():
            with self.part("forward"):
                logits = self.network(image)
            with self.part("loss"):
                loss = self.loss(logits, mask)
                self._count_overlap(logits.detach().argmax(1), mask)
        with self.part("backward"):
            self.scaler.scale(loss).backward()
        with self.part("optimizer"):
            return loss.detach(), self.update()

    def loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The loss of the whole batch, the same one in every process."""
        return self.module.loss.value(sum_over_processes(self.module.loss.sums(logits, mask)))

    def update(self) -> Tensor:
        """Clip the gradient and take the step; returns the norm it had."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.module.config.clip_norm:
            norm = nn.utils.clip_grad_norm_(parameters, self.module.config.clip_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def _rate(self, index: int) -> float:
        return self.module.rate(self.epoch + index / len(self.train_loader))

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self.module.config.precision)
        # Every weight is used once a pass: a cache would only keep its copy until the end.
        return torch.autocast(self.device.type, dtype, cache_enabled=False) if dtype else nullcontext()

    def _to_device(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        # Beside the GPU's work: the loader has pinned them.
        return batch["image"].to(self.device, non_blocking=True), batch["mask"].to(self.device, non_blocking=True)

    def _count_overlap(self, labels: Tensor, mask: Tensor) -> None:
        """This process's overlap and union of every object since the epoch began; stays on the device, unread."""
        known = mask < OPEN
        for label in range(1, len(self.classes)):
            found, truth = (labels == label) & known, mask == label
            self._overlap[0, label - 1] += (found & truth).sum()
            self._overlap[1, label - 1] += (found | truth).sum()

    def live_iou(self) -> dict[str, float]:
        """Training IoU of the objects over the epoch so far: of augmented images and of weights that still move."""
        overlap, union = self._overlap.tolist()
        return {name: o / u if u else math.nan for name, o, u in zip(self.classes[1:], overlap, union, strict=True)}

    # --- validation ---------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, after_step: Callable[[int], None] | None = None) -> dict[str, float]:
        """val_loss, val_miou and val_iou_CLASS over all processes, of weights that are finite."""
        self._stop_if_diverged()
        self._require_finite_weights()
        self.module.eval()
        metrics = SegmentationMetrics(len(self.classes))
        parts = []
        for index, batch in enumerate(self.val_loader):
            image, mask = self._to_device(batch)
            with self._autocast():
                logits = self.module(image)
                found, truth = settled(logits.argmax(1), mask)
                metrics.update(found, truth)
                images = logits.new_tensor([len(mask)], dtype=torch.float32)
                target = mask if self.module.loss.partly else truth
                parts.append(torch.cat([images, self.module.loss.sums(logits, target)]))
            if after_step is not None:
                after_step(index)
        sums = torch.stack(parts)
        if self.processes.count > 1:
            # Every process has its part of each batch; the last one may have had nothing left of the last.
            batches = sums.new_tensor(len(sums))
            dist.all_reduce(batches, dist.ReduceOp.MAX)
            sums = nn.functional.pad(sums, (0, 0, 0, int(batches) - len(sums)))
            dist.all_reduce(sums)
            confusion = metrics.confusion.to(self.device)
            dist.all_reduce(confusion)
            metrics.confusion = confusion.cpu()
        losses = torch.stack([self.module.loss.value(row[1:]) for row in sums])
        loss = (losses * sums[:, 0]).sum() / sums[:, 0].sum()
        if not loss.isfinite():
            raise self._diverged(f"the loss of the validation images is {loss:g}")
        scores = metrics.compute()
        ious = zip(self.classes, scores["iou"], strict=True)
        measured = {"val_miou": scores["miou"]} | {f"val_iou_{name}": iou for name, iou in ious}
        # In fp32, as the scores in every checkpoint are, which those of a resumed run are compared with.
        return {"val_loss": loss.item(), **{name: float(np.float32(score)) for name, score in measured.items()}}

    # --- divergence ---------------------------------------------------------------------------------

    def _watch(self, loss: Tensor, norm: Tensor) -> None:
        """Stop the run where the loss or the gradient is not finite: here every process has the same one."""
        self._watched.append(torch.stack((loss.float(), norm.float())))
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
        steps = len(self.train_loader)
        at = "its end" if step is None else f"step {step + 1} of {steps}"
        rate = self._rate(steps - 1 if step is None else step)
        return Diverged(f"diverged in epoch {self.epoch + 1}, at {at}, learning rate {rate:.3g}: {what}")

    def _require_finite_weights(self) -> None:
        """What validation judges and a checkpoint keeps: weights, statistics, averages, the optimizer's state."""
        model = self.module.model
        states = [{**model.state_dict(), **{f"average of {name}": v for name, v in self.module.ema.items()}}]
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            states.append({f"{key} of {names[parameter]}": value for key, value in state.items()})
        tensors = {name: v for state in states for name, v in state.items() if torch.is_tensor(v)}
        finite = torch.stack([value.isfinite().all().to(self.device) for value in tensors.values()]).cpu()
        if not finite.all():
            name = list(tensors)[int(finite.int().argmin())]
            raise self._diverged(f"{name} is not finite")
