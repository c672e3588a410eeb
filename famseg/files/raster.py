"""Opening a picture file as a viewer shows it: whole, upright, and the only one in its file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from famseg.files.decoding import decoding, expect_size, file_bytes, hear_jpeg
from famseg.files.errors import DataError

# What Pillow is asked to open. A JPEG with several pictures comes back as "MPO".
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
# A GIF keeps its indices, but its writers renumber them.
_EXACT = ("PNG", "BMP", "TIFF")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")
_SUBFILE, _REDUCED_OR_MASK = 254, 5  # TIFF: a smaller copy of another page, or its transparency
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # PNG: a pixel, by colour type
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_STRIPS, _TILES, _JPEG_TABLES = (273, 279), (324, 325), 347  # TIFF: where they are, and how long


def open_picture(path: Path, *, exact: bool = False, colour: bool = False) -> Image.Image:
    """The one picture in a file, decoded and turned as its EXIF orientation says, in Pillow's mode.

    16-bit colour comes as 16-bit grey (Rec. 601 luma): Pillow has no mode for it.

    Args:
        exact: refuse formats that change values: a label map must come back as it was stored.
        colour: refuse what would lose its colour.

    Raises:
        DataError: the file cannot be read, is damaged, has another number of pictures than one, transparent
            pixels, or more than `LARGEST` pixels; with `colour`, it is in 16-bit colour.
    """
    content = file_bytes(path)
    with decoding(path, "replace or remove the file"):
        try:
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:
            kinds = ", ".join(_EXACT if exact else ("DICOM", *FORMATS))
            raise DataError(f"cannot be decoded: is none of {kinds}; replace or remove it") from None
        if exact:
            _expect_exact(picture)
        _seek_only_page(picture)
        expect_size(picture.height, picture.width)
        if picture.format == "PNG":
            Image.open(io.BytesIO(content), formats=("PNG",)).verify()  # checksums, which decoding passes over
            _check_rows(content)
        elif picture.format in ("JPEG", "MPO"):
            hear_jpeg(content)
        elif picture.format == "TIFF":
            _check_strips(picture, content)
        upright = _upright(picture, content, exact, colour)
    return upright


def _expect_exact(picture: Image.Image) -> None:
    compression = picture.info.get("compression")
    if picture.format not in _EXACT or (picture.format == "TIFF" and compression in _LOSSY_TIFF):
        kind = "JPEG in TIFF" if picture.format == "TIFF" else picture.format
        raise DataError(f"expected an index PNG, found {kind}, which does not keep labels; export the mask as PNG")


def _seek_only_page(picture: Any) -> None:
    pages: Sequence[int] = range(getattr(picture, "n_frames", 1))  # no list: a PNG may claim 2³¹
    if picture.format == "TIFF":

        def is_picture(page: int) -> bool:
            picture.seek(page)
            return not int(picture.tag_v2.get(_SUBFILE, 0)) & _REDUCED_OR_MASK

        pages = [page for page in pages if is_picture(page)]
    if len(pages) != 1:
        raise DataError(f"expected one picture, found {len(pages)} ({picture.format}); save the one to be used alone")
    picture.seek(pages[0])


def _check_rows(content: bytes) -> None:
    """What Pillow passes over in a PNG: pixels that end before the last row does."""
    width, height, depth, kind, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    grids = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in grids if x < width and y < height]
    expected = sum(rows * (1 + -(-columns * depth * _SAMPLES[kind] // 8)) for columns, rows in sizes)
    pixels, at, parts = zlib.decompressobj(), 8, []
    while at < len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        parts += [content[at + 8 : at + 8 + length]] if name == b"IDAT" else []
        at += 12 + length
    found = len(pixels.decompress(b"".join(parts), expected))
    if found < expected:
        raise DataError(
            f"cannot be decoded: ends after {found / expected:.0%} of its pixels; replace or remove the file"
        )


def _check_strips(picture: Any, content: bytes) -> None:
    """What libtiff and Pillow pass over: the checksum at a deflated strip's end, libjpeg's remarks, missing strips."""
    tags, compression = picture.tag_v2, picture.info.get("compression")
    boxes = {tile[1] for tile in picture.tile}  # several of one place where a strip has one colour
    if sum((right - left) * (lower - upper) for left, upper, right, lower in boxes) < picture.width * picture.height:
        raise DataError("cannot be decoded: has strips for a part of its pixels; replace or remove the file")
    for offsets, lengths in (_STRIPS, _TILES):
        for start, length in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=True):
            strip = content[start : start + length]
            if compression in ("tiff_adobe_deflate", "tiff_deflate"):
                zlib.decompress(strip)
            elif compression == "jpeg":  # its tables stand apart: between their start and end marks
                hear_jpeg(tags[_JPEG_TABLES][:-2] + strip[2:] if _JPEG_TABLES in tags else strip)


def _upright(picture: Any, content: bytes, exact: bool, colour: bool) -> Image.Image:
    deep_colour = ";16" in str(picture.tile) and picture.mode in ("RGB", "RGBA", "LA")
    turned = picture.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    picture.load()
    # A colour declared transparent changes no label.
    transparent = "A" in picture.getbands() or ("transparency" in picture.info and not exact)
    transparent = transparent and picture.mode not in ("I;16", "I")
    if transparent and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise DataError("expected an opaque picture, found transparent pixels; save it without transparency")
    if deep_colour:
        if colour and picture.mode != "LA":
            raise DataError("is 16-bit colour, which is read as grey alone; save it with 8 bits a colour")
        if turned:
            raise DataError("is 16-bit colour stored turned (EXIF orientation); save it upright")
        flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
        return Image.fromarray(np.asarray(cv2.imdecode(np.frombuffer(content, np.uint8), flags)))
    white_is_zero = picture.format == "TIFF" and picture.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if white_is_zero and picture.mode.startswith("I;16"):  # Pillow turns 8 bits over, not 16
        return Image.fromarray(65535 - np.asarray(picture))
    return ImageOps.exif_transpose(picture)
