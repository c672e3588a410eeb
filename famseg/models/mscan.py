"""Published SegNeXt weights, for SegNeXt itself and for FAMSeg's strip blocks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from famseg.models.famseg import FAMSeg
from famseg.models.loading import load_all
from famseg.models.segnext import SegNeXt

_HEAD = "decode_head."


def load_mscan(model: FAMSeg | SegNeXt, state_dict: Mapping[str, Tensor]) -> int:
    """Load a published MSCAN, or a SegNeXt with it; returns how many tensors were loaded.

    Takes SegNeXt's keys (`block1.0.attn.…`, `mlp.dwconv.dwconv.…`) and mmseg's (`mlp.dwconv.…`), with or without a
    `backbone.` prefix. A FAMSeg takes the strip blocks; stem, downsampling and norms between stages have no counterpart
    in it. A SegNeXt takes all of it, and the decode head without its classifier where the checkpoint has one. For grey
    images the colour kernels of the first convolution are summed: such an image has three equal channels.

    Raises:
        ValueError: the checkpoint has fewer blocks or other widths than the model. Nothing is loaded then.
    """
    source = {key.removeprefix("backbone."): value for key, value in state_dict.items()}
    with_head = any(key.startswith(_HEAD) for key in source)
    targets = {n: t for n, t in model.published_tensors().items() if with_head or not n.startswith(_HEAD)}
    theirs = {name: name if name in source else name.replace("dwconv.dwconv", "dwconv") for name in targets}
    found = {name: source[key] for name, key in theirs.items() if key in source}
    return load_all(targets, found, others=source.keys() - theirs.values())
