"""`optimize_for_inference` gives a copy with the same outputs; what it cannot know it leaves as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from famseg import FAMSeg, FAMSegConfig, create_model, optimize_for_inference
from famseg.models import MODELS, optimize
from famseg.models.smp import NETWORKS

SMALL = {"context_channels": 64, "widths": (8, 16, 24, 32), "d_state": 4, "headdim": 8, "mlp_ratios": (2, 3, 2, 2)}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "identity": {"shortcut": "identity"},
    "bilinear": {"upsample": "bilinear"},
    "lightham": {"context": "lightham"},
    "no context": {"context": "none"},
    "no fusion": {"fusion": False},
    "fusion to stride 4": {"skip_stride": 4},
    "fusion to stride 2": {"skip_stride": 2},
    "one direction": {"directions": 1},
    "two directions": {"directions": 2},
    "independent strips": {"strip_form": "independent"},
    "stacked strips": {"strip_form": "stacked"},
    "square alone": {"strip_form": "square"},
    "FAM kernel, groups": {"fam_kernel": 3, "fam_groups": 2},
    "context stride": {"context_stride": 16},
    "shared B, C": {"shared_bc": True},
    "no stage norm": {"stage_norm": False},
    "no strips": {"strips": (0, 0, 0, 0), "bottles": (2, 1, 1, 1)},
    "no bottles": {"bottles": (0, 0, 0, 0), "strips": (1, 2, 1, 1)},
    "odd widths": {"widths": (2, 6, 10, 14), "headdim": 2, "context_channels": 9},
    "classes, channels": {"num_classes": 11, "in_channels": 3},
    "rank, drop path": {"context_rank": 3, "drop_path": 0.5},
}


def trained(model: nn.Module, channels: int = 1) -> nn.Module:
    """The model with every weight of a norm, bias and scale at random, and the running statistics that follow."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "layer_scale" in name:
                parameter.uniform_(0.05, 0.2)  # more, and the attentions of famseg_base go out of range
            elif parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, channels, 96, 96))
    return model.eval()


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest logit."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def agree(model: nn.Module, x: Tensor, least: float = 1e-4) -> nn.Module:
    optimized = optimize_for_inference(model)
    assert error(optimized(x), model(x)) < least
    return optimized


@pytest.mark.parametrize("name", MODELS)
def test_every_network_gives_the_same_logits(name: str) -> None:
    if name in NETWORKS:
        pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    agree(trained(create_model(name)), torch.randn(2, 1, 64, 96))


@pytest.mark.parametrize("least", [0, 1 << 60], ids=["onednn", "torch"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_option_gives_the_same_logits(
    options: dict[str, Any], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products and convolutions go to oneDNN from some size on."""
    monkeypatch.setattr(optimize, "_LEAST_PRODUCT", least)
    monkeypatch.setattr(optimize, "_LEAST_FUSED", least)
    torch.manual_seed(0)
    config = FAMSegConfig(**(SMALL | options))
    model = trained(FAMSeg(config), config.in_channels)
    for layout in (torch.contiguous_format, torch.channels_last):
        for size in ((1, 33), (45, 70)):
            agree(model, torch.randn(2, config.in_channels, *size).to(memory_format=layout))


def test_in_fp64_the_algebra_is_exact() -> None:
    agree(trained(FAMSeg(FAMSegConfig(**SMALL))).double(), torch.randn(1, 1, 40, 56, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("name", ["famseg_nano", "sc_unext"])
def test_no_batch_norm_is_left_that_could_be_folded(name: str) -> None:
    left = [m for m in optimize_for_inference(create_model(name)).modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_onednn_and_in_bf16_it_loses_no_more_than_the_network_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.manual_seed(0)
    model = trained(FAMSeg(FAMSegConfig(**SMALL)))
    x = torch.randn(1, 1, 48, 48)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        own = error(model.to(dtype)(x.to(dtype)).double(), truth)
        assert error(optimize_for_inference(model)(x.to(dtype)).double(), truth) < 2 * own + 1e-5


def test_autocast_loses_no_more_than_the_network_does() -> None:
    torch.manual_seed(0)
    model = trained(FAMSeg(FAMSegConfig(**SMALL)))
    x = torch.randn(1, 1, 48, 48)
    with torch.no_grad():
        truth = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            own = error(model(x).float(), truth)
            assert error(optimize_for_inference(model)(x).float(), truth) < 2 * own


def test_the_model_is_not_changed() -> None:
    model = trained(FAMSeg(FAMSegConfig(**SMALL))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimized = optimize_for_inference(model)
    optimized(torch.randn(1, 1, 40, 40))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert not own & {t.data_ptr() for t in (*optimized.parameters(), *optimized.buffers())}


def test_it_records_no_gradients_and_refuses_training() -> None:
    optimized = optimize_for_inference(trained(FAMSeg(FAMSegConfig(**SMALL))))
    x = torch.randn(1, 1, 32, 32, requires_grad=True)
    assert not optimized(x).requires_grad
    assert not optimized.eval().training
    with pytest.raises(RuntimeError, match="train the model it was made from"):
        optimized.train()


@pytest.mark.parametrize(("kept", "calls"), [(False, [2, 2, 1]), (True, [5])])
def test_a_large_batch_is_that_of_its_images(kept: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = optimize_for_inference(trained(FAMSeg(FAMSegConfig(**SMALL))).double())
    x = torch.randn(5, 1, 64, 64, dtype=torch.float64)
    alone = torch.cat([optimized(image) for image in x.split(1)])
    optimized.pixels = 2 * 64 * 64
    monkeypatch.setattr(optimize, "keeps_freed_memory", lambda: kept)
    sizes: list[int] = []
    optimized.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert error(optimized(x), alone) < 1e-12
    assert sizes == calls
    assert optimized(x[:0]).shape == (0, 3, 64, 64)


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize("name", ["encoder.stem.0", "encoder.stages.0.2.mlp.dwconv.dwconv", "decoder.steps.0.conv.0"])
@pytest.mark.parametrize("change", ["hook", "subclass", "parametrization", "circular"])
def test_what_is_no_plain_convolution_goes_on_as_it_is(name: str, change: str) -> None:
    model = trained(FAMSeg(FAMSegConfig(**SMALL)))
    conv = model.get_submodule(name)
    if change == "hook":
        conv.register_forward_hook(double_output)
    elif change == "subclass":
        conv.__class__ = Halved
    elif change == "circular":
        conv.padding_mode = "circular"
        conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    else:
        torch.nn.utils.parametrizations.weight_norm(conv)
    agree(model, torch.randn(1, 1, 32, 32))


def test_another_activation_stays() -> None:
    model = trained(FAMSeg(FAMSegConfig(**SMALL)))
    model.encoder.stem[2] = nn.GELU("tanh")
    model.decoder.steps[0].conv[2] = nn.SiLU()
    agree(model, torch.randn(1, 1, 48, 48))


class Reversed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(self):
            x = module(x)
        return x


def test_a_sequence_in_another_order_is_not_folded() -> None:
    agree(trained(Reversed(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(1))), torch.randn(1, 1, 32, 32))
