"""famseg-predict from the outside: every format in, masks at their own size out, bad files skipped and told."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

from famseg.biometrics import head_circumference
from famseg.cli.predict import main
from famseg.data.phantom import Phantom
from famseg.files.errors import DataError
from famseg.files.images import read_image
from tests.checkpoints import write_checkpoint

SHAPE = (45, 70)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt"))


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    return Phantom(1, SHAPE, seed=2)[0].image


def dicom(pixels: np.ndarray, **attributes: object) -> Dataset:
    """An ultrasound record of one frame (H, W) or (H, W, 3), 8 or 16 bit."""
    record, colour = Dataset(), pixels.ndim == 3
    record.file_meta = FileMetaDataset()
    record.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    record.file_meta.MediaStorageSOPClassUID = record.SOPClassUID = UltrasoundImageStorage
    record.file_meta.MediaStorageSOPInstanceUID = record.SOPInstanceUID = generate_uid()
    record.Rows, record.Columns = pixels.shape[:2]
    record.SamplesPerPixel = 3 if colour else 1
    record.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        record.PlanarConfiguration = 0
    record.BitsAllocated = record.BitsStored = 8 * pixels.itemsize
    record.HighBit, record.PixelRepresentation = record.BitsAllocated - 1, 0
    record.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(record, name, value)
    return record


def region(centimetres: float, **attributes: object) -> Dataset:
    found = Dataset()
    found.RegionDataType = found.RegionSpatialFormat = 1
    found.PhysicalUnitsXDirection = found.PhysicalUnitsYDirection = 3
    found.PhysicalDeltaX = found.PhysicalDeltaY = centimetres
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def save(record: Dataset, path: Path) -> Path:
    record.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, grey: np.ndarray) -> Path:
    """One picture in every format."""
    folder = tmp_path_factory.mktemp("inputs")
    colour, deep = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), grey.astype(np.uint16) * 200 + 77
    for name, pixels in {
        "grey.png": grey, "colour.png": colour, "deep.png": deep, "grey.jpg": grey, "colour.jpeg": colour,
        "grey.bmp": grey, "colour.bmp": colour, "grey.tif": grey, "deep.tiff": deep,
    }.items():  # fmt: skip
        cv2.imwrite(str(folder / f"{name.replace('.', '_')}.{name.split('.')[1]}"), pixels)
    save(dicom(grey, SequenceOfUltrasoundRegions=[region(0.02)]), folder / "region.dcm")
    save(dicom(np.stack([grey] * 3, 2), PixelSpacing=[0.3, 0.3]), folder / "spacing.dcm")
    return folder


def table(out: Path) -> dict[str, dict[str, str]]:
    return {Path(row["file"]).name: row for row in csv.DictReader((out / "biometrics.csv").open())}


def test_every_format_gives_the_same_mask_at_its_own_size(checkpoint: str, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([checkpoint, str(inputs), "--out", str(out), "--batch-size", "3"]) == 0
    names = {path.stem for path in inputs.iterdir()}
    for kind in ("masks", "overlays"):
        assert {path.stem for path in (out / kind).iterdir()} == names
    masks = {name: np.asarray(Image.open(out / "masks" / f"{name}.png")) for name in names}
    truth = masks["grey_png"]
    assert truth.shape == SHAPE
    assert len(np.unique(truth)) > 1
    for name, mask in masks.items():
        exact = name.split("_")[0] != "deep" and "jp" not in name  # 16 bit is stretched, JPEG loses
        assert (mask == truth).mean() > (0.999 if exact else 0.8), name
    rows = table(out)
    assert (rows["region.dcm"]["pixel_size_mm"], rows["region.dcm"]["pixel_size_from"]) == ("0.2", "file")
    assert rows["spacing.dcm"]["pixel_size_mm"] == "0.3"
    assert rows["grey_png.png"]["pixel_size_mm"] == ""
    assert "no pixel size" in rows["grey_png.png"]["flags"]


def test_options_reach_the_prediction(
    checkpoint: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def predict(network: object, images: object, **options: object) -> list[np.ndarray]:
        given.update(options)
        return []

    monkeypatch.setattr("famseg.cli.predict.predict", predict)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # or a CPU would be taken without being asked for
    (tmp_path / "predict.yaml").write_text("backend: reference\nbatch_size: 2\n")
    options = ["--config", str(tmp_path / "predict.yaml"), "--flips", "--batch-size", "3", "--device", "cpu"]
    main([checkpoint, str(inputs), "--out", str(tmp_path / "out"), *options])
    assert given == {"flips": True, "batch_size": 3, "device": "cpu", "backend": "reference"}


def test_millimetres_are_those_of_the_written_mask(checkpoint: str, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([checkpoint, str(inputs / "grey_png.png"), "--pixel-size", "0.25", "--out", str(out)]) == 0
    row = table(out)["grey_png.png"]
    mask = np.asarray(Image.open(out / "masks" / "grey_png.png"))
    expected = head_circumference(mask == 2, 0.25)
    assert row["head_circumference_mm"] == ("" if expected is None else f"{expected:.6g}")
    assert row["pixel_size_from"] == "given"


def test_pixel_sizes_from_a_table(checkpoint: str, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "sizes.csv").write_text("filename,pixel_size_mm\ngrey_png.png,0.125\n")
    files = [str(inputs / name) for name in ("grey_png.png", "grey_bmp.bmp")]
    assert main([checkpoint, *files, "--pixel-size", str(tmp_path / "sizes.csv"), "--out", str(tmp_path / "out")]) == 0
    rows = table(tmp_path / "out")
    assert rows["grey_png.png"]["pixel_size_mm"] == "0.125"
    assert rows["grey_bmp.bmp"]["pixel_size_mm"] == ""


def test_a_bad_file_is_told_and_skipped_and_the_others_are_done(
    checkpoint: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes((inputs / "grey_png.png").read_bytes()[:300])
    files = [str(tmp_path / "missing.png"), str(inputs / "grey_png.png"), str(tmp_path / "bad.png")]
    assert main([checkpoint, *files, "--out", str(tmp_path / "out")]) == 1
    captured = capfd.readouterr()
    skipped = captured.err.strip().splitlines()
    assert len(skipped) == 2
    assert all(line.startswith("famseg-predict: skipped: ") for line in skipped)
    assert "1 of 3" in captured.out
    assert list(table(tmp_path / "out")) == ["grey_png.png"]
    assert main([checkpoint, files[0], "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{checkpoint}"], "images: is missing"),
        (["{empty}/x.ckpt", "{inputs}"], "x.ckpt"),
        (["{checkpoint}", "{empty}"], "found none in this folder"),
        (["{checkpoint}", "{inputs}/grey_png.png", "{empty}/../grey_png.png"], "overwrite"),
        (["{checkpoint}", "{inputs}", "--pixel-size", "-1"], "pixel_size"),
        (["{checkpoint}", "{inputs}", "--pixel-size", "none.csv"], "none.csv"),
        (["{checkpoint}", "{inputs}", "--batch-size", "0"], "batch_size: expected at least 1"),
        (["{checkpoint}", "{inputs}", "--no-such-flag", "1"], "no-such-flag"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, checkpoint: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    given = [a.format(checkpoint=checkpoint, inputs=inputs, empty=tmp_path / "empty") for a in arguments]
    try:
        code = main([*given, "--out", str(tmp_path / "out")])
    except SystemExit as stop:  # the argument parser's own way out
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2
    assert words in message
    assert not (tmp_path / "out").exists()


def test_an_interrupt_keeps_the_table_of_what_is_done(
    checkpoint: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from famseg.cli import predict as command

    read = command.read_image

    def interrupt(path: Path) -> tuple[np.ndarray, float | None]:
        if path.name == "grey_tif.tif":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(command, "read_image", interrupt)
    assert main([checkpoint, str(inputs), "--out", str(tmp_path / "out"), "--batch-size", "2"]) == 130
    done = {path.stem for path in (tmp_path / "out" / "masks").iterdir()}
    assert {Path(name).stem for name in table(tmp_path / "out")} == done
    assert done


# --- DICOM --------------------------------------------------------------------------------------------


def test_dicom_pixels_are_those_of_the_frame(tmp_path: Path, grey: np.ndarray) -> None:
    for name, record, expected in (
        ("grey", dicom(grey), grey),
        ("colour", dicom(np.stack([grey] * 3, 2)), grey),
        ("inverted", dicom(255 - grey, PhotometricInterpretation="MONOCHROME1"), grey),
    ):
        image, pixel_size = read_image(save(record, tmp_path / name))  # known without a suffix
        np.testing.assert_array_equal(image, expected)
        assert pixel_size is None
    deep = np.linspace(100, 900, grey.size).reshape(SHAPE).astype(np.uint16)
    image, _ = read_image(save(dicom(deep), tmp_path / "deep"))
    np.testing.assert_allclose(image, (deep - 100.0) / 800 * 255, atol=0.51)


def test_dicom_pixel_sizes(tmp_path: Path, grey: np.ndarray) -> None:
    def size(**attributes: object) -> float | None:
        return read_image(save(dicom(grey, **attributes), tmp_path / "x.dcm"))[1]

    assert size(PixelSpacing=[0.2, 0.2]) == pytest.approx(0.2)
    assert size(SequenceOfUltrasoundRegions=[region(0.03)], PixelSpacing=[9, 9]) == pytest.approx(0.3)
    spectrum = region(0.5, RegionSpatialFormat=3)  # Doppler: its x axis is time
    assert size(SequenceOfUltrasoundRegions=[spectrum, region(0.03)]) == pytest.approx(0.3)
    assert size(SequenceOfUltrasoundRegions=[region(0.03, PhysicalUnitsXDirection=4)]) is None
    with pytest.raises(DataError, match="square pixels"):
        size(PixelSpacing=[0.2, 0.3])
    with pytest.raises(DataError, match="2 pictures of different pixel sizes"):
        size(SequenceOfUltrasoundRegions=[region(0.03), region(0.01)])


def test_dicom_that_cannot_be_used_says_why(tmp_path: Path, grey: np.ndarray) -> None:
    film = dicom(grey)
    film.NumberOfFrames, film.PixelData = 2, grey.tobytes() * 2
    with pytest.raises(DataError, match="one frame, found 2"):
        read_image(save(film, tmp_path / "film.dcm"))
    short = dicom(grey)
    short.PixelData = grey.tobytes()[:101] + b"\0"
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        read_image(save(short, tmp_path / "short.dcm"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be decoded"):
        (tmp_path / "noise.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 50)
        read_image(tmp_path / "noise.dcm")


def test_without_pydicom_the_message_says_what_to_install(
    tmp_path: Path, grey: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(dicom(grey), tmp_path / "x.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install 'famseg\[dicom\]'"):
        read_image(path)
