"""FAMSeg: segmentation of fetal femur and head in ultrasound, with millimetres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from famseg.models import FAMSeg, FAMSegConfig, create_model, optimize_for_inference

__version__ = "0.1.0"

__all__ = ["FAMSeg", "FAMSegConfig", "create_model", "optimize_for_inference"]


def __getattr__(name: str) -> Any:
    """When they are first asked for: before torch is imported, the command lines have something to say to it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from famseg import models

    return getattr(models, name)
