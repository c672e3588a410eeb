"""Parameters and FLOPs of a model, part by part."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from famseg.models import FAMSeg, create_model


def count(name: str, image_size: int, **options: Any) -> tuple[int, int]:
    """Parameters, and multiply–adds of the forward pass of one image."""
    model = create_model(name, **options).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, image_size, image_size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def summarise(name: str, image_size: int, **options: Any) -> str:
    """A table of parameters and forward FLOPs (2 per multiply–add, one image) of the model's parts."""
    model = create_model(name, **options).eval()
    image = torch.zeros(1, 1, image_size, image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    counts = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    lines = [f"{name} at {image_size}×{image_size}", f"{'part':28}{'parameters':>14}{'MFLOP':>12}"]
    for path, module in _parts(model):
        flops = counts.get(".".join(filter(None, (type(model).__name__, path))), 0)
        parameters = sum(p.numel() for p in module.parameters())
        lines.append(f"{path or 'total':28}{parameters:14,}{flops / 1e6:12.1f}")
    return "\n".join(lines)


def _parts(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    if not isinstance(model, FAMSeg):
        return [*((path, model.get_submodule(path)) for path in ("encoder", "decoder", "classifier")), ("", model)]
    stages = [(f"encoder.stages.{i}", stage) for i, stage in enumerate(model.encoder.stages)]
    steps = [(f"decoder.steps.{i}", step) for i, step in enumerate(model.decoder.steps)]
    return [
        ("encoder.stem", model.encoder.stem),
        *stages,
        ("decoder.context", model.decoder.context),
        *steps,
        ("classifier", model.classifier),
        ("", model),
    ]
