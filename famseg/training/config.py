"""Everything a training run depends on, as one flat record: the flags of famseg-train and the keys of config.yaml."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from famseg.models import MODELS
from famseg.training.schedule import Phase, parse_phases
from famseg_kernels.backends import CHOICES as BACKENDS


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, what is expected and what came."""


def option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Defaults train famseg_nano on the synthetic phantom in minutes on two CPU cores."""

    data: str = option("phantom", "phantom[:LENGTH], hc18:DIR, folder:DIR, or several joined by commas")
    model: str = option("famseg_nano", ", ".join(MODELS))
    epochs: int | None = option(None, "total epochs; the phases are stretched to it")
    phases: str = option("adamw:15,sgd:3", "optimizer:epochs, joined by commas (paper: adamw:150,sgd:50)")
    decay: Literal["cos", "step"] = option("cos", "learning-rate decay over the run: cos or step")
    batch_size: int = option(8, "images a step")
    image_size: int = option(128, "side of the square network input, px; images are letterboxed into it")
    learning_rate: float = option(0.04, "Init_lr of Eq. 11, fitted to the batch size (paper: 0.01 over 200 epochs)")
    min_learning_rate: float = option(0.0004, "Min_lr of Eq. 12, fitted to the batch size (paper: 0.0001)")
    lr_limit_max: float = option(0.01, "upper bound of Eq. 11 (paper: 0.001)")
    lr_limit_min: float = option(0.0001, "lower bound of Eq. 11 (paper: 0.0001)")
    clip_norm: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    weight_decay: float = option(0.01, "of AdamW and SGD; biases, norms and scan parameters are exempt")
    val_fraction: float = option(0.2, "part of the images held out for validation, split by subject")
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32, or bf16 autocast")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto, cpu or cuda")
    backend: str = option("auto", f"famseg_kernels backend: {', '.join(BACKENDS)}")
    workers: int = option(0, "processes that load and augment images; 0: the training process itself")
    seed: int = option(0, "of initialisation, split, augmentation and order")
    shortcut: Literal["mamba", "identity"] = option("mamba", "bottle-block shortcut: mamba or identity (ablation)")
    upsample: Literal["fam", "bilinear"] = option("fam", "decoder upsampling: fam or bilinear (ablation)")
    context: Literal["hamburger", "lightham", "none"] = option("hamburger", "hamburger, lightham or none")
    fusion: bool = option(True, "fuse encoder stages 2 and 3 in the decoder (false: ablation)")
    out: str | None = option(None, "output folder; default runs/<time>-<model>")

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"model: expected one of {', '.join(MODELS)}, got {self.model!r}")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}")
        for name in ("decay", "precision", "device", "shortcut", "upsample", "context"):
            choices = _CHOICES[name]
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, minimum in (("batch_size", 1), ("image_size", 16), ("workers", 0), ("epochs", 1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{name}: expected at least {minimum}, got {value}")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction: expected a number between 0 and 1, got {self.val_fraction}")
        for name in ("learning_rate", "min_learning_rate", "lr_limit_max", "lr_limit_min"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected a positive number, got {getattr(self, name)}")
        try:
            self.plan()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def plan(self) -> list[Phase]:
        """The optimizer phases, stretched to `epochs` where given."""
        return parse_phases(self.phases, self.epochs)

    def model_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("shortcut", "upsample", "context", "fusion")}


_CHOICES = {
    "decay": ("cos", "step"),
    "precision": ("fp32", "bf16"),
    "device": ("auto", "cpu", "cuda"),
    "shortcut": ("mamba", "identity"),
    "upsample": ("fam", "bilinear"),
    "context": ("hamburger", "lightham", "none"),
}
