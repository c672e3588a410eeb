"""Data sources, splits, the letterbox and augmentation, and the dataset handed to the training loop."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from famseg.data.augment import (
    MEAN,
    STD,
    eval_transform,
    letterbox,
    letterbox_scale,
    normalise,
    train_transform,
    undo_letterbox,
)
from famseg.data.dataset import PHANTOM_LENGTH, SegmentationDataset, open_data
from famseg.data.folder import Folder, write_folder
from famseg.data.hc18 import HC18, fill_outline
from famseg.data.phantom import Phantom
from famseg.data.sample import Sample
from famseg.data.split import k_folds, split_by_subject
from famseg.files.errors import DataError
from famseg.files.images import read_grey
from famseg.files.labels import read_labels

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
HC18_TABLE = "training_set_pixel_size_and_HC.csv"


def disc(height: int, width: int, x: float, y: float, a: float, b: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def outline_of(region: np.ndarray) -> np.ndarray:
    """The region's border, one pixel wide."""
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(region.shape, np.uint8), contours, -1, 1, 1).astype(bool)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def hc18(tmp_path: Path) -> Path:
    """Three images of two subjects in the challenge's layout."""
    root = tmp_path / "hc18"
    lines = ["filename,pixel size(mm),head circumference (mm)"]
    for name, a in (("001_HC", 20), ("001_2HC", 22), ("002_HC", 24)):
        image = np.random.default_rng(a).integers(0, 255, (60, 80), np.uint8)
        write_png(root / "training_set" / f"{name}.png", image)
        line = outline_of(disc(60, 80, 40, 30, a, 18)).astype(np.uint8) * 255
        write_png(root / "training_set" / f"{name}_Annotation.png", line)
        lines.append(f"{name}.png,0.2,{a}.5")
    (root / HC18_TABLE).write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 40), np.uint8)
    mask[3:6, 5:20] = 1
    mask[10:25, 10:30] = 2

    def image() -> np.ndarray:
        return rng.integers(0, 255, (30, 40), np.uint8)

    return [
        Sample("a", "s1", image(), mask, 0.25, 12.5, 80.125),
        Sample("b", "s1", image(), mask[::-1].copy()),
        Sample("c", "s2", image(), np.zeros_like(mask), 0.5, None, 90.0),
    ]


@pytest.fixture
def folder(tmp_path: Path, samples: list[Sample]) -> Path:
    write_folder(samples, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture(scope="session")
def real_hc18() -> HC18:
    if not (SHARED / "hc18_half").is_dir():
        pytest.skip(f"needs the HC18 images in {SHARED / 'hc18_half'}")
    return HC18(SHARED / "hc18_half")


# --- HC18 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "training_set"])
def test_hc18_reads_the_challenge_layout(hc18: Path, inner: str) -> None:
    data = HC18(hc18 / inner)
    assert data.names == ["001_2HC", "001_HC", "002_HC"]
    assert data.subjects == ["001", "001", "002"] == [sample.subject for sample in data]
    sample = data[2]
    assert (sample.name, sample.pixel_size, sample.head_circumference) == ("002_HC", 0.2, 24.5)
    assert sample.image.dtype == sample.mask.dtype == np.uint8
    assert sample.femur_length is None
    np.testing.assert_array_equal(sample.mask, disc(60, 80, 40, 30, 24, 18) * 2)


def break_hc18(root: Path, what: str) -> Path:
    """Damage the data set; returns the file that the message must name."""
    inner = root / "training_set"
    image, line, table = inner / "002_HC.png", inner / "002_HC_Annotation.png", root / HC18_TABLE
    if what == "no annotation":
        line.unlink()
        return image
    if what == "no row":
        table.write_text("\n".join(table.read_text().splitlines()[:-1]))
        return table
    if what == "no table":
        table.unlink()
        return table
    if what == "bad number":
        table.write_text(table.read_text().replace("24.5", "n/a"))
        return table
    if what == "bad column":
        table.write_text(table.read_text().replace("pixel size(mm)", "mm"))
        return table
    if what == "other size":
        write_png(line, np.full((30, 40), 255, np.uint8))
        return line
    if what == "truncated":
        image.write_bytes(image.read_bytes()[:200])
        return image
    if what == "no bytes":
        image.write_bytes(b"")
        return image
    if what == "black annotation":
        write_png(line, np.zeros((60, 80), np.uint8))
        return line
    for path in inner.iterdir():
        path.unlink()
    return inner


@pytest.mark.parametrize(
    "what",
    [
        "no annotation",
        "no row",
        "no table",
        "bad number",
        "bad column",
        "other size",
        "truncated",
        "no bytes",
        "black annotation",
        "empty",
    ],
)
def test_hc18_names_the_file_at_fault(hc18: Path, what: str) -> None:
    culprit = break_hc18(hc18, what)
    with pytest.raises(DataError) as error:
        list(HC18(hc18))
    assert str(error.value).startswith(str(culprit))
    assert "\n" not in str(error.value)


def test_hc18_missing_or_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*no such folder"):
        HC18(tmp_path / "nowhere")
    with pytest.raises(DataError, match="training_set"):
        HC18(tmp_path)


ELLIPSES = {
    "inside": (60, 45, 40, 30),
    "cut by the left edge": (20, 45, 40, 30),
    "cut by two opposite edges": (60, 45, 40, 60),
    "over a corner": (110, 80, 60, 50),
    "touching the edge from inside": (40, 45, 40, 30),
}


@pytest.mark.parametrize("where", ELLIPSES)
@pytest.mark.parametrize("gaps", [0, 1, 3])
def test_outlines_fill_at_edges_and_with_gaps(where: str, gaps: int) -> None:
    x, y, a, b = ELLIPSES[where]
    large = disc(190, 220, x + 50, y + 50, a, b)
    region, line = large[50:140, 50:170], outline_of(large)[50:140, 50:170].copy()  # open at the edge
    for y, x in np.argwhere(line)[:: max(1, line.sum() // 3)][:gaps]:
        line[y, x] = False
    assert iou(fill_outline(line), region) > 0.98


def test_closed_outlines_fill_exactly_whatever_their_shape() -> None:
    bean = disc(90, 120, 60, 45, 40, 30) & ~disc(90, 120, 60, 10, 15, 20)
    np.testing.assert_array_equal(fill_outline(outline_of(bean)), bean)
    np.testing.assert_array_equal(fill_outline(bean), bean)  # an annotation that is filled already


def test_every_real_outline_fills(real_hc18: HC18) -> None:
    assert len(real_hc18) == 798
    for index in range(0, len(real_hc18), 20):
        sample = real_hc18[index]
        assert set(np.unique(sample.mask)) == {0, 2}
        assert 0.03 < (sample.mask == 2).mean() < 0.6
        assert 50 < sample.head_circumference < 400


# --- your own folder --------------------------------------------------------------------------------------


def test_written_samples_come_back_exactly(folder: Path, samples: list[Sample]) -> None:
    data = Folder(folder)
    assert data.names == ["a", "b", "c"]
    assert data.subjects == ["s1", "s1", "s2"]
    for read, written in zip(data, samples, strict=True):
        np.testing.assert_array_equal(read.image, written.image)
        np.testing.assert_array_equal(read.mask, written.mask)
        for field in ("name", "subject", "pixel_size", "femur_length", "head_circumference"):
            assert getattr(read, field) == getattr(written, field)
    assert Image.open(folder / "masks" / "a.png").mode == "P"
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]  # no temporary files


def test_write_folder_keeps_what_is_there(folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="already holds"):
        write_folder(samples, folder)
    with pytest.raises(DataError, match=r"'\.\./a'"):
        write_folder([Sample("../a", "s", samples[0].image, samples[0].mask)], tmp_path / "new")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"])
@pytest.mark.parametrize("colour", [False, True])
def test_every_image_format_reads_as_grey(tmp_path: Path, suffix: str, colour: bool) -> None:
    grey = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8), (0, 0), 3)
    write_png(tmp_path / f"x{suffix}", cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR) if colour else grey)
    read = read_grey(tmp_path / f"x{suffix}")
    assert read.dtype == np.uint8
    np.testing.assert_allclose(read.astype(int), grey, atol=3 if "jp" in suffix else 0)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path: Path, suffix: str) -> None:
    deep = np.linspace(1000, 5000, 1200).reshape(30, 40).astype(np.uint16)
    write_png(tmp_path / f"x{suffix}", deep)
    read = read_grey(tmp_path / f"x{suffix}")
    np.testing.assert_allclose(read, (deep - 1000.0) / 4000 * 255, atol=0.51)
    write_png(tmp_path / f"flat{suffix}", np.full((4, 4), 700, np.uint16))
    assert not read_grey(tmp_path / f"flat{suffix}").any()


def test_palette_masks_are_indices_and_colour_masks_are_refused(tmp_path: Path) -> None:
    labels = np.arange(3, dtype=np.uint8).repeat(12).reshape(6, 6)
    picture = Image.fromarray(labels)
    picture.putpalette([200, 10, 10, 7, 7, 7, 90, 2, 250])
    picture.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "p.png"), labels)
    picture.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"rgb\.png.*mode RGB"):
        read_labels(tmp_path / "rgb.png")


def break_folder(root: Path, what: str) -> Path:
    image, mask, table = root / "images" / "c.png", root / "masks" / "c.png", root / "pixel_size.csv"
    if what == "no mask":
        mask.unlink()
        return image
    if what == "no row":
        table.write_text("\n".join(table.read_text().splitlines()[:-1]))
        return table
    if what == "negative":
        table.write_text(table.read_text().replace("0.25", "-0.25"))
        return table
    if what == "label":
        write_png(mask, np.full((30, 40), 7, np.uint8))
        return mask
    if what == "other size":
        write_png(mask, np.zeros((40, 30), np.uint8))
        return mask
    if what == "not an image":
        image.write_text("hello")
        return image
    if what == "not a mask":
        mask.write_text("hello")
        return mask
    if what == "same stem":
        write_png(root / "images" / "c.tif", np.zeros((30, 40), np.uint8))
        return root / "images" / "c.tif"
    for path in (root / "images").iterdir():
        path.unlink()
    return root / "images"


@pytest.mark.parametrize(
    "what",
    [
        "no mask",
        "no row",
        "negative",
        "label",
        "other size",
        "not an image",
        "not a mask",
        "same stem",
        "empty",
    ],
)
def test_folder_names_the_file_at_fault(folder: Path, what: str) -> None:
    culprit = break_folder(folder, what)
    with pytest.raises(DataError) as error:
        list(Folder(folder))
    assert str(error.value).startswith(str(culprit))
    assert "\n" not in str(error.value)
    if what == "label":
        assert "label 7" in str(error.value)


def test_folder_works_without_table_and_with_unknown_cells(folder: Path) -> None:
    (folder / "pixel_size.csv").write_text("filename, pixel_size_mm\na.png, 0.3\nb, \nc.png,\n")
    assert [sample.pixel_size for sample in Folder(folder)] == [0.3, None, None]
    (folder / "pixel_size.csv").unlink()
    assert Folder(folder).subjects == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"masks.*no such folder"):
        (folder / "masks").rename(folder / "labels")
        Folder(folder)


# --- splits -----------------------------------------------------------------------------------------------

SUBJECTS = [f"{i // 3:03d}" for i in range(60)] + ["big"] * 9


def test_split_is_disjoint_complete_and_deterministic() -> None:
    train, val = split_by_subject(SUBJECTS, 0.2, seed=3)
    assert sorted(train + val) == list(range(len(SUBJECTS)))
    assert not {SUBJECTS[i] for i in train} & {SUBJECTS[i] for i in val}
    assert 0.2 * len(SUBJECTS) <= len(val) < 0.2 * len(SUBJECTS) + 9
    assert (train, val) == split_by_subject(SUBJECTS, 0.2, seed=3)
    assert val != split_by_subject(SUBJECTS, 0.2, seed=4)[1]
    backwards = split_by_subject(SUBJECTS[::-1], 0.2, seed=3)[1]
    assert {SUBJECTS[i] for i in val} == {SUBJECTS[::-1][i] for i in backwards}


def test_split_reads_subjects_from_samples_too(samples: list[Sample], hc18: Path) -> None:
    assert split_by_subject(samples, 0.5) == split_by_subject(["s1", "s1", "s2"], 0.5)
    train, val = split_by_subject(HC18(hc18), 0.01)
    assert {tuple(train), tuple(val)} == {(0, 1), (2,)}


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_split_leaves_no_side_empty(fraction: float) -> None:
    train, val = split_by_subject(["a", "b", "b", "b"], fraction)
    assert train
    assert val


def test_folds_validate_every_sample_once() -> None:
    folds = [k_folds(SUBJECTS, 5, fold, seed=1) for fold in range(5)]
    assert sorted(i for _, val in folds for i in val) == list(range(len(SUBJECTS)))
    for train, val in folds:
        assert sorted(train + val) == list(range(len(SUBJECTS)))
        assert not {SUBJECTS[i] for i in train} & {SUBJECTS[i] for i in val}
        assert abs(len(val) - len(SUBJECTS) / 5) <= 3
    assert folds[0] == k_folds(SUBJECTS, 5, 0, seed=1)


def test_impossible_splits_explain_themselves() -> None:
    with pytest.raises(DataError, match="at least 2 subjects"):
        split_by_subject(["a", "a"])
    with pytest.raises(DataError, match="between 0 and 1"):
        split_by_subject(["a", "b"], 1.0)
    with pytest.raises(DataError, match="at least 3 subjects"):
        k_folds(["a", "b"], 3, 0)
    with pytest.raises(DataError, match="0 to 1"):
        k_folds(["a", "b"], 2, 2)
    with pytest.raises(DataError, match="2 or more"):
        k_folds(["a", "b"], 1, 0)


# --- letterbox and augmentation ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, (48, 96), (200, 120)])
def test_letterbox_keeps_circles_round_and_places(size: int | tuple[int, int]) -> None:
    height, width = 54, 80
    circle = disc(height, width, 50, 25, 20, 20)
    image, mask = eval_transform(size)(circle.astype(np.uint8) * 255, circle.astype(np.uint8) * 2)
    assert image.shape == mask.shape == ((size, size) if isinstance(size, int) else size)
    assert image.dtype == np.float32
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 2}
    scale = letterbox_scale(height, width, size)
    rows, columns = np.nonzero(mask)
    assert np.ptp(columns) + 1 == pytest.approx(40.5 * scale, abs=1.5)
    assert np.ptp(rows) + 1 == pytest.approx(40.5 * scale, abs=1.5)
    assert (mask == 2).sum() == pytest.approx(circle.sum() * scale**2, rel=0.03)
    # Image and mask lie on each other: nearest neighbour samples pixel centres.
    assert iou(image * STD + MEAN > 0.5, mask == 2) > 0.95
    assert iou(undo_letterbox(mask, height, width) == 2, circle) > 0.95


def test_letterbox_at_the_same_size_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    np.testing.assert_array_equal(letterbox(image, 32, cv2.INTER_LINEAR), image)
    np.testing.assert_array_equal(undo_letterbox(image, 32, 32), image)
    np.testing.assert_allclose(normalise(image), (image / 255 - MEAN) / STD, rtol=1e-5, atol=1e-6)


def test_augmentation_depends_on_the_seed_alone(samples: list[Sample]) -> None:
    transform, other = train_transform(64), train_transform(64)
    first = transform(samples[0].image, samples[0].mask, 7)
    different = transform(samples[0].image, samples[0].mask, 8)
    again = other(samples[0].image, samples[0].mask, 7)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], different[0])


def test_augmentation_draws_its_steps_independently() -> None:
    """Vertical flips must not be tied to horizontal ones (albumentations' set_random_seed does that)."""
    corner = np.zeros((64, 64), np.uint8)
    corner[8:20, 8:20] = 2
    transform, sides = train_transform(64), []
    for seed in range(150):
        rows, columns = np.nonzero(transform(corner, corner, seed)[1])
        sides.append((columns.mean() > 32, rows.mean() > 32))
    horizontal, vertical = np.array(sides).T
    assert 0.35 < horizontal.mean() < 0.65
    assert 0.03 < vertical.mean() < 0.25
    assert (vertical & ~horizontal).any()
    assert (vertical & horizontal).any()


def test_augmented_masks_follow_the_image() -> None:
    head = disc(64, 64, 30, 32, 20, 15)
    transform = train_transform(64)
    for seed in range(20):
        image, mask = transform(head.astype(np.uint8) * 200, head.astype(np.uint8) * 2, seed)
        assert set(np.unique(mask)) <= {0, 2}
        threshold = (image.max() + image.min()) / 2
        assert iou(image > threshold, mask == 2) > 0.9


def test_importing_the_data_layer_needs_no_network() -> None:
    """albumentations would ask a server for its version: sockets are made to fail before the import."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('opened a connection')\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        "import famseg.data.augment\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root, timeout=60)


# --- dataset ----------------------------------------------------------------------------------------------


def test_dataset_items(samples: list[Sample]) -> None:
    data = SegmentationDataset(samples, [0, 1], eval_transform(80))
    assert len(data) == 2
    item = data[0]
    assert item["image"].shape == (1, 80, 80)
    assert item["image"].dtype == torch.float32
    assert item["mask"].shape == (80, 80)
    assert item["mask"].dtype == torch.int64
    assert item["pixel_size"] == pytest.approx(0.125)  # 40 pixels became 80
    assert (item["femur_length"], item["head_circumference"]) == (12.5, 80.125)
    assert all(math.isnan(data[1][key]) for key in ("pixel_size", "femur_length", "head_circumference"))
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=2)))
    assert batch["image"].shape == (2, 1, 80, 80)
    assert batch["index"].tolist() == [0, 1]
    assert SegmentationDataset(samples, [2, 0], eval_transform(80))[1]["index"] == 0


class Counting(list):
    reads = 0

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("cache", "reads"), [(True, 1), (False, 3)])
def test_cache_reads_once(samples: list[Sample], cache: bool, reads: int) -> None:
    source = Counting(samples)
    data = SegmentationDataset(source, [0], eval_transform(32), cache=cache)
    for _ in range(3):
        data[0]
    assert source.reads == reads


def test_augmentation_varies_with_seed_epoch_and_index_only(samples: list[Sample]) -> None:
    data = SegmentationDataset(samples, [0, 1, 0], train_transform(64), seed=1)
    first = data[0]["image"]
    data[1]
    assert torch.equal(data[0]["image"], first)
    assert torch.equal(data[2]["image"], first)
    data.set_epoch(1)
    assert not torch.equal(data[0]["image"], first)
    data.set_epoch(0)
    assert torch.equal(data[0]["image"], first)
    assert not torch.equal(SegmentationDataset(samples, [0], train_transform(64), seed=2)[0]["image"], first)
    assert torch.equal(pickle.loads(pickle.dumps(data))[0]["image"], first)


def test_epochs_reach_persistent_workers(samples: list[Sample]) -> None:
    data = SegmentationDataset(samples, [0, 1, 2], train_transform(64), seed=1)
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        data.set_epoch(epoch)
        expected = torch.stack([data[i]["image"] for i in range(3)])
        assert torch.equal(next(iter(loader))["image"], expected)


# --- specifications ---------------------------------------------------------------------------------------


def test_open_data_understands_every_scheme(hc18: Path, folder: Path) -> None:
    assert len(open_data("phantom", image_size=32, seed=0)) == PHANTOM_LENGTH
    phantom = open_data("phantom:3", image_size=48, seed=5)
    assert len(phantom) == 3
    assert phantom[0].image.shape == (48, 48)
    np.testing.assert_array_equal(phantom[1].image, Phantom(3, (48, 48), 5)[1].image)
    assert len(open_data(f"hc18:{hc18}", image_size=32, seed=0)) == 3
    assert open_data(f"folder:{folder}", image_size=32, seed=0)[0].subject == "s1"


def test_joined_data_keep_subjects_apart(hc18: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "twin").symlink_to(hc18)
    other = tmp_path / "other"
    write_folder([Sample("x", "001", np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8))], other)
    data = open_data(f"hc18:{hc18}, folder:{other},phantom:2", image_size=32, seed=0)
    assert len(data) == 6
    assert [sample.name for sample in data][:4] == ["001_2HC", "001_HC", "002_HC", "x"]
    assert data[-1].name == data[5].name
    assert data.subjects == [sample.subject for sample in data]
    assert len(set(data.subjects)) == 5  # two of HC18, one of the folder though it shares a name, two phantoms
    with pytest.raises(IndexError):
        data[6]
    with pytest.raises(DataError, match="named twice"):
        open_data(f"hc18:{hc18},hc18:{tmp_path / 'twin'}", image_size=32, seed=0)


@pytest.mark.parametrize(
    "spec", ["", "coco:/x", "hc18", "folder:", "phantom:0", "phantom:many", "phantom:", "phantom,"]
)
def test_bad_specifications_list_what_would_work(spec: str) -> None:
    with pytest.raises(DataError, match="phantom") as error:
        open_data(spec, image_size=32, seed=0)
    assert "expected" in str(error.value)
