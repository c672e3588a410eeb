"""Everything a training run depends on, as one flat record: the flags of famseg-train and the keys of config.yaml."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from famseg.anatomy import DEFAULT, Structure, names_of, parse_classes
from famseg.data import DATA_HELP
from famseg.models import MODELS, model_config, option_names
from famseg.options import (
    BACKEND_HELP,
    DEVICE_HELP,
    LARGEST_SEED,
    ConfigError,
    device_for,
    expect_number,
    option,
)
from famseg.training.finetune import STRATEGIES, parse_trainable
from famseg.training.loss import parse_class_weights, parse_loss
from famseg.training.schedule import Phase, format_phases, parse_phases, total_epochs, with_adadelta

__all__ = ["ConfigError", "Diverged", "TrainConfig", "device_for"]


class Diverged(RuntimeError):
    """A loss, gradient or weight is not finite any more; the message names the step and what to try."""

    exit_code = 3


# Fields that are options of FAMSeg; None: the model's own value.
_ABLATIONS = (
    *("shortcut", "upsample", "context", "fusion", "strip_form", "fam_kernel", "fam_groups", "context_stride"),
    *("skip_stride", "context_rank", "directions", "shared_bc", "d_state", "headdim", "drop_path", "bottleneck_ratio"),
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Defaults train famseg_nano on the synthetic phantom in minutes on two CPU cores."""

    data: str = option("phantom", DATA_HELP)
    model: str = option("famseg_nano", ", ".join(MODELS))
    classes: str = option(
        DEFAULT, "names of what is found, joined by commas, in the order of labels from 1 on; the rest is background"
    )
    in_channels: Literal[1, 3] = option(1, "1: images in grey, 3: in colour")
    epochs: int | None = option(None, "total epochs; the phases are stretched to it (on resume: the last one is)")
    phases: str = option(
        "adamw:15,sgd:3:lr=0.01..0.0001",
        "optimizer:epochs, joined by commas (paper: adamw:150,sgd:50); one may have a schedule of its own: "
        "sgd:50:lr=0.05..0.0005 (rates as they are), sgd:50:limits=0.0005..0.05 (fitted by Eq. 11-12)",
    )
    decay: Literal["cos", "step", "constant", "adadelta"] = option(
        "cos",
        "how the learning rate falls: cos, step, constant (not at all), or adadelta (constant after a warm-up, then "
        "Adadelta runs the last phase)",
    )
    decay_epochs: int | None = option(
        None, "epoch at which the decay under way ends, constant after; default: at the end of its phases"
    )
    momentum: float = option(0.9, "of sgd, in Nesterov's form; 0: none (Eq. 6)")
    loss: str = option("ce+dice", "ce, focal, dice and edge, joined by +")
    class_weights: str = option(
        "none", "of ce and focal: none, balanced, or a number a class, background first, joined by commas"
    )
    batch_size: int = option(8, "images a step and process")
    image_size: int = option(128, "side of the square network input, px; images are letterboxed into it")
    augmentation: Literal["full", "wide", "rotate-flip", "none"] = option(
        "full",
        "of training images: full, wide (full with more of scale and shift), rotate-flip (pose alone, as in the "
        "fine-tuning study) or none",
    )
    learning_rate: float = option(0.04, "Init_lr of Eq. 11, fitted to the batch size (paper: 0.01 over 200 epochs)")
    min_learning_rate: float = option(0.0004, "Min_lr of Eq. 12, fitted to the batch size (paper: 0.0001)")
    lr_limit_max: float = option(0.01, "upper bound of Eq. 11 (paper: 0.001)")
    lr_limit_min: float = option(0.0001, "lower bound of Eq. 11 (paper: 0.0001)")
    clip_norm: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    weight_decay: float = option(0.01, "of every optimizer; biases, norms and scan parameters are exempt")
    ema: float = option(0.0, "decay of the averaged weights that are validated and kept, like 0.999; 0: none")
    patience: int = option(0, "stop after so many epochs without a better validation mIoU; 0: never")
    val_fraction: float = option(0.2, "part of the images held out for validation, split by subject")
    train_images: int | None = option(
        None, "train on so many images only, subject after subject; what is held out stays the same; default: all"
    )
    folds: int = option(0, "cross-validation by subject into so many folds, instead of val_fraction; 0: off")
    fold: int = option(0, "the fold to validate on, counting from 0")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "fp32, or autocast to bf16 or fp16 (GPU only)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", DEVICE_HELP)
    devices: int = option(1, "data-parallel processes on this machine, one a GPU; several machines: torchrun")
    backend: str = option("auto", BACKEND_HELP)
    compile: bool = option(False, "compile the network with torch.compile")
    channels_last: bool | None = option(
        None, "keep weights and images in channels-last memory order; default: on a GPU, where convolutions want it"
    )
    cuda_graph: bool = option(
        False, "record a training step as one CUDA graph: a GPU then waits for no launches of small batches"
    )
    workers: int | None = option(
        None,
        "processes a device that load and augment images; 0: the training process itself; default: 0, up to 8 a GPU",
    )
    cache: bool = option(True, "keep decoded images in memory; false: decode again every epoch")
    tensorboard: bool = option(False, "also write the metrics for TensorBoard, to OUT/tensorboard")
    seed: int = option(0, "of initialisation, split, augmentation and order")
    shortcut: Literal["mamba", "identity"] = option("mamba", "bottle-block shortcut: mamba or identity (ablation)")
    upsample: Literal["fam", "bilinear"] = option("fam", "decoder upsampling: fam or bilinear (ablation)")
    context: Literal["hamburger", "lightham", "none"] = option("hamburger", "hamburger, lightham or none")
    fusion: bool = option(True, "fuse encoder stages 2 and 3 in the decoder (false: ablation)")
    skip_stride: int | None = option(
        None, "finest stride of the encoder's features that the decoder fuses: 8 (the default), 4, or 2 (the stem's)"
    )
    strip_form: str | None = option(
        None, "how rows and columns are scanned: cascade (the default), independent, stacked, or square (5x5 alone)"
    )
    fam_kernel: int | None = option(None, "size of FAM's reassembly kernels, odd; default: 5")
    fam_groups: int | None = option(None, "kernels a pixel, each for a group of channels; default: 1")
    context_stride: int | None = option(None, "of the context: 32 (the default), 16 or 8")
    context_rank: int | None = option(None, "bases of the hamburger; default: the model's, 16 or 64")
    directions: int | None = option(None, "directions of the Mamba scan: 1, 2 or 4 (the default)")
    shared_bc: bool | None = option(None, "all directions of the scan read the same B and C; default: each its own")
    d_state: int | None = option(None, "state size of the scan; default: the model's, 16 or 64")
    headdim: int | None = option(None, "channels a head of the scan; default: the model's, 16 or 32")
    bottleneck_ratio: int | None = option(
        None, "outer over hidden width of convolution and bottle blocks; default: 4, famseg_nano: 1"
    )
    drop_path: float | None = option(None, "stochastic depth of the strip blocks; default: the model's, 0 or 0.1")
    weights: str | None = option(
        None,
        "start from this file: a checkpoint of famseg-train, MSCAN (FAMSeg, SegNeXt) or MobileNetV2 (U-Net); or "
        "pretrained: from the network that comes with famseg",
        path=True,
    )
    trainable: str = option("all", "what learns: all, encoder, decoder, or layers of it like decoder:1,2 (1: deepest)")
    train_head: bool = option(True, "false: the classifier stays as it is, with any part that learns")
    strategy: Literal["none", "a", "b", "c", "d", "e", "f", "g", "h", "i"] = option(
        "none", "of the fine-tuning study (arXiv 2407.20086, Fig. 2), instead of trainable: c to i start from --weights"
    )
    out: str | None = option(None, "output folder; default runs/<time>-<model>", path=True)
    resume: str | None = option(
        None, "auto: continue the run in OUT, if there is one; or a checkpoint to continue from", path=True
    )

    def __post_init__(self) -> None:
        self._expect("model", tuple(MODELS))
        for name, hint in get_type_hints(TrainConfig).items():
            if getattr(self, name) is None and type(None) not in get_args(hint):  # null in a YAML file
                raise ConfigError(f"{name}: expected a value, got none; leave it out")
            if get_origin(hint) is Literal:
                self._expect(name, get_args(hint))
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _ABLATIONS:
            if name not in option_names(self.model) and getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name}: is an option of FAMSeg, {self.model} has none; leave it out")
        largest_float = sys.float_info.max  # a finite number
        ranges: dict[str, tuple[float, ...]] = {
            "batch_size": (1,), "image_size": (16, 8192), "workers": (0, 256), "epochs": (1,), "decay_epochs": (1,),
            "train_images": (1,), "devices": (1, 1024), "folds": (0,), "patience": (0,), "seed": (0, LARGEST_SEED),
            "clip_norm": (0, largest_float), "weight_decay": (0, largest_float),
        }  # fmt: skip
        for name, bounds in ranges.items():
            if (value := getattr(self, name)) is not None:
                expect_number(name, value, *bounds)
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction: expected a number between 0 and 1, got {self.val_fraction}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema: expected a number from 0 to below 1, got {self.ema}")
        if self.folds == 1:
            raise ConfigError("folds: expected 2 or more, or 0 for a single split, got 1")
        if not 0 <= self.fold < max(self.folds, 1):
            came = f"with folds {self.folds}" if self.folds else "without folds"
            raise ConfigError(f"fold: expected 0 to {max(self.folds, 1) - 1} {came}, got {self.fold}")
        for name in ("learning_rate", "min_learning_rate", "lr_limit_max", "lr_limit_min"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.lr_limit_min > self.lr_limit_max:
            raise ConfigError(
                f"lr_limit_min: expected at most lr_limit_max, which is {self.lr_limit_max}, got {self.lr_limit_min}"
            )
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum: expected a number from 0 to below 1, got {self.momentum}")
        if self.cuda_graph and self.precision == "fp16":
            raise ConfigError("cuda_graph: fp16's loss scale decides on every step by itself; use bf16 or fp32")
        if self.folds and self.val_fraction != defaults["val_fraction"]:
            raise ConfigError(f"val_fraction: {self.folds} folds hold out 1/{self.folds}; leave one of the two out")
        if self.class_weights != "none" and not {"ce", "focal"} & set(self.loss.split("+")):
            raise ConfigError(f"class_weights: are of ce and focal, and the loss is {self.loss}; leave them out")
        if self.strategy != "none":
            given, part = STRATEGIES[self.strategy]
            if self.trainable != "all":
                raise ConfigError(f"trainable: strategy {self.strategy} trains {part}; leave one of the two out")
            if given != (self.weights is not None):
                remedy = "leave them out" if self.weights else "name a file with --weights"
                start = "the weights of a file" if given else "random weights"
                raise ConfigError(f"weights: strategy {self.strategy} starts from {start}; {remedy}")
        try:
            expect_number("phases", total_epochs(self.plan()), 1)
            classes = names_of(self.structures())
            network = model_config(self.model, len(classes), self.in_channels, **self.model_options())
            parse_loss(self.loss)
            parse_class_weights(self.class_weights, classes)
            parse_trainable(self.trainable)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._refuse_void_rates(defaults)
        if network and self.context_rank and self.context_rank >= (pixels := network.context_pixels(self.image_size)):
            raise ConfigError(
                f"context_rank: the context has {pixels} pixels at image_size {self.image_size}, which as many bases "
                f"do not constrain; expected at most {pixels - 1}, or a smaller context_stride, got {self.context_rank}"
            )

    def _refuse_void_rates(self, defaults: dict[str, Any]) -> None:
        """ConfigError where a setting of the optimizers was changed that no phase uses."""
        phases, given = self.plan(), parse_phases(self.phases)
        replaced = self.decay == "adadelta" and len(given) > 1 and given[-1].has_schedule
        if replaced and self.phases != defaults["phases"]:
            raise ConfigError("phases: decay adadelta takes the place of the last one; leave out its lr and limits")
        decaying = [phase for phase in phases if phase.optimizer != "adadelta"]
        shared = [phase for phase in decaying if phase.rates is None]
        used = {
            "momentum": any(phase.optimizer == "sgd" for phase in phases),
            "learning_rate": bool(shared),
            "min_learning_rate": bool(shared) and self.decay != "constant",
            "lr_limit_min": any(phase.limits is None for phase in shared),
            "lr_limit_max": any(phase.limits is None for phase in shared),
            "decay_epochs": self.decay != "constant" and bool(decaying),
        }
        for name, usable in used.items():
            if not usable and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name}: no phase of {format_phases(phases)} with decay {self.decay} uses it; leave it out"
                )

    def _expect(self, name: str, choices: tuple[Any, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name}: expected one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")

    def structures(self) -> tuple[Structure, ...]:
        """The network's classes by label, background first."""
        return parse_classes(self.classes)

    def plan(self) -> list[Phase]:
        """The optimizer phases, stretched to `epochs` where given; with decay "adadelta" they end with Adadelta."""
        phases = parse_phases(self.phases, self.epochs)
        return with_adadelta(phases) if self.decay == "adadelta" else phases

    def learning_part(self) -> str:
        """`trainable`, or what the strategy trains."""
        return self.trainable if self.strategy == "none" else STRATEGIES[self.strategy][1]

    def model_options(self) -> dict[str, Any]:
        known = option_names(self.model)
        options = {name: getattr(self, name) for name in _ABLATIONS if name in known}
        return {name: value for name, value in options.items() if value is not None}
