"""Checkpoints as famseg-train writes them, of networks that were never trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from famseg.data.dataset import open_data
from famseg.data.sample import CLASSES
from famseg.data.split import split_by_subject
from famseg.models import create_model
from famseg.training.config import TrainConfig


def write_checkpoint(path: Path, **settings: Any) -> Path:
    """A fresh network with a last layer that tells bright from dark, so that it finds something in most images."""
    config = TrainConfig(**{"image_size": 32, "data": "phantom:10", **settings})
    torch.manual_seed(config.seed)
    model = create_model(config.model, len(CLASSES), **config.model_options())
    torch.nn.init.normal_(model.classifier.weight, std=3.0)
    states = {f"model.{name}": value for name, value in model.state_dict().items()}
    samples = open_data(config.data, image_size=config.image_size, seed=config.seed)
    parts = split_by_subject(samples, config.val_fraction, config.seed)
    checkpoint = {
        "config": dataclasses.asdict(config),
        "state_dict": states,
        "epoch": 4,
        "images": {
            name: {samples[i].digest: samples[i].name for i in part}
            for name, part in zip(("trained", "held_out"), parts, strict=True)
        },
        "optimizer_states": [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path
