"""Landmarks: the ends of a head's diameters or of a femur, as rows of a table, and the shape and mask they stand for.

ofd_1_x, ofd_1_y, ofd_2_x, ofd_2_y, bpd_1_x, ...   a head: ends of the occipitofrontal and the biparietal diameter
fl_1_x, fl_1_y, fl_2_x, fl_2_y                     a femur: its ends
px_to_mm_rate                                      mm per pixel, where known
center_w, center_h                                 half the width and height of the image they were set on, where known

These are the columns of the public annotations of arXiv 2512.16710. x and y are those of pixel centres, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from famseg.anatomy import CLASSES
from famseg.biometrics import MIN_AREA, Axis, Ellipse
from famseg.files.errors import DataError
from famseg.files.tables import Row

# Nobody marks how wide a femur is: an eighth of its length, the middle of what phantoms have (0.10 to 0.15).
FEMUR_WIDTH = 1 / 8

# Diameters that are an ellipse's axes halve each other at right angles. 1,796 heads marked by hand are off by up to
# 7.5 degrees and 8 % of the longer one; ends that are swapped between the diameters are off by far more.
_LEANING = 15.0  # degrees
_APART = 0.15  # of the occipitofrontal diameter

_PIXEL_SIZE = "px_to_mm_rate"
_CENTER = ("center_w", "center_h")


@dataclass(frozen=True)
class Marked:
    """A structure that is marked."""

    name: str  # in `famseg.anatomy`
    measure: str  # the field of `Sample` for its length
    longest: float  # mm; above, the pixel size or the landmarks are wrong
    diameters: tuple[str, ...]  # first parts of its columns
    shape: Callable[[Row], Ellipse | Axis]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"{diameter}_{end}_{axis}" for diameter in self.diameters for end in "12" for axis in "xy")


def head_ellipse(row: Row) -> Ellipse:
    """The ellipse of a head's diameters, px: centred between the four ends, turned as the occipitofrontal one.

    Raises:
        DataError: a coordinate is no number, or the diameters do not halve each other at right angles.
    """
    ofd, bpd = _diameter(row, "ofd"), _diameter(row, "bpd")
    (x, y), (other_x, other_y) = _middle(ofd), _middle(bpd)
    degrees = _degrees(ofd)
    leaning = abs((_degrees(bpd) - degrees) % 180 - 90)
    if leaning > _LEANING or math.hypot(other_x - x, other_y - y) > _APART * ofd.length:
        raise DataError(
            f"{row.where}: expected the diameters ofd and bpd of a head to halve each other at right angles, found "
            f"middles ({x:g}, {y:g}) and ({other_x:g}, {other_y:g}) and {90 - leaning:.0f} degrees; correct their ends"
        )
    a, b = max(ofd.length, bpd.length) / 2, min(ofd.length, bpd.length) / 2
    turned = degrees if ofd.length >= bpd.length else (degrees + 90) % 180
    return Ellipse((x + other_x) / 2, (y + other_y) / 2, a, b, turned)


def femur_axis(row: Row) -> Axis:
    """A femur from end to end, px. Raises DataError where a coordinate is no number."""
    return _diameter(row, "fl")


HEAD = Marked("FB", "head_circumference", 450, ("ofd", "bpd"), head_ellipse)
FEMUR = Marked("FL", "femur_length", 90, ("fl",), femur_axis)


class Landmarks:
    """A structure as a row marks it.

    Raises:
        DataError: as the structure's shape; a pixel size or a centre is neither empty nor a number.
    """

    def __init__(self, structure: Marked, row: Row) -> None:
        self.structure = structure
        self.where = row.where
        self.shape = structure.shape(row)  # px
        self.pixel_size = row.millimetres(_PIXEL_SIZE)  # mm per pixel, None where unknown
        known = all(row.cells.get(column) for column in _CENTER)
        self.image_size = tuple(2 * row.number(column) for column in _CENTER) if known else None  # width, height, px

    @property
    def area(self) -> float:
        """Of the shape, px²."""
        if isinstance(self.shape, Ellipse):
            return math.pi * self.shape.a * self.shape.b
        radius = self.shape.length * FEMUR_WIDTH / 2
        return 2 * radius * (self.shape.length - 2 * radius) + math.pi * radius**2

    @property
    def doubt(self) -> str | None:
        """Why these cannot be right, if they cannot: clicks beside each other, or a pixel size of another image."""
        if self.area < MIN_AREA:
            return f"a shape below {MIN_AREA} pixels"
        if self.pixel_size is not None and self.shape.length * self.pixel_size > self.structure.longest:
            return (
                f"{self.structure.measure} above {self.structure.longest:g} mm: check the landmarks and {_PIXEL_SIZE}"
            )
        return None

    def mask(self, height: int, width: int) -> np.ndarray:
        """The structure in an image, (H, W) uint8: its label where its shape contains a pixel's centre, else 0.

        Raises:
            DataError: the landmarks were set on an image of another size, or the shape is outside the image.
        """
        size = self.image_size
        if size is not None and max(abs(size[0] - width), abs(size[1] - height)) > 1:
            raise DataError(
                f"{self.where}: its landmarks were set on an image of {size[0]:g}x{size[1]:g} pixels (twice center_w "
                f"and center_h), found one of {width}x{height}; use the image as published, or correct the row"
            )
        shape = self.shape
        inside = shape.inside(height, width) if isinstance(shape, Ellipse) else _inside_bar(shape, height, width)
        if not inside.any():
            raise DataError(
                f"{self.where}: expected landmarks inside the image of {width}x{height} pixels; correct them"
            )
        return inside.astype(np.uint8) * np.uint8(CLASSES.index(self.structure.name))


def _inside_bar(axis: Axis, height: int, width: int) -> np.ndarray:
    """The pixels of a straight bar with round ends, as long as its axis; (H, W) bool."""
    rows, columns = np.ogrid[:height, :width]
    (x, y), angle = _middle(axis), math.radians(_degrees(axis))
    radius = axis.length * FEMUR_WIDTH / 2
    dx, dy = columns - x, rows - y
    along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    beyond = np.maximum(np.abs(along) - (axis.length / 2 - radius), 0)  # into the round end
    return beyond**2 + across**2 <= radius**2


def _diameter(row: Row, name: str) -> Axis:
    (x, y), (other_x, other_y) = ((row.number(f"{name}_{end}_x"), row.number(f"{name}_{end}_y")) for end in "12")
    return Axis((x, y), (other_x, other_y))


def _middle(axis: Axis) -> tuple[float, float]:
    return (axis.start[0] + axis.end[0]) / 2, (axis.start[1] + axis.end[1]) / 2


def _degrees(axis: Axis) -> float:
    """The direction against the image's x axis, from 0 to 180."""
    return math.degrees(math.atan2(axis.end[1] - axis.start[1], axis.end[0] - axis.start[0])) % 180
