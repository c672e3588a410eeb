"""--weights and --trainable: where training starts, and what it leaves alone."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from famseg.cli.train import main
from famseg.data.augment import MEAN, STD
from famseg.files.errors import DataError
from famseg.models import create_model
from famseg.training.config import ConfigError, TrainConfig
from famseg.training.finetune import _IMAGENET, STRATEGIES, count_parameters, freeze, load_weights
from tests.checkpoints import write_checkpoint
from tests.test_models import published_mscan

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


@pytest.mark.parametrize(
    ("strategy", "trained"),
    [
        ("a", 4_404_928),
        ("b", 2_223_872),
        ("c", 2_223_872),
        ("d", 3_761_152),
        ("e", 4_240_896),
        ("f", 4_365_568),
        ("g", 164_032),
        ("h", 6_976),
        ("i", 4_404_928),
    ],
)
def test_a_strategy_trains_the_papers_number_of_parameters(strategy, trained):
    model = create_model("unet_mobilenetv2", num_classes=1, in_channels=3)
    part = STRATEGIES[strategy][1]
    freeze(model, part, head=False)
    assert count_parameters(model) == (trained, 6_628_945)
    freeze(model, part)
    assert count_parameters(model) == (trained + 145, 6_628_945)


def test_without_its_head_all_the_rest_learns():
    model = create_model("unext")
    freeze(model, "all", head=False)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_strategy_in_a_run(tmp_path, capsys):
    start = write_checkpoint(tmp_path / "start.ckpt", model="unet_mobilenetv2")
    arguments = ["--model", "unet_mobilenetv2", "--weights", str(start), "--strategy", "h", "--train-head", "false"]
    assert main([*SHORT, *arguments, "--out", str(tmp_path / "run")]) == 0
    assert "training 6,976 of 6,628,659 parameters" in capsys.readouterr().out.splitlines()
    before, after = weights_of(start), weights_of(tmp_path / "run" / "checkpoints" / "last.ckpt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.blocks.4.") for name in changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "j"}, "strategy: expected one of none, a, b, c, d, e, f, g, h, i, got 'j'"),
        ({"strategy": "a", "trainable": "decoder"}, "trainable: strategy a trains decoder; leave one of the two out"),
        ({"strategy": "a", "weights": "x"}, "weights: strategy a starts from random weights; leave them out"),
        ({"strategy": "i"}, "weights: strategy i starts from the weights of a file; name a file with --weights"),
    ],
)
def test_a_strategy_and_what_contradicts_it(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change)


def test_layers_of_every_decoder_count_from_the_deepest():
    for name in ("famseg_nano", "unet_mobilenetv2", "sc_unext"):
        model = create_model(name)
        freeze(model, "decoder:1")
        learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
        assert learning == {*model.decoder_layers[0].parameters(), *model.classifier.parameters()}
        with pytest.raises(ValueError, match=r"trainable: expected decoder layers from 1 to \d, got 9"):
            freeze(model, "decoder:9")


@pytest.fixture
def classifier(tmp_path):
    """torchvision's MobileNetV2 with statistics as after training, and its file."""
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(weights=None)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    torch.save(network.state_dict(), tmp_path / "mobilenet.pth")
    return network.double().eval(), tmp_path / "mobilenet.pth"


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_what_imagenets_classifier_sees(classifier, channels):
    """The colour network on it (a grey image three times), normalised as it was trained, equals ours on our input."""
    network, path = classifier
    model = create_model("unet_mobilenetv2", in_channels=channels)
    words = load_weights(model, path)
    assert words.endswith(
        "2 others in it are not used; not the file that torchvision publishes; ImageNet's "
        "normalisation is in the first layer"
    )
    features = model.double().eval().encoder.features
    image = torch.rand(2, channels, 64, 96, dtype=torch.float64)
    ours = (image - MEAN) / STD
    mean, deviation = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in _IMAGENET)
    with torch.no_grad():
        colour = (image.expand(-1, 3, -1, -1) - mean) / deviation
        torch.testing.assert_close(
            features[0](ours)[:, :, 1:, 1:], network.features[0](colour)[:, :, 1:, 1:], rtol=1e-5, atol=1e-6
        )
        # At the border too, where the colour image goes on as ours does: nearly black.
        network.features[0][0].padding = (0, 0)
        around = (F.pad(image, (1, 1, 1, 1), value=MEAN).expand(-1, 3, -1, -1) - mean) / deviation
        torch.testing.assert_close(features[:-1](ours), network.features[:-1](around), rtol=1e-4, atol=1e-5)


def imagenets_mscan():
    published = create_model("segnext", in_channels=3).encoder.state_dict()
    return {**published, "head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}


def mmsegs():
    network = create_model("segnext", in_channels=3)
    head = {f"decode_head.{name}": value for name, value in network.decoder.head.state_dict().items()}
    return {f"backbone.{name}": value for name, value in network.encoder.state_dict().items()} | head


@pytest.mark.parametrize(
    ("name", "published", "first", "key"),
    [
        ("segnext", imagenets_mscan, lambda encoder: encoder.patch_embed1.proj[:2], "patch_embed1.proj.0."),
        ("segnext", mmsegs, lambda encoder: encoder.patch_embed1.proj[:2], "backbone.patch_embed1.proj.0."),
        (
            "unet",
            lambda: torchvision.models.resnet34(weights=None).state_dict(),
            lambda encoder: torch.nn.Sequential(encoder.conv1, encoder.bn1),
            "conv1.",
        ),
    ],
)
def test_other_encoders_see_what_they_were_trained_on_too(name, published, first, key, tmp_path):
    states = published()
    torch.save(states, tmp_path / "weights.pth")
    model = create_model(name)
    assert load_weights(model, tmp_path / "weights.pth").endswith("; ImageNet's normalisation is in the first layer")
    image = torch.rand(1, 1, 32, 32)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in _IMAGENET)
    kernel, bias = states[f"{key}weight"], states.get(f"{key}bias")
    theirs = F.conv2d((image - mean) / deviation, kernel, bias, stride=2, padding=kernel.shape[-1] // 2)
    with torch.no_grad():
        layers = first(model.encoder.eval())
        ours = layers((image - MEAN) / STD)
        # The norm behind takes the constant, so theirs is the published one's: mean 0, deviation 1.
        theirs = F.batch_norm(theirs, torch.zeros(len(kernel)), torch.ones(len(kernel)))
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=1e-4, atol=1e-5)


def test_weights_without_imagenets_classes_are_taken_as_they_are(classifier, tmp_path):
    network, _ = classifier
    states = {name: v.float() for name, v in network.state_dict().items() if not name.startswith("classifier")}
    torch.save(states, tmp_path / "features.pth")
    model = create_model("unet_mobilenetv2")
    assert load_weights(model, tmp_path / "features.pth").endswith("ImageNet's normalisation is left out")
    torch.testing.assert_close(model.encoder.features[0][0].weight, states["features.0.0.weight"].sum(1, keepdim=True))


def test_torchvisions_file_is_known_by_its_hash(classifier, tmp_path, monkeypatch):
    _, path = classifier
    model = create_model("unet_mobilenetv2")
    damaged = path.rename(tmp_path / "mobilenet_v2-b0353104.pth")
    with pytest.raises(DataError, match="its SHA-256 is not b03531047ffacf1e…, which torchvision's"):
        load_weights(model, damaged)
    published = hashlib.sha256(damaged.read_bytes()).hexdigest()
    monkeypatch.setattr("famseg.training.finetune._TORCHVISION", (damaged.name, published))
    assert "torchvision's, by its SHA-256; ImageNet's normalisation is in" in load_weights(model, damaged)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"no tensors", "holds no tensors saved by torch.save"),
        ({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, "does not fit this network: missing: features"),
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


class Log:
    """What programs keep beside the weights; pickled by its class and its attributes."""

    def __init__(self):
        self.losses, self.array = [np.float64(0.5)], np.arange(3.0)


class Code:
    def __reduce__(self):
        return (pytest.fail, ("the file's code ran",))


EXTRAS = {
    "best": np.float64(0.9), "epoch": np.int64(3), "name": np.str_("x"), "curve": np.arange(4), "log": Log(),
    "args": argparse.Namespace(folder=Path("runs"), rate=0.1), "when": datetime.datetime(2026, 1, 1),
    "step": torch.ones(()),
}  # fmt: skip


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda states: states,
        lambda states: {f"module.{name}": value for name, value in states.items()},
        lambda states: {"state_dict": {f"module._orig_mod.model.{n}": value for n, value in states.items()}, **EXTRAS},
        lambda states: {"model": {f"_orig_mod.{name}": value for name, value in states.items()}, **EXTRAS},
        lambda states: {"network": {"model_state_dict": {f"net.{n}": value for n, value in states.items()}}},
    ],
)
def test_a_state_dict_loads_out_of_what_programs_wrap_around_it(wrapped, tmp_path):
    start, model = create_model("famseg_nano"), create_model("famseg_nano")
    torch.save(wrapped(start.state_dict()), tmp_path / "weights.pth")
    words = load_weights(model, tmp_path / "weights.pth")
    assert words == f"487 tensors of the network from {tmp_path / 'weights.pth'}"
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.backbone."])
def test_an_encoder_alone_loads_and_what_is_left_over_is_counted(prefix, tmp_path):
    start, model = create_model("sc_unext"), create_model("sc_unext")
    states = {f"{prefix}{name}": value for name, value in start.encoder.state_dict().items()}
    torch.save({"state_dict": {**states, "decode_head.weight": torch.zeros(3)}}, tmp_path / "weights.pth")
    words = load_weights(model, tmp_path / "weights.pth")
    assert words.startswith(f"{len(states)} tensors of the encoder from") and words.endswith(
        "; 1 others in it are not used"
    )
    assert all(torch.equal(v, start.encoder.state_dict()[name]) for name, v in model.encoder.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_published_strip_blocks_load_under_any_prefix(prefix, tmp_path):
    model = create_model("famseg_nano")
    torch.save({"state_dict": published_mscan(model, prefix=prefix), **EXTRAS}, tmp_path / "mscan.pth")
    assert load_weights(model, tmp_path / "mscan.pth") == (
        f"190 tensors of the strip blocks from {tmp_path / 'mscan.pth'}; 1 others in it are not used"
    )
    assert torch.all(model.encoder.stages[2][-1].layer_scale_1 == 0.01 * 4)


def spoilt(change):
    states = dict(create_model("famseg_nano").state_dict())
    change(states)
    return states


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights for this network"),
        ([torch.zeros(2)], "holds no weights for this network"),
        ({"model": Log()}, "holds no weights for this network"),
        (
            {"layer1.weight": torch.zeros(3)},
            r"missing: block1\.0\..*, block1.*, block1.* and \d+ more; not of this network: layer1.weight$",
        ),
        (
            spoilt(lambda s: s.update({"classifier.bias": torch.zeros(4)})),
            r"fit this network: of another shape: classifier.bias \(4,\) instead of \(3,\)$",
        ),
        (
            spoilt(lambda s: s.update({"classifier.offset": s.pop("classifier.bias")})),
            "fit this network: missing: classifier.bias; not of this network: classifier.offset$",
        ),
        (spoilt(lambda s: s.update({"classifier.bias": torch.full((3,), math.nan)})), "classifier.bias is not finite"),
        (spoilt(lambda s: s.update({"module.classifier.bias": torch.zeros(3)})), "classifier.bias is in it twice"),
        ({"log": Code(), **spoilt(lambda s: None)}, "also holds .*, which only code could read; if you trust"),
    ],
)
def test_nothing_to_load_or_no_fit_is_named(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    model = create_model("famseg_nano")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=message) as caught:
        load_weights(model, tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("classes", ["FB,FL", "FB", "FL,FB,lesion"])
def test_a_checkpoint_of_other_classes_is_refused(classes, tmp_path, capsys):
    """In another order its classifier would find femurs where it has learned heads."""
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", model="unext")
    settings = [*SHORT, "--model", "unext", "--weights", str(checkpoint), "--data", "phantom:6"]
    if "lesion" not in classes:  # which no phantom has
        assert main([*settings, "--classes", classes]) == 2
        line = f"it finds FL,FB, this one {classes}; start it with --classes FL,FB"
        assert line in capsys.readouterr().err
    with pytest.raises(DataError, match="it finds FL,FB"):
        load_weights(create_model("unext", len(classes.split(",")) + 1), checkpoint, classes)


def test_unext_starts_from_its_own_checkpoints_only(tmp_path, capsys):
    torch.save({}, tmp_path / "weights.pth")
    assert main([*SHORT, "--model", "unext", "--weights", str(tmp_path / "weights.pth")]) == 2
    assert "checkpoints of famseg-train only" in capsys.readouterr().err
