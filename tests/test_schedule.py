"""Phases and learning rates: section 3.4 and Eq. 11–12 of the paper, and a schedule a phase."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import yaml

from famseg.cli.train import _CONFIGS
from famseg.training.config import ConfigError, TrainConfig
from famseg.training.module import SegmentationModule
from famseg.training.schedule import (
    Phase,
    decay_span,
    fit_learning_rates,
    format_phases,
    learning_rate,
    parse_phases,
    phase_at,
    with_adadelta,
)

SMALL = TrainConfig(data="phantom:6", image_size=32, batch_size=2, device="cpu")


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


def test_with_decay_adadelta_only_adadelta_ends_the_constant_rate():
    rates = [learning_rate(e / 4, 20, "adadelta", 1e-2, 1e-4) for e in range(81)]
    assert rates[0] == 1e-4 and set(rates[8:]) == {1e-2}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("adamw:150,sgd:50", "adamw:150,adadelta:50"),
        ("sgd:200", "sgd:150,adadelta:50"),
        ("adam:3,adadelta:2", "adam:3,adadelta:2"),
        ("sgd:1", "adadelta:1"),
    ],
)
def test_adadelta_takes_the_last_phase_or_quarter(before, after):
    assert with_adadelta(parse_phases(before)) == parse_phases(after)
    assert TrainConfig(phases=before, decay="adadelta").plan() == parse_phases(after)
    assert format_phases(parse_phases(after)) == after


@pytest.mark.parametrize(
    "text",
    [
        "sgd:2:",
        "sgd:2:lr",
        "sgd:2:lr=",
        "sgd:2:lr=x",
        "sgd:2:lr=0",
        "sgd:2:lr=inf",
        "sgd:2:lr=1..0.1..0.01",
        "sgd:2:lr=0.1:lr=0.1",
        "sgd:2:rate=0.1",
        "sgd:2:lr=0.001..0.1",
        "sgd:2:limits=0.1..0.01",
        "adadelta:2:lr=0.1",
    ],
)
def test_a_malformed_schedule_is_refused(text):
    with pytest.raises(ValueError, match=f"phases: .*, got '{text}'"):
        parse_phases(f"adamw:3,{text}")


def test_a_schedule_of_a_phase_is_read_and_written():
    phases = parse_phases("adamw:15,sgd:5:lr=0.01..1e-4,sgd:2:lr=0.001:limits=0.0005..0.05", 44)
    assert phases == [
        Phase("adamw", 0, 30),
        Phase("sgd", 30, 10, (0.01, 0.0001)),
        Phase("sgd", 40, 4, (0.001, 0.001), (0.0005, 0.05)),
    ]
    assert parse_phases(format_phases(phases)) == phases


def test_neighbours_without_rates_share_a_schedule():
    phases = parse_phases("adamw:3,sgd:2,sgd:4:lr=0.1,adam:6,sgd:1")
    assert [decay_span(phases, epoch, None) for epoch in (0, 4, 5, 8, 9, 15, 99)] == [
        *((0, 5), (0, 5), (5, 9), (5, 9), (9, 16), (9, 16), (9, 16)),
    ]
    # decay_epochs ends the one that goes on then, and no other.
    assert [decay_span(phases, epoch, 7) for epoch in (0, 5, 9)] == [(0, 5), (5, 7), (9, 16)]
    assert [decay_span(phases, epoch, 40) for epoch in (0, 5, 9)] == [(0, 5), (5, 9), (9, 40)]


def module(**changes: object) -> SegmentationModule:
    return SegmentationModule(dataclasses.replace(SMALL, **changes))


def test_a_phase_restarts_at_its_own_rates():
    plain, own = module(phases="adamw:10"), module(phases="adamw:10,sgd:20:lr=0.05..0.0005")
    assert [own.rate(epoch / 2) for epoch in range(20)] == [plain.rate(epoch / 2) for epoch in range(20)]
    assert own.rate(10) == 0.0005 and own.rate(12) == pytest.approx(0.05) and own.rate(30) == pytest.approx(0.0005)
    assert own.optimizer(own.phases[1]).param_groups[0]["lr"] == 0.05


def test_limits_of_a_phase_fit_its_rates_to_the_batch():
    limited = module(phases="adamw:10,sgd:20:limits=0.0005..0.05", batch_size=16, learning_rate=0.01)
    assert limited.rate(12) == pytest.approx(0.01 * 16 / 64)
    both = module(phases="sgd:20:lr=0.5..0.1:limits=0.0005..0.05", batch_size=16)
    assert (both.rate(2), both.rate(20)) == pytest.approx((0.05, 0.0005))


def test_constant_is_one_rate_from_the_first_step_to_the_last():
    own, shared = module(phases="adam:20:lr=0.0001"), module(phases="adam:20", decay="constant")
    assert {own.rate(epoch / 4) for epoch in range(81)} == {0.0001}
    assert {shared.rate(epoch / 4) for epoch in range(81)} == {0.04 * 2 / 64}


def test_momentum_is_nesterovs_or_none():
    for momentum in (0.9, 0.0):
        group = module(phases="sgd:2", momentum=momentum).optimizer(Phase("sgd", 0, 2)).param_groups[0]
        assert (group["momentum"], group["nesterov"]) == (momentum, momentum > 0)


def test_without_momentum_a_step_is_equation_6():
    one = module(phases="sgd:2:lr=0.5", momentum=0.0, weight_decay=0.0)
    optimizer = one.optimizer(one.phases[0])
    before = [parameter.clone() for parameter in one.model.parameters()]
    for _ in range(2):
        for parameter in one.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for old, parameter in zip(before, one.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, old - 2 * 0.5)


def test_the_default_goes_with_every_decay():
    for decay, last in (("cos", "sgd"), ("step", "sgd"), ("constant", "sgd"), ("adadelta", "adadelta")):
        run = module(decay=decay)
        assert [phase.optimizer for phase in run.phases] == ["adamw", last]
        assert (run.rate(16) == 0.01) == (decay == "constant")
        assert TrainConfig(phases=format_phases(run.phases), decay=decay, epochs=36)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.5, "phases": "adamw:9"}, "momentum: no phase of adamw:9 with decay cos uses it"),
        ({"momentum": 0.5, "decay": "adadelta"}, "momentum: no phase of adamw:15,adadelta:3 with decay adadelta"),
        ({"momentum": 1.0}, "momentum: expected a number from 0 to below 1, got 1.0"),
        ({"momentum": -0.1}, "momentum: expected a number from 0"),
        ({"learning_rate": 0.1, "phases": "adam:9:lr=0.01"}, "learning_rate: no phase of adam:9:lr=0.01"),
        ({"lr_limit_max": 0.1, "phases": "adam:9:limits=0.01..0.1"}, "lr_limit_max: no phase"),
        ({"lr_limit_min": 1e-5, "phases": "adam:9:lr=0.01"}, "lr_limit_min: no phase"),
        ({"decay_epochs": 2, "decay": "constant"}, "decay_epochs: no phase of .* with decay constant uses it"),
        ({"min_learning_rate": 1e-5, "decay": "constant"}, "min_learning_rate: no phase of .* with decay constant"),
        ({"phases": "adam:9,sgd:3:lr=0.1", "decay": "adadelta"}, "phases: decay adadelta takes the place"),
    ],
)
def test_rates_that_nothing_uses_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change)


def rates(**changes: object) -> list[float]:
    """The learning rate at the beginning of each of twelve epochs."""
    run = module(phases="sgd:12", **changes)
    return [run.rate(epoch) for epoch in range(12)]


def test_learning_rate_settings_reach_the_steps():
    cos, step, constant = (rates(decay=decay) for decay in ("cos", "step", "adadelta"))
    assert len(set(constant[2:9])) == 1 and sorted(cos[2:], reverse=True) == cos[2:] != step[2:]
    assert step[3] / step[2] == pytest.approx(step[9] / step[8])
    assert rates(min_learning_rate=0.002)[0] == pytest.approx(5 * cos[0])
    assert len(set(rates(decay_epochs=6)[6:])) == 1 < len(set(cos[6:]))
    assert rates(learning_rate=1e-5, lr_limit_min=0.002)[2] > 10 * rates(learning_rate=1e-5)[2]


def test_learning_rates_are_fitted_to_the_batch_of_all_processes():
    config = dataclasses.replace(SMALL, lr_limit_min=1e-6)
    one, four = (SegmentationModule(config, processes=n) for n in (1, 4))
    assert four.rate(5) == pytest.approx(4 * one.rate(5))


CONFIGS = {path.stem: TrainConfig(**yaml.safe_load(path.read_text())) for path in _CONFIGS.glob("*.yaml")}


def test_shipped_configs_are_the_nine_of_table_2_and_the_text():
    optimizers = ("paper", "sgd-", "adam-", "adamw-")
    configs = {name: config for name, config in CONFIGS.items() if name.startswith(optimizers)}
    plans = {name: [phase.optimizer for phase in config.plan()] for name, config in configs.items()}
    expected = {"paper": ["adamw", "sgd"]}
    for name in ("sgd", "adam", "adamw"):
        expected |= {f"{name}-step": [name], f"{name}-cos": [name], f"{name}-adadelta": [name, "adadelta"]}
    assert plans == expected
    for name, config in configs.items():
        assert sum(phase.epochs for phase in config.plan()) == 200
        assert config.decay == ("cos" if name == "paper" else name.split("-")[1])
        assert fit_learning_rates(64, config.learning_rate, config.min_learning_rate, 1e-4, 1e-3) == (1e-3, 1e-5)


def test_the_fine_tuning_study_is_constant_adam_and_nothing_else():
    config = CONFIGS["finetune"]
    run = SegmentationModule(config)
    assert {run.rate(epoch / 4) for epoch in range(80)} == {1e-4}
    optimizer = run.optimizer(run.phases[0])
    assert type(optimizer) is torch.optim.Adam
    assert {group["weight_decay"] for group in optimizer.param_groups} == {config.clip_norm} == {0}
    assert (config.batch_size, config.image_size, config.loss, config.classes) == (10, 512, "ce", "FB")
    assert config.plan()[-1].epochs == 20


def test_sc_unext_goes_from_1e_4_to_1e_5_in_400_epochs():
    run = SegmentationModule(CONFIGS["sc-unext"])
    assert (run.rate(3), run.rate(400)) == pytest.approx((1e-4, 1e-5))
    assert (run.config.batch_size, run.config.image_size) == (8, 512)
