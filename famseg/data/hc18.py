"""The HC18 challenge's training set: fetal heads, outlined, with pixel size and head circumference.

training_set/NNN_HC.png              8-bit grey ultrasound image (NNN_2HC.png, ...: more of subject NNN)
training_set/NNN_HC_Annotation.png   closed outline of the head, one pixel wide
training_set_pixel_size_and_HC.csv   filename, pixel size(mm), head circumference (mm)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from famseg.anatomy import CLASSES
from famseg.data.sample import Sample, all_but
from famseg.files.errors import DataError
from famseg.files.images import read_grey
from famseg.files.labels import require_same_size
from famseg.files.listing import by_name, given_path, list_images, tell_left_out
from famseg.files.tables import read_table

HEAD = CLASSES.index("FB")
TABLE = "training_set_pixel_size_and_HC.csv"
_PIXEL_SIZE, _CIRCUMFERENCE = "pixel size(mm)", "head circumference (mm)"
_SUFFIX = "_Annotation"

# A closed outline and its convex hull agree to 1.4 % or better over 798 HC18 annotations (the rest is
# rasterisation of the smallest heads); an open outline encloses nothing. Half-way tells them apart safely.
_CLOSED = 0.5


class HC18(Sequence[Sample]):
    """The samples of a directory in the challenge's layout, read when asked for.

    `directory` is the folder holding `training_set/` and the table, or `training_set/` itself. Pairs and
    table rows are checked at construction (listing only), pixels at reading. Masks hold 2 (FB) in the head.

    Raises:
        DataError: nothing there, an image without annotation or table row, files that cannot be decoded or
            differ in size.
    """

    unlabelled = all_but("FB")

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory, table = _training_set(given_path(directory))
        rows = read_table(table, (_PIXEL_SIZE, _CIRCUMFERENCE))
        paths = by_name(list_images(self.directory))
        outlines = {name.removesuffix(_SUFFIX): path for name, path in paths.items() if name.endswith(_SUFFIX)}
        images = {name: path for name, path in paths.items() if not name.endswith(_SUFFIX)}
        if not images:
            raise DataError(f"{self.directory}: expected images like 001_HC.png, found none; unpack HC18 here")
        alone = [path.name for name, path in outlines.items() if name not in images]
        tell_left_out(f"{self.directory}", "no image of that name", alone)
        self.names = sorted(images)
        self._files: list[tuple[Path, Path]] = []
        self._mm: list[tuple[float, float]] = []
        for name in self.names:
            path = images[name]
            if not name[:3].isdigit():
                raise DataError(f"{path}: expected a name that starts with the subject's three digits, like 001_HC.png")
            if name not in outlines:
                raise DataError(f"{path}: its annotation {name}{_SUFFIX}.png is missing; add it, or remove the image")
            row = rows.row(path)
            if row is None:
                raise DataError(f"{table}: expected a row for {path.name}, found none; add it, or remove the image")
            pixel_size, circumference = (row.millimetres(column) for column in (_PIXEL_SIZE, _CIRCUMFERENCE))
            if pixel_size is None or circumference is None:
                raise DataError(f"{row.where}: expected '{_PIXEL_SIZE}' and '{_CIRCUMFERENCE}', found an empty cell")
            self._files.append((path, outlines[name]))
            self._mm.append((pixel_size, circumference))

    @property
    def subjects(self) -> list[str]:
        """The subject of every sample, without reading an image."""
        return [name[:3] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        name = self.names[index]
        pixel_size, circumference = self._mm[index]
        image_path, outline_path = self._files[index]
        image, outline = read_grey(image_path), read_grey(outline_path, exact=True)
        require_same_size(image, outline, image_path, outline_path)
        if not outline.any():
            raise DataError(f"{outline_path}: expected the outline of a head, found a black image; annotate it again")
        head = fill_outline(outline > outline.max() // 2)
        return Sample(
            name=name,
            subject=name[:3],
            image=image,
            mask=head.astype(np.uint8) * np.uint8(HEAD),
            pixel_size=pixel_size,
            head_circumference=circumference,
            unlabelled=self.unlabelled,
        )


def fill_outline(outline: np.ndarray) -> np.ndarray:
    """The region that a thin outline encloses, outline included; (H, W) bool to (H, W) bool.

    A closed outline is filled by flooding its outside. An outline with a gap, or one that leaves the image,
    lets the flood in; then the head, which is convex, is its convex hull, together with the image corners
    that the fitted ellipse contains (a head cut off by two borders covers a corner that the hull would miss).
    """
    ink = outline.astype(np.uint8)
    # A border of background lets the flood start anywhere outside, also around an outline at the image edge.
    _, areas = cv2.connectedComponents(
        cv2.copyMakeBorder(1 - ink, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1), connectivity=4
    )
    enclosed = (areas != areas[0, 0])[1:-1, 1:-1]
    if not ink.any():
        return outline
    points = cv2.findNonZero(ink).reshape(-1, 2)
    points = np.concatenate([points, _covered_corners(points, ink.shape)])
    hull = cv2.fillConvexPoly(np.zeros_like(ink), cv2.convexHull(points.astype(np.int32)), 1).astype(bool)
    return enclosed if enclosed.sum() > _CLOSED * hull.sum() else hull | outline


def _covered_corners(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Corners (x, y) of the image inside the ellipse fitted to the points; (K, 2), K from 0 to 4."""
    height, width = shape[:2]
    corners = np.array([(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)])
    if len(points) < 5:  # an ellipse has five parameters
        return corners[:0]
    (x, y), (width_, height_), degrees = cv2.fitEllipseDirect(points)
    if not (np.isfinite([x, y]).all() and min(width_, height_) > 0):
        return corners[:0]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    dx, dy = corners[:, 0] - x, corners[:, 1] - y
    inside = ((dx * c + dy * s) / width_) ** 2 + ((dy * c - dx * s) / height_) ** 2 <= 0.25
    return corners[inside]


def _training_set(directory: Path) -> tuple[Path, Path]:
    """The folder of images, and the table beside it: beside the name it was given by, or beside what that links to."""
    for candidate in (directory / "training_set", directory):
        if candidate.is_dir() and (candidate.name == "training_set" or any(candidate.glob("*_HC.png"))):
            named, real = Path(os.path.abspath(candidate)), candidate.resolve()
            tables = [folder.parent / TABLE for folder in (named, real)]
            return named, next((table for table in tables if table.exists()), tables[0])
    if not directory.is_dir():
        raise DataError(f"{directory}: no such folder; give the folder that holds HC18's training_set/")
    raise DataError(
        f"{directory}: expected HC18's layout (training_set/ and {TABLE}), found neither; "
        "give the folder that holds training_set/"
    )
