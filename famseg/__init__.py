"""FAMSeg: segmentation of fetal femur and head in ultrasound, with millimetres."""

from famseg.models import FAMSeg, FAMSegConfig, create_model, optimize_for_inference

__version__ = "0.1.0"

__all__ = ["FAMSeg", "FAMSegConfig", "create_model", "optimize_for_inference"]
