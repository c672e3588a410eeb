"""Networks: FAMSeg, and what its authors and the other papers compare with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import nn

from famseg.models.bisenetv2 import BiSeNetV2
from famseg.models.famseg import SIZES, FAMSeg, FAMSegConfig, create_famseg, expect_count, famseg_config
from famseg.models.mscan import load_mscan
from famseg.models.optimize import optimize_for_inference
from famseg.models.resunetplusplus import ResUNetPlusPlus
from famseg.models.segnext import SegNeXt
from famseg.models.smp import NETWORKS, SmpNetwork, UNetMobileNetV2, require_package
from famseg.models.unet import UNet
from famseg.models.unext import LARGE_WIDTHS, UNeXt

__all__ = [
    "MODELS",
    "POOLED_TO_A_PIXEL",
    "FAMSeg",
    "FAMSegConfig",
    "SegNeXt",
    "UNeXt",
    "UNetMobileNetV2",
    "create_model",
    "load_mscan",
    "model_config",
    "optimize_for_inference",
    "option_names",
]

_OTHERS: dict[str, Callable[..., nn.Module]] = {
    "segnext": SegNeXt,
    **{name: functools.partial(SmpNetwork, name) for name in NETWORKS},
    "bisenetv2": BiSeNetV2,
    "unet_mobilenetv2": UNetMobileNetV2,
    "unet31m": UNet,
    "resunetplusplus": ResUNetPlusPlus,
    "unext_large": functools.partial(UNeXt, widths=LARGE_WIDTHS),
    "unext": UNeXt,
    "sc_unext_skip": functools.partial(UNeXt, skip=True),
    "sc_unext_fuse": functools.partial(UNeXt, fuse=True),
    "sc_unext": functools.partial(UNeXt, skip=True, fuse=True),
}
MODELS = (*SIZES, *_OTHERS)
# Networks with batch norms over one pixel an image, whatever its size: a training step needs two images.
POOLED_TO_A_PIXEL = frozenset({"upernet", "twins", "swin", "convnext", "bisenetv2"})


def option_names(name: str) -> frozenset[str]:
    """What `create_model` takes beside the model's name and the number of classes."""
    if name not in SIZES:
        return frozenset()
    return frozenset(field.name for field in dataclasses.fields(FAMSegConfig)) - {"num_classes", "in_channels"}


def create_model(name: str, num_classes: int = 3, in_channels: int = 1, **options: object) -> nn.Module:
    """A freshly initialised network: (N, in_channels, H, W) → logits (N, num_classes, H, W).

    Args:
        name: one of MODELS.
        num_classes: output classes.
        in_channels: 1 for grey images, 3 for colour, or any other number.
        options: of a FAMSeg any field of FAMSegConfig, for example shortcut="identity", upsample="bilinear",
            context="none"; the others have none.

    Raises:
        ValueError: unknown model, option or value, or one that the others make meaningless; a package that the model
            needs is missing.
    """
    config = model_config(name, num_classes, in_channels, **options)
    return _OTHERS[name](num_classes, in_channels) if config is None else create_famseg(config)


def model_config(name: str, num_classes: int, in_channels: int = 1, **options: object) -> FAMSegConfig | None:
    """What `create_model` builds a FAMSeg from; None for the other networks. Nothing is built yet.

    Raises:
        ValueError: as `create_model`.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    known = option_names(name)
    if unknown := options.keys() - known:
        expected = f"expected one of {', '.join(sorted(known))}" if known else f"{name} has none"
        raise ValueError(f"model option: {expected}, got {', '.join(sorted(unknown))}")
    if name in SIZES:
        return famseg_config(name, num_classes, in_channels=in_channels, **options)
    expect_count("num_classes", num_classes)
    expect_count("in_channels", in_channels)
    if name in NETWORKS:
        require_package(name)
    return None
