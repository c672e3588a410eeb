"""A loss, gradient or weight that is not finite ends the run at its step, and no checkpoint holds it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from famseg.cli.train import main
from famseg.training.config import Diverged, TrainConfig
from famseg.training.loop import Loop
from famseg.training.module import SegmentationModule
from famseg.training.run import _after_divergence

SHORT = ["--data", "phantom:6", "--image-size", "32", "--batch-size", "2", "--phases", "sgd:2", "--device", "cpu"]


def test_the_run_stops_at_the_step_and_goes_on_from_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    loss_of = Loop.loss

    def spoilt(self, logits, mask):
        loss = loss_of(self, logits, mask)
        return loss * math.nan if (self.epoch, self.steps) == (1, 3) else loss

    out = tmp_path / "run"
    last = out / "checkpoints" / "last.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "loss", spoilt)
        assert main([*SHORT, "--out", str(out)]) == 3
    error = capsys.readouterr().err
    assert (
        error.startswith("famseg-train: diverged in epoch 2, at step 2 of 2, learning rate 0.00") and str(last) in error
    )
    assert error.count("\n") == 1 and "--learning-rate" in error
    kept = torch.load(last, weights_only=True)
    assert kept["epoch"] == 0 and all(value.isfinite().all() for value in kept["state_dict"].values())
    assert not (out / "metrics.json").exists()
    assert main(["--resume", "auto", "--out", str(out)]) == 0
    assert (out / "metrics.json").exists()


class Loader(list):
    """Batches, and what is told which epoch they are of."""

    batch_sampler = SimpleNamespace(sampler=SimpleNamespace(set_epoch=lambda epoch: None))


def loop(image: float = 0.0, **changes: object) -> Loop:
    """In the first of four steps of its epoch; the network is three numbers, the one image to validate a constant."""
    module = SegmentationModule(TrainConfig(phases="sgd:2", weight_decay=0.0, **changes))
    module.model = nn.Conv2d(1, 3, 1, bias=False)
    batch = {"image": torch.full((1, 1, 2, 2), image), "mask": torch.zeros(1, 2, 2, dtype=torch.long)}
    loop = Loop(module, Loader([batch] * 4), Loader([batch]), device=torch.device("cpu"))
    loop.begin(0)
    return loop


def step(loop: Loop, loss: float, gradient: float) -> None:
    weight = loop.module.model.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[0] = gradient
    scale = loop.scaler.get_scale()
    loop.finish(torch.tensor(loss), loop.update(), scale)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_loss_and_gradient_are_watched_with_and_without_clipping(loss, gradient, clip_norm):
    one = loop(clip_norm=clip_norm)
    before = one.module.model.weight[0].item()
    step(one, 1.0, 2.0)
    moved = (before - one.module.model.weight[0].item()) / one.optimizer.param_groups[0]["lr"]
    assert moved == pytest.approx(1.9 * (1.0 if clip_norm else 2.0), rel=1e-3)  # Nesterov: 1.9 gradients
    with pytest.raises(Diverged, match=f"step 2 of 4.*loss is {loss:g}, the norm of its gradient {abs(gradient):g}"):
        step(one, loss, gradient)


def scaler(scale: float) -> SimpleNamespace:
    """A GradScaler that skips every step."""
    nothing = dict.fromkeys(("unscale_", "step"), lambda optimizer: None)
    return SimpleNamespace(get_scale=lambda: scale, update=lambda: None, **nothing)


def test_a_step_that_loss_scaling_skips_is_none_of_it():
    one = loop()
    one.scaler = scaler(2.0**16)
    step(one, 1.0, math.inf)
    with pytest.raises(Diverged, match="loss is nan"):
        step(one, math.nan, 1.0)
    one.scaler = scaler(1.0)  # nothing left to scale down
    with pytest.raises(Diverged, match="gradient inf"):
        step(one, 1.0, math.inf)


def test_a_gpu_is_asked_now_and_then_and_the_step_is_named_all_the_same():
    one = loop()
    one.device = torch.device("meta")
    for gradient in (1.0, 1.0, math.nan, 1.0):
        step(one, 1.0, gradient)
    with pytest.raises(Diverged, match="step 3 of 4"):
        one.validate()  # before anything is judged or kept
    one.begin(0)
    for _ in range(9):
        step(one, 1.0, math.nan)
    with pytest.raises(Diverged, match="step 1 of 4"):
        step(one, 1.0, 1.0)


@pytest.mark.parametrize("where", ["weight", "average of weight", "momentum_buffer of weight"])
def test_no_checkpoint_is_made_of_what_is_not_finite(where):
    one = loop(ema=0.9)
    step(one, 1.0, 1.0)
    one.validate()
    weight = one.module.model.weight
    kept = {
        "weight": weight.data,
        "average of weight": one.module.ema["weight"],
        "momentum_buffer of weight": one.optimizer.state[weight]["momentum_buffer"],
    }
    kept[where].fill_(math.inf)
    with pytest.raises(Diverged, match=f"at its end.*: {where} is not finite"):
        one.validate()


def test_a_validation_loss_that_is_not_finite_is_no_score():
    with pytest.raises(Diverged, match="the loss of the validation images is nan"):
        loop(image=math.nan).validate()


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ("adamw:3,sgd:2", "with a lower --learning-rate"),
        ("adamw:3,sgd:2:lr=0.1", "with a lower --learning-rate and lr in --phases"),
        ("adam:3:lr=0.1", "with a lower lr in --phases"),
    ],
)
def test_the_advice_names_the_rates_that_the_phases_use(phases, words, tmp_path):
    assert _after_divergence(TrainConfig(phases=phases), tmp_path / "last.ckpt").endswith(words)
