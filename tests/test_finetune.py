"""--weights and --trainable: where training starts, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import torchvision

from famseg.cli.train import main
from famseg.models import create_model
from famseg.training.finetune import freeze, load_weights
from tests.checkpoints import write_checkpoint

SHORT = ["--data", "phantom:6", "--image-size", "32", "--batch-size", "2", "--phases", "adamw:1", "--device", "cpu"]


def weights_of(path):
    states = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("model."): value for name, value in states.items() if name.startswith("model.")}


@pytest.mark.parametrize(
    ("trainable", "moves"),
    [
        ("all", ("encoder.", "decoder.", "classifier.")),
        ("encoder", ("encoder.", "classifier.")),
        ("decoder", ("decoder.", "classifier.")),
        ("decoder:1,3", ("decoder.blocks.0.", "decoder.blocks.2.", "classifier.")),
    ],
)
def test_only_the_trainable_part_moves_batch_norms_included(trainable, moves, tmp_path):
    start = write_checkpoint(tmp_path / "start.ckpt", model="unet_mobilenetv2")
    arguments = ["--model", "unet_mobilenetv2", "--weights", str(start), "--trainable", trainable]
    assert main([*SHORT, *arguments, "--out", str(tmp_path / "run")]) == 0
    before, after = weights_of(start), weights_of(tmp_path / "run" / "checkpoints" / "last.ckpt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith(moves) for name in changed)
    for part in moves:
        assert any(name.startswith(part) and name.endswith("weight") for name in changed)
    if trainable == "encoder":
        assert any(name.endswith("running_mean") for name in changed)


def test_layers_of_every_decoder_count_from_the_deepest():
    for name in ("famseg_nano", "unet_mobilenetv2", "sc_unext"):
        model = create_model(name)
        freeze(model, "decoder:1")
        learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
        assert learning == {*model.decoder_layers[0].parameters(), *model.classifier.parameters()}
        with pytest.raises(ValueError, match=r"trainable: expected decoder layers from 1 to \d, got 9"):
            freeze(model, "decoder:9")


def test_a_colour_classifier_becomes_the_encoder(tmp_path):
    torch.manual_seed(0)
    classifier = torchvision.models.mobilenet_v2(weights=None).eval()
    torch.save(classifier.state_dict(), tmp_path / "mobilenet.pth")
    model = create_model("unet_mobilenetv2").eval()
    assert "tensors of the encoder" in load_weights(model, tmp_path / "mobilenet.pth")
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected = classifier.features[:-1](x.expand(1, 3, 64, 64))
        torch.testing.assert_close(model.encoder.features[:-1](x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"no tensors", "holds no tensors saved by torch.save"),
        ({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, "does not fit this network: features"),
        ("famseg_nano", "does not fit this network"),
    ],
)
def test_weights_that_cannot_be_used_are_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        write_checkpoint(path, model=content)
    out = tmp_path / "run"
    assert main([*SHORT, "--model", "unet_mobilenetv2", "--weights", str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "weights: " in error[0] and message in error[0]
    assert not out.exists()


def test_unext_starts_from_its_own_checkpoints_only(tmp_path, capsys):
    torch.save({}, tmp_path / "weights.pth")
    assert main([*SHORT, "--model", "unext", "--weights", str(tmp_path / "weights.pth")]) == 2
    assert "checkpoints of famseg-train only" in capsys.readouterr().err
