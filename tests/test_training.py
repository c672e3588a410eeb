"""Phases and learning rates (section 3.4, Eq. 11–12), the loss, and the checkpoint writer."""

from __future__ import annotations

import itertools

import pytest
import torch

from famseg.training.callbacks import AtomicCheckpointIO
from famseg.training.config import ConfigError, TrainConfig
from famseg.training.loss import segmentation_loss
from famseg.training.schedule import Phase, fit_learning_rates, learning_rate, parse_phases, phase_at


def test_the_papers_phases():
    assert parse_phases("adamw:150,sgd:50") == [Phase("adamw", 0, 150), Phase("sgd", 150, 50)]


@pytest.mark.parametrize("total", [2, 3, 4, 7, 40, 400])
def test_phases_stretch_in_proportion_and_keep_their_order(total):
    phases = parse_phases("adamw:150,sgd:50", total)
    assert sum(p.epochs for p in phases) == total
    assert all(p.epochs >= 1 for p in phases)
    assert all(a.start + a.epochs == b.start for a, b in itertools.pairwise(phases))
    if total % 4 == 0:
        assert phases[0].epochs == 3 * phases[1].epochs


@pytest.mark.parametrize("text", ["", "adamw", "adamw:0", "adamw:x", "lion:3", "adamw:3,,sgd:2"])
def test_malformed_phases_are_refused(text):
    with pytest.raises(ValueError, match="phases: expected OPTIMIZER:EPOCHS"):
        parse_phases(text)


def test_every_epoch_has_its_phase():
    phases = parse_phases("adamw:3,sgd:2")
    assert [phase_at(phases, e).optimizer for e in range(6)] == ["adamw"] * 3 + ["sgd"] * 3


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(64, (1e-3, 1e-5)), (8, (1e-3, 1e-5)), (4, (6.25e-4, 6.25e-6)), (1, (1.5625e-4, 1.5625e-6))],
)
def test_equations_11_and_12_with_the_papers_limits(batch, expected):
    assert fit_learning_rates(batch, 0.01, 1e-4, 1e-4, 1e-3) == pytest.approx(expected)


@pytest.mark.parametrize("decay", ["cos", "step"])
def test_learning_rate_warms_up_then_never_rises(decay):
    rates = [learning_rate(e / 4, 20, decay, 1e-2, 1e-4) for e in range(81)]
    peak = rates.index(max(rates))
    assert rates[0] == 1e-4 and max(rates) == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-4)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_loss_is_small_for_the_truth_and_large_for_its_opposite():
    target = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    right = 20.0 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    assert segmentation_loss(right, target) < 1e-3
    assert segmentation_loss(-right, target) > 10


def test_loss_of_an_absent_class_has_a_gradient():
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    segmentation_loss(logits, torch.zeros(1, 4, 4, dtype=torch.long)).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)

    def full_disk(value, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "unet"}, "model: expected one of famseg_nano"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"val_fraction": 1.0}, "val_fraction: expected a number between 0 and 1"),
        ({"phases": "adamw:2,sgd"}, "phases: expected OPTIMIZER:EPOCHS"),
        ({"epochs": 1}, "epochs: expected at least 2, one a phase, got 1"),
        ({"decay": "linear"}, "decay: expected one of cos, step, got 'linear'"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change)
