"""Layers: checkpoints of SegNeXt and mmcv load and mean the same; accelerate; the scan block."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import famseg_kernels as fk
from benchmarks.models import AttentionModule, CARAFEPack, VMambaStage


@pytest.mark.parametrize("size", [(95, 27), (8, 8), (3, 5)])
def test_segnext_attention_loads_and_agrees(size):
    torch.manual_seed(0)
    theirs, ours = AttentionModule(6), fk.StripAttention(6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, *size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"up_group": 2, "up_kernel": 3}, {"scale_factor": 3, "encoder_dilation": 2}])
def test_mmcv_carafe_pack_loads_and_agrees(options):
    torch.manual_seed(0)
    options = {"scale_factor": 2, "compressed_channels": 8, **options}
    theirs, ours = CARAFEPack(4, **options), fk.FeatureAwareUpsample(4, **options)
    nn.init.normal_(theirs.content_encoder.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_fresh_upsampler_averages_the_window():
    y = fk.FeatureAwareUpsample(4)(torch.ones(1, 4, 8, 8))
    torch.testing.assert_close(y[..., 6:10, 6:10], torch.ones(1, 4, 4, 4))


def test_strip_layer_without_square_or_bias():
    layer = fk.StripConv2d(3, square_kernel=None, strip_kernels=(5,), bias=False)
    assert set(layer.state_dict()) == {"conv0_1.weight", "conv0_2.weight"}
    assert layer(torch.randn(1, 3, 4, 4)).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("shared_bc", [False, True])
def test_scan_block_trains(directions, shared_bc):
    torch.manual_seed(0)
    layer = fk.Mamba2Scan2d(8, d_state=4, headdim=4, directions=directions, shared_bc=shared_bc)
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_scan_block_starts_near_the_identity():
    torch.manual_seed(0)
    layer = fk.Mamba2Scan2d(32, d_state=16, headdim=16)
    layer.init_identity()
    x = F.layer_norm(torch.randn(2, 9, 9, 32), (32,)).permute(0, 3, 1, 2)
    with torch.no_grad():
        y = layer(x)
    assert (y - x).norm() / x.norm() < 0.25


@pytest.mark.parametrize(("options", "message"), [({"headdim": 5}, "headdim"), ({"directions": 3}, "directions")])
def test_scan_block_names_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        fk.Mamba2Scan2d(8, **{"headdim": 4, **options})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), AttentionModule(4))
        self.up = CARAFEPack(4, 2, compressed_channels=8)

    def forward(self, x):
        return self.up(self.encoder(x))


def test_accelerate_swaps_in_place_and_keeps_parameters_and_results():
    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(1, 1, 9, 8)
    before, parameters = model(x), list(model.parameters())
    report = fk.accelerate(model)
    assert report.swapped == {
        "encoder.1": "AttentionModule → StripAttention",
        "up": "CARAFEPack → FeatureAwareUpsample",
    }
    assert isinstance(model.encoder[1], fk.StripAttention) and not model.up.training
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert "encoder.1" in str(report)
    assert not fk.accelerate(model).swapped


def test_accelerate_knows_vmamba_s_mamba_2_scan():
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


def test_accelerate_leaves_other_scans_of_vmamba():
    model = VMambaStage(16, headdim=8)
    scans = [block["op"] for block in model.blocks]
    scans[0].forward_core = scans[0].forward  # as Mamba-1's forms, under another name
    scans[1].initial_state = torch.zeros(1)
    report = fk.accelerate(model)
    assert not report.swapped
    assert "m0" in report.left["blocks.0.op"] and "state" in report.left["blocks.1.op"]


def test_accelerate_leaves_what_it_does_not_know():
    model = Model()
    model.encoder[1].conv1_1 = nn.Conv2d(4, 4, (1, 9), padding=(0, 4), groups=4)
    model.up.register_forward_hook(lambda *args: None)
    report = fk.accelerate(model)
    assert not report.swapped
    assert "conv1_1.weight" in report.left["encoder.1"] and "hooks" in report.left["up"]
    with pytest.raises(ValueError, match="Sequential"):
        fk.accelerate(AttentionModule(4))


def test_layers_run_on_meta_tensors():
    x = torch.randn(1, 4, 6, 6, device="meta")
    for layer in (fk.StripConv2d(4), fk.Mamba2Scan2d(4, 4, 4), fk.FeatureAwareUpsample(4)):
        assert layer.to("meta")(x).device.type == "meta"
