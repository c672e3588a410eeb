"""FAMSeg: segmentation of fetal femur and head in ultrasound, with millimetres."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from famseg.inference import load_network, load_pretrained, predict
    from famseg.models import FAMSeg, FAMSegConfig, create_model, optimize_for_inference

_MODELS = ("FAMSeg", "FAMSegConfig", "create_model", "optimize_for_inference")
__all__ = [
    "FAMSeg",
    "FAMSegConfig",
    "create_model",
    "load_network",
    "load_pretrained",
    "optimize_for_inference",
    "predict",
]


def __getattr__(name: str) -> Any:
    """When they are first asked for: before torch is imported, the command lines have something to say to it."""
    if name == "__version__":
        return importlib.metadata.version("famseg")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from famseg import inference, models

    return getattr(models if name in _MODELS else inference, name)
