"""Checkpoints load or say why not; label maps come back at each image's own size, place and smoothness."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from famseg import optimize_for_inference
from famseg.data.augment import letterbox, undo_letterbox
from famseg.data.phantom import Phantom
from famseg.files.errors import DataError
from famseg.inference import Network, load_network, logits_at, predict
from famseg.metrics import jaggedness
from famseg.options import warn_of_slow_bf16
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "best.ckpt")


def test_the_network_is_what_was_saved(checkpoint: Path) -> None:
    network = load_network(checkpoint)
    states = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, states[f"model.{name}"])
    assert (network.image_size, network.epoch, network.model.training) == (32, 5, False)


def test_averaged_weights_win_and_options_are_kept(tmp_path: Path) -> None:
    options = {"strip_form": "stacked", "context_stride": 16, "directions": 2, "shared_bc": True}
    path = write_checkpoint(tmp_path / "a.ckpt", upsample="bilinear", context="none", **options)
    saved = torch.load(path, weights_only=True)
    names = [name.removeprefix("model.") for name in saved["state_dict"]]
    saved["ema"] = {name: torch.full_like(saved["state_dict"][f"model.{name}"], 2) for name in names}
    torch.save(saved, path)
    states = load_network(path).model.state_dict()
    assert set(states) == set(names)
    assert all((value == 2).all() for value in states.values())


class Code:
    def __reduce__(self):
        return (pytest.fail, ("the checkpoint's code ran",))


def spoilt(kind: str, good: Path, folder: Path) -> Path:
    path = folder / f"{kind}.ckpt"
    content = good.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("epoch,train_loss\n1,0.5\n")
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "code":
        torch.save({"config": Code()}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "other network":
        saved = torch.load(good, weights_only=True)
        saved["config"]["model"] = "famseg_tiny"
        torch.save(saved, path)
    elif kind == "not finite":
        saved = torch.load(good, weights_only=True)
        saved["state_dict"]["model.classifier.bias"][1] = torch.nan
        torch.save(saved, path)
    elif kind == "unknown model":
        saved = torch.load(good, weights_only=True)
        saved["config"]["model"] = "unet"
        torch.save(saved, path)
    return path


@pytest.mark.parametrize(
    "kind",
    ["missing", "cut", "empty", "text", "foreign", "code", "folder", "other network", "unknown model", "not finite"],
)
def test_what_is_no_checkpoint_is_one_clear_line(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    path = spoilt(kind, checkpoint, tmp_path)
    with pytest.raises(DataError) as caught:
        load_network(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_labels_have_each_images_size_and_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    network = load_network(checkpoint)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, shape, np.uint8) for shape in ((40, 60), (90, 30), (1, 1), (32, 32), (7, 200))]
    together = list(predict(network, images, batch_size=4))
    alone = [next(predict(network, [image])) for image in images]
    for image, first, second in zip(images, together, alone, strict=True):
        assert first.shape == image.shape
        assert first.dtype == np.uint8
        assert (first == second).mean() > 0.999  # rounding may decide a tie
    assert list(predict(network, [])) == []


def test_batch_size_and_backend_are_used(checkpoint: Path) -> None:
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("famseg.ssd_scan_2d"):
                seen.append((len(args[0]), args[-1]))
            return function(*args, **(kwargs or {}))

    seen: list[tuple[int, str]] = []
    with Calls():
        list(predict(load_network(checkpoint), [np.zeros((32, 32), np.uint8)] * 5, batch_size=3, backend="reference"))
    assert set(seen) == {(3, "reference"), (2, "reference")}


def test_the_network_is_optimised_once_and_stays_what_it_was(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, optimised = load_network(checkpoint), []
    before = {name: value.clone() for name, value in network.model.state_dict().items()}

    def optimize(model: torch.nn.Module) -> torch.nn.Module:
        optimised.append(model)
        return optimize_for_inference(model)

    monkeypatch.setattr("famseg.inference.optimize_for_inference", optimize)
    assert len(list(predict(network, [np.zeros((32, 32), np.uint8)] * 5, batch_size=2))) == 5
    assert optimised == [network.model]
    assert all(torch.equal(value, before[name]) for name, value in network.model.state_dict().items())


@pytest.mark.parametrize(
    ("image", "batch_size", "message"),
    [
        (np.zeros((8, 8), np.float32), 1, r"images: expected \(H, W\) uint8, got \(8, 8\) float32"),
        (np.zeros((8, 8, 3), np.uint8), 1, r"images: expected"),
        (np.zeros((0, 8), np.uint8), 1, r"images: expected"),
        (np.zeros((8, 8), np.uint8), 0, "batch_size: expected at least 1, got 0"),
    ],
)
def test_what_is_no_image_is_refused(image, batch_size, message) -> None:
    with pytest.raises(ValueError, match=message):
        next(predict(Network(Bright(), {}, {}, 1, 32, Path("bright")), [image], batch_size=batch_size))


def test_flips_make_the_result_mirror_with_the_image(checkpoint: Path) -> None:
    network = load_network(checkpoint)
    image = Phantom(1, (32, 32), seed=5)[0].image
    there, back = (next(predict(network, [np.ascontiguousarray(i)], flips=True)) for i in (image, image[:, ::-1]))
    assert (there == back[:, ::-1]).mean() > 0.999
    plain = [next(predict(network, [np.ascontiguousarray(i)])) for i in (image, image[:, ::-1])]
    assert (plain[0] != plain[1][:, ::-1]).any()


def test_bf16_finds_what_fp32_finds_but_for_its_rounding(checkpoint: Path) -> None:
    network = load_network(checkpoint)
    images = [sample.image for sample in Phantom(4, (32, 32), seed=5)]
    wide, narrow = (np.stack(list(predict(network, images, precision=p))) for p in ("fp32", "bf16"))
    assert (wide == narrow).mean() > 0.97 and (wide != narrow).any()
    with pytest.raises(ValueError, match="precision: expected fp32 or bf16, got 'fp16'"):
        next(predict(network, images, precision="fp16"))


@pytest.mark.parametrize("units", [True, False])
def test_bf16_on_a_cpu_without_its_units_says_so(units, monkeypatch, capsys) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: units)
    warn_of_slow_bf16("fp32", "cpu")
    warn_of_slow_bf16("bf16", "cuda")
    assert capsys.readouterr().err == ""
    warn_of_slow_bf16("bf16", "cpu")
    assert ("no bf16 units" in capsys.readouterr().err) is not units


class Bright(torch.nn.Module):
    """A network that calls every pixel above the middle grey a head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([-x, torch.full_like(x, -100.0), x], 1)


def test_objects_come_back_where_they_were() -> None:
    network = Network(Bright(), {}, {}, 1, 64, Path("bright"))
    for shape, box in (((120, 200), (30, 70, 50, 130)), ((200, 90), (60, 160, 20, 70)), ((40, 30), (10, 30, 8, 20))):
        image = np.zeros(shape, np.uint8)
        top, bottom, left, right = box
        image[top:bottom, left:right] = 255
        found = next(predict(network, [image])) == 2
        rows, columns = np.nonzero(found)
        grain = max(shape) / 64  # one network pixel
        edges = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
        np.testing.assert_allclose(edges, box, atol=max(grain, 1))


def test_enlarged_logits_are_smooth_where_enlarged_labels_are_jagged() -> None:
    rows, columns = np.mgrid[:64, :64]
    inside = 20.0 - np.hypot(rows - 31.3, columns - 30.6)
    logits = torch.from_numpy(np.stack([-inside, np.full_like(inside, -100), inside])).float()
    smooth = logits_at(logits, 256, 256).argmax(0).numpy()
    nearest = undo_letterbox(logits.argmax(0).numpy().astype(np.uint8), 256, 256)
    assert jaggedness(smooth == 2) < 1.07
    assert jaggedness(nearest == 2) > 1.15
    truth = 80.0 - np.hypot(np.mgrid[:256, :256][0] - 126.7, np.mgrid[:256, :256][1] - 123.9) > 0
    assert (truth != (smooth == 2)).sum() < 0.3 * (truth != (nearest == 2)).sum()


def test_the_letterbox_is_undone_on_logits_as_on_labels() -> None:
    mask = np.zeros((90, 150), np.uint8)
    mask[20:60, 40:120] = 2
    boxed = letterbox(mask, 75, cv2.INTER_NEAREST_EXACT)
    logits = torch.nn.functional.one_hot(torch.from_numpy(boxed.astype(np.int64)), 3).movedim(-1, 0).float()
    labels = logits_at(logits, 90, 150).argmax(0).numpy()
    np.testing.assert_array_equal(labels[22:58, 42:118], 2)
    assert abs(int((labels == 2).sum()) - int((mask == 2).sum())) < 250
