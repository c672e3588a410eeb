"""What the values of a source's masks mean, and samples as a network takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from famseg.anatomy import CLASSES, Structure, names_of
from famseg.data.sample import Sample
from famseg.data.split import subjects_of
from famseg.files.errors import DataError
from famseg.files.images import as_rgb


def labels_of(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The names of the structures that a source's masks hold, by label.

    A source with other ones than the default's offers them as `labels`.
    """
    return tuple(getattr(samples, "labels", CLASSES))


def left_out_of(samples: Sequence[Sample]) -> list[str]:
    """The structures of a source that its masks, made for a network, have as background."""
    return list(getattr(samples, "left_out", ()))


def _unlabelled(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The structures that a source has labels for, and that nobody looked for in any of its images."""
    return tuple(getattr(samples, "unlabelled", ()))


def adapted(
    sources: Sequence[Sequence[Sample]], spec: str, classes: Sequence[Structure], colour: bool
) -> list[Sequence[Sample]]:
    """The sources of a specification with the labels of `classes`, in colour images as (H, W, 3).

    Raises:
        DataError: no source has one of the classes, or labels any of them.
    """
    names = names_of(classes)
    known = list(dict.fromkeys(name for source in sources for name in labels_of(source)))
    looked_for = {name for source in sources for name in labels_of(source) if name not in _unlabelled(source)}
    missing = [name for name in names if name not in known]
    if missing or looked_for.isdisjoint(names[1:]):
        found = ", ".join(name for name in known[1:] if name in looked_for) or "none"
        raise DataError(
            f"data '{spec}': expected masks with {', '.join(names[1:])}, found {found} and no "
            f"{missing[0] if missing else names[1]}; use other data, or train with other --classes"
        )
    return [s if labels_of(s) == names and not colour else _Adapted(s, names, colour) for s in sources]


class _Adapted(Sequence[Sample]):
    """A source's samples; what is none of `names` becomes background, and in colour grey images are repeated."""

    def __init__(self, source: Sequence[Sample], names: Sequence[str], colour: bool) -> None:
        self._source, self._colour = source, colour
        known = labels_of(source)
        self.labels = tuple(names)
        unlabelled = _unlabelled(source)  # nothing there to leave out
        self.left_out = [name for name in known if name not in self.labels and name not in unlabelled]
        self._new = np.array([self.labels.index(name) if name in self.labels else 0 for name in known], np.uint8)
        self._same = self._new.tolist() == list(range(len(known)))

    @property
    def subjects(self) -> list[str]:
        return subjects_of(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        sample = self._source[index]
        return dataclasses.replace(
            sample,
            image=as_rgb(sample.image) if self._colour else sample.image,
            mask=sample.mask if self._same else self._new[sample.mask],
        )
