"""famseg-export from the outside: files that run without this library and agree with the network at any size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from famseg.cli import export as command
from famseg.cli.export import export_program, main
from famseg.data.augment import MEAN, STD
from famseg.inference import load_network
from famseg.models.famseg import SIZES
from tests.checkpoints import write_checkpoint

# One file, and images of other sizes than the command itself checks. The scan's reference makes chunks of 64 tokens and
# blocks of 16 chunks: of the last image it makes two blocks.
SHAPES = ((1, 64, 64), (2, 96, 96), (5, 64, 224), (1, 128, 160))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three ops, once each stage at most: tracing takes time in proportion to their number."""
    few = dataclasses.replace(SIZES["famseg_nano"], strips=(1, 0, 0, 0), bottles=(1, 0, 0, 0))
    monkeypatch.setitem(SIZES, "famseg_nano", few)


def agree(run, network) -> None:
    for batch, height, width in SHAPES:
        x = torch.randn(batch, 1, height, width, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = network.model(x).numpy()
        np.testing.assert_allclose(run(x), expected, atol=1e-4 * np.abs(expected).max())


def test_one_onnx_file_agrees_with_the_network_at_every_size(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.ckpt", image_size=80)
    assert main([str(checkpoint)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "best.onnx"}
    session = onnxruntime.InferenceSession(str(tmp_path / "best.onnx"), providers=["CPUExecutionProvider"])
    agree(lambda x: session.run(["logits"], {"image": x.numpy()})[0], load_network(checkpoint))
    about = json.loads(session.get_modelmeta().custom_metadata_map["famseg"])
    assert about["classes"] == ["background", "FL", "FB"]
    assert (about["image_size"], about["trained_at_image_size"]) == (96, 80)
    assert (about["mean"], about["std"]) == (MEAN, STD)


def test_pt2_agrees_with_the_network_and_holds_no_op_of_this_library(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.ckpt", image_size=32, upsample="bilinear", context="none")
    assert main([str(checkpoint), "--format", "pt2", "--out", str(tmp_path / "net.pt2")]) == 0
    extra = {"famseg": ""}
    program = torch.export.load(str(tmp_path / "net.pt2"), extra_files=extra)
    assert json.loads(extra["famseg"])["image_size"] == 64
    assert "famseg" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    module = program.module()
    agree(lambda x: module(x).detach().numpy(), load_network(checkpoint))


def test_a_file_that_disagrees_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.ckpt", shortcut="identity", upsample="bilinear", context="none")

    def spoilt(network):
        program = export_program(network)
        program.state_dict["classifier.bias"] = torch.nn.Parameter(network.model.classifier.bias + 1.0)
        return program

    monkeypatch.setattr(command, "export_program", spoilt)
    with pytest.raises(RuntimeError, match="was not written"):
        main([str(checkpoint), "--format", "pt2"])
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "checkpoint: is missing"),
        (["{folder}/none.ckpt"], "none.ckpt"),
        (["{checkpoint}", "--out", "{folder}/none/net.onnx"], "folder does not exist"),
        (["{checkpoint}", "--out", "{folder}"], "is a folder"),
        (["{checkpoint}", "--format", "coreml"], "coreml"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.ckpt")
    try:
        code = main([a.format(folder=tmp_path, checkpoint=checkpoint) for a in arguments])
    except SystemExit as stop:  # the argument parser's own way out
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2
    assert words in message
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_settings_come_from_yaml_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "export.yaml").write_text(f"format: pt2\nout: {tmp_path}\n")
    assert main([str(checkpoint), "--config", str(tmp_path / "export.yaml")]) == 2
    assert "is a folder; give a file name" in capsys.readouterr().err


def test_without_onnx_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "best.ckpt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(checkpoint)]) == 2
    assert "pip install 'famseg[onnx]'" in capsys.readouterr().err
