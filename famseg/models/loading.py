"""Tensors by name into a network: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def load_all(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], others: Iterable[str] = ()) -> int:
    """Copy `found` into `targets`, the tensors of a network; returns how many.

    Where the network's first kernel sees one channel and that of `found` three, the colours are summed: a grey image is
    one with three equal channels. Old files lack the counters of batch norms.

    Args:
        others: what else was there, for the message.

    Raises:
        ValueError: names what is missing, of another shape, or of no use. Nothing is copied then.
    """
    first = next((name for name, target in targets.items() if target.dim() == 4), None)
    values = dict(found)
    if first in values and targets[first].shape[1] == 1 and values[first].shape[1:2] == (3,):
        values[first] = values[first].sum(1, keepdim=True)
    shared = [name for name in targets if name in values]
    faults = {
        "missing": [n for n in targets if n not in values and not n.endswith("num_batches_tracked")],
        "of another shape": [
            f"{n} {tuple(values[n].shape)} instead of {tuple(targets[n].shape)}"
            for n in shared
            if values[n].shape != targets[n].shape
        ],
    }
    unexpected = [name for name in values if name not in targets]
    if unexpected or any(faults.values()):
        faults["not of this network"] = [*unexpected, *sorted(others)]
        raise ValueError("; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names))
    with torch.no_grad():
        for name in shared:
            targets[name].copy_(values[name])
    return len(shared)


def _some(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
