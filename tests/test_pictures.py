"""A picture file gives what a viewer shows, for images and masks alike, or is refused by name with the reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from famseg.data.phantom import Phantom
from famseg.files.errors import DataError
from famseg.files.images import read_grey, read_image
from famseg.files.labels import read_labels
from tests.dicom import dicom, save

GREY = Phantom(1, (96, 130), seed=3)[0].image
LABELS = np.zeros((20, 30), np.uint8)
LABELS[2:9, 3:12] = 1
LABELS[12:18, 5:25] = 2
# What each orientation asks a viewer to do with the stored pixels (EXIF 2.3, tag 274).
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.T, 2),
    8: lambda a: np.rot90(a),
}


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(content, kind, **options)
    return content.getvalue()


def stored(folder: Path, content: bytes, name: str = "x.png") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = value
    return exif


def refused(path: Path, words: str, read: object = read_image) -> None:
    with pytest.raises(DataError, match=words) as error:
        read(path)  # type: ignore[operator]
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", TURNS)
def test_images_and_masks_are_turned_alike(tmp_path: Path, value: int) -> None:
    exif, turned = orientation(value), TURNS[value]
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(read_grey(stored(tmp_path, encoded(GREY, kind, exif=exif))), turned(GREY))
        mask = stored(tmp_path, encoded(LABELS, kind, exif=exif))
        np.testing.assert_array_equal(read_labels(mask), turned(LABELS))
    deep = GREY.astype(np.uint16) * 257
    np.testing.assert_array_equal(
        read_grey(stored(tmp_path, encoded(deep, "PNG", exif=exif))).shape, turned(GREY).shape
    )
    webp = read_grey(stored(tmp_path, encoded(GREY, "WEBP", lossless=True, exif=exif)))
    np.testing.assert_array_equal(webp, turned(GREY))
    jpeg = read_grey(stored(tmp_path, encoded(GREY, "JPEG", quality=100, exif=exif)))
    np.testing.assert_allclose(jpeg.astype(int), turned(GREY), atol=2)


def test_a_palette_mask_is_turned_and_keeps_its_indices(tmp_path: Path) -> None:
    picture = Image.fromarray(LABELS)
    picture.putpalette([9, 9, 9, 1, 2, 3, 200, 0, 0])
    mask = stored(tmp_path, encoded(picture, "PNG", exif=orientation(6), transparency=0))
    np.testing.assert_array_equal(read_labels(mask), TURNS[6](LABELS))


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG", "MPO"])
def test_several_pictures_in_one_file_are_refused(tmp_path: Path, kind: str) -> None:
    others = [Image.fromarray(255 - GREY), Image.fromarray(GREY // 2)]
    path = stored(tmp_path, encoded(GREY, kind, save_all=True, append_images=others))
    refused(path, "expected one picture, found 3")


def test_a_smaller_copy_of_the_page_is_no_second_picture(tmp_path: Path) -> None:
    content = io.BytesIO()
    with AppendingTiffWriter(content) as f:
        Image.fromarray(GREY).save(f, "TIFF")
        f.newFrame()
        Image.fromarray(GREY[::4, ::4]).save(f, "TIFF", tiffinfo={254: 1})
    np.testing.assert_array_equal(read_grey(stored(tmp_path, content.getvalue())), GREY)


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "progressive", "TIFF LZW", "TIFF deflate", "TIFF JPEG"])
def test_damage_in_the_middle_is_refused(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    content = {
        "PNG": encoded(GREY, "PNG"),
        "JPEG": encoded(GREY, "JPEG"),
        "progressive": encoded(GREY, "JPEG", progressive=True),
        "TIFF LZW": encoded(GREY, "TIFF", compression="tiff_lzw"),
        "TIFF JPEG": encoded(GREY, "TIFF", compression="jpeg"),
        "TIFF deflate": encoded(GREY, "TIFF", compression="tiff_adobe_deflate"),
    }[kind]
    read_grey(stored(tmp_path, content))
    refused(stored(tmp_path, damaged(content)), "cannot be decoded")
    assert capfd.readouterr().err == ""  # the decoder's own words are in the message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_file_cut_short_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    content = encoded(GREY, kind)
    refused(stored(tmp_path, content[: int(len(content) * share)]), "cannot be decoded")


def test_a_flipped_bit_in_a_png_is_found_by_its_checksum(tmp_path: Path) -> None:
    content = bytearray(encoded(GREY, "PNG", compress_level=0))  # stored blocks: any bytes decode
    content[len(content) // 2] ^= 4
    refused(stored(tmp_path, bytes(content)), "cannot be decoded")


def test_what_others_write_to_standard_error_meanwhile_is_passed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def talking(*arguments: object) -> None:
        os.write(2, b"progress 3/30\n")

    monkeypatch.setattr("famseg.files.raster.hear_jpeg", talking)
    read_grey(stored(tmp_path, encoded(GREY, "JPEG")))
    assert capfd.readouterr().err == "progress 3/30\n"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("JPEG", {"quality": 100}, "found JPEG"),
        ("WEBP", {}, "found WEBP"),
        ("WEBP", {"lossless": True}, "found WEBP"),
        ("GIF", {}, "found GIF"),
        ("JPEG2000", {}, "found JPEG2000"),
        ("TIFF", {"compression": "jpeg", "quality": 100}, "found JPEG in TIFF"),
    ],
)
def test_a_label_map_in_a_format_that_changes_labels_is_refused(
    tmp_path: Path, kind: str, options: dict, words: str
) -> None:
    refused(stored(tmp_path, encoded(LABELS, kind, **options)), words, read_labels)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_a_label_map_in_an_exact_format_comes_back(tmp_path: Path, kind: str, options: dict) -> None:
    np.testing.assert_array_equal(read_labels(stored(tmp_path, encoded(LABELS, kind, **options))), LABELS)


def test_a_mask_is_no_dicom_and_the_message_does_not_ask_for_it(tmp_path: Path) -> None:
    path = save(dicom(LABELS), tmp_path / "x.png")
    refused(path, "is none of PNG, BMP, TIFF", read_labels)


def test_a_negative_label_is_not_background(tmp_path: Path) -> None:
    assert read_labels(stored(tmp_path, encoded(-LABELS.astype(np.int32), "TIFF"))).max() == 255


def test_transparent_pixels_are_refused_and_opaque_ones_are_not(tmp_path: Path) -> None:
    picture = Image.fromarray(GREY).convert("RGBA")
    np.testing.assert_array_equal(read_grey(stored(tmp_path, encoded(picture, "PNG"))), GREY)
    picture.putpixel((3, 3), (9, 9, 9, 0))
    refused(stored(tmp_path, encoded(picture, "PNG")), "transparent")
    refused(stored(tmp_path, encoded(Image.fromarray(GREY), "PNG", transparency=0)), "transparent")


def tiff(pixels: np.ndarray, photometric: int) -> bytes:
    """Bare TIFF: one strip, no compression."""
    (height, width), bits, short, long = pixels.shape, 8 * pixels.itemsize, 3, 4
    entries = [
        (256, long, width), (257, long, height), (258, short, bits), (259, short, 1), (262, short, photometric),
        (273, long, 8), (277, short, 1), (278, long, height), (279, long, pixels.nbytes),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    header = b"II*\0" + struct.pack("<I", 8 + pixels.nbytes)
    return header + pixels.tobytes() + struct.pack("<H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("depth", ["<u1", "<u2"])
def test_white_is_zero_is_shown_as_white(tmp_path: Path, depth: str) -> None:
    pixels = np.arange(256).reshape(16, 16).astype(depth) * (257 if depth == "<u2" else 1)
    rising = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(read_grey(stored(tmp_path, tiff(pixels.astype(depth), 1))), rising)
    np.testing.assert_array_equal(read_grey(stored(tmp_path, tiff(pixels.astype(depth), 0))), 255 - rising)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_colour_are_scaled_by_their_range(tmp_path: Path, kind: str) -> None:
    deep = np.linspace(1000, 5000, 1200).reshape(30, 40).astype(np.uint16)
    for channels in (3, 4):
        colour = np.stack([deep] * 3 + [np.full_like(deep, 65535)] * (channels - 3), 2)
        path = stored(tmp_path, cv2.imencode(f".{kind.lower()}", colour)[1].tobytes())
        np.testing.assert_allclose(read_grey(path), (deep - 1000.0) / 4000 * 255, atol=0.6)


def test_sixteen_bits_of_colour_stored_turned_are_refused(tmp_path: Path) -> None:
    colour = np.stack([GREY.astype(np.uint16) * 257] * 3, 2)
    content = cv2.imencode(".png", colour)[1].tobytes()
    for value in (1, 6):
        exif = orientation(value).tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        path = stored(tmp_path, content[:33] + chunk + content[33:])  # after the header
        if value == 1:
            assert read_grey(path).shape == GREY.shape
        else:
            refused(path, "stored turned")


def test_colour_spaces(tmp_path: Path) -> None:
    colour = Image.fromarray(np.stack([GREY, 255 - GREY, GREY // 2], 2))
    luma = np.asarray(colour.convert("L")).astype(int)
    np.testing.assert_allclose(read_grey(stored(tmp_path, encoded(colour, "PNG"))), luma, atol=1)
    np.testing.assert_allclose(read_grey(stored(tmp_path, encoded(colour.convert("P"), "GIF"))), luma, atol=40)
    cmyk = colour.convert("CMYK")
    expected = np.asarray(cmyk.convert("RGB").convert("L")).astype(int)
    np.testing.assert_allclose(read_grey(stored(tmp_path, encoded(cmyk, "TIFF"))), expected, atol=1)
    refused(stored(tmp_path, encoded(colour.convert("LAB"), "TIFF")), "mode LAB")
    refused(stored(tmp_path, encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF")), "mode F")
    refused(stored(tmp_path, encoded(Image.fromarray(GREY.astype(np.int32) * 10000), "TIFF")), "mode I")


def png_header(width: int, height: int) -> bytes:
    content = bytearray(encoded(GREY, "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_a_picture_that_claims_too_much_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    for side in (20_000, 100_000, 2**31 - 1):
        refused(stored(tmp_path, png_header(side, side)), "pixels")
    bitmap = bytearray(encoded(GREY, "BMP"))
    for offset, value in ((18, 2**31 - 1), (22, -(2**31)), (10, 2**31), (28, 7), (14, 3), (30, 99)):
        broken = bytearray(bitmap)
        struct.pack_into("<i" if value < 0 else "<I", broken, offset, value)
        refused(stored(tmp_path, bytes(broken)), "pixels|cannot be decoded")
    refused(stored(tmp_path, b""), "empty")
    refused(stored(tmp_path, b"hello"), "is none of DICOM, PNG")


def test_any_header_damage_is_one_line(tmp_path: Path) -> None:
    """Random bytes in the first part of a file: a picture or a DataError, never another exception."""
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"):
        content = encoded(GREY, kind)
        for _ in range(25):
            broken = bytearray(content)
            at = int(rng.integers(2, min(200, len(content) - 8)))
            broken[at : at + 4] = rng.bytes(4)
            path = stored(tmp_path, bytes(broken))
            try:
                assert read_grey(path).dtype == np.uint8
            except DataError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
