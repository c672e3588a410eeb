"""famseg-evaluate from the outside: what it writes, which images it takes, and how it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from famseg.cli.evaluate import main
from famseg.cli.train import main as train
from famseg.data.folder import write_folder
from famseg.data.phantom import Phantom
from famseg.data.split import split_by_subject
from famseg.inference import load_network
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: checkpoint and metrics.csv."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "checkpoints" / "best.ckpt", data="phantom:10", val_fraction=0.3, seed=3)
    (folder / "metrics.csv").write_text("epoch,phase,train_loss,val_miou\n1,adamw,1.5,0.2\n2,sgd,1.2,0.3\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> str:
    return str(run / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="module")
def result(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert main([checkpoint, "--out", str(out), "--batch-size", "2"]) == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "per_image.csv").open()))


def test_it_writes_scores_a_table_and_a_page(result: Path) -> None:
    assert {path.name for path in result.iterdir()} == {"metrics.json", "per_image.csv", "report.html"}
    summary = json.loads((result / "metrics.json").read_text())
    assert summary["images"] == len(rows(result)) == 3
    assert set(summary["iou"]) == {"background", "FL", "FB"}
    page = (result / "report.html").read_text()
    assert "Synthetic images" in page
    assert "Training" in page  # metrics.csv lies above the checkpoint


def test_by_default_it_takes_what_was_held_out_in_training(result: Path) -> None:
    held_out = split_by_subject(Phantom(10, (32, 32), 3), 0.3, 3)[1]
    assert [row["name"] for row in rows(result)] == [f"phantom_3_{index:06d}" for index in held_out]


def test_images_that_a_run_set_aside_are_not_held_out(checkpoint: str, result: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    trained = content["images"]["trained"]
    content["images"] |= {"trained": dict([*trained.items()][:2]), "unused": dict([*trained.items()][2:])}
    torch.save(content, tmp_path / "few.ckpt")
    assert main([str(tmp_path / "few.ckpt"), "--out", str(tmp_path / "out")]) == 0
    assert [row["name"] for row in rows(tmp_path / "out")] == [row["name"] for row in rows(result)]
    assert "or were set aside by --train-images" in (tmp_path / "out" / "report.html").read_text()


def test_other_data_are_taken_whole_and_training_images_only_when_asked_for(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder([Phantom(3, (40, 48), seed=9)[i] for i in range(3)], tmp_path / "data")
    assert main([checkpoint, "--data", f"folder:{tmp_path / 'data'}", "--out", str(tmp_path / "a")]) == 0
    assert len(rows(tmp_path / "a")) == 3
    assert main([checkpoint, "--data", "phantom:4", "--data-seed", "9", "--out", str(tmp_path / "b")]) == 0
    assert rows(tmp_path / "b")[0]["name"] == "phantom_9_000000"
    assert "trained" not in capsys.readouterr().out
    assert main([checkpoint, "--split", "all", "--out", str(tmp_path / "c")]) == 0
    assert len(rows(tmp_path / "c")) == 10
    line = "7 of these 10 images trained the network: their numbers are too good."
    assert line in capsys.readouterr().out and line in (tmp_path / "c" / "report.html").read_text()
    assert json.loads((tmp_path / "c" / "metrics.json").read_text())["trained_on"] == 7


def test_training_images_are_known_under_other_names_and_with_their_subjects(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = Phantom(10, (32, 32), 3), Phantom(3, (32, 32), seed=9)
    trained = split_by_subject(own, 0.3, 3)[0][0]
    samples = [
        dataclasses.replace(own[trained], name="renamed", subject="one"),
        dataclasses.replace(other[0], name="same_subject", subject="one"),
        dataclasses.replace(other[1], name="new", subject="two"),
    ]
    write_folder(samples, tmp_path / "data")
    arguments = [checkpoint, "--data", f"folder:{tmp_path / 'data'}", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    assert [row["name"] for row in rows(tmp_path / "a")] == ["new"]
    assert "2 images of subjects that trained the network are left out" in capsys.readouterr().out
    (tmp_path / "data/images/new.png").unlink()
    assert main([*arguments, str(tmp_path / "b")]) == 2
    assert "--split all" in capsys.readouterr().err


def test_training_images_at_another_size_are_told_by_their_names(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Phantom(10, (32, 32), 3)
    trained, held_out = (own[part[0]] for part in split_by_subject(own, 0.3, 3))
    larger = [
        dataclasses.replace(
            s, image=np.kron(s.image, np.ones((2, 2), np.uint8)), mask=np.kron(s.mask, np.ones((2, 2), np.uint8))
        )
        for s in (trained, held_out)
    ]
    write_folder(larger, tmp_path / "data")
    assert main([checkpoint, "--data", f"folder:{tmp_path / 'data'}", "--out", str(tmp_path / "out")]) == 0
    line = "1 of these 2 images have the names of images that trained the network, and other pixels"
    assert line in capsys.readouterr().out and line in (tmp_path / "out" / "report.html").read_text()


def test_images_behind_the_weights_that_training_began_with_are_not_held_out(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [Phantom(10, (32, 32), 3)[i] for i in range(10)]
    write_folder(samples, tmp_path / "data")
    settings = ["--image-size", "32", "--batch-size", "2", "--val-fraction", "0.5", "--out", str(tmp_path / "run")]
    data = ["--data", f"folder:{tmp_path / 'data'}", "--weights", checkpoint]
    assert train([*settings, *data, "--phases", "adamw:1"]) == 0
    assert "held-out images trained it: their scores are too good" in capsys.readouterr().out
    assert train(["--out", str(tmp_path / "run"), "--resume", "auto", "--epochs", "2"]) == 0  # which reads no weights
    best = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    first, second = (load_network(path) for path in (checkpoint, best))
    assert second.images["before"] == first.images["trained"]
    main([best, "--out", str(tmp_path / "out")])
    scored = {row["name"] for row in rows(tmp_path / "out")} if (tmp_path / "out").exists() else set()
    assert not scored & {*first.images["trained"].values()}


def test_options_reach_the_prediction(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    class Stop(Exception):
        pass

    def readings(network: object, images: object, **options: object) -> None:
        given.update(options)
        raise Stop

    monkeypatch.setattr("famseg.cli.evaluate.readings", readings)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # or a CPU would be taken without being asked for
    options = ["--flips", "--batch-size", "3", "--device", "cpu", "--backend", "reference", "--precision", "bf16"]
    with pytest.raises(Stop):
        main([checkpoint, "--out", str(tmp_path / "out"), *options])
    assert given == {"flips": True, "batch_size": 3, "precision": "bf16", "device": "cpu", "backend": "reference"}


def test_settings_come_from_yaml_under_the_same_names(checkpoint: str, tmp_path: Path, result: Path) -> None:
    settings = {"out": str(tmp_path / "out"), "batch_size": 2, "split": "held-out"}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    assert main([checkpoint, "--config", str(tmp_path / "evaluate.yaml")]) == 0
    assert (tmp_path / "out" / "per_image.csv").read_bytes() == (result / "per_image.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{out}/none.ckpt"], "none.ckpt"),
        ([], "data: is missing"),
        (["{checkpoint}", "--data", "folder:/nowhere"], "/nowhere"),
        (["{checkpoint}", "--backend", "abacus"], "abacus"),
        (["{checkpoint}", "--split", "most"], "most"),
        (["{checkpoint}", "--batch-size", "many"], "many"),
        (["{checkpoint}", "--batch-size", "0"], "batch_size: expected at least 1"),
        (["{checkpoint}", "--data-seed", "-1"], "data_seed: expected at least 0"),
        (["{checkpoint}", "--data-seed", "4294967296"], "data_seed: expected at most"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(out=tmp_path, checkpoint=checkpoint) for argument in arguments]
    try:
        code = main([*given, "--out", str(tmp_path / "out")])
    except SystemExit as stop:  # the argument parser's own way out
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2
    assert words in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_a_used_output_folder_is_refused(checkpoint: str, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([checkpoint, "--out", str(result)]) == 2
    assert "choose another" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("famseg.cli.evaluate.readings", interrupt)
    assert main([checkpoint, "--out", str(tmp_path / "out")]) == 130


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("checkpoint", "--data", "--out", "--split", "--data-seed", "--flips", "--batch-size", "--device"):
        assert flag in text
