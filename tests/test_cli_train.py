"""famseg-train from the outside: what it writes, and one clear line with exit code 2 for what it cannot use."""

from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from famseg.cli.train import main
from famseg.data.folder import write_folder
from famseg.data.phantom import Phantom
from famseg.training.config import TrainConfig
from famseg.training.module import SegmentationModule

QUICK = ["--epochs", "2", "--batch-size", "4", "--image-size", "48"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    code = main(["--data", "phantom:10", *QUICK, "--out", str(out)])
    return code, out


def test_a_run_writes_everything(run):
    code, out = run
    assert code == 0
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "config.yaml", "metrics.csv", "metrics.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
        "figures/loss.png", "figures/overlays.png",
    }  # fmt: skip


def test_metrics_have_the_documented_shape(run):
    _, out = run
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["phase"] for row in rows] == ["adamw", "sgd"]
    assert {"epoch", "learning_rate", "train_loss", "val_loss", "val_miou", "val_iou_FL", "val_iou_FB"} <= set(rows[0])
    results = json.loads((out / "metrics.json").read_text())
    assert set(results["iou"]) == {"background", "FL", "FB"}
    present = [iou for iou in results["iou"].values() if iou is not None]
    assert results["miou"] == pytest.approx(np.mean(present))
    best = max(rows, key=lambda row: float(row["val_miou"]))
    assert results["miou"] == pytest.approx(float(best["val_miou"]), abs=1e-5)
    assert results["best_epoch"] == int(best["epoch"])


def test_the_configuration_repeats_the_run_bitwise(run, tmp_path):
    _, out = run
    settings = yaml.safe_load((out / "config.yaml").read_text())
    settings["out"] = str(tmp_path / "again")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["--config", str(tmp_path / "config.yaml")]) == 0
    for name in ("metrics.csv", "figures/overlays.png"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_checkpoints_hold_no_code(run):
    _, out = run
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["config"]["model"] == "famseg_nano"


def test_options_of_a_run_show_in_what_it_writes(tmp_path, monkeypatch):
    """bf16, averaged weights, a shipped configuration and TensorBoard in one run."""
    written, autocast = [], set()
    count = SegmentationModule._count_overlap
    monkeypatch.setattr(
        SegmentationModule,
        "_count_overlap",
        lambda *args: autocast.add(torch.is_autocast_enabled("cpu")) or count(*args),
    )

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def flush(self):
            pass

        close = flush

    # TensorBoard is an optional package.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    out = tmp_path / "out"
    options = ["--config", "sgd-step", "--epochs", "2", "--ema", "0.5", "--precision", "bf16", "--tensorboard"]
    assert main(["--data", "phantom:8", "--image-size", "32", "--batch-size", "4", *options, "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["phase"] for row in rows] == ["sgd"] * 2
    assert autocast == {True}
    assert written[0] == (str(out / "tensorboard"), 1)
    assert set(written[1:]) == {(name, step) for name in rows[0].keys() - {"epoch", "phase"} for step in (1, 2)}
    assert yaml.safe_load((out / "config.yaml").read_text())["lr_limit_max"] == 0.001
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert {f"model.{name}" for name in checkpoint["ema"]} == checkpoint["state_dict"].keys()


def test_gradient_clipping_bounds_a_step(tmp_path):
    """SGD without momentum yet: the first step is at most learning rate times norm."""
    moved = []
    for norm in ("0", "1e-3"):
        out = tmp_path / norm
        options = ["--phases", "sgd:1", "--clip-norm", norm, "--weight-decay", "0"]
        assert (
            main(["--data", "phantom:5", "--image-size", "32", "--batch-size", "4", *options, "--out", str(out)]) == 0
        )
        after = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
        L.seed_everything(0, verbose=False)
        before = SegmentationModule(TrainConfig())
        rate = float(next(csv.DictReader((out / "metrics.csv").open()))["learning_rate"])
        squares = sum((after["state_dict"][n] - p).square().sum() for n, p in before.named_parameters())
        moved.append(squares.sqrt().item() / rate)
    assert moved[0] > 1e-2 > 2.1e-3 > moved[1] > 0  # Nesterov: 1.9 gradients


def test_profile_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("famseg.training.profile.profile", lambda config: f"profile of {config.model}")
    assert main(["--profile"]) == 0
    assert capsys.readouterr().out == "profile of famseg_nano\n"
    assert not list(tmp_path.iterdir())


def test_flags_go_over_the_configuration_file(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("seed: 7\nbatch_size: 3\n")
    seen = []
    monkeypatch.setattr("famseg.training.profile.profile", lambda config: seen.append(config) or "")
    for config in (["--config", str(tmp_path / "mine.yaml")], [f"--config={tmp_path / 'mine.yaml'}"]):
        assert main(["--profile", *config, "--seed", "9"]) == 0
        assert (seen[-1].seed, seen[-1].batch_size) == (9, 3)
    for config in (["--config", "adam-adadelta"], ["--config=adam-adadelta"]):
        assert main(["--profile", *config]) == 0
        assert seen[-1].decay == "adadelta"
    assert main(["--profile", "--compile", "--channels-last", "true", "--cache", "false"]) == 0
    assert (seen[-1].compile, seen[-1].channels_last, seen[-1].cache) == (True, True, False)


def test_a_path_may_begin_with_the_home_folder_also_in_yaml(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("out: ~/run\nweights: ~/start.pt\nresume: ~/run/checkpoints/last.ckpt\n")
    seen = []
    monkeypatch.setattr("famseg.training.profile.profile", lambda config: seen.append(config) or "")
    assert main(["--profile", "--config", str(tmp_path / "mine.yaml")]) == 0
    config = seen[-1]
    assert (config.out, config.weights) == (f"{tmp_path}/run", f"{tmp_path}/start.pt")
    assert config.resume == f"{tmp_path}/run/checkpoints/last.ckpt"
    assert main(["--profile", "--out=~/other", "--resume", "auto"]) == 0
    assert seen[-1].out == f"{tmp_path}/other"


def test_summary_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--summary", "--model", "famseg_nano", "--image-size", "64"]) == 0
    assert "total" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    write_folder([Phantom(4, (64, 64))[i] for i in range(4)], tmp_path / "data")
    return tmp_path / "data"


def spoil_missing_mask(folder):
    next((folder / "masks").iterdir()).unlink()


def spoil_size(folder):
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(next((folder / "masks").iterdir()))


def spoil_label(folder):
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(next((folder / "masks").iterdir()))


def spoil_png(folder):
    next((folder / "images").iterdir()).write_bytes(b"no picture")


def spoil_empty(folder):
    for kind in ("images", "masks"):
        for path in (folder / kind).iterdir():
            path.unlink()
    (folder / "pixel_size.csv").unlink(missing_ok=True)


@pytest.mark.parametrize("spoil", [spoil_missing_mask, spoil_size, spoil_label, spoil_png, spoil_empty])
def test_unusable_data_end_in_one_line_and_nothing_written(folder, spoil, tmp_path, capsys):
    spoil(folder)
    out = tmp_path / "out"
    assert main(["--data", f"folder:{folder}", *QUICK, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("famseg-train: ") and message.count("\n") == 1
    assert str(folder) in message and "Traceback" not in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "famseg_huge"], "famseg_huge"),
        (["--data", "folder:/nowhere"], "/nowhere"),
        (["--data", "hc18:/nowhere"], "/nowhere"),
        (["--data", "coco"], "coco"),
        (["--device", "cuda"], "cuda"),
        (["--epochs", "many"], "many"),
        (["--config", "no-such-config"], "no-such-config"),
        (["--precision", "fp16", "--device", "cpu"], "fp16"),
        (["--folds", "3", "--fold", "3"], "fold"),
        (["--no-such-flag", "1"], "no-such-flag"),
    ],
)
def test_bad_usage_is_exit_code_2(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:  # the argument parser's own way out
        code = stop.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_used_output_folder_is_refused(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("keep me")
    assert main(["--data", f"folder:{folder}", *QUICK, "--out", str(tmp_path / "out")]) == 2
    assert "choose another" in capsys.readouterr().err
