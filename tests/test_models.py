"""FAMSeg: shapes, options, determinism, published weights, one training step."""

from __future__ import annotations

import pytest
import torch

import famseg
from famseg.models import MODELS, UNeXt, load_mscan
from famseg.models.hamburger import LightHam, NMF2d
from famseg.models.summary import summarise
from famseg.models.unext import _shift

OPTIONS = [
    {},
    {"shortcut": "identity"},
    {"upsample": "bilinear"},
    {"context": "lightham"},
    {"context": "none"},
    {"fusion": False},
    {"num_classes": 5, "in_channels": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_gives_full_size_logits(options):
    model = famseg.create_model("famseg_nano", **options).eval()
    with torch.no_grad():
        y = model(torch.randn(1, options.get("in_channels", 1), 48, 64))
    assert y.shape == (1, options.get("num_classes", 3), 48, 64)


@pytest.mark.parametrize("name", ["famseg_nano", "unet_mobilenetv2", "sc_unext"])
@pytest.mark.parametrize("size", [(1, 1), (33, 57), (95, 27), (64, 31), (7, 130)])
def test_any_input_size(size, name):
    model = famseg.create_model(name).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_built_and_runs(name):
    model = famseg.create_model(name).eval()
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 1, 32, 32))).all()


def test_same_input_same_output_also_from_another_instance():
    torch.manual_seed(0)
    model = famseg.create_model("famseg_nano").eval()
    x = torch.randn(2, 1, 40, 40)
    again = famseg.create_model("famseg_nano").eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("name", ["famseg_nano", "unet_mobilenetv2", "sc_unext"])
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = famseg.create_model(name)
    model(torch.randn(2, 1, 64, 64)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_sizes_are_the_published_ones():
    def parameters(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert parameters(UNeXt(1, in_channels=3)) == 253_561  # UNeXt-S
    unet = famseg.create_model("unet_mobilenetv2", 1)
    assert parameters(unet.decoder) == 4_404_928  # "4.4M trainable parameters"
    assert parameters(famseg.create_model("sc_unext")) < 1.1 * parameters(famseg.create_model("unext"))


def test_unext_shifts_five_groups_of_channels():
    tokens = torch.arange(7.0).view(1, 7, 1, 1).expand(1, 7, 3, 10)
    moved = _shift(tokens, 1)[0, 3, 0]
    torch.testing.assert_close(moved, torch.tensor([5.0, 5, 4, 4, 3, 3, 2, 2, 1, 1]))
    assert _shift(tokens, 1)[0, 6, 0, 0] == 0  # beyond the border
    torch.testing.assert_close(_shift(tokens.transpose(1, 2), 2), _shift(tokens, 1).transpose(1, 2))


def test_wrong_names_are_refused():
    for arguments, message in (
        (("famseg_huge",), "model: expected one of famseg_nano"),
        (("famseg_nano", 3), None),
    ):
        if message:
            with pytest.raises(ValueError, match=message):
                famseg.create_model(*arguments)
    with pytest.raises(ValueError, match="shortcut: expected one of mamba, identity, got 'none'"):
        famseg.create_model("famseg_nano", shortcut="none")
    with pytest.raises(ValueError, match="model option: expected one of"):
        famseg.create_model("famseg_nano", depth=3)
    with pytest.raises(ValueError, match="model option: unext has none, got fusion"):
        famseg.create_model("unext", fusion=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected a whole number of at least 1, got 0"),
        ({"in_channels": True}, "in_channels: expected a whole number"),
        ({"widths": (16, 32, 48)}, "widths: expected four numbers"),
        ({"widths": (1, 32, 48, 64)}, "widths: expected a whole number of at least 2, got 1"),
        ({"strips": (1, -1, 2, 1)}, "strips: expected a whole number of at least 0, got -1"),
        ({"bottles": 3}, "bottles: expected four numbers"),
        ({"mlp_ratios": (4, 4, 0.5, 4)}, "mlp_ratios: expected a whole number of at least 1, got 0.5"),
        ({"context_channels": 48}, "context_channels: expected a multiple of 32"),
        ({"context_rank": 0}, "context_rank: expected a whole number"),
        ({"headdim": 7}, "headdim: expected a divisor of 32"),
        ({"d_state": 0}, "d_state: expected a whole number"),
        ({"directions": 3}, "directions: expected one of 1, 2, 4, got 3"),
        ({"drop_path": 1.5}, "drop_path: expected a number from 0 to below 1, got 1.5"),
        ({"drop_path": float("nan")}, "drop_path: expected a number"),
        ({"fusion": "false"}, "fusion: expected one of True, False, got 'false'"),
        ({"context": "lightham", "fusion": False}, "fusion: lightham fuses"),
        ({"context": "none", "context_rank": 4}, "context_rank: nothing in this network depends on it"),
        ({"shortcut": "identity", "d_state": 8}, "d_state: nothing in this network depends on it"),
        ({"bottles": (0, 0, 0, 0), "shortcut": "identity"}, "shortcut: nothing in this network depends on it"),
        ({"strips": (0, 0, 0, 0), "drop_path": 0.2}, "drop_path: nothing in this network depends on it"),
    ],
)
def test_options_that_make_no_network_or_no_difference_are_refused_before_anything_is_built(
    options, message, monkeypatch
):
    monkeypatch.setattr("famseg.models.create_famseg", None)
    with pytest.raises(ValueError, match=message):
        famseg.create_model("famseg_nano", **options)


@pytest.mark.parametrize("name", ["unext", "unet_mobilenetv2"])
def test_every_network_needs_a_class(name):
    with pytest.raises(ValueError, match="num_classes: expected a whole number of at least 1, got 0"):
        famseg.create_model(name, 0)


def published_mscan(model, *, dwconv="dwconv.dwconv", prefix=""):
    """A checkpoint with the keys of SegNeXt (or, with dwconv="dwconv", of mmseg) for the model's strip blocks."""
    checkpoint = {f"{prefix}patch_embed1.proj.0.weight": torch.zeros(1)}
    for i, stage in enumerate(model.encoder.stages, 1):
        blocks = [b for b in stage if type(b).__name__ == "StripBlock"]
        for j, block in enumerate(blocks):
            for key, value in block.state_dict().items():
                name = f"{prefix}block{i}.{j}.{key.replace('dwconv.dwconv', dwconv)}"
                checkpoint[name] = torch.full_like(value, 0.01 * (i + j))
    return checkpoint


@pytest.mark.parametrize("layout", [{}, {"dwconv": "dwconv", "prefix": "backbone."}], ids=["segnext", "mmseg"])
def test_published_mscan_blocks_load(layout):
    model = famseg.create_model("famseg_tiny")
    assert load_mscan(model, published_mscan(model, **layout)) == 13 * 38
    block = model.encoder.stages[3][-1]
    assert torch.all(block.mlp.dwconv.dwconv.weight == 0.01 * 5)
    assert torch.all(block.attn.spatial_gating_unit.conv2_1.weight == 0.01 * 5)
    with pytest.raises(ValueError, match=r"block1.0.*expected shape"):
        load_mscan(famseg.create_model("famseg_small"), published_mscan(model))


def test_lightham_has_the_keys_of_segnexts_head():
    keys = set(LightHam((8, 8, 8), 16).state_dict())
    assert keys == {
        "squeeze.conv.weight", "squeeze.gn.weight", "squeeze.gn.bias",
        "hamburger.ham_in.conv.weight", "hamburger.ham_in.conv.bias",
        "hamburger.ham_out.conv.weight", "hamburger.ham_out.gn.weight", "hamburger.ham_out.gn.bias",
        "align.conv.weight", "align.gn.weight", "align.gn.bias",
    }  # fmt: skip


def test_factorisation_reconstructs_a_low_rank_map():
    torch.manual_seed(0)
    x = (torch.rand(1, 12, 2) @ torch.rand(1, 2, 30)).view(1, 12, 5, 6)
    y = NMF2d(12, 8).eval()(x)
    assert (y - x).norm() / x.norm() < 0.1


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    model = famseg.create_model("famseg_nano").eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


def test_bf16_autocast_stays_close():
    torch.manual_seed(0)
    model = famseg.create_model("famseg_nano").eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        y = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
    assert (y - z.float()).norm() / y.norm() < 0.1


def test_summary_counts_parameters_and_flops():
    text = summarise("famseg_nano", 64)
    assert f"{sum(p.numel() for p in famseg.create_model('famseg_nano').parameters()):,}" in text
