"""Sources say what their masks hold, and deliver them and their images as a network takes them; ISIC's layout."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from famseg.anatomy import parse_classes
from famseg.cli.train import main as train
from famseg.data.augment import train_transform
from famseg.data.classes import labels_of, left_out_of
from famseg.data.dataset import SegmentationDataset, open_data
from famseg.data.folder import Folder
from famseg.data.isic import ISIC
from famseg.data.phantom import Phantom
from famseg.files.errors import DataError
from famseg.files.images import read_colour_image, read_image
from tests.dicom import dicom, save
from tests.isic import INPUT, TRUTH, photograph, write_isic

LESION = parse_classes("lesion")


@pytest.fixture(scope="module")
def isic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_isic(tmp_path_factory.mktemp("isic"))


# --- labels of a source -------------------------------------------------------------------------------


def test_masks_are_mapped_by_name_and_what_is_left_out_is_background() -> None:
    source = Phantom(6, (64, 64), 3)
    swapped = open_data("phantom:6", image_size=64, seed=3, classes=parse_classes("FB,FL"))
    heads = open_data("phantom:6", image_size=64, seed=3, classes=parse_classes("FB"))
    assert labels_of(source) == ("background", "FL", "FB")
    assert (left_out_of(source), left_out_of(swapped), left_out_of(heads)) == ([], [], ["FL"])
    assert heads.subjects == source.subjects  # type: ignore[attr-defined]
    for i, sample in enumerate(source):
        np.testing.assert_array_equal(swapped[i].mask, np.uint8([0, 2, 1])[sample.mask])
        np.testing.assert_array_equal(heads[i].mask, sample.mask == 2)
        assert heads[i].mask.dtype == np.uint8 and heads[i].digest == sample.digest


def test_joined_sources_count_each_in_its_own_way(isic: Path) -> None:
    data = open_data(f"isic:{isic},phantom:2", image_size=64, seed=0, classes=parse_classes("FB,lesion"))
    assert left_out_of(data) == ["FL"]
    assert set(np.unique(data[0].mask)) == {0, 2}
    heads = [Phantom(2, (64, 64), 0)[i].mask == 2 for i in range(2)]
    assert [set(np.unique(data[6 + i].mask)) for i in range(2)] == [set(np.unique(head)) for head in heads]


def test_a_class_that_no_source_has_is_an_error(isic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="expected masks with FL, FB, found lesion and no FL"):
        open_data(f"isic:{isic}", image_size=64, seed=0)
    capsys.readouterr()
    assert train(["--data", "phantom:8", "--classes", "FB,lesion"]) == 2
    error = capsys.readouterr().err
    assert "found FL, FB and no lesion" in error and error.count("\n") == 1


# --- folders ------------------------------------------------------------------------------------------


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_counts_as_the_classes_do(tmp_path: Path) -> None:
    image, white = photograph(0)
    labels = np.zeros_like(white)
    labels[5:9, 5:9] = 1
    cv2.rectangle(labels, (20, 10), (40, 30), 1, 3)
    labels[12:29, 22:39] = 2  # lined by 1, as a cup in a disc: of femur and head it would be a sign of blending
    write(tmp_path / "images" / "a.png", image)
    write(tmp_path / "masks" / "a.png", labels)
    data = open_data(f"folder:{tmp_path}", image_size=64, seed=0, classes=parse_classes("disc,cup"))
    np.testing.assert_array_equal(data[0].mask, labels)
    with pytest.raises(DataError, match="label 1 lines label 2"):
        Folder(tmp_path)[0]
    with pytest.raises(
        DataError, match=r"expected the labels 0 background, 1 lesion; found label 2; relabel the mask$"
    ):
        Folder(tmp_path, LESION)[0]


def test_black_and_white_masks_are_one_class(tmp_path: Path) -> None:
    image, white = photograph(0)
    write(tmp_path / "images" / "a.png", image)
    mask = write(tmp_path / "masks" / "a.png", white)
    np.testing.assert_array_equal(Folder(tmp_path, LESION)[0].mask, white // 255)
    with pytest.raises(DataError, match=r"found label 255; relabel the mask, or name its one class by --classes"):
        Folder(tmp_path)[0]
    write(mask, np.full_like(white, 255))
    assert (Folder(tmp_path, LESION)[0].mask == 1).all()
    white[0, :2] = 1, 0  # what is neither black nor white may mean anything
    write(mask, white)
    with pytest.raises(DataError, match=r"found label 255; relabel the mask$"):
        Folder(tmp_path, LESION)[0]


def test_masks_may_be_called_as_isics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, white = photograph(0)
    for name in ("a", "b", "b_segmentation", "c"):
        write(tmp_path / "images" / f"{name}.jpg", image)
    for name in ("a_segmentation", "b", "b_segmentation", "c_Segmentation", "d_segmentation"):
        write(tmp_path / "masks" / f"{name}.png", white)
    assert Folder(tmp_path, LESION).names == ["a", "b", "b_segmentation", "c"]
    assert "1 left out (no image of that name): d_segmentation.png" in capsys.readouterr().err
    twice = write(tmp_path / "masks" / "c.png", white)
    with pytest.raises(DataError, match=r"c_Segmentation\.png: c\.jpg has a mask already, c\.png; remove one") as error:
        Folder(tmp_path, LESION)
    twice.unlink()
    assert "\n" not in str(error.value)


# --- colour -------------------------------------------------------------------------------------------


def test_colour_is_read_as_it_is_and_grey_is_repeated(tmp_path: Path) -> None:
    image, _ = photograph(1)
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    colour, grey = write(tmp_path / "colour.png", image), write(tmp_path / "grey.png", luma)
    np.testing.assert_array_equal(read_colour_image(colour)[0], image)
    np.testing.assert_array_equal(read_image(colour)[0], luma)
    np.testing.assert_array_equal(read_colour_image(grey)[0], np.stack([luma] * 3, 2))
    record = save(dicom(image, PixelSpacing=[0.2, 0.2]), tmp_path / "colour")
    np.testing.assert_array_equal(read_colour_image(record)[0], image)
    assert read_colour_image(record)[1] == 0.2
    np.testing.assert_array_equal(read_image(record)[0], luma)
    record = save(dicom(luma), tmp_path / "grey")
    np.testing.assert_array_equal(read_colour_image(record)[0], np.stack([luma] * 3, 2))


def test_deep_colour_is_refused_and_deep_grey_is_read(tmp_path: Path) -> None:
    image, white = photograph(1)
    deep = tmp_path / "deep.png"
    cv2.imwrite(str(deep), image.astype(np.uint16) * 200)
    with pytest.raises(DataError, match=r"deep\.png: is 16-bit colour, which is read as grey alone; save it with 8"):
        read_colour_image(deep)
    cv2.imwrite(str(deep), white.astype(np.uint16) * 200)
    np.testing.assert_array_equal(read_colour_image(deep)[0], np.stack([white] * 3, 2))


def test_items_in_colour_have_three_channels(isic: Path) -> None:
    data = open_data(f"isic:{isic},phantom:2", image_size=64, seed=0, classes=parse_classes("lesion,FB"), in_channels=3)
    for augmentation in ("full", "wide", "rotate-flip"):
        items = SegmentationDataset(data, range(8), train_transform(64, augmentation))
        for epoch in range(3):
            items.set_epoch(epoch)
            assert {items[i]["image"].shape for i in (0, 7)} == {(3, 64, 64)}
    plain = SegmentationDataset(data, range(8), train_transform(64, "none"))
    photo, phantom = plain[0]["image"], plain[7]["image"]
    assert (photo[0] > photo[2] + 0.5).float().mean() > 0.5  # red skin
    assert torch.equal(phantom[0], phantom[2])


# --- ISIC ---------------------------------------------------------------------------------------------


def test_isic_reads_its_layouts(isic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ISIC(isic, colour=True)
    assert len(data) == 6 and data.names[1] == data.subjects[1] == "ISIC_0000001"
    image, white = photograph(1)
    np.testing.assert_allclose(data[1].image.astype(int), image, atol=40)
    assert np.abs(data[1].image.astype(int) - image).mean() < 5
    np.testing.assert_array_equal(data[1].mask, white // 255)
    assert data[1].pixel_size is None
    assert ISIC(isic)[1].image.shape == white.shape
    assert capsys.readouterr().err.count("LICENSE.txt") == 4  # both folders, twice

    # 2016 and 2017: other names, superpixels among the images, the ground truth of other tasks beside.
    root = write_isic(tmp_path / "2017", suffix="_Segmentation")
    (root / INPUT).rename(root / "ISIC-2017_Training_Data")
    (root / TRUTH).rename(root / "ISIC-2017_Training_Part1_GroundTruth")
    (root / "ISIC-2017_Training_Part2_GroundTruth").mkdir()
    write(root / "ISIC-2017_Training_Data" / "ISIC_0000000_superpixels.png", image)
    assert len(ISIC(root)) == len(ISIC(root / "ISIC-2017_Training_Data")) == 6
    assert "ISIC_0000000_superpixels.png" in capsys.readouterr().err

    assert len(ISIC((tmp_path / "2017").rename(tmp_path / "My_Data"))) == 6
    root = tmp_path / "My_Data"

    # Two parts side by side: which one is meant must be said.
    write_isic(root / "other")
    for name in (INPUT, TRUTH):
        (root / "other" / name).rename(root / name)
    with pytest.raises(DataError, match=r"found ISIC-2017_Training_Data, ISIC2018.*like isic:/"):
        ISIC(root)


def broken(root: Path, what: str) -> str:
    """Damage a set; what the error must say."""
    image, truth = root / INPUT / "ISIC_0000002.jpg", root / TRUTH / "ISIC_0000002_segmentation.png"
    white = photograph(2)[1]
    if what == "no mask":
        truth.unlink()
        return f"{image}: its mask {truth} is missing"
    if what == "two masks":
        write(root / TRUTH / "ISIC_0000002_Segmentation.png", white)
        return "ISIC_0000002 has a mask already"
    if what == "two images":
        write(image.with_suffix(".png"), white)
        return "has the same name but for the suffix"
    if what == "other values":
        write(truth, white // 2)
        return f"{truth}: expected the values 0 and 255, found others"
    if what == "other size":
        write(truth, white[:-1])
        return f"{truth}: expected 64x48 pixels"
    if what == "no masks":
        (root / TRUTH).rename(root / "masks")
        return "expected one folder *_GroundTruth"
    (root / INPUT).rename(root / "images")
    return "expected one folder of images, called *_Data or *_Input, found none"


@pytest.mark.parametrize(
    "what", ["no mask", "two masks", "two images", "other values", "other size", "no masks", "no images"]
)
def test_isic_names_what_is_at_fault(tmp_path: Path, what: str) -> None:
    words = broken(write_isic(tmp_path / "isic"), what)
    with pytest.raises(DataError) as error:
        list(ISIC(tmp_path / "isic"))
    assert words in str(error.value) and "\n" not in str(error.value)
