"""Networks."""

from famseg.models.famseg import MODELS, FAMSeg, FAMSegConfig, create_model, load_mscan

__all__ = ["MODELS", "FAMSeg", "FAMSegConfig", "create_model", "load_mscan"]
