"""Images as (H, W) uint8 grey or (H, W, 3) uint8 RGB: what a viewer would show; and pictures written as PNG."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from famseg.files.decoding import eight_bit, file_bytes
from famseg.files.dicom import is_dicom, read_dicom
from famseg.files.errors import DataError
from famseg.files.raster import open_picture
from famseg.files.writing import write_atomic

_COLOURS = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes


def read_image(path: Path) -> tuple[np.ndarray, float | None]:
    """Decode any supported image file to (H, W) uint8 grey and, where the file says it, mm per pixel.

    What `read_grey` reads, without a pixel size; DICOM (known by its content, not its name) through pydicom, which
    must be installed.

    Raises:
        DataError: as `read_grey` and `read_dicom`.
    """
    content = file_bytes(path)
    return read_dicom(path, content) if is_dicom(content) else (read_grey(path), None)


def read_colour_image(path: Path) -> tuple[np.ndarray, float | None]:
    """What `read_image` reads, as (H, W, 3) uint8 RGB; a grey file has three equal channels.

    Raises:
        DataError: as `read_image`, or the file is in 16-bit colour.
    """
    content = file_bytes(path)
    return read_dicom(path, content, colour=True) if is_dicom(content) else (_read_colour(path), None)


def read_grey(path: Path, *, exact: bool = False) -> np.ndarray:
    """Decode a picture file to (H, W) uint8 grey, upright.

    Colour is turned to luma (Rec. 601). A 16-bit file is scaled by its own range, darkest pixel to 0 and brightest
    to 255: exporters store 10, 12 or 16 significant bits, with or without an offset, and do not say which.

    Args:
        exact: refuse lossy formats, as for a mask.

    Raises:
        DataError: as `open_picture`, or the file holds neither 8- nor 16-bit pixels.
    """
    return _grey(open_picture(path, exact=exact), path)


def _read_colour(path: Path) -> np.ndarray:
    picture = open_picture(path, colour=True)
    return np.array(picture.convert("RGB")) if picture.mode in _COLOURS else as_rgb(_grey(picture, path))


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W) grey as (H, W, 3) of three equal channels; (H, W, 3) as it is."""
    return image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)


def _grey(picture: Image.Image, path: Path) -> np.ndarray:
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        low, high = int(values.min()), int(values.max())
        if high - low < 2**16:
            return eight_bit(values, low, high)
    elif picture.mode in ("1", "L", "LA"):
        return np.array(picture.convert("L"))
    elif picture.mode in _COLOURS:
        return cv2.cvtColor(np.asarray(picture.convert("RGB")), cv2.COLOR_RGB2GRAY)
    raise DataError(f"{path}: expected 8- or 16-bit grey or colour, found mode {picture.mode}; convert it to 8-bit PNG")


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (H, W) grey or (H, W, 3) RGB, uint8, as PNG.

    Raises:
        OSError: as `write_atomic`.
    """
    content = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()
    write_atomic(path, content)
