"""The loss, and what every setting of a training run does."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from famseg.data.augment import eval_transform
from famseg.data.dataset import OPEN
from famseg.data.split import k_folds
from famseg.files.errors import DataError
from famseg.training.checkpoint import Checkpoints
from famseg.training.config import ConfigError, TrainConfig, device_for
from famseg.training.distributed import ALONE
from famseg.training.log import ProgressBar, TimeLeft
from famseg.training.loop import Loop
from famseg.training.loss import SegmentationLoss, settled
from famseg.training.module import SegmentationModule
from famseg.training.profile import profile
from famseg.training.run import Prepared, prepare


def labels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("terms", ["ce", "dice", "focal", "edge", "ce+dice", "focal+dice+edge", "ce+focal+dice"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 2.0]])
def test_loss_is_small_for_the_truth_and_large_for_its_opposite(terms, weights):
    target = labels(2, 8, 8)
    right = 20.0 * F.one_hot(target, 3).movedim(-1, 1).float()
    loss = SegmentationLoss(terms, weights)
    assert loss(right, target) < 1e-3
    assert loss(-right, target) > 0.6


def test_pixel_terms_are_the_known_ones():
    target, logits = labels(2, 8, 8), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 3.0, 2.0])
    cross_entropy = SegmentationLoss("ce", weights.tolist())(logits, target)
    torch.testing.assert_close(cross_entropy, F.cross_entropy(logits, target, weights))
    right = logits.softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(SegmentationLoss("focal")(logits, target), (-((1 - right) ** 2) * right.log()).mean())
    both = SegmentationLoss("ce+dice")(logits, target)
    torch.testing.assert_close(both, F.cross_entropy(logits, target) + SegmentationLoss("dice")(logits, target))


def test_edge_counts_the_pixels_on_both_sides_of_an_outline():
    target = torch.zeros(1, 6, 7, dtype=torch.long)
    target[0, 2:4, 3:5] = 2
    edge = torch.zeros(6, 7, dtype=torch.bool)
    edge[1:5, 2:6] = True
    logits = torch.randn(1, 3, 6, 7)
    expected = F.cross_entropy(logits, target, reduction="none")[0, edge].mean()
    torch.testing.assert_close(SegmentationLoss("edge")(logits, target), expected)
    nothing = SegmentationLoss("edge")(logits, torch.ones_like(target))
    assert nothing == 0


def test_dice_ignores_background_and_absent_classes():
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[0, :2] = 2
    logits = 20.0 * F.one_hot(target, 3).movedim(-1, 1).float()
    logits[0, 1, 3, 3] = 40.0  # a false femur where there is none at all
    assert SegmentationLoss("dice")(logits, target) < 1e-3


def test_loss_of_an_absent_class_has_a_gradient():
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    SegmentationLoss()(logits, torch.zeros(1, 4, 4, dtype=torch.long)).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("terms", ["ce", "focal", "dice", "edge", "ce+dice"])
def test_what_an_image_does_not_label_is_left_out_of_its_loss(terms):
    """A femur called so in the background of such an image costs nothing; in another image it does."""
    loss, logits = SegmentationLoss(terms, partly=True), torch.randn(2, 3, 6, 6)
    target = torch.zeros(2, 6, 6, dtype=torch.int64)
    target[:, 2:4, 1:5] = 2
    assert torch.equal(loss(logits, target), SegmentationLoss(terms)(logits, target))
    target[1, 0, 0] = 1
    open_target = target.clone()
    open_target[0][target[0] == 0] = OPEN + (1 << 1)
    background = logits[0, :2].logsumexp(0)
    values, gradients = [], []
    for share in (0.1, 0.9):  # of the background's probability that is the femur's
        moved = logits.clone()
        moved[0, 0], moved[0, 1] = background + math.log(1 - share), background + math.log(share)
        moved.requires_grad_()
        values.append(loss(moved, open_target))
        gradients.append(torch.autograd.grad(values[-1], moved)[0])
    assert torch.allclose(values[0], values[1], atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)
    closed = [loss(moved, target) for moved in (logits, logits + torch.tensor([0.0, 5.0, 0.0]).view(1, 3, 1, 1))]
    assert not torch.allclose(closed[0], closed[1])


def test_what_an_image_does_not_label_counts_in_no_score() -> None:
    target = torch.tensor([[[OPEN + 0b10, OPEN + 0b10, 2, OPEN + 0b10]], [[0, 1, 2, 0]]])
    found, truth = settled(torch.tensor([[[1, 2, 1, 0]], [[1, 1, 1, 2]]]), target)
    assert found.tolist() == [[[0, 2, 1, 0]], [[1, 1, 1, 2]]]
    assert truth.tolist() == [[[0, 0, 2, 0]], [[0, 1, 2, 0]]]


def test_pixels_without_any_weight_make_no_loss():
    loss = SegmentationLoss("ce", [0.0, 1.0, 1.0])(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
    assert loss == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "unet++"}, "model: expected one of famseg_nano"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"val_fraction": 1.0}, "val_fraction: expected a number between 0 and 1"),
        ({"phases": "adamw:2,sgd"}, "phases: expected OPTIMIZER:EPOCHS"),
        ({"epochs": 1}, "epochs: expected at least 2, one a phase, got 1"),
        ({"decay": "linear"}, "decay: expected one of cos, step, constant, adadelta, got 'linear'"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"precision": "fp8"}, "precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ({"model": "unext", "fusion": False}, "fusion: is an option of FAMSeg, unext has none"),
        ({"trainable": "decoder:"}, "trainable: expected all, encoder, decoder"),
        ({"loss": "ce+hinge"}, "loss: expected some of ce, focal, dice, edge"),
        ({"loss": "ce+ce"}, "loss: expected some of"),
        ({"class_weights": "1,2"}, "class_weights: expected none, balanced, or 3 numbers"),
        ({"class_weights": "1,-2,1"}, "class_weights: expected none"),
        ({"ema": 1.0}, "ema: expected a number from 0 to below 1"),
        ({"folds": 1}, "folds: expected 2 or more"),
        ({"folds": 3, "fold": 3}, "fold: expected 0 to 2 with folds 3, got 3"),
        ({"fold": 1}, "fold: expected 0 to 0 without folds"),
        ({"augmentation": "mixup"}, "augmentation: expected one of full, wide, rotate-flip, none, got 'mixup'"),
        ({"train_images": 0}, "train_images: expected at least 1"),
        ({"devices": 0}, "devices: expected at least 1"),
        ({"clip_norm": float("nan")}, "clip_norm: expected at least 0"),
        ({"clip_norm": float("inf")}, "clip_norm: expected at most"),
        ({"weight_decay": float("inf")}, "weight_decay: expected at most"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a positive number, got inf"),
        ({"min_learning_rate": float("nan")}, "min_learning_rate: expected a positive number, got nan"),
        ({"lr_limit_min": 0.02}, "lr_limit_min: expected at most lr_limit_max, which is 0.01, got 0.02"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"seed": 2**32}, "seed: expected at most 4294967295, got 4294967296"),
        ({"image_size": 10**6}, "image_size: expected at most 8192"),
        ({"batch_size": 10**400}, "batch_size: expected at most 1000000"),
        ({"workers": 10**5}, "workers: expected at most 256"),
        ({"devices": 10**9}, "devices: expected at most 1024"),
        ({"epochs": 10**9}, "epochs: expected at most 1000000"),
        ({"phases": "adamw:999999999"}, "phases: expected at most 1000000"),
        ({"phases": f"adamw:{'9' * 5000}"}, "phases: expected OPTIMIZER:EPOCHS"),
        ({"class_weights": "1e39,1,1"}, "class_weights: expected none, balanced"),
        ({"class_weights": "1e-39,0,0"}, "class_weights: expected none, balanced"),
        ({"class_weights": "1,2,3", "loss": "dice"}, "class_weights: are of ce and focal, and the loss is dice"),
        ({"folds": 3, "val_fraction": 0.3}, "val_fraction: 3 folds hold out 1/3"),
        ({"context": "lightham", "fusion": False}, "fusion: lightham fuses"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change)


SMALL = TrainConfig(data="phantom:6", image_size=32, batch_size=2, device="cpu")


def prepared(**changes: object) -> Prepared:
    return prepare(dataclasses.replace(SMALL, **changes), ALONE)


def looped(**changes: object) -> Loop:
    run = prepared(**changes)
    return Loop(run.module, run.train_loader, run.val_loader, device=run.device)


def first_batch(run: Prepared) -> dict[str, torch.Tensor]:
    return next(iter(run.train_loader))


def optimizer(**changes: object) -> torch.optim.Optimizer:
    module = SegmentationModule(dataclasses.replace(SMALL, **changes))
    return module.optimizer(module.phases[0])


def names(run: Prepared) -> str:
    return " ".join(type(m).__name__ for m in run.module.model.modules())


@pytest.mark.parametrize(("images", "batch"), [(6, 1), (2, 8)])
@pytest.mark.parametrize("model", ["famseg_nano", "unext"])
def test_a_step_of_one_pixel_is_refused_before_anything_is_built(images, batch, model, monkeypatch):
    monkeypatch.setattr("famseg.training.module.create_model", None)
    with pytest.raises(ConfigError, match="batch_size: one image of 32 px a step"):
        prepared(data=f"phantom:{images}", batch_size=batch, model=model)


def test_a_batch_larger_than_the_data_is_told(capsys):
    run = prepared(batch_size=8)
    assert run.train_loader.batch_sampler.batch_size == 4
    assert capsys.readouterr().out == "batch_size: 8 are more than the 4 images to train on; taking 4\n"
    prepared()
    assert capsys.readouterr().out == ""


def test_model_and_ablations():
    nano = prepared()
    assert "Mamba2Scan2d" in names(nano) and "Mamba2Scan2d" not in names(prepared(shortcut="identity"))
    assert "FeatureAwareUpsample" not in names(prepared(upsample="bilinear"))
    assert "LightHam" in names(prepared(context="lightham"))
    parameters = [sum(p.numel() for p in prepared(**c).module.parameters()) for c in ({}, {"fusion": False})]
    assert parameters[0] > parameters[1]
    assert prepared(model="famseg_tiny").module.model.config.widths == (32, 64, 160, 256)


def test_data_settings():
    assert first_batch(prepared(image_size=48, batch_size=3))["image"].shape == (3, 1, 48, 48)
    assert len(prepared(data="phantom:7", val_fraction=0.5).validation) == 4
    run = prepared(folds=3, fold=2)
    assert (run.training.indices, run.validation.indices) == k_folds(run.training.samples, 3, 2, SMALL.seed)
    plain = prepared(augmentation="none").training
    assert np.array_equal(plain[0]["image"][0], eval_transform(32)(plain.sample(0).image, plain.sample(0).mask)[0])
    one, two = (first_batch(prepared(seed=seed))["image"] for seed in (0, 1))
    assert not torch.equal(one, two)
    assert torch.equal(one, first_batch(prepared())["image"])


def test_few_images_train_and_what_is_held_out_stays():
    every, few = prepared(data="phantom:10"), prepared(data="phantom:10", train_images=3)
    assert len(few.training) == 3 and set(few.training.indices) < set(every.training.indices)
    assert few.validation.indices == every.validation.indices and few.images["held_out"] == every.images["held_out"]
    assert {**few.images["trained"], **few.images["unused"]} == every.images["trained"]
    assert "unused" not in every.images
    with pytest.raises(DataError, match="train_images: expected 1 to 8, the images there are to train on, got 9"):
        prepared(data="phantom:10", train_images=9)


def test_workers_load_the_same_batches():
    alone, helped = prepared(workers=0).train_loader, prepared(workers=1).train_loader
    assert (alone.num_workers, helped.num_workers) == (0, 1)
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["mask"], other["mask"])


@pytest.mark.parametrize(("cache", "decoded_again"), [(True, 0), (False, 5)])
def test_the_cache_keeps_what_was_decoded(cache, decoded_again, monkeypatch):
    run = prepared(cache=cache)
    reads = []
    original = type(run.training.samples).__getitem__
    monkeypatch.setattr(type(run.training.samples), "__getitem__", lambda s, i: reads.append(i) or original(s, i))
    batches = [batch["index"] for batch in run.train_loader]
    assert len(reads) == (decoded_again and sum(map(len, batches)))


def test_optimizer_settings():
    assert isinstance(optimizer(phases="sgd:2"), torch.optim.SGD)
    assert type(optimizer(phases="adam:2")) is torch.optim.Adam
    assert isinstance(optimizer(phases="adamw:2"), torch.optim.AdamW)
    assert isinstance(optimizer(phases="adadelta:2"), torch.optim.Adadelta)
    assert [group["weight_decay"] for group in optimizer(weight_decay=0.3).param_groups] == [0.3, 0.0]
    rates = {"learning_rate": 0.01, "min_learning_rate": 1e-4, "lr_limit_min": 1e-6, "lr_limit_max": 0.1}
    assert optimizer(**rates).param_groups[0]["lr"] == pytest.approx(0.01 * 2 / 64)
    assert optimizer(**rates | {"lr_limit_max": 1e-5}).param_groups[0]["lr"] == 1e-5


def test_loss_setting():
    logits, target = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), labels(2, 8, 8)
    for terms in ("ce", "dice", "focal+dice"):
        assert prepared(loss=terms).module.loss(logits, target) == SegmentationLoss(terms)(logits, target)


def test_ema_setting_is_the_part_of_the_average_that_stays():
    module = SegmentationModule(dataclasses.replace(SMALL, ema=0.75))
    module.start_average()
    before = module.ema["classifier.weight"].clone()
    with torch.no_grad():
        module.model.classifier.weight += 1
    module.average(1000)  # beyond the short memory of the beginning
    torch.testing.assert_close(module.ema["classifier.weight"], before + 0.25)


def test_device_setting(monkeypatch):
    assert device_for("auto", "auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_for(wish, "auto") for wish in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_class_weights():
    assert prepared().module.loss.weight is None
    assert prepared(class_weights="1,3,2").module.loss.weight.tolist() == [1, 3, 2]
    run = prepared(data="phantom:20", class_weights="balanced")
    pixels = sum(np.bincount(run.training.sample(i).mask.ravel(), minlength=3) for i in range(len(run.training)))
    assert (pixels > 0).all()
    balanced = run.module.loss.weight.numpy() * pixels
    np.testing.assert_allclose(balanced, np.median(pixels), rtol=1e-5)


def test_channels_last_and_compile_keep_the_weights_and_their_names(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda image: calls.append(image) or function(image))
    plain, other = prepared(), prepared(channels_last=True, compile=True)
    stem = other.module.model.encoder.stem[3].weight
    assert stem.is_contiguous(memory_format=torch.channels_last) and not stem.is_contiguous()
    state, changed = plain.module.state_dict(), other.module.state_dict()
    assert state.keys() == changed.keys() and all(torch.equal(state[name], changed[name]) for name in state)
    image = first_batch(plain)["image"]
    for mode in (True, False):
        expected, found = plain.module.train(mode)(image), other.module.train(mode)(image)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert len(calls) == 1  # validation is not compiled


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_backend_is_used(backend):
    class Backends(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("famseg"):
                seen.update(argument for argument in args if isinstance(argument, str))
            return function(*args, **(kwargs or {}))

    seen: set[str] = set()
    run = prepared(backend=backend)
    with torch.no_grad(), Backends():
        run.module.eval()(first_batch(run)["image"])
    assert seen == {backend}


def test_patience_counts_epochs_without_a_better_score(tmp_path):
    checkpoints = Checkpoints(tmp_path, patience=2)
    better = []
    for epoch, score in enumerate((0.5, 0.4, 0.6, 0.6, float("nan"))):
        assert not checkpoints.stale(epoch - 1)
        better.append(checkpoints.better(epoch, score))
    assert checkpoints.stale(4)
    assert better == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "precision: fp16 is for GPUs"),
        ({"backend": "cuda"}, "backend: cuda is not available"),
        ({"device": "cuda"}, "device: cuda was asked for"),
        ({"tensorboard": True}, "tensorboard: the package is not installed"),
    ],
)
def test_what_this_machine_cannot_do_is_named(change, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        prepared(**change)


def test_rows_of_two_ablations_are_shipped():
    from famseg.cli.train import _CONFIGS

    configs = {path.stem: TrainConfig(**yaml.safe_load(path.read_text())) for path in _CONFIGS.glob("*.yaml")}
    rows = {name: configs[name] for name in configs if name.startswith(("table3-", "scunext-"))}
    networks = {(row.model, row.shortcut, row.fusion, row.loss) for row in rows.values()}
    assert len(networks) == len(rows) == 4 + 8


def test_time_left_is_in_proportion(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = TimeLeft(4, 10)
    assert clock.text(4.0) == "?"
    now[0] += 60
    assert clock.text(5.5) == "0:03:00"  # 1.5 epochs a minute, 4.5 to go


def test_the_bar_tells_how_far_the_epoch_and_how_good_it_is():
    loop = looped()
    bar = ProgressBar(loop, TimeLeft(0, 3), disable=False)
    (task,) = bar._bar.tasks
    loop.begin(1)
    loop._overlap += torch.tensor([[1, 0], [4, 0]])
    bar.scores = {"train_loss": 0.5, "val_loss": 0.5, "val_miou": 0.25}
    bar.trained(0)
    assert (task.description, task.completed, task.total) == ("epoch 2/3", 1, 2)
    words = "train_loss 0.500 val_miou 0.250 IoU_FL 0.250 IoU_FB nan left 0:00:0"
    assert task.fields["words"].startswith(words)
    bar.validated(0)
    assert (task.description, task.completed, task.total) == ("validation", 1, 1)


def test_workers_load_the_order_of_the_epoch_that_a_run_goes_on_with(monkeypatch):
    orders: list[list[int]] = []
    monkeypatch.setattr(Loop, "step", lambda self, index, batch: orders[-1].extend(batch["index"].tolist()))
    for workers, epoch in ((0, 0), (0, 3), (1, 3)):
        orders.append([])
        looped(workers=workers).train_epoch(epoch)
    assert orders[0] != orders[1] == orders[2]


def test_the_scale_of_an_fp16_loss_is_kept():
    def scaled() -> Loop:
        run = prepared()
        run.module.config = dataclasses.replace(run.module.config, precision="fp16")  # refused for a run on a CPU
        return Loop(run.module, run.train_loader, run.val_loader, device=run.device)

    one, two = scaled(), scaled()
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = one.module.state_dict()["model.classifier.weight"].clone()
    one.begin(0)
    one.step(0, next(iter(one.train_loader)))
    assert torch.equal(before, one.module.state_dict()["model.classifier.weight"])  # overflown, and skipped
    assert one.scaler.get_scale() == 2.0**29
    two.resume(one.state())
    assert two.scaler.get_scale() == 2.0**29 and two.steps == 1


def test_profile_names_every_part_of_a_step():
    text = profile(SMALL, steps=1)
    for part in ("loader", "forward", "loss", "backward", "optimizer", "step with a constant batch"):
        assert part in text
    assert "convolution" in text and "famseg::strip_conv2d_backward" in text
