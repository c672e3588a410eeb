"""Reading and writing the files of a data set: errors name the file, writes are atomic."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from famseg.data.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom")
_PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0]  # the paper's colours: femur red, head green
_CENTIMETRES = 3  # DICOM C.8.5.5.1.15: unit of Physical Delta X
_SQUARE = 0.01  # relative difference of row and column spacing up to which one pixel size stands for both


def read_image(path: Path) -> tuple[np.ndarray, float | None]:
    """Decode any supported image file to (H, W) uint8 grey and, where the file says it, mm per pixel.

    PNG, JPEG, BMP and TIFF as `read_grey`, without a pixel size; DICOM (known by its content, not its name) through
    pydicom, which must be installed.

    Raises:
        DataError: as `read_grey`; pydicom is missing; a DICOM file without a single frame that can be decoded, or
            with pixels that are not square.
    """
    content = _bytes(path)
    if content[128:132].tobytes() == b"DICM":
        return _read_dicom(path, content.tobytes())
    return read_grey(path), None


def _read_dicom(path: Path, content: bytes) -> tuple[np.ndarray, float | None]:
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ImportError:
        raise DataError(f"{path}: is a DICOM file; to read it, pip install 'famseg[dicom]'") from None
    try:
        record = pydicom.dcmread(io.BytesIO(content))
        pixels = pixel_array(record)  # colour comes as RGB
    except Exception as error:  # pydicom and its decoders raise whatever the file makes them stumble over
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: the DICOM pixels cannot be decoded ({reason}); export the frame as PNG") from error
    colour = int(record.get("SamplesPerPixel", 1)) > 1
    if pixels.ndim != (3 if colour else 2):
        frames = record.get("NumberOfFrames", 1)
        raise DataError(f"{path}: expected one frame, found {frames}; export the frame to be measured as a file")
    if colour:
        pixels = cv2.cvtColor(_eight_bit(pixels), cv2.COLOR_RGB2GRAY)
    grey = _eight_bit(pixels)
    if record.get("PhotometricInterpretation") == "MONOCHROME1":  # 0 is white
        grey = 255 - grey
    return grey, _pixel_spacing(path, record)


def _pixel_spacing(path: Path, record: Any) -> float | None:
    """mm per pixel from the ultrasound regions, else from Pixel Spacing; None where the file does not say."""
    found: set[tuple[float, float]] = set()
    for region in record.get("SequenceOfUltrasoundRegions", ()):
        tissue = region.get("RegionDataType") == 1 and region.get("RegionSpatialFormat") == 1  # a 2D B-mode picture
        units = (region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection"))
        if tissue and units == (_CENTIMETRES, _CENTIMETRES):
            found.add((10 * abs(region.PhysicalDeltaX), 10 * abs(region.PhysicalDeltaY)))
    if not found and record.get("PixelSpacing"):
        rows, columns = (float(mm) for mm in record.PixelSpacing)
        found.add((columns, rows))
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"{path}: shows {len(found)} pictures of different pixel sizes; crop the one to be measured")
    x, y = found.pop()
    if not (x > 0 and abs(x - y) <= _SQUARE * x):
        raise DataError(f"{path}: expected square pixels, found {x:g} x {y:g} mm; resample it to square pixels")
    return (x + y) / 2


def _eight_bit(pixels: np.ndarray) -> np.ndarray:
    """8-bit pixels as they are; anything wider scaled by its own range, darkest to 0 and brightest to 255."""
    if pixels.dtype == np.uint8:
        return pixels
    low, high = int(pixels.min()), int(pixels.max())
    return np.rint((pixels - np.float64(low)) * (255.0 / max(high - low, 1))).astype(np.uint8)


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
    if image.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path}: expected 8- or 16-bit pixels, found {image.dtype}; convert it to 8-bit PNG")
    return _eight_bit(image)


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


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of equal keys as CSV with a header: numbers to six digits, empty where there is no value."""
    text = io.StringIO()
    lines = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    lines.writeheader()
    lines.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    write_atomic(path, text.getvalue().encode())


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


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Write labels (H, W) uint8 as a palette PNG: viewers show colours, readers see the indices."""
    content = io.BytesIO()
    picture = Image.fromarray(labels)
    picture.putpalette(_PALETTE)
    picture.save(content, format="PNG")
    write_atomic(path, content.getvalue())


def empty_folder(path: Path, remedy: str = "choose another --out") -> Path:
    """`path`, which must not exist or be an empty folder: results never mix with older ones. Nothing is made yet.

    Raises:
        DataError: there are files in it, or it is a file itself.
    """
    if path.is_dir() and any(path.iterdir()):
        raise DataError(f"out: expected a new or empty folder, {path} has files in it; {remedy}")
    if path.exists() and not path.is_dir():
        raise DataError(f"out: expected a folder, {path} is a file")
    return path


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
