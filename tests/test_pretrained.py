"""The network that comes with famseg: there, whole, used where none is named, and as good as its card says."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import famseg
from benchmarks.tables import PRETRAINED as HELD_OUT
from benchmarks.tables import read
from famseg.cli.evaluate import main as evaluate
from famseg.cli.predict import main as predict
from famseg.data.hc18 import HC18
from famseg.data.phantom import Phantom
from famseg.files.errors import DataError
from famseg.files.images import write_image
from famseg.gestation import hadlock
from famseg.inference import PRETRAINED, load_pretrained
from famseg.models import create_model
from famseg.training.finetune import load_weights

NATIVE = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "hc18_native"


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, float]:
    """A picture with a head, its pixel size and its circumference in mm."""
    sample = next(s for s in Phantom(20, (256, 256), seed=9) if s.head_circumference and s.femur_length)
    path = tmp_path_factory.mktemp("scan") / "scan.png"
    write_image(path, sample.image)
    assert sample.pixel_size is not None and sample.head_circumference is not None
    return path, sample.pixel_size, sample.head_circumference


def table(out: Path) -> dict[str, str]:
    (row,) = csv.DictReader((out / "biometrics.csv").open())
    return row


def test_it_is_small_and_says_what_it_is() -> None:
    network = load_pretrained()
    assert PRETRAINED.stat().st_size < 5e6
    assert [structure.name for structure in network.classes] == ["background", "FL", "FB"]
    assert set(network.expectations) == {"head_circumference", "femur_length"}
    assert network.excess["head_circumference"] > 1
    assert not Path(network.config["data"].split(",")[0].removeprefix("hc18:")).is_absolute()
    assert network.config["out"] is None
    assert famseg.load_pretrained().parameters == network.parameters


def test_predict_takes_it_where_no_checkpoint_is_named(
    scan: tuple[Path, float, float], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pixel_size, truth = scan
    monkeypatch.chdir(tmp_path)
    assert predict([str(path), "--pixel-size", str(pixel_size), "--gestational-age"]) == 0
    assert "no checkpoint named: taking the network that comes with famseg" in capsys.readouterr().out
    (out,) = (tmp_path / "runs").glob("*-predict")
    row = table(out)
    measured, expected = float(row["head_circumference_mm"]), float(row["head_circumference_expected_error_mm"])
    assert measured == pytest.approx(truth, rel=0.05)
    assert 0 < expected < 0.1 * truth
    age = hadlock("head_circumference", measured)
    weeks, two_sd = (row[f"head_circumference_{name}_hadlock"] for name in ("weeks", "two_sd_weeks"))
    assert age is not None and float(weeks) == pytest.approx(age.weeks, abs=1e-3) and float(two_sd) == age.two_sd
    assert (out / "masks" / "scan.png").exists() and (out / "overlays" / "scan.png").exists()


def test_without_a_pixel_size_there_is_no_age_and_a_flag(scan: tuple[Path, float, float], tmp_path: Path) -> None:
    assert predict([str(scan[0]), "--gestational-age", "--out", str(tmp_path / "out")]) == 0
    row = table(tmp_path / "out")
    assert float(row["head_circumference_px"]) > 0
    assert "no pixel size" in row["flags"]
    for column in ("mm", "expected_error_mm", "weeks_hadlock", "two_sd_weeks_hadlock"):
        assert row[f"head_circumference_{column}"] == ""
    assert row["weeks_intergrowth21st"] == ""


def test_evaluate_takes_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(["--data", "phantom:4", "--data-seed", "77", "--out", str(tmp_path / "out")]) == 0
    assert "no checkpoint named" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "per_image.csv").open()))
    measured = [row for row in rows if row["head_circumference_mm"]]
    assert measured and all(float(row["head_circumference_expected_error_mm"]) > 0 for row in measured)


def test_training_starts_from_it() -> None:
    model = create_model(load_pretrained().config["model"])
    assert "all weights of" in load_weights(model, "pretrained")
    for mine, its in zip(model.state_dict().values(), load_pretrained().model.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    with pytest.raises(DataError, match=r"famseg\.ckpt does not fit this network"):
        load_weights(create_model("famseg_nano"), "pretrained")


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_package_without_it_is_one_line(
    damage: str,
    scan: tuple[Path, float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "famseg.ckpt"
    if damage == "damaged":
        broken.write_bytes(PRETRAINED.read_bytes()[:-1000])
    monkeypatch.setattr("famseg.inference.PRETRAINED", broken)
    assert predict([str(scan[0]), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"famseg-predict: {broken}: ")
    assert line.endswith("; install famseg again, or name a checkpoint")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not NATIVE.is_dir(), reason=f"needs the HC18 images in {NATIVE}")
def test_heads_at_full_resolution_come_out_right(tmp_path: Path) -> None:
    """It was trained on images of these subjects, at half the resolution: this shows the way, not the skill."""
    for sample in HC18(NATIVE):
        path, out = tmp_path / f"{sample.name}.png", tmp_path / f"out_{sample.name}"
        write_image(path, sample.image)
        assert predict([str(path), "--pixel-size", str(sample.pixel_size), "--out", str(out)]) == 0
        assert float(table(out)["head_circumference_mm"]) == pytest.approx(sample.head_circumference, rel=0.05)


def test_the_card_is_of_every_image_once_and_of_folds_by_subject() -> None:
    heads = [row for row in read(HELD_OUT) if row["measure"] == "head_circumference" and row["simulated"] == "0"]
    assert max(Counter(row["image"] for row in heads).values()) == 1
    assert len(heads) == 798
    folds: dict[str, set[str]] = {}
    for row in heads:
        folds.setdefault(row["image"][:3], set()).add(row["fold"])
    assert all(len(found) == 1 for found in folds.values())
    assert {row["fold"] for row in heads} == {"0", "1", "2", "3", "4"}
    assert all(
        math.isclose(float(r["error_mm"]), float(r["measured_mm"] or 0) - float(r["truth_mm"]), abs_tol=1e-3)
        for r in heads
    )
