"""A loss, gradient or weight that is not finite ends the run at its step, and no checkpoint holds it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from famseg.cli.train import main
from famseg.training.config import Diverged, TrainConfig
from famseg.training.module import SegmentationModule

SHORT = ["--data", "phantom:6", "--image-size", "32", "--batch-size", "2", "--phases", "sgd:2", "--device", "cpu"]


def test_the_run_stops_at_the_step_and_goes_on_from_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    step = SegmentationModule.training_step

    def spoilt(self, batch, index):
        loss = step(self, batch, index)
        return loss * math.nan if (self.current_epoch, index) == (1, 1) else loss

    out = tmp_path / "run"
    last = out / "checkpoints" / "last.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModule, "training_step", spoilt)
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


def module(**changes: object) -> SegmentationModule:
    """In the first of four steps of its epoch; the network is one number."""
    module = SegmentationModule(TrainConfig(phases="sgd:2", **changes))
    module.model = nn.Linear(1, 1, bias=False)
    module.trainer = SimpleNamespace(
        current_epoch=0, num_training_batches=4, precision_plugin=SimpleNamespace(), optimizers=[], global_rank=0
    )
    module.trainer.optimizers.append(module.configure_optimizers())
    module.on_train_epoch_start()
    return module


def step(module: SegmentationModule, loss: float, gradient: float) -> None:
    module._loss = torch.tensor(loss)
    module.model.weight.grad = torch.full((1, 1), gradient)
    module.configure_gradient_clipping(module.trainer.optimizers[0], module.config.clip_norm or None)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_loss_and_gradient_are_watched_with_and_without_clipping(loss, gradient, clip_norm):
    one = module(clip_norm=clip_norm)
    step(one, 1.0, 2.0)
    assert one.model.weight.grad.item() == pytest.approx(1.0 if clip_norm else 2.0)
    with pytest.raises(Diverged, match=f"step 2 of 4.*loss is {loss:g}, the norm of its gradient {abs(gradient):g}"):
        step(one, loss, gradient)


def test_a_step_that_loss_scaling_skips_is_none_of_it():
    one = module()
    one.trainer.precision_plugin.scaler = SimpleNamespace(get_scale=lambda: 2.0**16)
    step(one, 1.0, math.inf)
    with pytest.raises(Diverged, match="loss is nan"):
        step(one, math.nan, 1.0)
    one.trainer.precision_plugin.scaler = SimpleNamespace(get_scale=lambda: 1.0)  # nothing left to scale down
    with pytest.raises(Diverged, match="gradient inf"):
        step(one, 1.0, math.inf)


def test_a_gpu_is_asked_now_and_then_and_the_step_is_named_all_the_same(monkeypatch):
    one = module()
    monkeypatch.setattr(SegmentationModule, "device", torch.device("meta"))
    for gradient in (1.0, 1.0, math.nan, 1.0):
        step(one, 1.0, gradient)
    with pytest.raises(Diverged, match="step 3 of 4"):
        one.on_validation_epoch_start()  # before anything is judged or kept
    one.on_train_epoch_start()
    for _ in range(9):
        step(one, 1.0, math.nan)
    with pytest.raises(Diverged, match="step 1 of 4"):
        step(one, 1.0, 1.0)


@pytest.mark.parametrize("where", ["weight", "average of weight", "momentum_buffer of weight"])
def test_no_checkpoint_is_made_of_what_is_not_finite(where):
    one = module(ema=0.9)
    one.ema = {"weight": torch.ones(1, 1)}
    step(one, 1.0, 1.0)
    one.trainer.optimizers[0].step()
    one.on_validation_epoch_start()
    kept = {
        "weight": one.model.weight.data,
        "average of weight": one.ema["weight"],
        "momentum_buffer of weight": one.trainer.optimizers[0].state[one.model.weight]["momentum_buffer"],
    }
    kept[where].fill_(math.inf)
    with pytest.raises(Diverged, match=f"at its end.*: {where} is not finite"):
        one.on_validation_epoch_start()


def test_a_validation_loss_that_is_not_finite_is_no_score():
    one = module()
    one.on_validation_epoch_start()
    one._val_sums = [torch.full((2 + 1 + 9,), math.nan)]
    with pytest.raises(Diverged, match="the loss of the validation images is nan"):
        one.on_validation_epoch_end()
