"""Folders as people have them: every file is used, or counted and named."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from famseg.data.dataset import open_data
from famseg.data.folder import Folder
from famseg.data.hc18 import HC18
from famseg.data.phantom import Phantom
from famseg.files.errors import DataError
from famseg.files.listing import list_images, stem
from tests.dicom import dicom, save

PHANTOM = Phantom(1, (48, 64), seed=1)[0]
APPLE_DOUBLE = b"\0\x05\x16\x07\0\2\0\0Mac OS X        " + bytes(60)


def write(path: Path, pixels: np.ndarray, kind: str = "PNG", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    path.write_bytes(content.getvalue())
    return path


def pair(root: Path, name: str, kind: str = "PNG") -> None:
    write(root / "images" / name, PHANTOM.image, kind)
    write(root / "masks" / f"{stem(Path(name))}.png", PHANTOM.mask)


def test_eight_pairs_give_eight_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"a.png": "PNG", "b.webp": "WEBP", "c.jfif": "JPEG", "d.JPE": "JPEG", "e.gif": "GIF", "f": "PNG"}
    for name, kind in names.items():
        pair(tmp_path, name, kind)
    for name in ("1.2.840.10", "1.2.840.11"):
        save(dicom(PHANTOM.image, PixelSpacing=[0.2, 0.2]), tmp_path / "images" / name)
        write(tmp_path / "masks" / f"{name}.png", PHANTOM.mask)
    data = Folder(tmp_path)
    assert data.names == ["1.2.840.10", "1.2.840.11", "a", "b", "c", "d", "e", "f"]
    assert [sample.pixel_size for sample in data][:3] == [0.2, 0.2, None]
    for sample in data:
        assert np.corrcoef(sample.image.ravel(), PHANTOM.image.ravel())[0, 1] > 0.95
        np.testing.assert_array_equal(sample.mask, PHANTOM.mask)
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path, "a.png")
    write(tmp_path / "masks" / "alone.png", PHANTOM.mask)
    images = tmp_path / "images"
    for number in range(7):
        (images / f"note{number}.txt").write_text("BM is how a bitmap starts")
    (images / "._a.png").write_bytes(APPLE_DOUBLE)
    (images / "more").mkdir()
    for hidden in (".DS_Store", "Thumbs.db", "desktop.ini", ".a.png.123"):
        (images / hidden).write_text("x")
    (tmp_path / "pixel_size.csv").write_text("filename,pixel_size_mm\na.png,0.2\nb.png,0.2\n")
    (tmp_path / "Pixel_Sizes.csv").write_text("filename,pixel_size_mm\na.png,0.3\n")
    assert len(Folder(tmp_path)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"famseg: {images}: 9 left out (no image): ._a.png, more, note0.txt, note1.txt, note2.txt and 4 more",
        f"famseg: {tmp_path / 'masks'}: 1 left out (no image of that name): alone.png",
        f"famseg: {tmp_path}: 1 left out (neither images, masks nor pixel_size.csv): Pixel_Sizes.csv",
        f"famseg: {tmp_path / 'pixel_size.csv'}: 1 left out (no image of that name): b.png",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such names")
def test_a_name_of_two_lines_is_told_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path, "a\nb.png")
    (tmp_path / "images" / "c\nd.txt").write_text("x")
    write(tmp_path / "masks" / "a\nb.png", PHANTOM.mask, "JPEG")
    with pytest.raises(DataError, match=r"masks/a\\nb\.png: expected an index PNG"):
        Folder(tmp_path)[0]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file that blocks whoever opens it")
def test_a_pipe_in_the_folder_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert list_images(tmp_path) == []


def test_masks_are_found_whatever_the_case_of_the_suffix_and_the_form_of_the_name(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.PNG", PHANTOM.image)
    write(tmp_path / "masks" / "a.PNG", PHANTOM.mask)
    write(tmp_path / "images" / "Mu\u0308ller.png", PHANTOM.image)
    write(tmp_path / "masks" / "M\u00fcller.png", PHANTOM.mask)
    write(tmp_path / "images" / "c.bmp", PHANTOM.image, "BMP")
    write(tmp_path / "masks" / "c.tif", PHANTOM.mask, "TIFF")
    (tmp_path / "pixel_size.csv").write_text("filename,pixel_size_mm\na.PNG,1\nM\u00fcller.png,2\nc,3\n")
    assert sorted(sample.pixel_size for sample in Folder(tmp_path)) == [1, 2, 3]  # type: ignore[type-var]


def test_the_mask_of_one_uid_is_not_taken_for_another(tmp_path: Path) -> None:
    save(dicom(PHANTOM.image), write(tmp_path / "images" / "1.2.840.10", PHANTOM.image))
    write(tmp_path / "masks" / "1.2.840.png", PHANTOM.mask)
    with pytest.raises(DataError, match=r"1\.2\.840\.10: its mask .*1\.2\.840\.10\.png is missing"):
        Folder(tmp_path)


def test_image_and_mask_that_are_turned_differently_are_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    write(tmp_path / "images" / "a.png", PHANTOM.image, exif=exif)
    mask = write(tmp_path / "masks" / "a.png", PHANTOM.mask)
    with pytest.raises(DataError, match=r"expected 48x64 pixels .*, found 64x48"):
        Folder(tmp_path)[0]
    write(mask, PHANTOM.mask, exif=exif)
    sample = Folder(tmp_path)[0]
    np.testing.assert_array_equal(sample.image, np.rot90(PHANTOM.image, -1))
    np.testing.assert_array_equal(sample.mask, np.rot90(PHANTOM.mask, -1))


def test_a_jpeg_called_png_is_no_mask(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    write(tmp_path / "masks" / "a.png", PHANTOM.mask, "JPEG", quality=100)
    with pytest.raises(DataError, match=r"masks/a\.png: expected an index PNG, found JPEG"):
        Folder(tmp_path)[0]


def test_a_mask_resized_with_blended_labels_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    head = np.zeros((48, 64), np.uint8)
    cv2.ellipse(head, (30, 24), (20, 14), 20, 0, 360, 2, cv2.FILLED)
    for scale in (0.5, 1.3, 2, 3):
        size = (round(64 * scale), round(48 * scale))
        write(tmp_path / "images" / "a.png", cv2.resize(PHANTOM.image, size))
        write(tmp_path / "masks" / "a.png", cv2.resize(head, size, interpolation=cv2.INTER_LINEAR))
        with pytest.raises(DataError, match=r"masks/a\.png: label 1 lines label 2"):
            Folder(tmp_path)[0]
        write(tmp_path / "masks" / "a.png", cv2.resize(head, size, interpolation=cv2.INTER_NEAREST))
        assert set(np.unique(Folder(tmp_path)[0].mask)) == {0, 2}


def test_links_commas_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path / "scans, new", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "scans, new")
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("folder:~/link", f"folder:{tmp_path}/scans, new", "folder:~/scans, new"):
        assert len(open_data(spec, image_size=32, seed=0)) == 1
    assert len(open_data("folder:~/scans, new,phantom:2", image_size=32, seed=0)) == 3
    with pytest.raises(DataError, match="named twice"):
        open_data(f"folder:~/link,folder:{tmp_path}/scans, new", image_size=32, seed=0)


@pytest.mark.parametrize("linked", ["set", "root", "given"])
def test_hc18_through_links(tmp_path: Path, linked: str) -> None:
    line = np.zeros((48, 64), np.uint8)
    line[10:30, 10] = line[10:30, 40] = line[10, 10:41] = line[29, 10:41] = 255
    root = tmp_path / "hc18"
    inner = tmp_path / "elsewhere" if linked == "set" else root / "training_set"
    write(inner / "001_HC.png", PHANTOM.image)
    write(inner / "001_HC_Annotation.png", line)
    root.mkdir(exist_ok=True)
    if linked == "set":
        (root / "training_set").symlink_to(inner)
    table = root / "training_set_pixel_size_and_HC.csv"
    table.write_text("filename,pixel size(mm),head circumference (mm)\n001_HC.png,0.2,80\n")
    (tmp_path / "link").symlink_to(root / "training_set" if linked == "given" else root)
    for directory in (root, root / "training_set", tmp_path / "link"):
        assert HC18(directory)[0].pixel_size == 0.2


def test_only_an_image_suffix_is_no_part_of_the_name() -> None:
    names = {
        "a.png": "a",
        "a.b.TIFF": "a.b",
        "1.2.840.10": "1.2.840.10",
        "1.2.3.dcm": "1.2.3",
        "a": "a",
        "v1.5": "v1.5",
    }
    assert {name: stem(Path(name)) for name in names} == names
