"""Standard planes with landmarks: the shapes they stand for, and every file used, counted or refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from famseg.biometrics import Axis, Ellipse, ellipse_circumference, fit_femur, fit_head
from famseg.cli.train import main
from famseg.data.dataset import open_data
from famseg.data.landmarks import FEMUR, FEMUR_WIDTH, HEAD, Landmarks, Marked
from famseg.data.planes import Planes
from famseg.files.errors import DataError
from famseg.files.tables import Row

HEIGHT, WIDTH = 120, 160
HEAD_COLUMNS = ("image_name", "center_w", "center_h", *HEAD.columns, "px_to_mm_rate", "Split")
FEMUR_COLUMNS = ("image_name", "center_w", "center_h", *FEMUR.columns, "px_to_mm_rate", "Algo")
SPAIN, AFRICA = "FETAL_PLANES_DB_data.csv", "African_planes_database.csv"


def ends(x: float, y: float, length: float, degrees: float) -> tuple[float, ...]:
    """Of a diameter with this middle: x, y, x, y."""
    dx, dy = length / 2 * math.cos(math.radians(degrees)), length / 2 * math.sin(math.radians(degrees))
    return x - dx, y - dy, x + dx, y + dy


def marked(structure: Marked, *coordinates: float, **cells: str) -> Landmarks:
    points = dict(zip(structure.columns, (repr(value) for value in coordinates), strict=True))
    return Landmarks(structure, Row("Marks.csv: line 2", {**points, **cells}))


def head_at(x: float, y: float, ofd: float, bpd: float, degrees: float) -> Landmarks:
    return marked(HEAD, *ends(x, y, ofd, degrees), *ends(x, y, bpd, degrees + 90))


# --- geometry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0, 20, 90, 137, 180, 250])
@pytest.mark.parametrize(("ofd", "bpd"), [(110, 90), (80, 100), (90, 90)])
def test_a_head_is_the_ellipse_of_its_diameters(ofd: float, bpd: float, degrees: float) -> None:
    landmarks = head_at(140.3, 130.6, ofd, bpd, degrees)
    shape = landmarks.shape
    assert isinstance(shape, Ellipse)
    assert (shape.x, shape.y, 2 * shape.a, 2 * shape.b) == pytest.approx((140.3, 130.6, max(ofd, bpd), min(ofd, bpd)))
    assert shape.length == pytest.approx(ellipse_circumference(ofd / 2, bpd / 2))
    mask = landmarks.mask(260, 280)
    assert set(np.unique(mask)) == {0, 2}
    assert np.count_nonzero(mask) == pytest.approx(math.pi * ofd * bpd / 4, rel=0.003)
    assert landmarks.area == pytest.approx(math.pi * ofd * bpd / 4)
    fit = fit_head(mask)
    assert fit is not None and fit.length == pytest.approx(shape.length, abs=0.4)
    assert (fit.x, fit.y) == pytest.approx((140.3, 130.6), abs=0.1)
    # The ends of both diameters are on the border: the pixel before is inside, the one behind is not.
    for length, angle in ((ofd, degrees), (bpd, degrees + 90)):
        for sign in (-1, 1):
            step = sign * np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
            (x, y), (out_x, out_y) = ([140.3, 130.6] + step * (length / 2 + d) for d in (-1.5, 1.5))
            assert mask[round(y), round(x)] == 2 and mask[round(out_y), round(out_x)] == 0


def test_a_circle_of_whole_pixels_is_exact() -> None:
    mask = head_at(10, 10, 10, 10, 0).mask(21, 21)
    rows, columns = np.mgrid[:21, :21]
    np.testing.assert_array_equal(mask == 2, (rows - 10) ** 2 + (columns - 10) ** 2 <= 25)


@pytest.mark.parametrize("degrees", [0, 35, 90, 164])
@pytest.mark.parametrize("length", [64, 150.5, 240])
def test_a_femur_is_a_bar_as_long_as_its_ends_are_apart(length: float, degrees: float) -> None:
    landmarks = marked(FEMUR, *ends(140.2, 139.7, length, degrees))
    assert isinstance(landmarks.shape, Axis) and landmarks.shape.length == pytest.approx(length)
    mask = landmarks.mask(280, 280)
    assert set(np.unique(mask)) == {0, 1}
    radius = length * FEMUR_WIDTH / 2
    area = 2 * radius * (length - 2 * radius) + math.pi * radius**2
    assert np.count_nonzero(mask) == pytest.approx(area, rel=0.03)
    assert landmarks.area == pytest.approx(area)
    fit = fit_femur(mask)
    assert fit is not None and fit.length == pytest.approx(length, abs=1)
    across = np.argwhere(mask) @ [math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))]
    assert np.ptp(across) == pytest.approx(2 * radius, abs=1.5)


def test_a_bar_along_the_rows_has_these_pixels() -> None:
    mask = marked(FEMUR, 4, 10, 20, 10).mask(21, 25)  # radius 1
    expected = np.zeros((21, 25), np.uint8)
    expected[10, 4:21] = 1
    expected[[9, 11], 5:20] = 1
    np.testing.assert_array_equal(mask, expected)


def test_a_head_that_leaves_the_image_is_cut_off_and_keeps_its_length() -> None:
    landmarks = head_at(20, 60, 100, 80, 0)
    mask = landmarks.mask(HEIGHT, WIDTH)
    whole = head_at(20 + 50, 60, 100, 80, 0).mask(HEIGHT, WIDTH)
    np.testing.assert_array_equal(mask[:, :-50], whole[:, 50:])
    assert landmarks.shape.length == pytest.approx(ellipse_circumference(50, 40))


@pytest.mark.parametrize(
    ("coordinates", "words"),
    [
        ((*ends(80, 60, 90, 0), *ends(80, 60, 70, 70)), "found middles .* and 70 degrees"),
        ((*ends(80, 60, 90, 0), *ends(80, 80, 70, 90)), r"middles \(80, 60\) and \(80, 80\)"),
        ((35, 60, 80, 25, 125, 60, 80, 95), "at right angles"),  # an end of one diameter for one of the other
    ],
)
def test_diameters_that_are_no_axes_are_refused(coordinates: tuple[float, ...], words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        marked(HEAD, *coordinates)
    assert str(error.value).startswith("Marks.csv: line 2: ")


def test_landmarks_marked_by_hand_need_not_be_exact() -> None:
    shape = marked(HEAD, *ends(80, 60, 90, 0), *ends(82, 64, 70, 98)).shape
    assert isinstance(shape, Ellipse)
    assert (shape.x, shape.y, shape.a, shape.b, shape.degrees) == pytest.approx((81, 62, 45, 35, 0))


# --- sets of planes -----------------------------------------------------------------------------------


def table(path: Path, columns: tuple[str, ...], rows: list[tuple[object, ...]], separator: str = ",") -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([columns, *rows])


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(len(path.name)).integers(0, 255, (height, width), np.uint8))


def head_row(name: str, rate: object = 0.5, ofd: float = 90) -> tuple[object, ...]:
    return name, WIDTH / 2, HEIGHT / 2, *ends(80, 60, ofd, 30), *ends(80, 60, 70, 120), rate, "Train"


def femur_row(name: str, rate: object = 0.25) -> tuple[object, ...]:
    return name, WIDTH / 2, HEIGHT / 2, *ends(80, 60, 96, 10), rate, ""


@pytest.fixture
def spain(tmp_path: Path) -> Path:
    """Six images of four patients as FETAL_PLANES_DB has them, with landmarks as the public annotations have them."""
    root = tmp_path / "spain"
    rows = []
    for name, patient, plane in (
        ("Patient00168_Plane2_1_of_1", 168, "Fetal abdomen"),
        ("Patient00168_Plane3_1_of_2", 168, "Fetal brain"),
        ("Patient00168_Plane3_2_of_2", 168, "Fetal brain"),
        ("Patient00168_Plane5_1_of_1", 168, "Fetal femur"),
        ("Patient00721_Plane3_1_of_1", 721, "Fetal brain"),
        ("Patient00900_Plane5_1_of_1", 900, "Fetal femur"),
    ):
        picture(root / "Images" / f"{name}.png")
        rows.append((name, patient, plane, "Not A Brain", "Op. 1", "Voluson E6", "1 "))
    columns = ("Image_name", "Patient_num", "Plane", "Brain_plane", "Operator", "US_Machine", "Train ")
    table(root / SPAIN, columns, rows, ";")
    heads = [f"Patient00168_Plane3_{i}_of_2.png" for i in (1, 2)]
    table(root / "Head.csv", HEAD_COLUMNS, [*map(head_row, heads), head_row("Patient00721_Plane3_1_of_1.png", "")])
    table(root / "Femur.csv", FEMUR_COLUMNS, [femur_row("Patient00168_Plane5_1_of_1.png")])
    return root


@pytest.fixture
def africa(tmp_path: Path) -> Path:
    """Patient 1 of two countries, a head and a femur of each."""
    root = tmp_path / "africa"
    rows, heads, femurs = [], [], []
    for center, code in (("Malawi", "MWI"), ("Egypt", "EGY")):
        for number, plane in ((1, "Fetal brain"), (2, "Fetal femur"), (3, "Fetal thorax")):
            name = f"patient001_{code}_plane{number}"
            picture(root / center / f"{name}.png")
            rows.append((1, plane, 0, center, name))
        heads.append(head_row(f"patient001_{code}_plane1.png", ""))
        femurs.append(femur_row(f"patient001_{code}_plane2"))
    table(root / AFRICA, ("Patient_num", "Plane", "Train", "Center", "Filename"), rows)
    table(root / "Head.csv", HEAD_COLUMNS, heads)
    table(root / "Femur.csv", FEMUR_COLUMNS, femurs)
    return root


def test_spanish_planes_with_landmarks_are_samples(spain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Planes(spain)
    assert data.names == [
        *("Patient00168_Plane3_1_of_2", "Patient00168_Plane3_2_of_2", "Patient00168_Plane5_1_of_1"),
        "Patient00721_Plane3_1_of_1",
    ]
    assert data.subjects == [sample.subject for sample in data] == ["168", "168", "168", "721"]
    assert [sample.pixel_size for sample in data] == [0.5, 0.5, 0.25, None]
    circumference = 0.5 * ellipse_circumference(45, 35)
    assert [sample.head_circumference for sample in data] == [pytest.approx(circumference)] * 2 + [None, None]
    assert [sample.femur_length for sample in data] == [None, None, pytest.approx(0.25 * 96), None]
    assert [set(np.unique(sample.mask)) for sample in data] == [{0, 2}, {0, 2}, {0, 1}, {0, 2}]
    assert all(sample.image.shape == sample.mask.shape == (HEIGHT, WIDTH) for sample in data)
    assert capsys.readouterr().err.splitlines() == [
        f"famseg: {spain}: 1 left out (neither Fetal brain nor Fetal femur): Patient00168_Plane2_1_of_1.png",
        f"famseg: {spain}: 1 left out (Fetal femur without a row in Femur.csv): Patient00900_Plane5_1_of_1.png",
    ]


def test_african_patients_are_those_of_their_country(africa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(f"planes:{africa}", image_size=32, seed=0)
    assert [sample.subject for sample in data] == ["Egypt/1", "Egypt/1", "Malawi/1", "Malawi/1"]
    assert [sample.name for sample in data][::2] == ["patient001_EGY_plane1", "patient001_MWI_plane1"]
    left_out = "patient001_EGY_plane3.png, patient001_MWI_plane3.png"
    assert (
        capsys.readouterr().err == f"famseg: {africa}: 2 left out (neither Fetal brain nor Fetal femur): {left_out}\n"
    )


def test_both_sets_join(spain: Path, africa: Path) -> None:
    data = open_data(f"planes:{spain}, planes:{africa},phantom:2", image_size=32, seed=0)
    assert len(data) == 4 + 4 + 2
    assert data[4].subject == f"planes:{africa}/Egypt/1"


def test_one_file_of_landmarks_is_enough(spain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spain / "Head.csv").unlink()
    assert Planes(spain).names == ["Patient00168_Plane5_1_of_1"]
    assert "3 left out (Fetal brain without a row in Head.csv): Patient00168" in capsys.readouterr().err


def test_what_has_no_use_is_counted_and_named(spain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (
        f"Patient00{name}.png" for name in ("168_Plane3_1_of_2", "168_Plane3_2_of_2", "721_Plane3_1_of_1")
    )
    femur = "Patient00168_Plane5_1_of_1.png"
    heads, femurs = spain / "Head.csv", spain / "Femur.csv"
    (spain / "Images" / second).unlink()
    clicks = (third, 80, 60, *ends(80, 60, 6, 30), *ends(80, 60, 2, 120), 0.1, "Train")
    table(heads, HEAD_COLUMNS, [clicks, head_row("009_HC.png"), head_row(second), head_row(femur), head_row(first)])
    table(femurs, FEMUR_COLUMNS, [femur_row(femur, 0.94)])  # 90.2 mm
    assert Planes(spain).names == ["Patient00168_Plane3_1_of_2"]
    assert capsys.readouterr().err.splitlines() == [
        f"famseg: {spain / SPAIN}: 1 left out (no image of that name): Patient00168_Plane3_2_of_2",
        f"famseg: {spain}: 1 left out (neither Fetal brain nor Fetal femur): Patient00168_Plane2_1_of_1.png",
        f"famseg: {femurs}: 1 left out (femur_length above 90 mm: check the landmarks and px_to_mm_rate): {femur}",
        f"famseg: {heads}: 1 left out (a shape below 20 pixels): {third}",
        f"famseg: {spain}: 1 left out (Fetal femur without a row in Femur.csv): Patient00900_Plane5_1_of_1.png",
        f"famseg: {heads}: 3 left out (no image of that name that is a Fetal brain): 009_HC.png, {second}, {femur}",
    ]


def edit(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def spoil(root: Path, what: str) -> tuple[Path, str]:
    """Break a Spanish set; the file that must be named, and words of the message."""
    image = root / "Images" / "Patient00168_Plane3_1_of_2.png"
    if what == "no table":
        (root / SPAIN).unlink()
        return root, f"expected one of the tables {SPAIN} or {AFRICA}, found 0"
    if what == "two tables":
        (root / AFRICA).write_text("")
        return root, "found 2"
    if what == "commas for semicolons":
        (root / SPAIN).write_text((root / SPAIN).read_text().replace(";", ","))
        return root / SPAIN, "separate columns by semicolons"
    if what == "no plane column":
        return edit(root / SPAIN, "Plane;", "Kind;"), r"expected the column\(s\) Plane, found Image_name"
    if what == "unknown plane":
        return edit(root / SPAIN, "Fetal brain", "Fetal brian"), "line 3: expected one of .*, found 'Fetal brian'"
    if what == "no patient":
        return edit(root / SPAIN, ";721;", ";;"), "line 6: expected a value in 'Patient_num'"
    if what == "two rows for an image":
        line = "Patient00721_Plane3_1_of_1;721;Fetal brain;;;;1\n"
        (root / SPAIN).write_text((root / SPAIN).read_text() + line)
        return root / SPAIN, "line 8: .* has a row already"
    if what == "image without a row":
        picture(root / "Images" / "new.png")
        return root / SPAIN, "expected a row for Images/new.png, found none"
    if what == "one name twice":
        picture(image.with_suffix(".bmp"))
        return root / "Images", "has the same name but for the suffix"
    if what == "no landmarks":
        (root / "Head.csv").unlink()
        (root / "Femur.csv").unlink()
        return root, "expected images with landmarks in Head.csv or Femur.csv, found none"
    if what == "no images":
        image.parent.rename(root / "Pictures")
        return root, "expected images with landmarks"
    if what == "no column of landmarks":
        return edit(root / "Head.csv", "bpd_2_y", "bpd_y2"), r"expected the column\(s\) bpd_2_y"
    if what == "landmark that is no number":
        first = repr(ends(80, 60, 96, 10)[0])
        return edit(root / "Femur.csv", first, "left"), "line 2: expected a number in 'fl_1_x', found 'left'"
    if what == "empty landmark":
        first = repr(ends(80, 60, 96, 10)[0])
        return edit(root / "Femur.csv", first, ""), "line 2: expected a number in 'fl_1_x', found ''"
    if what == "pixel size of 0":
        return edit(root / "Femur.csv", ",0.25,", ",0,"), "line 2: expected a positive number of mm in 'px_to_mm_rate'"
    if what == "two rows of landmarks":
        with (root / "Head.csv").open("a", newline="") as file:
            csv.writer(file).writerow(head_row("Patient00721_Plane3_1_of_1"))
        return root / "Head.csv", r"line 5: Patient00721_Plane3_1_of_1\.png has a row already"
    if what == "image of another size":
        picture(image, HEIGHT // 2, WIDTH // 2)
        return root / "Head.csv", "line 2: its landmarks were set on an image of 160x120 pixels .*, found one of 80x60"
    if what == "landmarks outside":
        outside = ("Patient00168_Plane5_1_of_1.png", "", "", 300, 60, 400, 60, "", "")
        table(root / "Femur.csv", FEMUR_COLUMNS, [outside])
        return root / "Femur.csv", "line 2: expected landmarks inside the image of 160x120 pixels"
    assert what == "damaged image"
    image.write_bytes(b"no picture")
    return image, "picture|image|decode"


@pytest.mark.parametrize(
    "what",
    [
        *("no table", "two tables", "commas for semicolons", "no plane column", "unknown plane", "no patient"),
        *("two rows for an image", "image without a row", "one name twice", "no landmarks", "no images"),
        *("no column of landmarks", "landmark that is no number", "empty landmark", "pixel size of 0"),
        *("two rows of landmarks", "image of another size", "landmarks outside", "damaged image"),
    ],
)
def test_what_cannot_be_used_is_named(spain: Path, what: str) -> None:
    path, words = spoil(spain, what)
    with pytest.raises(DataError, match=words) as error:
        list(Planes(spain))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_image_in_the_folder_of_another_country_is_refused(africa: Path) -> None:
    name = "patient001_MWI_plane1.png"
    (africa / "Malawi" / name).rename(africa / "Egypt" / name)
    with pytest.raises(DataError, match=rf"{AFRICA}: expected a row for Egypt/{name}, found none"):
        Planes(africa)


def test_a_country_may_be_missing(africa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (africa / "Egypt").rename(africa / "elsewhere")
    assert Planes(africa).subjects == ["Malawi/1", "Malawi/1"]
    assert f"{AFRICA}: 3 left out (no image of that name): patient001_EGY_plane1" in capsys.readouterr().err


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        Planes(tmp_path / "nowhere")


def test_a_network_trains_on_both_sets(spain: Path, africa: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--model", "famseg_nano", "--image-size", "64", "--phases", "adamw:1", "--batch-size", "2"]
    assert main(["--data", f"planes:{spain},planes:{africa}", *options, "--out", str(out)]) == 0
    results = json.loads((out / "metrics.json").read_text())
    assert set(results["iou"]) == {"background", "FL", "FB"}
