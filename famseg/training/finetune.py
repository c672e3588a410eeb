"""Starting from given weights, and training a part of the network only: the strategies of arXiv 2407.20086, Fig. 2."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from famseg.files.errors import DataError
from famseg.inference import read_checkpoint, weights_of
from famseg.models import FAMSeg, UNetMobileNetV2, load_mscan


def parse_trainable(text: str) -> tuple[str, tuple[int, ...]]:
    """ "decoder:1,2" → ("decoder", (1, 2)); no numbers: the whole part. Raises ValueError for anything else."""
    found = re.fullmatch(r"(all|encoder|decoder(?::(\d+(?:,\d+)*))?)", text)
    if found is None:
        raise ValueError(f"trainable: expected all, encoder, decoder, or layers of it like decoder:1,2; got {text!r}")
    return found[1].split(":")[0], tuple(int(number) for number in found[2].split(",")) if found[2] else ()


def freeze(model: nn.Module, trainable: str) -> list[nn.Module]:
    """Leave gradients to the part `trainable` and the classifier only; returns the modules that stay as they are.

    These belong into evaluation mode, or their batch norms would go on adapting. Decoder layers count from 1, the
    deepest.

    Raises:
        ValueError: the decoder has no such layer.
    """
    part, numbers = parse_trainable(trainable)
    if part == "all":
        return []
    layers = list(model.decoder_layers)  # type: ignore[arg-type]
    if beyond := [number for number in numbers if not 1 <= number <= len(layers)]:
        raise ValueError(f"trainable: expected decoder layers from 1 to {len(layers)}, got {beyond[0]}")
    trained = [layers[number - 1] for number in numbers] or [model.get_submodule(part)]
    trained.append(model.get_submodule("classifier"))
    kept = {parameter for module in trained for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in kept)
    inside = {module for one in trained for module in one.modules()}
    return [module for module in model.modules() if module not in inside and not any(True for _ in module.children())]


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Start from weights in a file; returns what was loaded, in words.

    Takes a checkpoint of famseg-train of the same network, or a published encoder saved by torch.save: MSCAN for a
    FAMSeg's strip blocks, MobileNetV2 (torchvision) for U-Net.

    Raises:
        DataError: the file cannot be read or does not fit.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"weights: {path}: cannot be read ({error.strerror})") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise DataError(f"weights: {path}: holds no tensors saved by torch.save ({reason})") from error
    try:
        if isinstance(content, dict) and "loops" in content:
            model.load_state_dict(weights_of(read_checkpoint(path)))  # read again: with its checksums
            return f"all weights of {path}"
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        if isinstance(model, FAMSeg):
            return f"{load_mscan(model, content)} tensors of the strip blocks from {path}"
        if isinstance(model, UNetMobileNetV2):
            return f"{model.load_encoder(content)} tensors of the encoder from {path}"
    except (ValueError, RuntimeError) as error:
        # torch's first line only says that there was an error.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DataError(f"weights: {path} does not fit this network: {lines[:2][-1]}") from error
    raise DataError(f"weights: {path}: this network starts from checkpoints of famseg-train only")
