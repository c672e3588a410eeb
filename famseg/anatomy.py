"""The classes: one entry a structure, which everything reads that names, draws, measures or writes one.

The table has what is known, and is what a network has unless it is told otherwise. The classes of a network are a tuple
of structures by label, background first, made from their names by `parse_classes`: its loss, its scores, its pictures
and its files read that tuple.

Another known structure is another entry with the next label. Where data sets know its true length, `Sample` needs a
field of the measure's name too. The default number of classes then grows: a checkpoint that does not name its classes
does not load any more.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
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

# Of structures that are not in the table, in the order of a network's classes: word, shade and palette, ink. None is
# red, green or the calipers' yellow, and the first is unlike skin.
_FURTHER_COLOURS: tuple[tuple[str, RGB, str], ...] = (
    ("blue", (56, 132, 255), "#1f63d0"),
    ("orange", (255, 150, 40), "#c96a00"),
    ("purple", (184, 108, 240), "#7c3fb8"),
    ("cyan", (40, 208, 222), "#0b8793"),
    ("pink", (255, 110, 180), "#c2327c"),
    ("brown", (176, 116, 70), "#7a4a22"),
)
_MOST = 255  # labels in a mask beside the background
# A name is a part of columns and of CSS classes. With "mean" there would be two columns mean_iou.
_NAME, _RESERVED = re.compile(r"[A-Za-z][A-Za-z0-9_-]*"), ("background", "mean")


def parse_classes(text: str) -> tuple[Structure, ...]:
    """ "FL,FB" → the background and the structures of these names, which get the labels 1, 2, ... in this order.

    A structure of the table keeps its colours, word and measure. Another has the next of a few colours, which begin
    again after the last, its name as its word, and no measure.

    Raises:
        ValueError: no name, one that is there twice, is reserved or has other signs, or more than fit into a mask.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not _NAME.fullmatch(name) or name in _RESERVED or names.count(name) > 1:
            raise ValueError(
                f"classes: expected names joined by commas, each once, a letter and then letters, digits, _ or -, none "
                f"of them {' or '.join(_RESERVED)}; got {name!r} in {text!r}"
            )
    if len(names) > _MOST:
        raise ValueError(f"classes: expected at most {_MOST} names, got {len(names)}")
    further = itertools.cycle(_FURTHER_COLOURS)
    structures = [BY_LABEL[0]]
    for label, name in enumerate(names, 1):
        if name in BY_NAME:
            structures.append(dataclasses.replace(BY_NAME[name], label=label))
        else:
            word, shade, ink = next(further)
            structures.append(Structure(label, name, name, palette=shade, ink=ink, shade=shade, shade_word=word))
    return tuple(structures)


def names_of(classes: Sequence[Structure]) -> tuple[str, ...]:
    """The names, by label."""
    return tuple(structure.name for structure in classes)


def reported(classes: Sequence[Structure]) -> list[Structure]:
    """The objects in the order of reports: those of the table as there, then the others by label."""
    order = [*BY_NAME]
    return sorted(classes[1:], key=lambda s: order.index(s.name) if s.name in order else len(order))


def measures_of(classes: Sequence[Structure]) -> dict[str, Measure]:
    """What is measured, by the structure's name, in the order of reports."""
    return {structure.name: structure.measure for structure in reported(classes) if structure.measure is not None}


CLASSES = names_of(BY_LABEL)
OBJECTS = BY_LABEL[1:]
MEASURES = measures_of(BY_LABEL)
DEFAULT = ",".join(CLASSES[1:])  # `parse_classes` makes BY_LABEL of it
