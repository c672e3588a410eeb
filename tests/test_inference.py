"""Checkpoints load or say why not; label maps come back at each image's own size, place and smoothness."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from famseg import optimize_for_inference
from famseg.biometrics import fit_femur, fit_head
from famseg.data.augment import letterbox, undo_letterbox
from famseg.data.phantom import Phantom
from famseg.data.sample import Sample
from famseg.files.errors import DataError
from famseg.inference import Network, Reading, load_network, logits_at, mask_excess, predict, readings
from famseg.metrics import jaggedness
from famseg.options import warn_of_slow_bf16
from famseg.uncertainty import Expectation
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


def bright_disc(radius: float, shape: tuple[int, int] = (160, 200)) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.where(np.hypot(rows - 80, columns - 100) < radius, 255, 0).astype(np.uint8)


def test_what_masks_measure_too_much_is_taken_off() -> None:
    image = bright_disc(50)
    plain = Network(Bright(), {}, {}, 1, 64, Path("bright"))
    calibrated = Network(Bright(), {}, {}, 1, 64, Path("bright"), excess={"head_circumference": 6.0})
    lengths = []
    for network in (plain, calibrated):
        measure = network.classes[2].measure
        assert measure is not None
        shape = measure.fit(next(predict(network, [image])) == 2)
        assert shape is not None
        lengths.append(shape.length)
    assert lengths[0] - lengths[1] == pytest.approx(6.0 * 200 / 64, rel=1e-3)  # 64 px of input for 200 of the image
    assert calibrated.classes[1].measure is plain.classes[1].measure or calibrated.classes[1] == plain.classes[1]


def test_an_outline_as_wide_as_the_pen_is_what_masks_measure_too_much() -> None:
    inner, outer = bright_disc(50) > 0, bright_disc(52) > 0
    true = fit_head(inner)
    assert true is not None
    sample = Sample("a", "a", bright_disc(50), outer.astype(np.uint8) * 2, 0.5, head_circumference=true.length * 0.5)
    classes = Network(Bright(), {}, {}, 1, 100, Path("bright")).classes
    excess = mask_excess(sample, classes, image_size=100)
    assert excess == {"head_circumference": pytest.approx(2 * np.pi * 2 / 2, rel=0.05)}  # half of the image's pixels
    for change in ({"simulated": True}, {"pixel_size": None}, {"head_circumference": None}):
        assert mask_excess(Sample(**{**vars(sample), **change}), classes, 100) == {}


def test_shapes_are_never_shortened_to_nothing() -> None:
    head, femur = fit_head(bright_disc(4) > 0), fit_femur(bright_disc(4) > 0)
    assert head is not None and femur is not None
    for shape in (head, femur):
        assert 0.4 * shape.length < shape.shortened(1e6).length < shape.length
        assert shape.shortened(1.0).length == pytest.approx(shape.length - 1.0)
        assert shape.shortened(-1.0).length == pytest.approx(shape.length + 1.0)


class Watched(Bright):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return super().forward(x)


def test_a_network_that_knows_its_errors_looks_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Watched()
    monkeypatch.setattr("famseg.inference.optimize_for_inference", lambda model: model)
    expectation = Expectation((0.5, 1.0, 0.0), doubtful=0.6)
    network = Network(model, {}, {}, 1, 64, Path("bright"), expectations={"head_circumference": expectation})
    reading = next(readings(network, [bright_disc(50)]))
    assert [x.shape[-1] for x in model.seen] == [64, 64, 96, 96]
    assert torch.equal(model.seen[0].flip(3), model.seen[1])
    signs = reading.signs["head_circumference"]
    assert reading.expected_error == {"head_circumference": pytest.approx(0.5 * signs[0] + signs[1])}
    nothing = next(readings(network, [np.zeros((40, 60), np.uint8)]))
    assert nothing.expected_error == {} and nothing.doubts("head_circumference", 0.1) == []


def test_what_is_expected_to_be_far_off_is_uncertain() -> None:
    reading = Reading(np.zeros((1, 1)), {}, {"head_circumference": 10.0}, {"head_circumference": 2.0})
    assert reading.doubts("head_circumference", 0.3) == ["uncertain"]  # 3 mm
    for measure, pixel_size in (("head_circumference", 0.1), ("head_circumference", None), ("femur_length", 0.3)):
        assert reading.doubts(measure, pixel_size) == []
