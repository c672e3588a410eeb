"""Images as (H, W) uint8 grey."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from famseg.files.dicom import eight_bit, read_dicom
from famseg.files.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom")


def read_image(path: Path) -> tuple[np.ndarray, float | None]:
    """Decode any supported image file to (H, W) uint8 grey and, where the file says it, mm per pixel.

    PNG, JPEG, BMP and TIFF as `read_grey`, without a pixel size; DICOM (known by its content, not its name) through
    pydicom, which must be installed.

    Raises:
        DataError: as `read_grey`; pydicom is missing; a DICOM file without a single frame that can be decoded, or
            with pixels that are not square.
    """
    content = file_bytes(path)
    if content[128:132].tobytes() == b"DICM":
        return read_dicom(path, content.tobytes())
    return read_grey(path), None


def read_grey(path: Path) -> np.ndarray:
    """Decode an image file to (H, W) uint8 grey.

    Colour is turned to luma (Rec. 601) and an alpha channel is dropped. A 16-bit file is scaled by its own
    range, darkest pixel to 0 and brightest to 255: exporters store 10, 12 or 16 significant bits, with or
    without an offset, and do not say which.

    Raises:
        DataError: the file is missing, cannot be decoded, or holds neither 8- nor 16-bit pixels.
    """
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_GRAYSCALE
    image = cv2.imdecode(file_bytes(path), flags)
    if image is None:
        raise DataError(f"{path}: expected an image, but it cannot be decoded; replace or remove the file")
    if image.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path}: expected 8- or 16-bit pixels, found {image.dtype}; convert it to 8-bit PNG")
    return eight_bit(image)


def file_bytes(path: Path) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check that the file exists") from error
    if not content:
        raise DataError(f"{path}: the file is empty; copy it again")
    return np.frombuffer(content, np.uint8)
