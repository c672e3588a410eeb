"""Your own data: a folder of images and a folder of index masks.

images/NAME.png     any image that famseg-predict reads, DICOM included; grey or colour, 8 or 16 bit
masks/NAME.png      one label per pixel, as the network counts its classes: 0 background, 1 femur (FL), 2 head (FB);
                    grey or palette; also bmp, tif, and NAME_segmentation.png; of one class 0 and 255 will do
pixel_size.csv      optional: filename, pixel_size_mm [, subject, femur_length_mm, head_circumference_mm]
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from famseg.anatomy import BY_LABEL, OBJECTS, Structure, names_of
from famseg.data.sample import Sample
from famseg.files.errors import DataError
from famseg.files.images import read_colour_image, read_image, write_image
from famseg.files.labels import black_and_white, read_labels, require_same_size, write_labels
from famseg.files.listing import by_name, given_path, is_hidden, list_images, stem, tell_left_out
from famseg.files.tables import FILENAME, FileTable, read_table, write_table

TABLE = "pixel_size.csv"
_SUBJECT, _PIXEL_SIZE = "subject", "pixel_size_mm"
_SUFFIX = "_[Ss]egmentation$"  # of a mask's name, in ISIC's archives
_LENGTHS = {s.measure.name: f"{s.measure.name}_mm" for s in OBJECTS if s.measure is not None}  # columns


@dataclass(frozen=True)
class _Entry:
    image: Path
    mask: Path
    subject: str
    pixel_size: float | None = None
    lengths: dict[str, Any] = field(default_factory=dict)  # mm


class Folder(Sequence[Sample]):
    """The samples of a directory with `images/` and `masks/`, ordered by name, read when asked for.

    Without a `subject` column every image counts as its own subject; several images of one fetus need the
    column, or they may end up on both sides of a split. With a table, every image needs a row; an empty cell
    means unknown (or the pixel size in the DICOM file). Pairs and rows are checked at construction (listing only),
    pixels at reading. Files and rows that belong to no image are counted on standard error.

    Args:
        classes: whose labels the masks have.
        colour: images as (H, W, 3) instead of (H, W).

    Raises:
        DataError: nothing there, an image without mask or table row or with two masks, files that cannot be decoded or
            differ in size, labels that are no class's.
    """

    def __init__(
        self, directory: str | os.PathLike[str], classes: Sequence[Structure] = BY_LABEL, *, colour: bool = False
    ) -> None:
        self.labels, self._read = names_of(classes), read_colour_image if colour else read_image
        self.directory = given_path(directory)
        if not self.directory.is_dir():
            raise DataError(f"{self.directory}: no such folder; give the folder that holds images/ and masks/")
        self._entries = _entries(self.directory)

    @property
    def names(self) -> list[str]:
        """File stems."""
        return [stem(entry.image) for entry in self._entries]

    @property
    def subjects(self) -> list[str]:
        """The subject of every sample, without reading an image."""
        return [entry.subject for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        entry = self._entries[index]
        (image, pixel_size), mask = self._read(entry.image), read_labels(entry.mask)
        require_same_size(image, mask, entry.image, entry.mask)
        white = black_and_white(mask)
        if white is not None and len(self.labels) == 2:
            mask = white
        if mask.max(initial=0) >= len(self.labels):
            expected = ", ".join(f"{label} {name}" for label, name in enumerate(self.labels))
            remedy = "relabel the mask" + ("" if white is None else ", or name its one class by --classes")
            raise DataError(f"{entry.mask}: expected the labels {expected}; found label {mask.max()}; {remedy}")
        if {*self.labels[1:3]} == {"FL", "FB"} and _blended(mask):
            raise DataError(
                f"{entry.mask}: label 1 lines label 2, as when a mask is resized with its labels blended; "
                "export it again, or resize it by nearest neighbour"
            )
        return Sample(
            name=stem(entry.image),
            subject=entry.subject,
            image=image,
            mask=mask,
            pixel_size=pixel_size if entry.pixel_size is None else entry.pixel_size,
            **entry.lengths,
        )


def _blended(mask: np.ndarray) -> bool:
    """Whether much of what is beside the head is femur: 1 is what interpolation makes between 0 and 2.

    23 % to all of it after a linear, cubic or area resize by 0.3 to 3; next to none of it in an annotation.
    """
    pairs = ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]))
    neighbours = np.concatenate([p[(q == 2) & (p != 2)] for a, b in pairs for p, q in ((a, b), (b, a))])
    return neighbours.size > 0 and float((neighbours == 1).mean()) > 0.2


def write_folder(samples: Iterable[Sample], directory: str | os.PathLike[str]) -> None:
    """Write samples as a `Folder`: PNG images, palette PNG masks and the table.

    Raises:
        DataError: the folder already holds images, or a sample's name is not usable as a file name.
    """
    root = Path(directory)
    if any((root / "images").glob("*")):
        raise DataError(f"{root / 'images'}: already holds files; give a new or empty folder")
    rows: list[dict[str, str]] = []
    for sample in samples:
        filename = f"{sample.name}.png"
        if not sample.name or Path(filename).name != filename or (root / "images" / filename).exists():
            raise DataError(f"{root}: cannot write the sample '{sample.name}': its name is not a new file name")
        write_labels(root / "masks" / filename, sample.mask)
        write_image(root / "images" / filename, sample.image)
        lengths = {_PIXEL_SIZE: sample.pixel_size, **{c: sample.true_length(name) for name, c in _LENGTHS.items()}}
        exact = {column: "" if mm is None else repr(float(mm)) for column, mm in lengths.items()}
        rows.append({FILENAME: filename, _SUBJECT: sample.subject, **exact})
    write_table(root / TABLE, rows, (FILENAME, _SUBJECT, _PIXEL_SIZE, *_LENGTHS.values()))


def _entries(root: Path) -> list[_Entry]:
    images, masks = root / "images", root / "masks"
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; put the images into images/ and the masks into masks/")
    paths = list_images(images)
    if not paths:
        raise DataError(f"{images}: expected images, found none; put them there")
    names = by_name(paths)
    found, alone = _masks(list_images(masks), names)
    tell_left_out(f"{masks}", "no image of that name", alone)
    others = sorted(path.name for path in root.iterdir() if path.name not in (images.name, masks.name, TABLE))
    tell_left_out(f"{root}", f"neither images, masks nor {TABLE}", [name for name in others if not is_hidden(name)])
    table = root / TABLE
    rows = read_table(table, (_PIXEL_SIZE,)) if table.exists() else None
    entries = []
    for name, path in names.items():
        if name not in found:
            raise DataError(f"{path}: its mask {masks / name}.png is missing; add it, or remove the image")
        entries.append(_entry(path, found[name], table, rows))
    if rows is not None:
        used = {id(rows.row(path)) for path in paths}
        tell_left_out(f"{table}", "no image of that name", [name for name, row in rows.items() if id(row) not in used])
    return entries


def _masks(paths: Sequence[Path], images: Mapping[str, Path]) -> tuple[dict[str, Path], list[str]]:
    """The mask of every image that has one, and the names of files that are none's."""
    found: dict[str, Path] = {}
    alone = []
    for name, path in by_name(paths).items():
        image = name if name in images else re.sub(_SUFFIX, "", name)
        if image not in images:
            alone.append(path.name)
        elif other := found.get(image):
            raise DataError(f"{path}: {images[image].name} has a mask already, {other.name}; remove one of them")
        else:
            found[image] = path
    return found, alone


def _entry(path: Path, mask: Path, table: Path, rows: FileTable | None) -> _Entry:
    if rows is None:
        return _Entry(path, mask, subject=stem(path))
    row = rows.row(path)
    if row is None:
        raise DataError(f"{table}: expected a row for {path.name}, found none; add it (an empty cell means unknown)")
    return _Entry(
        path,
        mask,
        subject=row.cells.get(_SUBJECT, "") or stem(path),
        pixel_size=row.millimetres(_PIXEL_SIZE),
        lengths={name: row.millimetres(column) for name, column in _LENGTHS.items()},
    )
