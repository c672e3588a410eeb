"""The one record type that every data source (real or synthetic) delivers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from famseg.anatomy import CLASSES

__all__ = ["CLASSES", "Sample"]


def all_but(name: str) -> tuple[str, ...]:
    """What a source does not label that labels one structure."""
    return tuple(other for other in CLASSES[1:] if other != name)


@dataclass(frozen=True)
class Sample:
    """One labelled image."""

    name: str  # unique within the data set
    subject: str  # images of one subject must never be split between train and validation
    image: np.ndarray  # (H, W) uint8 grey, or (H, W, 3) uint8 RGB
    mask: np.ndarray  # (H, W) uint8; `famseg.data.classes.labels_of` has the names of its values
    pixel_size: float | None = None  # mm per pixel
    femur_length: float | None = None  # mm, None where unknown or absent
    head_circumference: float | None = None  # mm, None where unknown or absent
    simulated: bool = False  # drawn, with a mask that is exact
    unlabelled: tuple[str, ...] = ()  # structures that may be in the image's background, for nobody looked for them

    def true_length(self, measure: str) -> float | None:
        """The field that a measure of `famseg.anatomy` is called by, mm; None without one."""
        value: float | None = getattr(self, measure, None)
        return value

    @property
    def digest(self) -> str:
        """What tells this image from others, by its pixels alone: a file may be copied and renamed."""
        return hashlib.blake2b(repr(self.image.shape).encode() + self.image.tobytes(), digest_size=8).hexdigest()
