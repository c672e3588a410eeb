"""The classes: one entry a structure, which everything reads that names, draws, measures or writes one.

Another structure is another entry with the next label. Where data sets know its true length, `Sample` needs a field of
the measure's name too. The number of classes is the network's: one that was trained before does not load any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from famseg.biometrics import Axis, Ellipse, fit_femur, fit_head

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Measure:
    """A length of a structure: in px, and in mm where an image has a pixel size."""

    name: str  # a field of Sample, and with _mm and _px a column of tables and a key of metrics.json
    short: str  # beside its value on an overlay
    definition: str
    fit: Callable[[np.ndarray], Ellipse | Axis | None]  # the shape measured in a (H, W) mask

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Structure:
    """A class of pixels."""

    label: int  # in masks, and the network's channel
    name: str  # in files, tables and plots
    word: str  # in sentences
    palette: RGB  # of mask files
    ink: str  # on white: curves, and the report's marks
    shade: RGB = (0, 0, 0)  # over the grey image; the background is not drawn
    shade_word: str = ""
    measure: Measure | None = None

    @property
    def title(self) -> str:
        return self.word if self.word == self.name else f"{self.word} ({self.name})"


# In the order of reports. The paper's colours (Fig. 4), head green and femur red, in shades that stay apart from each
# other and from grey speckle, also for readers with red-green blindness (the red is darker).
STRUCTURES = (
    Structure(label=0, name="background", word="background", palette=(0, 0, 0), ink="#8a8f98"),
    Structure(
        label=2,
        name="FB",
        word="head",
        palette=(0, 255, 0),
        ink="#1a9e4b",
        shade=(52, 214, 88),
        shade_word="green",
        measure=Measure("head_circumference", "HC", "perimeter of the ellipse fitted to the head", fit_head),
    ),
    Structure(
        label=1,
        name="FL",
        word="femur",
        palette=(255, 0, 0),
        ink="#d7301f",
        shade=(235, 52, 45),
        shade_word="red",
        measure=Measure("femur_length", "FL", "tip to tip along its axis", fit_femur),
    ),
)

BY_NAME = {structure.name: structure for structure in STRUCTURES}
BY_LABEL = tuple(sorted(STRUCTURES, key=lambda structure: structure.label))
CLASSES = tuple(structure.name for structure in BY_LABEL)
OBJECTS = BY_LABEL[1:]
REPORTED = tuple(structure for structure in STRUCTURES if structure in OBJECTS)
MEASURES = {structure.name: structure.measure for structure in REPORTED if structure.measure is not None}
