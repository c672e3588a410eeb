"""Parameters and FLOPs: of a model part by part, and of all models in a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from famseg.models import MODELS, FAMSeg, create_model


def summarise(name: str, image_size: int, *, num_classes: int = 3, in_channels: int = 1, **options: Any) -> str:
    """A table of parameters and forward FLOPs (2 per multiply–add, one image) of the model's parts."""
    model = create_model(name, num_classes, in_channels, **options).eval()
    image = torch.zeros(1, in_channels, image_size, image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    counts = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    lines = [f"{name} at {image_size}×{image_size}", f"{'part':28}{'parameters':>14}{'MFLOP':>12}"]
    for path, module in _parts(model):
        flops = counts.get(".".join(filter(None, (type(model).__name__, path))), 0)
        parameters = sum(p.numel() for p in module.parameters())
        lines.append(f"{path or 'total':28}{parameters:14,}{flops / 1e6:12.1f}")
    if isinstance(model, FAMSeg) and model.config.context != "none":
        pixels, rank = model.config.context_pixels(image_size), model.config.context_rank
        if pixels <= rank:
            lines.append(f"the context has {pixels} pixels, which {rank} bases (context_rank) do not constrain")
    return "\n".join(lines)


# What the papers say of a network: its size, or its mIoU in FAMSeg's Table 1.
PUBLISHED = {
    "segnext": "4.3 M with 150 classes; mIoU 89.94",
    "unet": "mIoU 90.13 (its citation is UPerNet)",
    "upernet": "mIoU 90.13, if the citation is meant",
    "twins": "mIoU 89.94",
    "swin": "mIoU 90.34",
    "mobilenetv3": "mIoU 88.37",
    "convnext": "mIoU 88.36",
    "bisenetv2": "mIoU 88.58",
    "unet_mobilenetv2": "6,628,945 with colour and one class; decoder 4.4 M",
    "unet31m": "31 M",
    "resunetplusplus": "7.67 MB, 19.31 GFLOPs (not its authors' network)",
    "unext_large": "1.47 M, 0.57 GFLOPs",
    "unext": "247.62 x 1024, 0.10 GFLOPs",
    "sc_unext": "243.63 x 1024, 0.13 GFLOPs",
}
_FAMSEG = "mIoU 91.58, no size"


def cost(
    name: str, *, num_classes: int = 3, in_channels: int = 1, image_size: int = 256, **options: Any
) -> tuple[int, int]:
    """Parameters, and multiply–adds of one image, of a model that is never given memory."""
    with torch.device("meta"):
        model = create_model(name, num_classes, in_channels, **options)
    model.to("meta").eval()  # what was made on the CPU all the same
    image = torch.empty(1, in_channels, image_size, image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def list_models(num_classes: int, in_channels: int = 1) -> Iterator[str]:
    """The lines of a table of all models, with what the papers say of them."""
    yield f"{'model':18}{'parameters':>12}{'GMAC at 256x256':>17}  in the papers"
    for name in MODELS:
        try:
            parameters, macs = cost(name, num_classes=num_classes, in_channels=in_channels)
            sizes = f"{parameters:12,}{macs / 1e9:17.3f}"
        except ValueError as error:  # a package is missing
            sizes = f"  {error}"
        yield f"{name:18}{sizes}  {PUBLISHED.get(name, _FAMSEG if name.startswith('famseg') else '')}".rstrip()


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
