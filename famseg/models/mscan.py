"""Published SegNeXt weights, for SegNeXt itself and for FAMSeg's strip blocks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from famseg.models.famseg import FAMSeg
from famseg.models.segnext import SegNeXt

_FIRST = "patch_embed1.proj.0.weight"
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
    targets, found = model.published_tensors(), {}
    for name, target in targets.items():
        if name.startswith(_HEAD) and not with_head:
            continue
        value = source.get(name, source.get(name.replace("dwconv.dwconv", "dwconv")))
        if value is None and name.endswith("num_batches_tracked"):
            continue
        if value is not None and name == _FIRST and target.shape[1] == 1 and value.shape[1:2] == (3,):
            value = value.sum(1, keepdim=True)
        if value is None or value.shape != target.shape:
            came = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise ValueError(f"{name}: expected shape {tuple(target.shape)}, got {came}")
        found[name] = value
    for name, value in found.items():
        targets[name].copy_(value)
    return len(found)
