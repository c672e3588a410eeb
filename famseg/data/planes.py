"""Two public sets of fetal standard planes, with the landmarks of heads and femurs put beside them.

FETAL_PLANES_DB_data.csv       Spain (Zenodo 3904280): Image_name;Patient_num;Plane;...
Images/NAME.png
African_planes_database.csv    five African countries (Zenodo 7540448): Patient_num,Plane,Train,Center,Filename
CENTER/NAME.png
Head.csv, Femur.csv            for either: image_name and the columns of `famseg.data.landmarks`
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from famseg.data.landmarks import FEMUR, HEAD, Landmarks, Marked
from famseg.data.sample import Sample, all_but
from famseg.files.errors import DataError
from famseg.files.images import read_image
from famseg.files.listing import by_name, given_path, list_images, stem, tell_left_out
from famseg.files.tables import FileTable, Row, read_table

_PATIENT, _PLANE, _CENTER = "Patient_num", "Plane", "Center"
_MARKED = {"Fetal brain": (HEAD, "Head.csv"), "Fetal femur": (FEMUR, "Femur.csv")}
_PLANES = ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax", "Maternal cervix", "Other")


@dataclass(frozen=True)
class _Layout:
    table: str
    separator: str
    filename: str  # the column
    required: tuple[str, ...]

    def folder(self, row: Row) -> str:
        """Where a row's image lies."""
        return row.cells[_CENTER] if _CENTER in self.required else "Images"

    def subject(self, row: Row) -> str:
        """The patient. Every centre counts its own, so two of them have a patient 1."""
        return "/".join(row.cells[column] for column in (_CENTER, _PATIENT) if column in self.required)


_LAYOUTS = (
    _Layout("FETAL_PLANES_DB_data.csv", ";", "Image_name", (_PATIENT, _PLANE)),
    _Layout("African_planes_database.csv", ",", "Filename", (_PATIENT, _PLANE, _CENTER)),
)


class Planes(Sequence[Sample]):
    """The images of brain and femur planes that have landmarks, ordered by folder and name, read when asked for.

    `directory` holds one of the two tables, its folder(s) of images, and `Head.csv` or `Femur.csv` or both. A mask is
    the ellipse of the head or a bar along the femur. The subject is the patient. Names, tables and landmarks are
    checked at construction (listing only), pixels at reading. What is not used is counted on standard error: images of
    other planes, without landmarks, or with ones that cannot be right (`Landmarks.doubt`); rows without an image.

    Raises:
        DataError: nothing there, an image without a row, a plane of another name, landmarks that are no numbers or no
            head, files that cannot be decoded, landmarks for another size of image.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = given_path(directory)
        layout = _layout(self.directory)
        marks = {name: _marks(self.directory / name, structure) for structure, name in _MARKED.values()}
        self._images: list[tuple[Path, str, Landmarks]] = []
        left_out: dict[tuple[Path, str], list[str]] = {}  # by place and reason
        used: set[int] = set()
        for path, row in _rows_of_images(self.directory, layout):
            plane = row.cells[_PLANE]
            if plane not in _MARKED:
                left_out.setdefault((self.directory, f"neither {' nor '.join(_MARKED)}"), []).append(path.name)
                continue
            structure, name = _MARKED[plane]
            marked = marks[name].row(path)
            if marked is None:
                left_out.setdefault((self.directory, f"{plane} without a row in {name}"), []).append(path.name)
                continue
            used.add(id(marked))
            landmarks = Landmarks(structure, marked)
            if landmarks.doubt is None:
                self._images.append((path, layout.subject(row), landmarks))
            else:
                left_out.setdefault((self.directory / name, landmarks.doubt), []).append(path.name)
        for plane, (_, name) in _MARKED.items():
            alone = [marked for marked, row in marks[name].items() if id(row) not in used]
            left_out[self.directory / name, f"no image of that name that is a {plane}"] = alone
        for (place, reason), names in left_out.items():
            tell_left_out(f"{place}", reason, names)
        if not self._images:
            tables = " or ".join(marks)
            raise DataError(f"{self.directory}: expected images with landmarks in {tables}, found none; put both there")

    @property
    def names(self) -> list[str]:
        """File stems."""
        return [stem(path) for path, _, _ in self._images]

    @property
    def subjects(self) -> list[str]:
        """The subject of every sample, without reading an image."""
        return [subject for _, subject, _ in self._images]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        path, subject, landmarks = self._images[index]
        image, pixel_size = read_image(path)
        pixel_size = pixel_size if landmarks.pixel_size is None else landmarks.pixel_size
        length = None if pixel_size is None else landmarks.shape.length * pixel_size
        lengths: dict[str, Any] = {landmarks.structure.measure: length}
        return Sample(
            name=stem(path),
            subject=subject,
            image=image,
            mask=landmarks.mask(*image.shape),
            pixel_size=pixel_size,
            unlabelled=all_but(landmarks.structure.name),
            **lengths,
        )


def _layout(directory: Path) -> _Layout:
    if not directory.is_dir():
        raise DataError(f"{directory}: no such folder; give the folder that holds {_LAYOUTS[0].table}")
    found = [layout for layout in _LAYOUTS if (directory / layout.table).exists()]
    if len(found) != 1:
        tables = " or ".join(layout.table for layout in _LAYOUTS)
        raise DataError(
            f"{directory}: expected one of the tables {tables}, found {len(found)}; give the folder that holds it"
        )
    return found[0]


def _marks(path: Path, structure: Marked) -> FileTable:
    return read_table(path, structure.columns, filename="image_name") if path.exists() else FileTable()


def _rows_of_images(directory: Path, layout: _Layout) -> list[tuple[Path, Row]]:
    """Every image in the table's folders, with its row."""
    table = directory / layout.table
    rows = read_table(table, layout.required, filename=layout.filename, separator=layout.separator)
    for row in rows.values():
        for column in layout.required:
            if not row.cells[column]:
                raise DataError(f"{row.where}: expected a value in '{column}', found an empty cell; add it")
        if row.cells[_PLANE] not in _PLANES:
            planes = ", ".join(_PLANES)
            raise DataError(
                f"{row.where}: expected one of {planes} in '{_PLANE}', found '{row.cells[_PLANE]}'; correct it"
            )
    images = []
    for folder in sorted({directory / layout.folder(row) for row in rows.values()}):
        for path in by_name(list_images(folder) if folder.is_dir() else []).values():
            own = rows.row(path)
            if own is None or layout.folder(own) != folder.name:
                raise DataError(
                    f"{table}: expected a row for {folder.name}/{path.name}, found none; add it, or remove the image"
                )
            images.append((path, own))
    used = {id(row) for _, row in images}
    tell_left_out(f"{table}", "no image of that name", [name for name, row in rows.items() if id(row) not in used])
    return images
