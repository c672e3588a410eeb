"""FAMSeg: shapes, options, determinism, published weights, one training step."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

import famseg
from famseg.cli.train import main
from famseg.models import MODELS, load_mscan
from famseg.models.blocks import strip_attention
from famseg.models.hamburger import LightHam, NMF2d
from famseg.models.summary import cost, summarise
from famseg.models.unext import _shift
from famseg.training.config import ConfigError, TrainConfig

OPTIONS = [
    {},
    {"shortcut": "identity"},
    {"upsample": "bilinear"},
    {"context": "lightham"},
    {"context": "none"},
    {"fusion": False},
    {"skip_stride": 4},
    {"skip_stride": 2},
    {"skip_stride": 2, "context": "lightham"},
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


# Parameters and MACs at 256 × 256 with colour and one class, as the papers count. Published are: 253,561 (UNeXt-S),
# 1,471,921 (UNeXt), 243.63 × 1024 (SC-UNeXt), 6,628,945 and 31.04 M (the fine-tuning studies).
COSTS = {
    "famseg_nano": (694_873, 584_201_216),
    "famseg_tiny": (6_919_355, 4_423_374_848),
    "famseg_small": (19_201_905, 7_910_780_928),
    "famseg_base": (36_577_793, 16_380_637_184),
    "segnext": (4_225_121, 1_562_763_264),
    "unet": (24_436_369, 7_813_988_352),
    "upernet": (37_284_673, 19_122_880_512),
    "twins": (31_861_761, 17_485_767_936),
    "swin": (36_743_099, 20_630_524_672),
    "mobilenetv3": (6_685_825, 3_063_123_840),
    "convnext": (37_043_873, 19_104_317_440),
    "unet_mobilenetv2": (6_628_945, 3_345_014_784),
    "bisenetv2": (3_340_433, 3_056_553_984),
    "unet31m": (31_037_633, 48_167_387_136),
    "resunetplusplus": (4_057_617, 15_668_876_608),
    "unext_large": (1_471_921, 562_003_968),
    "unext": (253_561, 99_229_696),
    "sc_unext_skip": (246_897, 102_264_672),
    "sc_unext_fuse": (256_145, 131_735_552),
    "sc_unext": (249_481, 134_770_528),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_size_and_cost(name):
    assert cost(name, num_classes=1, in_channels=3) == COSTS[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_in_one_step_and_evaluates(name):
    torch.manual_seed(0)
    model = famseg.create_model(name)
    x, target = torch.randn(2, 1, 64, 64), torch.randint(3, (2, 64, 64))  # smaller: batch norms over two values
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    F.cross_entropy(model(x), target).backward()
    optimizer.step()
    parts = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert parts == {"encoder", "decoder", "classifier"}
    with torch.no_grad():
        y = model.eval()(x[:1])
    assert y.shape == (1, 3, 64, 64) and torch.isfinite(y).all()
    layers = {parameter for layer in model.decoder_layers for parameter in layer.parameters()}
    assert layers and layers <= set(model.decoder.parameters())


@pytest.mark.parametrize(
    "name", ["famseg_nano", "segnext", "upernet", "twins", "swin", "bisenetv2", "unet31m", "sc_unext"]
)
@pytest.mark.parametrize("size", [(1, 1), (33, 57), (95, 27), (7, 130)])
def test_any_input_size(size, name):
    model = famseg.create_model(name).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, *size)).shape == (1, 3, *size)


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


def test_the_decoder_of_the_fine_tuning_studies_has_its_published_size():
    decoder = famseg.create_model("unet_mobilenetv2", 1, 3).decoder
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 4_404_928  # "4.4M trainable parameters"
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder.blocks]
    assert layers == [3_761_152, 479_744, 124_672, 32_384, 6_976]


def test_the_ablations_of_sc_unext_add_up():
    unext, skip, fuse, both = (
        cost(n, num_classes=1)[0] for n in ("unext", "sc_unext_skip", "sc_unext_fuse", "sc_unext")
    )
    assert both - unext == (skip - unext) + (fuse - unext)


@pytest.mark.parametrize(
    ("name", "size"),
    [("unet", (33, 40)), ("mobilenetv3", (40, 33)), ("convnext", (65, 31)), ("resunetplusplus", (5, 9))],
)
def test_three_channels_and_any_number_of_classes(name, size):
    model = famseg.create_model(name, num_classes=5, in_channels=3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).shape == (1, 5, *size)


def test_the_list_of_models_names_all_of_them_and_what_is_missing(capsys, monkeypatch):
    assert main(["--list-models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(MODELS)
    assert "249,355" in lines[-1] and lines[-1].endswith("243.63 x 1024, 0.13 GFLOPs")
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    monkeypatch.setattr("famseg.models.summary.MODELS", ("swin", "unext"))
    assert main(["--list-models"]) == 0
    assert "swin needs a package: pip install 'famseg[baselines]'" in capsys.readouterr().out


def test_a_missing_package_is_named_before_anything_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    assert main(["--model", "swin", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "famseg-train: model: swin needs a package: pip install 'famseg[baselines]'\n"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="pip install"):
        famseg.create_model("upernet")


def test_one_image_a_step_is_refused_where_a_network_pools_to_a_pixel(capsys, tmp_path):
    arguments = ["--model", "bisenetv2", "--data", "phantom:6", "--image-size", "48", "--batch-size", "1"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "batch norms of bisenetv2 one value a channel; expected 2 images or more\n" in error


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
        ({"skip_stride": 16}, "skip_stride: expected one of 8, 4, 2, got 16"),
        ({"skip_stride": 2, "fusion": False}, "fusion: without it there are no skips"),
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


@pytest.mark.parametrize("name", ["famseg_nano", "unext", "unet"])
def test_every_network_needs_a_class_and_a_channel(name):
    with pytest.raises(ValueError, match="num_classes: expected a whole number of at least 1, got 0"):
        famseg.create_model(name, 0)
    with pytest.raises(ValueError, match="in_channels: expected a whole number of at least 1, got 0"):
        famseg.create_model(name, in_channels=0)


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


def test_published_segnext_loads_whole_or_not_at_all():
    torch.manual_seed(0)
    published, model, grey = (famseg.create_model("segnext", 3, channels) for channels in (3, 3, 1))
    state = {
        f"backbone.{key.replace('dwconv.dwconv', 'dwconv')}": v for key, v in published.encoder.state_dict().items()
    }
    encoder = len(state)
    state |= {f"decode_head.{key}": value for key, value in published.decoder.head.state_dict().items()}
    state["decode_head.conv_seg.weight"] = torch.zeros(150, 256, 1, 1)
    assert load_mscan(model, state) == len(state) - 1
    published.classifier.load_state_dict(model.classifier.state_dict())
    x = torch.randn(1, 1, 40, 48)
    with torch.no_grad():
        expected = published.eval()(x.expand(1, 3, 40, 48))
        assert torch.equal(model.eval()(x.expand(1, 3, 40, 48)), expected)
        assert load_mscan(grey, {k: v for k, v in state.items() if k.startswith("backbone")}) == encoder
        features = zip(grey.eval().encoder(x), published.encoder(x.expand(1, 3, 40, 48)), strict=True)
        for ours, theirs in features:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    before = {key: value.clone() for key, value in grey.state_dict().items()}
    state["backbone.norm4.weight"] = torch.zeros(255)
    with pytest.raises(ValueError, match=r"of another shape: norm4.weight \(255,\) instead of \(256,\)"):
        load_mscan(grey, {key: value + 1 for key, value in state.items()})
    assert all(torch.equal(value, before[key]) for key, value in grey.state_dict().items())


@pytest.mark.parametrize("layout", [{}, {"dwconv": "dwconv", "prefix": "backbone."}], ids=["segnext", "mmseg"])
def test_published_mscan_blocks_load(layout):
    model = famseg.create_model("famseg_tiny")
    assert load_mscan(model, published_mscan(model, **layout)) == 13 * 38
    *_, block, _ = model.encoder.stages[3]  # a norm is last
    assert torch.all(block.mlp.dwconv.dwconv.weight == 0.01 * 5)
    assert torch.all(block.attn.spatial_gating_unit.conv2_1.weight == 0.01 * 5)
    with pytest.raises(ValueError, match=r"of another shape: block1.0.*; not of this network: block1.2"):
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
