"""famseg-predict from the outside: every format in, masks at their own size out, bad files skipped and told."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from famseg.biometrics import head_circumference
from famseg.cli.predict import main
from famseg.data.phantom import Phantom
from famseg.inference import Reading
from tests.checkpoints import write_checkpoint
from tests.dicom import dicom, region, save

SHAPE = (45, 70)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt"))


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    return Phantom(1, SHAPE, seed=2)[0].image


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

    def readings(network: object, images: object, **options: object) -> list[Reading]:
        given.update(options)
        return []

    monkeypatch.setattr("famseg.cli.predict.readings", readings)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # or a CPU would be taken without being asked for
    (tmp_path / "predict.yaml").write_text("backend: reference\nbatch_size: 2\n")
    options = ["--config", str(tmp_path / "predict.yaml"), "--flips", "--batch-size", "3", "--device", "cpu"]
    options += ["--precision", "bf16"]
    main([checkpoint, str(inputs), "--out", str(tmp_path / "out"), *options])
    assert given == {"flips": True, "batch_size": 3, "precision": "bf16", "device": "cpu", "backend": "reference"}


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
        ([], "images: is missing"),
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


def test_eighteen_of_thirty_are_done_and_each_of_the_twelve_others_says_why(
    checkpoint: str, grey: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "thirty"
    folder.mkdir()

    def encode(kind: str, pixels: np.ndarray = grey, **options: object) -> bytes:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, kind, **options)
        return content.getvalue()

    kinds = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
    for number in range(16):
        (folder / f"good{number:02}.{kinds[number % 6].lower()}").write_bytes(encode(kinds[number % 6]))
    save(dicom(grey), folder / "1.2.840.10")
    save(dicom(grey), folder / "1.2.840.11")
    jpeg, turned, film = encode("JPEG"), Image.fromarray(grey).convert("RGBA"), dicom(grey)
    middle = len(jpeg) // 2
    turned.putalpha(7)
    film.NumberOfFrames, film.PixelData = 2, grey.tobytes() * 2
    film_bytes, spacing_bytes, colour_bytes = io.BytesIO(), io.BytesIO(), io.BytesIO()
    film.save_as(film_bytes, enforce_file_format=True)
    dicom(grey, PixelSpacing=[0.2]).save_as(spacing_bytes, enforce_file_format=True)
    dicom(grey, PhotometricInterpretation="HSV").save_as(colour_bytes, enforce_file_format=True)
    bitmap = bytearray(encode("BMP"))
    bitmap[18:22] = b"\xff\xff\xff\x7f"
    broken = {
        "bad01.png": (encode("PNG")[:300], "truncated|cannot be decoded"),
        "bad02.jpg": (jpeg[:middle] + bytes(64) + jpeg[middle + 64 :], "Corrupt JPEG data"),
        "bad03.bmp": (bytes(bitmap), "pixels"),
        "bad04.tif": (encode("TIFF", save_all=True, append_images=[Image.fromarray(grey)]), "one picture, found 2"),
        "bad05.png": (b"", "empty"),
        "bad06.png": (b"hello, world", "is none of DICOM, PNG"),
        "bad07.dcm": (film_bytes.getvalue(), "one frame, found 2"),
        "bad08.dcm": (spacing_bytes.getvalue(), "Pixel Spacing: expected two numbers"),
        "bad09.dcm": (colour_bytes.getvalue(), "found HSV"),
        "bad10.png": (encode("PNG", np.asarray(turned)), "transparent"),
        "bad11.tif": (encode("TIFF", grey.astype(np.float32)), "mode F"),
        "bad12.webp": (encode("WEBP")[:200], "cannot be decoded"),
    }
    for name, (content, _) in broken.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("no image")
    assert len(list(folder.iterdir())) == 31
    assert main([checkpoint, str(folder), "--out", str(tmp_path / "out"), "--batch-size", "4"]) == 1
    captured = capfd.readouterr()
    assert "18 of 30 images done" in captured.out
    told, *skipped = captured.err.splitlines()
    assert told == f"famseg: {folder}: 1 left out (no image): notes.txt"
    assert len(skipped) == 12
    for line, (name, (_, words)) in zip(skipped, sorted(broken.items()), strict=True):
        assert re.match(f"famseg-predict: skipped: {folder / name}: .*({words})", line)
    assert len(table(tmp_path / "out")) == 18
    for kind in ("masks", "overlays"):
        assert {"1.2.840.10.png", "1.2.840.11.png"} < {path.name for path in (tmp_path / "out" / kind).iterdir()}
        assert len(list((tmp_path / "out" / kind).iterdir())) == 18


def test_extreme_shapes_and_names_cost_no_other_image(
    checkpoint: str, grey: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    shapes = {"1x1": (1, 1), "column": (5000, 1), "row": (1, 5000), "2x3": (2, 3), "long": (40_000, 2)}
    for name, shape in shapes.items():
        cv2.imwrite(str(folder / f"{name}.png"), np.full(shape, 90, np.uint8))
    cv2.imwrite(str(folder / f"{'n' * 246}.png"), grey)
    (folder / ("u" * 255)).write_bytes((folder / "1x1.png").read_bytes())
    assert main([checkpoint, str(folder), "--out", str(tmp_path / "out"), "--batch-size", "3"]) == 1
    assert "6 of 7 images done" in (captured := capfd.readouterr()).out
    assert captured.err.count("\n") == 1 and "name of more than 255 bytes" in captured.err
    for name, shape in {**shapes, "n" * 246: SHAPE}.items():
        assert Image.open(tmp_path / "out" / "masks" / f"{name}.png").size == shape[::-1]
        width, height = Image.open(tmp_path / "out" / "overlays" / f"{name}.png").size
        assert width * height < 10e6


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_names_and_terminals_that_are_not_utf8_cost_nothing(checkpoint: str, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"f\xff")
    folder.mkdir()
    content = (inputs / "grey_png.png").read_bytes()
    for name in (b"a\xff.png", "Müller 超声.png".encode()):
        (folder / os.fsdecode(name)).write_bytes(content)
    (folder / os.fsdecode(b"bad\xfe.png")).write_bytes(content[:200])
    command = [sys.executable, "-m", "famseg.cli.predict", checkpoint, str(folder), "--out", str(folder / "out")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert b"2 of 3 images done" in done.stdout
    assert done.stderr.count(b"\n") == 1 and b"bad\\udcfe.png" in done.stderr
    rows = (folder / "out" / "biometrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3
    assert any("a\\xff.png" in row for row in rows) and any("Müller 超声.png" in row for row in rows)


def test_a_full_disk_names_the_file_and_keeps_the_table(
    checkpoint: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, files = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        if path.parent.name in ("masks", "overlays"):
            files.append(path)
            if len(files) > 4:
                write(path, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main([checkpoint, str(inputs), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path / "out" / "overlays" / "colour_png.png") in message and "No space left" in message
    assert len(table(tmp_path / "out")) == 2
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 2
