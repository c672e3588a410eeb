"""FAMSeg: shapes, options, determinism, published weights, one training step."""

from __future__ import annotations

import pytest
import torch

import famseg
from famseg.models import MODELS, UNeXt, load_mscan
from famseg.models.blocks import strip_attention
from famseg.models.hamburger import LightHam, NMF2d
from famseg.models.summary import summarise
from famseg.models.unext import _shift
from famseg.training.config import ConfigError, TrainConfig

OPTIONS = [
    {},
    {"shortcut": "identity"},
    {"upsample": "bilinear"},
    {"context": "lightham"},
    {"context": "none"},
    {"fusion": False},
    {"strip_form": "independent"},
    {"strip_form": "stacked"},
    {"strip_form": "square"},
    {"fam_kernel": 3, "fam_groups": 4},
    {"context_stride": 16},
    {"context_stride": 8},
    {"context_stride": 16, "context": "none", "fusion": False},
    {"shared_bc": True, "directions": 2, "d_state": 8, "headdim": 8},
    {"num_classes": 5, "in_channels": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_gives_full_size_logits_and_has_no_idle_parameter(options):
    torch.manual_seed(0)
    model = famseg.create_model("famseg_nano", **options)
    y = model(torch.randn(2, options.get("in_channels", 1), 48, 65))
    assert y.shape == (2, options.get("num_classes", 3), 48, 65)
    y.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("form", ["independent", "stacked"])
def test_separate_strips_are_sums_over_rows_and_columns(form):
    torch.manual_seed(0)
    attention = strip_attention(6, form)
    x = torch.randn(2, 6, 23, 17)
    a = attention.conv0(x)
    across = sum(getattr(attention, f"conv{i}_1")(a) for i in range(3))
    down = sum(getattr(attention, f"conv{i}_2")(a) for i in range(3))
    views = torch.cat([a + across, a + down], 1) if form == "stacked" else a + across + down
    expected = attention.conv3(views) * x
    torch.testing.assert_close(attention(x), expected)
    seen = []
    attention.conv1_2.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(attention(x), expected)
    assert seen == [1]


def test_independent_strips_have_the_cascades_weights_and_read_published_ones():
    cascade, independent = (famseg.create_model("famseg_tiny", strip_form=f) for f in ("cascade", "independent"))
    assert {k: v.shape for k, v in cascade.state_dict().items()} == {
        k: v.shape for k, v in independent.state_dict().items()
    }
    assert load_mscan(independent, published_mscan(cascade)) == 13 * 38


def test_a_context_that_its_bases_do_not_constrain_is_said():
    assert "16 pixels, which 16 bases (context_rank) do not constrain" in summarise("famseg_nano", 128)
    assert "constrain" not in summarise("famseg_nano", 129)
    with pytest.raises(ConfigError, match=r"the context has 16 pixels at image_size 128.* at most 15"):
        TrainConfig(context_rank=16)
    assert TrainConfig(context_rank=16, context_stride=16).model_options()["context_stride"] == 16


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
        ({"strip_form": "rows"}, "strip_form: expected one of cascade, independent, stacked, square, got 'rows'"),
        ({"shared_bc": 1}, "shared_bc: expected one of True, False, got 1"),
        ({"fam_kernel": 4}, "fam_kernel: expected an odd size from 3 to 63, got 4"),
        ({"fam_kernel": 1}, "fam_kernel: expected an odd size from 3 to 63, got 1"),
        ({"fam_groups": 3}, "fam_groups: expected a divisor of 64"),
        ({"context_stride": 4}, "context_stride: expected one of 32, 16, 8, got 4"),
        ({"context_stride": 8, "fusion": False}, "fusion: a context at stride 8 has stages 2 and 3 in it"),
        ({"context_stride": 16, "context": "lightham"}, "context_stride: nothing in this network depends on it"),
        ({"fam_groups": 2, "upsample": "bilinear"}, "fam_groups: nothing in this network depends on it"),
        ({"shared_bc": True, "directions": 1}, "shared_bc: nothing in this network depends on it"),
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
