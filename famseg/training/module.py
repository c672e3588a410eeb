"""What a run trains: the network, its loss, what of it learns and how fast, and its averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from famseg.models import create_model
from famseg.training.config import TrainConfig
from famseg.training.finetune import freeze
from famseg.training.loss import SegmentationLoss
from famseg.training.schedule import Phase, decay_span, fit_learning_rates, learning_rate, phase_at
from famseg_kernels import use_backend


class SegmentationModule(nn.Module):
    """
    Args:
        config: the run.
        processes: of a data-parallel run; the learning rates are fitted to the batch of all of them.
        class_weights: of the loss, as they come out of `config.class_weights` and the training masks.
        partly: of the loss: some images do not label all classes.
        channels_last: memory order of weights and images, as it comes out of `config.channels_last` and the device.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        processes: int = 1,
        class_weights: Sequence[float] | None = None,
        channels_last: bool = False,
        partly: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.phases = config.plan()
        self.model: nn.Module = create_model(
            config.model, len(config.structures()), config.in_channels, **config.model_options()
        )
        self.frozen = freeze(self.model, config.learning_part(), config.train_head)
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = SegmentationLoss(config.loss, class_weights, partly)
        # Of training alone: validation has another mode, a ragged last batch and averaged weights, each a compilation.
        self.compiled: Callable[[Tensor], Tensor] | None = None
        self.ema: dict[str, Tensor] = {}
        self._images = config.batch_size * processes  # a step

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, classes, h, w) of images (N, in_channels, h, w); in evaluation by the averaged weights, if any."""
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with use_backend(self.config.backend):
            if self.ema and not self.training:
                return torch.func.functional_call(self.model, self.ema, (image,))
            return (self.compiled if self.compiled and self.training else self.model)(image)

    def train(self, mode: bool = True) -> SegmentationModule:
        """Training or evaluation mode; what is frozen stays in the latter."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    # --- how it learns ------------------------------------------------------------------------------

    def optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """A new optimizer for `phase`; `rate` is its learning rate, step by step."""
        groups = [
            {"params": parameters, "weight_decay": self.config.weight_decay if decayed else 0.0}
            for decayed, parameters in zip((True, False), _split_by_decay(self.model), strict=True)
        ]
        if phase.optimizer == "adadelta":
            return torch.optim.Adadelta(groups)  # its learning rate is 1: it has none (Zeiler 2012)
        rate, _ = self._rates(phase)
        if phase.optimizer == "sgd":
            momentum = self.config.momentum
            return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=True)
        kind = torch.optim.AdamW if phase.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=rate, fused=True)

    def rate(self, progress: float) -> float:
        """The learning rate after `progress` (fractional) epochs."""
        phase = phase_at(self.phases, int(progress))
        if phase.optimizer == "adadelta":
            return 1.0  # it has none
        start, end = decay_span(self.phases, int(progress), self.config.decay_epochs)
        return learning_rate(progress - start, end - start, self.config.decay, *self._rates(phase))

    def _rates(self, phase: Phase) -> tuple[float, float]:
        """Learning rates that the schedule of `phase` leads from and to."""
        config = self.config
        if phase.rates and not phase.limits:
            return phase.rates
        init, low = phase.rates or (config.learning_rate, config.min_learning_rate)
        return fit_learning_rates(
            self._images, init, low, *(phase.limits or (config.lr_limit_min, config.lr_limit_max))
        )

    # --- averaged weights -----------------------------------------------------------------------------

    def start_average(self) -> None:
        """Average from the weights as they are, unless a checkpoint has brought an average."""
        if self.config.ema and not self.ema:
            self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def average(self, steps: int) -> None:
        """Take the weights into their average, after `steps` steps."""
        if not self.ema:
            return
        # Short memory at first, or the average would long be that of the random start.
        decay = min(self.config.ema, (1 + steps) / (10 + steps))
        current = self.model.state_dict()
        floats = [name for name, value in self.ema.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[n] for n in floats], [current[n] for n in floats], 1 - decay)
        for name in self.ema.keys() - set(floats):  # batch counters
            self.ema[name].copy_(current[name])


def _split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay: matrices and kernels have it; biases, norms, scales do not."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        small = parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False)
        (exempt if small else decayed).append(parameter)
    return decayed, exempt
