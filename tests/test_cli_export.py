"""famseg-export from the outside: files that run without this library and agree with the network at any size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from famseg.cli import export as command
from famseg.cli import onnx_graph
from famseg.cli.export import export_program, main
from famseg.data.augment import MEAN, STD
from famseg.inference import load_network
from famseg.models.famseg import SIZES
from tests.checkpoints import write_checkpoint
from tests.runtimes import RUNTIMES

# One file, and images of other sizes than the command itself checks. The scan makes chunks of 64 tokens (PT2) or 32
# (ONNX), and blocks of 16 chunks: of the last image it makes two blocks or three.
SHAPES = ((1, 64, 64), (2, 96, 96), (5, 64, 224), (1, 128, 160))
ODD = ((1, 1, 1), (2, 20, 33), (1, 101, 70))


# All ops, once each stage at most: tracing takes time in proportion to their number.
SMALL = dataclasses.replace(SIZES["famseg_nano"], strips=(1, 0, 0, 0), bottles=(1, 0, 0, 0))
SMALLEST = dataclasses.replace(SMALL, strips=(0,) * 4, bottles=(0,) * 4, upsample="bilinear", context="none")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "famseg_nano", SMALL)


def telling(path: Path, **settings) -> Path:
    """A checkpoint in whose logits an error of any op shows: fresh scans and strips add next to nothing."""
    checkpoint = torch.load(write_checkpoint(path, **settings), weights_only=False)
    generator = torch.Generator().manual_seed(1)
    for name, value in checkpoint["state_dict"].items():
        if name.endswith(("layer_scale_1", "layer_scale_2")):
            value.fill_(0.1)
        elif name.endswith(("in_proj.weight", "content_encoder.weight")):
            value.normal_(std=0.15, generator=generator)
    torch.save(checkpoint, path)
    return path


def agree(run, network, shapes) -> None:
    for batch, height, width in shapes:
        x = torch.randn(batch, 1, height, width, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = network.model(x).numpy()
        np.testing.assert_allclose(run(x), expected, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "famseg_nano", SMALL)
        # A second trace would take as long as the first.
        patch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
        assert main([str(telling(folder / "best.ckpt", image_size=80))]) == 0
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "best.onnx"}
    return folder / "best.onnx"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_one_onnx_file_agrees_with_the_network_at_every_size(onnx_file: Path, runtime: str) -> None:
    run = RUNTIMES[runtime](onnx_file)
    agree(lambda x: run(x.numpy()), load_network(onnx_file.with_suffix(".ckpt")), SHAPES + ODD)


def test_an_onnx_file_says_what_it_is(onnx_file: Path) -> None:
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("image", ["batch", 1, "height", "width"])]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("logits", ["batch", 3, "height", "width"])
    ]
    about = json.loads(session.get_modelmeta().custom_metadata_map["famseg"])
    assert about["classes"] == ["background", "FL", "FB"]
    assert (about["image_size"], about["trained_at_image_size"]) == (80, 80)
    assert (about["mean"], about["std"]) == (MEAN, STD)


def test_an_onnx_file_has_few_nodes(onnx_file: Path) -> None:
    nodes = onnx.load(str(onnx_file)).graph.node
    assert len(nodes) < 700
    # Constants would be nodes too; sequences, conditions and loops keep runtimes from planning ahead.
    kinds = {node.op_type for node in nodes}
    assert not kinds & {
        "Constant",
        "Identity",
        "If",
        "Loop",
        "Scan",
        "SequenceAt",
        "SplitToSequence",
        "GatherND",
        "Where",
    }


def test_pt2_agrees_with_the_network_and_holds_no_op_of_this_library(tmp_path: Path) -> None:
    checkpoint = telling(tmp_path / "best.ckpt", image_size=32, upsample="bilinear", context="none")
    assert main([str(checkpoint), "--format", "pt2", "--out", str(tmp_path / "net.pt2")]) == 0
    extra = {"famseg": ""}
    program = torch.export.load(str(tmp_path / "net.pt2"), extra_files=extra)
    assert json.loads(extra["famseg"])["image_size"] == 64
    assert "famseg" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    module = program.module()
    agree(lambda x: module(x).detach().numpy(), load_network(checkpoint), SHAPES)


def test_a_file_that_disagrees_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "famseg_nano", SMALLEST)
    checkpoint = write_checkpoint(tmp_path / "best.ckpt", upsample="bilinear", context="none")

    def spoilt(model, *arguments):
        program = export_program(model, *arguments)
        program.state_dict["classifier.bias"] = torch.nn.Parameter(model.classifier.bias + 1.0)
        return program

    monkeypatch.setattr(command, "export_program", spoilt)
    with pytest.raises(RuntimeError, match="was not written"):
        main([str(checkpoint)])
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_what_has_no_form_in_onnx_is_decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "_aten", dict)  # without batch_norm
    model = torch.nn.BatchNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 5)
    onnx_graph.onnx_program(torch.export.export(model, (x,))).save(str(tmp_path / "norm.onnx"))
    found = RUNTIMES["onnxruntime"](tmp_path / "norm.onnx")(x.numpy())
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


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


def test_networks_that_have_no_form_at_a_free_size_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    checkpoint = write_checkpoint(tmp_path / "best.ckpt", model="swin")
    assert main([str(checkpoint)]) == 2
    assert "checkpoint: swin cannot be exported" in capsys.readouterr().err


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
