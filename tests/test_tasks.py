"""Other tasks than femur and head in grey: classes by their names and colour, from training to export."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from famseg.anatomy import BY_LABEL, DEFAULT, names_of, parse_classes, reported
from famseg.cli.evaluate import main as evaluate
from famseg.cli.export import main as export
from famseg.cli.predict import main as predict
from famseg.cli.study import main as study
from famseg.cli.train import main as train
from famseg.data.phantom import Phantom
from famseg.inference import load_network
from famseg.inference import predict as label
from famseg.models.summary import cost
from famseg.options import ConfigError
from famseg.study.plan import read_study
from famseg.training.config import TrainConfig
from famseg.training.loss import parse_class_weights
from tests.isic import INPUT, write_isic

LESION = parse_classes("lesion")
SMALL = ["--model", "unext", "--image-size", "64", "--batch-size", "4", "--epochs", "1", "--phases", "adamw:1"]


def run(main: Any, *arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def isic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_isic(tmp_path_factory.mktemp("isic"))


# --- names --------------------------------------------------------------------------------------------


def test_the_default_classes_are_the_table() -> None:
    assert parse_classes(DEFAULT) == BY_LABEL
    assert TrainConfig().structures() == BY_LABEL


def test_known_names_keep_colour_word_and_measure_and_others_get_their_own() -> None:
    classes = parse_classes("lesion, FB,hair")
    assert names_of(classes) == ("background", "lesion", "FB", "hair")
    assert [structure.label for structure in classes] == [0, 1, 2, 3]
    head = next(structure for structure in BY_LABEL if structure.name == "FB")
    assert (classes[2].ink, classes[2].word, classes[2].measure) == (head.ink, "head", head.measure)
    lesion, hair = classes[1], classes[3]
    assert lesion.title == "lesion" and lesion.measure is hair.measure is None
    assert len({structure.shade for structure in classes} | {structure.palette for structure in classes}) > 4
    assert [structure.name for structure in reported(classes)] == ["FB", "lesion", "hair"]


@pytest.mark.parametrize("text", ["", "a,,b", "a,a", "background,a", "a b", "3D", "mean", "a.b", "ä", "a\n"])
def test_names_that_cannot_be_used_are_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    if text != "a\n":  # blanks around a name are not part of it
        with pytest.raises(ConfigError, match="classes: expected names joined by commas"):
            TrainConfig(classes=text)
        assert train(["--classes", text]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_class_weights_are_one_a_class() -> None:
    assert parse_class_weights("1,2", names_of(LESION)) == [1, 2]
    with pytest.raises(ConfigError, match=r"2 numbers .* \(background, lesion\), got '1,2,3'"):
        TrainConfig(classes="lesion", class_weights="1,2,3")


# --- from end to end ----------------------------------------------------------------------------------


def test_lesions_in_colour_from_training_to_export(
    isic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "run", f"isic:{isic}"
    run(train, "--data", data, "--classes", "lesion", "--in-channels", 3, "--out", out, *SMALL)
    assert "lesion 0." in capsys.readouterr().out
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["classes"], settings["in_channels"]) == ("lesion", 3)
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["iou"]) == ["background", "lesion"] and list(metrics["per_image"]) == ["lesion"]
    assert not any(key.endswith("_mm") for key in metrics)
    assert "val_iou_lesion" in (out / "metrics.csv").read_text()
    assert metrics["parameters"] == cost("unext", num_classes=2, in_channels=3)[0]
    best = out / "checkpoints" / "best.ckpt"
    network = load_network(best)
    assert (names_of(network.classes), network.in_channels) == (("background", "lesion"), 3)
    with pytest.raises(ValueError, match=r"images: expected \(H, W, 3\) uint8, got \(48, 64\) uint8"):
        next(label(network, [np.zeros((48, 64), np.uint8)]))

    run(evaluate, best, "--split", "all", "--flips", "--out", tmp_path / "evaluation")
    assert "lesion Dice" in capsys.readouterr().out
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "lesion blue, the true outline white." in page and "Nothing is measured" in page
    lines = list(csv.DictReader((tmp_path / "evaluation" / "per_image.csv").open()))
    assert len(lines) == 6 and "lesion_dice" in lines[0] and "FB_dice" not in lines[0]
    assert not any("circumference" in column for column in lines[0])

    run(predict, best, isic / INPUT, "--out", tmp_path / "prediction")
    said = capsys.readouterr().out
    assert "6 of 6 images done" in said and "biometrics.csv has no lengths" in said
    lines = list(csv.DictReader((tmp_path / "prediction" / "biometrics.csv").open()))
    assert list(lines[0]) == ["file", "width", "height", "pixel_size_mm", "pixel_size_from", "flags"]
    with Image.open(tmp_path / "prediction" / "masks" / "ISIC_0000000.png") as mask:
        assert mask.size == (64, 48) and tuple(mask.getpalette()[3:6]) == LESION[1].palette  # type: ignore[index]
    overlay = cv2.imread(str(tmp_path / "prediction" / "overlays" / "ISIC_0000000.png"))
    assert overlay is not None and overlay[..., 2].mean() > overlay[..., 0].mean() + 10  # skin is still red

    run(export, best, "--out", tmp_path / "lesion.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "lesion.onnx")
    assert session.get_inputs()[0].shape[1] == 3 and session.get_outputs()[0].shape[1] == 2
    described = json.loads(session.get_modelmeta().custom_metadata_map["famseg"])
    assert (described["classes"], described["in_channels"]) == (["background", "lesion"], 3)
    assert "red, green, blue" in described["input"]
    run(export, best, "--format", "pt2", "--out", tmp_path / "lesion.pt2")


def test_heads_alone_keep_their_millimetres(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run(train, "--data", "phantom:10", "--classes", "FB", "--out", out, *SMALL)
    assert "data 'phantom:10': FL counted as background: --classes has FB" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["head_circumference_mm"]["images"] > 0 and "femur_length_mm" not in metrics
    best = out / "checkpoints" / "best.ckpt"
    run(evaluate, best, "--split", "all", "--out", tmp_path / "evaluation")
    assert "FL in the masks: no class of the network, counted as background" in capsys.readouterr().out
    cv2.imwrite(str(tmp_path / "scan.png"), Phantom(1, (64, 64), 5)[0].image)
    run(predict, best, tmp_path / "scan.png", "--out", tmp_path / "prediction")
    header = (tmp_path / "prediction" / "biometrics.csv").read_text().splitlines()[0]
    assert "head_circumference_mm" in header and "femur" not in header


def test_a_run_goes_on_with_the_classes_that_it_began_with(
    isic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(train, "--data", f"isic:{isic}", "--classes", "lesion", "--in-channels", 3, "--out", out, *SMALL)
    run(train, "--resume", "auto", "--out", out, "--epochs", 2)
    assert len((out / "metrics.csv").read_text().splitlines()) == 3
    assert train(["--resume", "auto", "--out", str(out), "--classes", "spot", "--epochs", "3"]) == 2
    assert "classes: the run to continue has 'lesion', got 'spot'" in capsys.readouterr().err
    assert train(["--weights", str(out / "checkpoints" / "best.ckpt"), "--data", "phantom:8", *SMALL]) == 2
    assert "does not fit this network" in capsys.readouterr().err


def test_a_checkpoint_that_names_no_classes_is_of_the_default(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(train, "--data", "phantom:8", "--out", out, *SMALL)
    best = out / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    del content["config"]["classes"], content["config"]["in_channels"]
    torch.save(content, best)
    network = load_network(best)
    assert (network.classes, network.in_channels) == (BY_LABEL, 1)


def test_the_summary_is_of_these_classes_and_channels(capsys: pytest.CaptureFixture[str]) -> None:
    run(train, "--summary", "--model", "unext", "--classes", "lesion", "--in-channels", 3, "--image-size", 64)
    assert f"{cost('unext', num_classes=2, in_channels=3)[0]:,}" in capsys.readouterr().out
    assert train(["--in-channels", "2"]) == 2
    assert "in_channels" in capsys.readouterr().err


# --- studies ------------------------------------------------------------------------------------------

STUDY: dict[str, Any] = {
    "title": "Skin",
    "scores": {"DSC": "per_image.lesion.dice.mean"},
    "reference": "A",
    "options": {"model": "unext", "device": "cpu", "phases": "adamw:1", "classes": "lesion", "in_channels": 3},
    "budgets": {"tiny": {"seeds": 1, "image_size": 32, "epochs": 1, "batch_size": 4}},
    "cells": {"A": {}, "B": {"loss": "ce"}},
}


def test_a_study_of_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "skin.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    isic = write_isic(tmp_path / "isic", 12)
    run(study, file, "--data", f"isic:{isic}", "--smoke", "--out", tmp_path / "out")
    lines = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert [line["state"] for line in lines] == ["done", "done"]
    assert {line["train_images"] for line in lines} == {"8"} and "per_image.lesion.dice.mean" in lines[0]
    assert (tmp_path / "out" / "panel.png").exists()
    sizes = read_study(str(file), data=f"isic:{isic}").sizes["A"]
    assert (sizes.parameters, sizes.macs_256) == cost("unext", num_classes=2, in_channels=3)

    for changed, words in {
        "classes": ({"cells": {"A": {"classes": "spot"}}}, "cell 'A': classes: is the same for all cells"),
        "channels": ({"cells": {"A": {"in_channels": 1}}}, "cell 'A': in_channels: is the same for all cells"),
        "score": ({"scores": {"IoU": "iou.FB"}}, "got 'iou.FB'"),
        "names": ({"options": {"classes": "a,a"}}, "classes: expected names"),
    }.values():
        file.write_text(yaml.safe_dump({**STUDY, **changed}))
        with pytest.raises(ConfigError, match=words):
            read_study(str(file), data=f"isic:{isic}")
