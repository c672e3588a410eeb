"""DICOM of a single frame, as a viewer shows it: through its lookup tables, its window and its polarity.

The grey pipeline is that of PS3.4 N.2: stored values → modality table or rescale → window or VOI table → polarity. Its
steps are written out here where pydicom's wrap around (a table of 8-bit entries) or turn a negative slope upside down.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from famseg.files.decoding import decoding, eight_bit, expect_size, hear_jpeg
from famseg.files.errors import DataError

_MAGIC = slice(128, 132)
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom gives all of them as RGB
_GREYS = ("MONOCHROME1", "MONOCHROME2")
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_CENTIMETRES = 3  # C.8.5.5.1.15: unit of Physical Delta X
_SQUARE = 0.01  # relative difference of row and column spacing up to which one pixel size stands for both
_SAME = 1e-3  # relative difference up to which two regions have the same pixel size
_EXPORT = "export the frame as PNG"


def is_dicom(content: bytes) -> bool:
    """Whether a file's first bytes are those of DICOM."""
    return content[_MAGIC] == b"DICM"


def read_dicom(path: Path, content: bytes, *, colour: bool = False) -> tuple[np.ndarray, float | None]:
    """A DICOM file of one frame: (H, W) uint8 grey as displayed, and mm per pixel where the file says it.

    With `colour`, (H, W, 3) uint8 RGB; a grey frame has three equal channels.

    Without a window, up to 8 stored bits are shown by their whole range and more by the image's own range. Padding is
    black. Overlays, which are graphics beside the pixels, are not drawn.

    Raises:
        DataError: pydicom is missing; the file is damaged, has not one frame, is displayed in a way not known here, or
            its pixels are not square or of no plausible size.
    """
    try:
        from pydicom import dcmread
        from pydicom.filereader import read_file_meta_info
        from pydicom.pixels import pixel_array
        from pydicom.uid import DeflatedExplicitVRLittleEndian
    except ImportError:
        raise DataError(f"{path}: is a DICOM file; to read it, pip install 'famseg[dicom]'") from None
    with decoding(path, _EXPORT):
        if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise DataError(f"is deflated as a whole, which is not known here; {_EXPORT}")  # 1 kB may hold 1 MB
        record = dcmread(io.BytesIO(content))
        _lift_functional_groups(record)
        _expect_displayable(record)
        pixel_size = _pixel_size(record)
        if record.file_meta.TransferSyntaxUID in _JPEG:
            from pydicom.encaps import get_frame

            hear_jpeg(get_frame(record.PixelData, 0, number_of_frames=1))
        pixels = pixel_array(record)
        if pixels.ndim != (3 if record.SamplesPerPixel > 1 else 2):
            raise DataError(f"expected one frame, found {len(pixels)}; export the frame to be measured as a file")
        is_grey = record.PhotometricInterpretation in _GREYS
        image = _grey(record, pixels) if is_grey else _rgb(record, pixels)
    if is_grey == colour:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if colour else cv2.COLOR_RGB2GRAY)
    return image, pixel_size


def _lift_functional_groups(record: Any) -> None:
    """An enhanced object keeps its frame's window, slope and spacing in functional groups; here they go to the top."""
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in record.get(name) or ():
            for macro in group:
                for element in macro.value[0] if macro.VR == "SQ" and macro.value else ():
                    if element.tag not in record:
                        record[element.tag] = element


def _expect_displayable(record: Any) -> None:
    frames = int(record.get("NumberOfFrames") or 1)
    if frames != 1:
        raise DataError(f"expected one frame, found {frames}; export the frame to be measured as a file")
    if "PixelData" not in record:
        floats = "FloatPixelData" in record or "DoubleFloatPixelData" in record
        raise DataError(f"expected integer pixels, found {'floating-point pixels' if floats else 'none'}; {_EXPORT}")
    kind = record.PhotometricInterpretation
    if kind not in (*_GREYS, *_COLOURS, "PALETTE COLOR"):
        raise DataError(f"expected grey, RGB, YBR or palette pixels, found {kind}; {_EXPORT}")
    expected = 3 if kind in _COLOURS else 1
    if record.SamplesPerPixel != expected:
        raise DataError(f"expected {expected} sample(s) per pixel of {kind}, found {record.SamplesPerPixel}; {_EXPORT}")
    if kind in _GREYS and "RedPaletteColorLookupTableDescriptor" in record:
        raise DataError(f"shows some grey values in colour (supplemental palette), which is not known here; {_EXPORT}")
    shape = record.get("PresentationLUTShape") or "IDENTITY"
    if "PresentationLUTSequence" in record or "ShutterShape" in record or shape not in ("IDENTITY", "INVERSE"):
        raise DataError(f"has a presentation table or a shutter, which are not known here; {_EXPORT}")
    if int(record.get("HighBit", record.BitsStored - 1)) != record.BitsStored - 1:
        raise DataError(f"expected High Bit {record.BitsStored - 1}, found {record.HighBit}; {_EXPORT}")
    tables = (kind == "PALETTE COLOR", "ModalityLUTSequence" in record, "VOILUTSequence" in record)
    if any(tables) and not record.file_meta.TransferSyntaxUID.is_little_endian:
        raise DataError(f"has a lookup table in big-endian order, which is not known here; {_EXPORT}")
    expect_size(record.Rows, record.Columns)


def _rgb(record: Any, pixels: np.ndarray) -> np.ndarray:
    """Colour, or indices into a palette, to (H, W, 3) uint8 RGB."""
    bits = record.BitsStored
    if record.PhotometricInterpretation == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        count, first, _ = record.RedPaletteColorLookupTableDescriptor
        count = count or 2**16
        if count > 256 and len(record.get("RedPaletteColorLookupTableData", b"")) <= count + 1:
            raise DataError(f"has a palette of {count} entries of 8 bits, which is not known here; {_EXPORT}")
        # Only to unpack the table: pydicom subtracts in the type of the entries, where an index far outside wraps.
        entries = apply_color_lut(np.arange(first, first + count), record)[:, :3]
        if entries.shape[1] != 3:  # pydicom passes over an empty table
            raise DataError(f"has a palette without one of red, green and blue; {_EXPORT}")
        pixels = entries[np.clip(pixels.astype(np.int64) - first, 0, count - 1)]
        bits = 16 if entries.max() > 255 else 8  # whatever the descriptor says of 8-bit entries in 16
    return eight_bit(pixels, 0, 2**bits - 1)


def _grey(record: Any, pixels: np.ndarray) -> np.ndarray:
    bits, values = record.BitsStored, pixels.astype(np.float64)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if record.PixelRepresentation else (0, 2**bits - 1)
    padding = _padding(record, pixels)
    if record.get("ModalityLUTSequence"):
        values, low, high = _look_up(record.ModalityLUTSequence[0], values)
    elif record.get("RescaleSlope") is not None:
        slope, intercept = float(record.RescaleSlope), float(record.get("RescaleIntercept") or 0)
        if not (math.isfinite(slope * intercept) and slope):
            raise DataError(f"expected a rescale slope other than 0, found {slope} and {intercept}; {_EXPORT}")
        values = values * slope + intercept
        low, high = sorted((low * slope + intercept, high * slope + intercept))
    if record.get("VOILUTSequence"):
        values, low, high = _look_up(record.VOILUTSequence[0], np.rint(values))
    elif all(record.get(name) not in (None, "") for name in ("WindowCenter", "WindowWidth")):
        values, low, high = _window(record, values)
    elif bits > 8 and not padding.all():
        low, high = values[~padding].min(), values[~padding].max()
    grey = eight_bit(values, low, high)
    if record.PhotometricInterpretation == "MONOCHROME1" or record.get("PresentationLUTShape") == "INVERSE":
        grey = 255 - grey
    grey[padding] = 0
    return grey


def _padding(record: Any, pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool: outside the picture, by the value or range of values that says so (C.7.5.1.1.2)."""
    value = record.get("PixelPaddingValue")
    if value is None:
        return np.zeros(pixels.shape, bool)
    other = record.get("PixelPaddingRangeLimit")
    first, last = sorted((int(value), int(value if other is None else other)))
    return (pixels >= first) & (pixels <= last)


def _look_up(table: Any, values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Values through a modality or VOI table (C.11.1.1), and the range of its entries; outside, its ends hold."""
    count, first, bits = (int(number) for number in table.LUTDescriptor)
    entries = table.LUTData
    if isinstance(entries, bytes):
        entries = np.frombuffer(entries, np.uint8 if len(entries) <= (count or 2**16) + 1 else "<u2")
    entries = np.asarray(entries, np.float64)[: count or 2**16]
    index = np.clip(values - first, 0, len(entries) - 1).astype(np.int64)
    return entries[index], 0, 2**bits - 1


def _window(record: Any, values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Values, and those that are black and white by the first window (C.11.2.1.2)."""
    centre, width = (float(_first(record[name].value)) for name in ("WindowCenter", "WindowWidth"))
    kind = record.get("VOILUTFunction") or "LINEAR"
    valid = width >= 1 if kind == "LINEAR" else width > 0
    if kind not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or not (valid and math.isfinite(centre)):
        raise DataError(f"expected a window of positive width, found {kind} {centre:g} / {width:g}; {_EXPORT}")
    if kind == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))), 0, 1
    if kind == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return values, centre - width / 2, centre + width / 2


def _first(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else value[0]


def _pixel_size(record: Any) -> float | None:
    """mm per pixel from the ultrasound regions, else from Pixel Spacing; None where the file does not say."""
    vertical, horizontal = _two_numbers("Pixel Aspect Ratio", record.get("PixelAspectRatio") or (1, 1))
    if vertical != horizontal:
        raise DataError(f"expected square pixels, found {vertical:g} to {horizontal:g}; resample it to square pixels")
    found = []
    for region in record.get("SequenceOfUltrasoundRegions") or ():
        tissue = region.get("RegionDataType") == 1 and region.get("RegionSpatialFormat") == 1  # a 2D B-mode picture
        units = (region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection"))
        if tissue and units == (_CENTIMETRES, _CENTIMETRES):
            deltas = (region.get("PhysicalDeltaX"), region.get("PhysicalDeltaY"))
            found.append(tuple(10 * abs(value) for value in _two_numbers("Physical Delta X and Y", deltas)))
    if not found and record.get("PixelSpacing") is not None:
        found.append(_two_numbers("Pixel Spacing", record.PixelSpacing))
    if not found:
        return None
    (x, y), least, most = np.mean(found, 0), np.min(found, 0), np.max(found, 0)
    if not least.min() > 0:
        raise DataError(f"expected a positive pixel size, found {x:g} x {y:g} mm; {_EXPORT} and give --pixel-size")
    if (most > least * (1 + _SAME)).any():
        raise DataError(f"shows {len(found)} pictures of different pixel sizes; crop the one to be measured")
    if abs(x - y) > _SQUARE * x:
        raise DataError(f"expected square pixels, found {x:g} x {y:g} mm; resample it to square pixels")
    return float(x + y) / 2


def _two_numbers(name: str, values: Any) -> tuple[float, float]:
    try:
        first, second = (float(value) for value in values)
    except (TypeError, ValueError):
        raise DataError(f"{name}: expected two numbers, found {values}; {_EXPORT}") from None
    if not (math.isfinite(first) and math.isfinite(second)):
        raise DataError(f"{name}: expected two numbers, found {values}; {_EXPORT}")
    return first, second
