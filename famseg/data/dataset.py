"""From a data specification to what the training loop iterates over."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from famseg.anatomy import BY_LABEL, MEASURES, Structure
from famseg.data import DATA_HELP
from famseg.data.augment import Transform, channels_first, letterbox_scale
from famseg.data.classes import adapted, left_out_of
from famseg.data.folder import Folder
from famseg.data.hc18 import HC18
from famseg.data.isic import ISIC
from famseg.data.phantom import Phantom
from famseg.data.planes import Planes
from famseg.data.sample import Sample
from famseg.data.split import subjects_of
from famseg.files.errors import DataError
from famseg.files.listing import given_path

OPEN = 1 << 62  # in a mask: background, or a class of those whose labels are the bits set beside this one
PHANTOM_LENGTH = 800  # images of a plain "phantom": 640 to train, 160 to validate at the usual 80:20 split
_NEXT_SOURCE = r",(?=\s*(?:phantom|hc18|planes|isic|folder)\b)"  # not every comma: folders have them in their names


class SegmentationDataset(torch.utils.data.Dataset):
    """Some of a sequence's samples, transformed for the network.

    Every item is a dict: "image" float32 (1, h, w), in colour (3, h, w); "mask" int64 (h, w); "index" int, the
    position in `samples`; "pixel_size" float, mm per network pixel before augmentation; "head_circumference" and
    "femur_length" float, mm. Unknown lengths are NaN, so that items collate.

    Augmentation is a function of (seed, epoch, index) alone: neither the order of access nor the number of
    loader workers changes it. `cache` keeps decoded samples in memory (per worker process: 0.2 MB for a
    400x270 pair).

    `partly` has the labels of classes that some samples label and others do not (`Sample.unlabelled`): the background
    of the latter may hold them, and is `OPEN` plus their bits in place of 0. To score, also of those that none labels.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        indices: Sequence[int],
        transform: Transform,
        *,
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        self.samples = samples
        self.indices = list(indices)
        self.transform = transform
        self.seed = seed
        self.partly: dict[str, int] = {}
        self._cache: dict[int, Sample] | None = {} if cache else None
        # Shared memory, so that set_epoch also reaches loader workers that are already running.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next items get."""
        self._epoch.fill_(epoch)

    def sample(self, position: int) -> Sample:
        """The untransformed sample behind item `position`."""
        index = self.indices[position]
        if self._cache is None:
            return self.samples[index]
        if index not in self._cache:
            self._cache[index] = self.samples[index]
        return self._cache[index]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index, sample = self.indices[position], self.sample(position)
        entropy = np.random.SeedSequence([self.seed, int(self._epoch), index])
        image, mask = self.transform(sample.image, sample.mask, int(entropy.generate_state(1)[0]))
        height, width = sample.mask.shape
        scale = letterbox_scale(height, width, self.transform.size)
        labels = mask.astype(np.int64)
        if unlabelled := [self.partly[name] for name in sample.unlabelled if name in self.partly]:
            labels[labels == 0] = OPEN + sum(1 << label for label in unlabelled)
        return {
            "image": torch.from_numpy(channels_first(image)),
            "mask": torch.from_numpy(labels),
            "index": index,
            "pixel_size": math.nan if sample.pixel_size is None else sample.pixel_size / scale,
            **{measure.name: _or_nan(sample.true_length(measure.name)) for measure in MEASURES.values()},
        }


def open_data(
    spec: str, *, image_size: int, seed: int, classes: Sequence[Structure] = BY_LABEL, in_channels: int = 1
) -> Sequence[Sample]:
    """Open a source, like "phantom:64" or "hc18:DIR", or several of them joined by commas.

    Phantoms are generated at (image_size, image_size) from `seed`. In a joined set, every subject is prefixed
    by its source, so that equal names in two sources stay different subjects. Masks have the labels of `classes`, to
    which those of a source are assigned by name; what becomes background is `left_out_of`. With three `in_channels`
    images are (H, W, 3).

    Raises:
        DataError: the specification is not one of these, names a source twice, or its data are unusable; no source has
            one of the classes.
    """
    parts = [part.strip() for part in re.split(_NEXT_SOURCE, spec)]
    colour = in_channels == 3
    sources = adapted([_open(part, spec, image_size, seed, classes, colour) for part in parts], spec, classes, colour)
    if len(sources) == 1:
        return sources[0]
    # One source twice would put the same images under two subjects, on both sides of a split.
    names = [_source_name(part) for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data '{spec}': '{name}' is named twice; name every source once")
    return _Joined(dict(zip(names, sources, strict=True)))


class _Joined(Sequence[Sample]):
    """Sequences one after the other, subjects prefixed by the name of their source."""

    def __init__(self, sources: dict[str, Sequence[Sample]]) -> None:
        self._sources = sources

    @property
    def subjects(self) -> list[str]:
        return [f"{name}/{subject}" for name, source in self._sources.items() for subject in subjects_of(source)]

    @property
    def left_out(self) -> list[str]:
        return list(dict.fromkeys(name for source in self._sources.values() for name in left_out_of(source)))

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources.values())

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        position = index + len(self) if index < 0 else index
        for name, source in self._sources.items():
            if 0 <= position < len(source):
                sample = source[position]
                return dataclasses.replace(sample, subject=f"{name}/{sample.subject}")
            position -= len(source)
        raise IndexError(f"index {index} out of range for {len(self)} samples")


def _open(
    part: str, spec: str, image_size: int, seed: int, classes: Sequence[Structure], colour: bool
) -> Sequence[Sample]:
    scheme, _, argument = part.partition(":")
    if scheme == "phantom":
        return Phantom(_length(argument, part) if ":" in part else PHANTOM_LENGTH, (image_size, image_size), seed)
    if scheme == "isic" and argument:
        return ISIC(argument, colour=colour)
    if scheme == "folder" and argument:
        return Folder(argument, classes, colour=colour)
    if scheme in ("hc18", "planes") and argument:
        return HC18(argument) if scheme == "hc18" else Planes(argument)
    raise DataError(f"data '{spec}': cannot open '{part}'; expected {DATA_HELP}")


def _length(argument: str, part: str) -> int:
    if not (argument.isascii() and argument.isdigit() and int(argument) > 0):
        raise DataError(f"data '{part}': expected a positive number of images after 'phantom:', like phantom:64")
    return int(argument)


def _source_name(part: str) -> str:
    scheme, _, argument = part.partition(":")
    return scheme if scheme == "phantom" else f"{scheme}:{os.path.realpath(given_path(argument))}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
