"""DICOM of a single frame, through pydicom."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from famseg.files.errors import DataError

_CENTIMETRES = 3  # DICOM C.8.5.5.1.15: unit of Physical Delta X
_SQUARE = 0.01  # relative difference of row and column spacing up to which one pixel size stands for both


def read_dicom(path: Path, content: bytes) -> tuple[np.ndarray, float | None]:
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
        pixels = cv2.cvtColor(eight_bit(pixels), cv2.COLOR_RGB2GRAY)
    grey = eight_bit(pixels)
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


def eight_bit(pixels: np.ndarray) -> np.ndarray:
    """8-bit pixels as they are; anything wider scaled by its own range, darkest to 0 and brightest to 255."""
    if pixels.dtype == np.uint8:
        return pixels
    low, high = int(pixels.min()), int(pixels.max())
    return np.rint((pixels - np.float64(low)) * (255.0 / max(high - low, 1))).astype(np.uint8)
