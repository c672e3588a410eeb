"""Reading and writing the files of a data set: errors name the file, writes are atomic."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from famseg.data.errors import DataError


def read_grey(path: Path) -> np.ndarray:
    """Decode an image file to (H, W) uint8 grey.

    Colour is turned to luma (Rec. 601) and an alpha channel is dropped. A 16-bit file is scaled by its own
    range, darkest pixel to 0 and brightest to 255: exporters store 10, 12 or 16 significant bits, with or
    without an offset, and do not say which.

    Raises:
        DataError: the file is missing, cannot be decoded, or holds neither 8- nor 16-bit pixels.
    """
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_GRAYSCALE
    image = cv2.imdecode(_bytes(path), flags)
    if image is None:
        raise DataError(f"{path}: expected an image, but it cannot be decoded; replace or remove the file")
    if image.dtype == np.uint16:
        low, high = int(image.min()), int(image.max())
        return np.rint((image - np.float64(low)) * (255.0 / max(high - low, 1))).astype(np.uint8)
    if image.dtype != np.uint8:
        raise DataError(f"{path}: expected 8- or 16-bit pixels, found {image.dtype}; convert it to 8-bit PNG")
    return image


def read_labels(path: Path) -> np.ndarray:
    """Decode an index image to (H, W) uint8 labels, exactly as stored: a palette is not looked up.

    Raises:
        DataError: the file is missing, cannot be decoded, or holds colours instead of one label per pixel.
    """
    _bytes(path)  # a missing or empty file gets its own message
    try:
        with Image.open(path) as picture:
            picture.load()
            mode, labels = picture.mode, np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports broken PNG chunks as SyntaxError.
        raise DataError(
            f"{path}: expected an index PNG, but it cannot be decoded ({error}); replace or remove the file"
        ) from error
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise DataError(
            f"{path}: expected one label per pixel (8-bit grey or palette PNG), found mode {mode}; "
            "save the label indices, not their colours"
        )
    # 16-bit index files are fine as long as the labels fit; the caller judges the values that do.
    return np.clip(labels, 0, 255).astype(np.uint8)


def read_table(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line; cells and column names are stripped of blanks.

    Raises:
        DataError: the file is missing, is not UTF-8 text, or lacks a required column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: expected a table with columns {', '.join(required)}, found no file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it as CSV in UTF-8") from error
    lines = csv.reader(text.splitlines(), skipinitialspace=True)
    header = [cell.strip() for cell in next(lines, [])]
    missing = [column for column in required if column not in header]
    if missing:
        raise DataError(
            f"{path}: expected the column(s) {', '.join(missing)}, found {', '.join(header) or 'none'}; add them"
        )
    rows = []
    for line in lines:
        if any(cell.strip() for cell in line):
            cells = [cell.strip() for cell in line] + [""] * (len(header) - len(line))
            rows.append(dict(zip(header, cells, strict=False)))
    return rows


def positive(text: str, path: Path, row: str, column: str) -> float:
    """A cell that must hold a positive, finite number; DataError naming file, row and column otherwise."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{path}: row {row}: expected a positive number of mm in '{column}', found '{text}'")
    return value


def require_same_size(image: np.ndarray, mask: np.ndarray, image_path: Path, mask_path: Path) -> None:
    """DataError when an image and its mask differ in size."""
    if image.shape != mask.shape:
        (h, w), (mask_h, mask_w) = image.shape, mask.shape
        raise DataError(
            f"{mask_path}: expected {w}x{h} pixels as in {image_path.name}, found {mask_w}x{mask_h}; "
            "export the pair again at one size"
        )


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _bytes(path: Path) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check that the file exists") from error
    if not content:
        raise DataError(f"{path}: the file is empty; copy it again")
    return np.frombuffer(content, np.uint8)
