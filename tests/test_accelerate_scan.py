"""fk.accelerate of VMamba's scan blocks: SS2D with the Mamba-2 core."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from torch import nn

import famseg_kernels as fk
from benchmarks.models import SS2D, VMambaStage
from tests.test_accelerate import after


def test_vmamba_s_mamba_2_scan():
    torch.manual_seed(0)
    model = VMambaStage(16, headdim=8)
    for block in model.blocks:  # directions and heads that differ, so that a wrong order shows
        for parameter in (block["op"].Ds, block["op"].A_logs, block["op"].dt_projs_bias):
            nn.init.normal_(parameter)
    x = torch.randn(2, 16, 7, 5)
    before, parameters = model(x), list(model.parameters())
    before.square().sum().backward()
    expected = [parameter.grad for parameter in parameters]
    model.zero_grad()
    report = fk.accelerate(model)
    assert report.swapped == {f"blocks.{i}.op": "SS2D.forward_core → ssd_scan_2d" for i in range(2)}
    for again in (model, copy.deepcopy(model)):
        y = again(x)
        torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        for parameter, gradient in zip(again.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
        model.zero_grad()
    assert not fk.accelerate(model).swapped


def core_of(function):
    """An SS2D with another forward_corem0, of the published name."""
    module = SS2D(8, 4)
    module.forward_core = types.MethodType(function, module)
    return module


def doubled(self, x):
    return 2 * self.forward_corem0(x, 4)


def plain(self, x):
    return self.forward_corem0(x, 4)


def stateful(self, x):
    self.seen = x
    return self.forward_corem0(x, 4)


for function in (doubled, plain, stateful):
    function.__name__ = "forward_corem0"

SCANS = {
    "another form": (after(lambda m: setattr(m, "forward_core", m.forward), lambda: SS2D(8, 4)), "m0"),
    "no core": (after(lambda m: delattr(m, "forward_core"), lambda: SS2D(8, 4)), "m0"),
    "a state": (after(lambda m: setattr(m, "initial_state", torch.zeros(1)), lambda: SS2D(8, 4)), "state"),
    "a bias": (after(lambda m: setattr(m, "x_proj_bias", torch.zeros(4, 10)), lambda: SS2D(8, 4)), "bias"),
    "another order": (
        after(
            lambda m: setattr(m, "forward_core", functools.partial(m.forward_core, scan_mode="bidi")),
            lambda: SS2D(8, 4),
        ),
        "bidi",
    ),
    "another result": (core_of(doubled), "output"),
    "something kept": (core_of(stateful), "changes its own seen"),
    "two directions": (after(lambda m: setattr(m, "Ds", nn.Parameter(m.Ds[:2])), lambda: SS2D(8, 4)), "directions"),
    "dropout in its norm": (
        after(lambda m: setattr(m, "out_norm", nn.Sequential(m.out_norm, nn.Dropout(0.5))), lambda: SS2D(8, 4)),
        "output in training",
    ),
    "another's core": (
        after(lambda m: setattr(m, "forward_core", SS2D(8, 4).forward_core), lambda: SS2D(8, 4)),
        "output",
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_other_scans_of_vmamba_are_left(name):
    module, reason = SCANS[name]
    core = getattr(module, "forward_core", None)
    report = fk.accelerate(nn.Sequential(module))
    assert not report.swapped and reason in report.left["0"], report.left
    assert getattr(module, "forward_core", None) is core


def test_a_core_that_was_replaced_by_an_equal_one_is_swapped():
    assert fk.accelerate(nn.Sequential(core_of(plain))).swapped


def test_hooks_in_a_scan_block_stay():
    module, seen = SS2D(8, 4), []
    module.out_norm.register_forward_hook(lambda *args: seen.append(1))
    assert fk.accelerate(module).swapped and not seen
    module(torch.randn(1, 3, 4, 8))
    assert seen == [1]
