"""Data sources and splits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from famseg.anatomy import parse_classes
from famseg.biometrics import fit_head
from famseg.data.classes import left_out_of
from famseg.data.dataset import OPEN, PHANTOM_LENGTH, open_data
from famseg.data.folder import Folder, write_folder
from famseg.data.hc18 import HC18, fill_outline
from famseg.data.phantom import Phantom
from famseg.data.sample import Sample
from famseg.data.split import first_images, k_folds, split_by_subject
from famseg.files.errors import DataError
from famseg.files.images import read_grey
from famseg.files.labels import read_labels
from famseg.training.config import TrainConfig
from famseg.training.distributed import ALONE
from famseg.training.run import prepare
from tests.samples import disc, iou, three_samples

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
HC18_TABLE = "training_set_pixel_size_and_HC.csv"


def outline_of(region: np.ndarray) -> np.ndarray:
    """The region's border, one pixel wide."""
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(region.shape, np.uint8), contours, -1, 1, 1).astype(bool)


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
    return three_samples()


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


def test_what_hc18_does_not_label_is_not_said_to_become_background(hc18: Path) -> None:
    heads = open_data(f"hc18:{hc18}", image_size=64, seed=0, classes=parse_classes("FB"))
    assert left_out_of(heads) == [] and set(np.unique(heads[0].mask)) == {0, 1}
    both = open_data(f"hc18:{hc18},phantom:2", image_size=64, seed=0, classes=parse_classes("FB"))
    assert left_out_of(both) == ["FL"]


def test_classes_that_nobody_looked_for_are_an_error(hc18: Path) -> None:
    """A network that finds none of them would be right everywhere: mIoU 1.000."""
    with pytest.raises(DataError, match="expected masks with FL, found FB and no FL"):
        open_data(f"hc18:{hc18}", image_size=64, seed=0, classes=parse_classes("FL"))
    assert len(open_data(f"hc18:{hc18}", image_size=64, seed=0)) == 3


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


def test_few_images_are_part_of_more_and_of_few_subjects() -> None:
    train, _ = split_by_subject(SUBJECTS, 0.2, seed=3)
    before: list[int] = []
    for count in (1, 3, 7, 20, len(train)):
        few = first_images(SUBJECTS, train, count, seed=3)
        assert len(few) == count and set(before) <= set(few) <= set(train) and few == sorted(few)
        cut = [s for s in {SUBJECTS[i] for i in few} if {i for i in train if SUBJECTS[i] == s} - set(few)]
        assert len(cut) <= 1  # the last subject's
        before = few
    assert few == train
    assert first_images(SUBJECTS, train, 7, seed=4) != first_images(SUBJECTS, train, 7, seed=3)
    for count in (0, len(train) + 1):
        with pytest.raises(DataError, match=f"train_images: expected 1 to {len(train)}, .* got {count}"):
            first_images(SUBJECTS, train, count)


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


def test_a_class_that_only_some_sources_label_is_open_in_the_others(hc18: Path, capsys) -> None:
    """HC18 has no femurs in its masks; the phantom has."""
    config = TrainConfig(data=f"hc18:{hc18},phantom:6", image_size=64, augmentation="none", batch_size=2)
    run = prepare(config, ALONE)
    assert run.training.partly == {"FL": 1}
    assert run.module.loss.partly
    assert "do not have FL say nothing of it" in capsys.readouterr().out
    for position in range(len(run.training)):
        simulated = run.training.sample(position).simulated
        assert set(run.training[position]["mask"].unique().tolist()) - {1, 2} == ({0} if simulated else {OPEN + 2})
    assert all(item["mask"].max() <= 2 for item in run.validation)
    only = prepare(dataclasses.replace(config, data=f"hc18:{hc18}"), ALONE)
    assert only.training.partly == {} and not only.module.loss.partly  # no image says what a femur is: background
    assert set(only.training[0]["mask"].unique().tolist()) == {0, 2}


def test_a_run_knows_what_its_masks_measure_too_much(hc18: Path) -> None:
    config = TrainConfig(data=f"hc18:{hc18},phantom:6", image_size=64, batch_size=2)
    given = [20.5, 22.5, 24.5]  # of the fixture, far from what its masks measure: what counts is that phantoms do not
    excess = prepare(config, ALONE).excess
    assert set(excess) == {"head_circumference"}
    mask = fit_head(HC18(hc18)[0].mask == 2)
    assert mask is not None and excess["head_circumference"] == pytest.approx(
        (mask.length - given[1] / 0.2) * 64 / 80, rel=0.3
    )
    assert prepare(dataclasses.replace(config, data="phantom:6"), ALONE).excess == {}
