"""Networks: FAMSeg, and what its authors and the other papers compare with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import nn

from famseg.models.famseg import SIZES, FAMSeg, FAMSegConfig, create_famseg, load_mscan
from famseg.models.unet import UNetMobileNetV2
from famseg.models.unext import UNeXt

__all__ = ["MODELS", "FAMSeg", "FAMSegConfig", "UNeXt", "UNetMobileNetV2", "create_model", "load_mscan", "option_names"]

_OTHERS: dict[str, Callable[[int], nn.Module]] = {
    "unet_mobilenetv2": UNetMobileNetV2,
    "unext": UNeXt,
    "sc_unext_skip": functools.partial(UNeXt, skip=True),
    "sc_unext_fuse": functools.partial(UNeXt, fuse=True),
    "sc_unext": functools.partial(UNeXt, skip=True, fuse=True),
}
MODELS = (*SIZES, *_OTHERS)


def option_names(name: str) -> frozenset[str]:
    """What `create_model` takes beside the model's name and the number of classes."""
    return frozenset(field.name for field in dataclasses.fields(FAMSegConfig)) if name in SIZES else frozenset()


def create_model(name: str, num_classes: int = 3, **options: object) -> nn.Module:
    """A freshly initialised network: (N, 1, H, W) → logits (N, num_classes, H, W).

    Args:
        name: one of MODELS.
        num_classes: output classes.
        options: of a FAMSeg any field of FAMSegConfig, for example shortcut="identity", upsample="bilinear",
            context="none"; the others have none.

    Raises:
        ValueError: unknown model, option or value; a package that the model needs is missing.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    known = option_names(name)
    if unknown := options.keys() - known:
        expected = f"expected one of {', '.join(sorted(known))}" if known else f"{name} has none"
        raise ValueError(f"model option: {expected}, got {', '.join(unknown)}")
    return create_famseg(name, num_classes, **options) if name in SIZES else _OTHERS[name](num_classes)
