"""fk.accelerate swaps what it has shown to compute the same, in place; the rest stays and is in the report."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import famseg_kernels as fk
from benchmarks import models
from benchmarks.models import SS2D, AttentionModule, CARAFEPack
from famseg_kernels.reassembly.layer import Carafe


class MSCAAttention(nn.Module):
    """mmseg's: kernel sizes and paddings are given."""

    def __init__(self, channels, kernel_sizes=(5, (1, 7), (1, 11), (1, 21)), paddings=(2, (0, 3), (0, 5), (0, 10))):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_sizes[0], padding=paddings[0], groups=channels)
        for i, (size, padding) in enumerate(zip(kernel_sizes[1:], paddings[1:], strict=True)):
            for j, turn in ((1, 1), (2, -1)):
                conv = nn.Conv2d(channels, channels, size[::turn], padding=padding[::turn], groups=channels)
                self.add_module(f"conv{i}_{j}", conv)
        self.conv3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        u = x.clone()
        attn = self.conv0(x)
        attn_0 = self.conv0_2(self.conv0_1(attn))
        attn_1 = self.conv1_2(self.conv1_1(attn))
        attn_2 = self.conv2_2(self.conv2_1(attn))
        return self.conv3(attn + attn_0 + attn_1 + attn_2) * u


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), AttentionModule(4))
        self.up = CARAFEPack(4, 2, compressed_channels=8)

    def forward(self, x):
        return self.up(self.encoder(x))


def test_what_is_known_is_swapped_in_place_and_the_rest_of_the_model_is_not_touched():
    torch.manual_seed(0)
    model = Model().eval()
    model.up.content_encoder.weight.requires_grad_(False)
    x = torch.randn(1, 1, 9, 8)
    before, parameters = model(x), list(model.parameters())
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = fk.accelerate(model)
    assert report.swapped == {
        "encoder.1": "AttentionModule → StripAttention",
        "up": "CARAFEPack → FeatureAwareUpsample",
    }
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model.encoder[1]) is fk.StripAttention and type(model.up) is fk.FeatureAwareUpsample
    assert not any(module.training for module in model.modules())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert not model.up.content_encoder.weight.requires_grad and model.encoder[1].conv0.weight.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert "encoder.1" in str(report)
    again = fk.accelerate(model)
    assert not again.swapped and not again.left


def test_a_model_that_is_itself_such_a_module():
    model = AttentionModule(4)
    report = fk.accelerate(model)
    assert report.swapped == {"": "AttentionModule → StripAttention"} and "the model" in str(report)
    assert type(model) is fk.StripAttention
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        fk.accelerate([model])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = nn.ModuleList([AttentionModule(3), CARAFEPack(4, 2, compressed_channels=8), SS2D(8, 4)]).to(dtype)
    report = fk.accelerate(model)
    assert not report.left and len(report.swapped) == 3
    assert model[2].forward_core(torch.randn(1, 3, 4, 16, dtype=dtype)).dtype == dtype


def test_fp64_is_not_computed_by_way_of_fp32(monkeypatch):
    torch.manual_seed(0)
    plain = SS2D(8, 4).double()
    nn.init.normal_(plain.A_logs)
    fast = copy.deepcopy(plain)
    assert fk.accelerate(fast).swapped
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)

    def scan(x, dt, A, B, C, D, z, dt_bias, *_):  # the peer's own works in fp32
        return fk.ssd_scan(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)

    monkeypatch.setattr(models, "scan_matmul", scan)
    torch.testing.assert_close(fast.forward_core(x), plain.forward_core(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "sizes",
    [
        ((3, (1, 5), (1, 9), (1, 15)), (1, (0, 2), (0, 4), (0, 7))),
        ((7, (1, 3), (1, 3), (1, 31)), (3, (0, 1), (0, 1), (0, 15))),
        ((1, (1, 63), (1, 1), (1, 21)), (0, (0, 31), (0, 0), (0, 10))),
    ],
)
def test_mmseg_s_kernel_sizes(sizes):
    torch.manual_seed(0)
    model, x = nn.Sequential(MSCAAttention(4, *sizes)), torch.randn(2, 4, 17, 14)
    before = model(x)
    assert fk.accelerate(model).swapped == {"0": "MSCAAttention → StripAttention"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (((5, (1, 7), (1, 11), (1, 65)), (2, (0, 3), (0, 5), (0, 32))), "63"),
        (((5, (7, 1), (11, 1), (21, 1)), (2, (3, 0), (5, 0), (10, 0))), "conv0_1 has kernel size"),
        (((5, (1, 7), (1, 11), (1, 21)), (2, (0, 4), (0, 5), (0, 10))), "conv0_1 has padding"),
        (((5, (1, 7), (1, 11), (1, 21), (1, 3)), (2, (0, 3), (0, 5), (0, 10), (0, 1))), "output"),
        (((4, (1, 7), (1, 11), (1, 21)), (2, (0, 3), (0, 5), (0, 10))), "cannot be compared"),
    ],
)
def test_kernel_sizes_that_are_not_the_op_s_are_left(sizes, reason):
    report = fk.accelerate(nn.Sequential(MSCAAttention(4, *sizes)))
    assert not report.swapped and reason in report.left["0"], report.left


def test_dropped_biases_same_padding_and_tied_weights():
    torch.manual_seed(0)
    model = nn.Sequential(AttentionModule(4))
    for name in ("conv0", "conv1_1", "conv2_2", "conv3"):
        model[0].get_submodule(name).bias = None
    model[0].conv0 = nn.Conv2d(4, 4, 5, padding="same", groups=4)
    model[0].conv1_2.weight = nn.Parameter(torch.randn(4, 1, 11, 1))
    model[0].conv2_1 = model[0].conv0_1
    x = torch.randn(2, 4, 12, 9)
    before = model(x)
    assert fk.accelerate(model).swapped
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert model[0].conv2_1 is model[0].conv0_1


def test_a_shared_module_is_swapped_at_all_its_places():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = AttentionModule(4)
            self.b = nn.Sequential(self.a)
            self.plain = [self.a]
            object.__setattr__(self, "alias", self.a)

    model = Shared()
    assert fk.accelerate(model).swapped.keys() == {"a", "b.0"}
    assert all(type(m) is fk.StripAttention for m in (model.a, model.b[0], model.plain[0], model.alias))


# --- look-alikes ------------------------------------------------------------------------------------------


def attention(**members):
    """An instance of another class of that name."""
    module = AttentionModule(4)
    module.__class__ = type("AttentionModule", (nn.Module,), {"forward": AttentionModule.forward, **members})
    return module


def with_child(name, child):
    module = AttentionModule(4)
    module.add_module(name, child)
    return module


def after(change, make=lambda: AttentionModule(4)):
    module = make()
    change(module)
    return module


def forward_of(formula):
    def forward(self, x):
        a = self.conv0(x)
        a = a + sum(getattr(self, f"conv{i}_2")(getattr(self, f"conv{i}_1")(a)) for i in range(3))
        return formula(self, a, x)

    return forward


def counting(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return AttentionModule.forward(self, x)


def tempered(self, x):
    return AttentionModule.forward(self, x) * self.temperature


def pack():
    return CARAFEPack(4, 2, compressed_channels=8)


def carafe_like(**members):
    module = pack()
    module.__class__ = type("CARAFEPack", (nn.Module,), {"forward": CARAFEPack.forward, **members})
    return module


circular = nn.Conv2d(4, 4, 5, padding=2, groups=4, padding_mode="circular")
LOOK_ALIKES = {
    "circular padding": (with_child("conv0", circular), "padding mode"),
    "a stride": (with_child("conv0", nn.Conv2d(4, 4, 5, padding=2, groups=4, stride=2)), "stride"),
    "a dilation": (with_child("conv0_1", nn.Conv2d(4, 4, (1, 7), padding=(0, 6), groups=4, dilation=2)), "conv0_1"),
    "dense": (with_child("conv0", nn.Conv2d(4, 4, 5, padding=2)), "depthwise"),
    "no padding": (with_child("conv0", nn.Conv2d(4, 4, 5, groups=4)), "padding"),
    "a GELU": (with_child("act", nn.GELU()), "act"),
    "a Dropout": (with_child("drop", nn.Dropout(0.1)), "drop"),
    "a norm without weights": (with_child("norm", nn.InstanceNorm2d(4)), "norm"),
    "a conv in a Sequential": (with_child("conv0", nn.Sequential(AttentionModule(4).conv0)), "conv0"),
    "an Identity": (with_child("conv1_1", nn.Identity()), "conv1_1"),
    "a missing child": (with_child("conv3", None), "conv3"),
    "a hook on a child": (after(lambda m: m.conv0.register_forward_hook(lambda *a: None)), "conv0 has hooks"),
    "a pre-hook on a child": (after(lambda m: m.conv3.register_forward_pre_hook(lambda *a: None)), "conv3 has hooks"),
    "a backward hook on a child": (after(lambda m: m.conv2_2.register_full_backward_hook(lambda *a: None)), "hooks"),
    "a backward pre-hook": (after(lambda m: m.conv2_2.register_full_backward_pre_hook(lambda *a: None)), "hooks"),
    "weight norm": (after(lambda m: parametrizations.weight_norm(m.conv0)), "Parametrized"),
    "old weight norm": (after(lambda m: nn.utils.weight_norm(m.conv0)), "hooks"),
    "spectral norm": (after(lambda m: nn.utils.spectral_norm(m.conv0_2)), "hooks"),
    "pruning": (after(lambda m: prune.l1_unstructured(m.conv0, "weight", 0.5)), "hooks"),
    "a buffer": (after(lambda m: m.register_buffer("scale", torch.ones(1), persistent=False)), "buffer"),
    "a buffer in a child": (after(lambda m: m.conv0.register_buffer("scale", torch.ones(1))), "buffer"),
    "a parameter": (after(lambda m: m.register_parameter("gamma", nn.Parameter(torch.ones(1)))), "gamma"),
    "another forward on the instance": (after(lambda m: setattr(m, "forward", lambda x: x)), "forward"),
    "a bound forward": (after(lambda m: setattr(m, "forward", types.MethodType(counting, m))), "forward"),
    "another forward of a child": (after(lambda m: setattr(m.conv0, "forward", lambda x: x)), "conv0"),
    "another _conv_forward": (after(lambda m: setattr(m.conv0, "_conv_forward", lambda *a: a[0])), "conv0"),
    "a class with another forward": (attention(forward=lambda self, x: self.conv3(self.conv0(x)) * x), "output"),
    "no gate": (attention(forward=forward_of(lambda self, a, x: self.conv3(a))), "output"),
    "a residual": (attention(forward=forward_of(lambda self, a, x: self.conv3(a) * x + x)), "output"),
    "1e-3 too much": (attention(forward=forward_of(lambda self, a, x: self.conv3(a) * x + 1e-3)), "output"),
    "a GELU in forward": (attention(forward=forward_of(lambda self, a, x: self.conv3(F.gelu(a)) * x)), "output"),
    "only in training": (
        attention(forward=forward_of(lambda self, a, x: self.conv3(a) * (x * 2 if self.training else x))),
        "output in training",
    ),
    "only in evaluation": (
        attention(forward=forward_of(lambda self, a, x: self.conv3(a) * (x if self.training else x * 2))),
        "output in evaluation",
    ),
    "dropout in forward": (
        attention(forward=forward_of(lambda self, a, x: F.dropout(self.conv3(a), 0.1, self.training) * x)),
        "output in training",
    ),
    "a detached gate": (attention(forward=forward_of(lambda self, a, x: self.conv3(a) * x.detach())), "gradient"),
    "no gradient": (attention(forward=torch.no_grad()(AttentionModule.forward)), "grad"),
    "another dtype": (attention(forward=forward_of(lambda self, a, x: (self.conv3(a) * x).double())), "float64"),
    "two results": (attention(forward=forward_of(lambda self, a, x: (self.conv3(a) * x, a))), "cannot be compared"),
    "two inputs": (attention(forward=lambda self, x, mask: x), "forward takes"),
    "an optional input": (attention(forward=lambda self, x, mask=None: AttentionModule.forward(self, x)), "mask"),
    "it raises": (attention(forward=lambda self, x: 1 / 0), "ZeroDivisionError"),
    "it counts": (attention(forward=counting), "calls"),
    "its own train()": (attention(train=lambda self, mode=True: self), "train"),
    "its own loading": (attention(_load_from_state_dict=lambda self, *a: None), "_load_from_state_dict"),
    "an attribute read in forward": (
        after(lambda m: setattr(m, "temperature", 1.0), lambda: attention(forward=tempered)),
        "temperature",
    ),
    "a subclass": (type("Mine", (AttentionModule,), {})(4), "derived from AttentionModule"),
    "it cannot be copied": (after(lambda m: setattr(m, "lock", __import__("threading").Lock())), "copied"),
    "meta": (AttentionModule(4).to("meta"), "meta"),
    "wrong scale": (after(lambda m: setattr(m, "scale_factor", 4), pack), "cannot be compared"),
    "no attribute": (after(lambda m: delattr(m, "up_group"), pack), "up_group"),
    "hook in the encoder": (
        after(lambda m: m.content_encoder.register_forward_hook(lambda *a: None), pack),
        "content_encoder has hooks",
    ),
    "a sharper softmax": (
        carafe_like(forward=lambda self, x: CARAFEPack.forward(self, x) * 1.001),
        "output",
    ),
    "another CARAFE": (type("CARAFE", (nn.Module,), {"forward": lambda self, x: x})(), "kernel_size"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_is_left_and_reported(name):
    module, reason = LOOK_ALIKES[name]
    before = dict(vars(module)), type(module), module.training
    model = nn.ModuleDict({"it": module})
    report = fk.accelerate(model)
    assert not report.swapped and report.left.keys() == {"it"}
    assert reason in report.left["it"], report.left["it"]
    assert model["it"] is module and (dict(vars(module)), type(module), module.training) == before


def test_hooks_of_a_swapped_module_stay():
    torch.manual_seed(0)
    model = nn.Sequential(AttentionModule(4))
    seen = []
    module = model[0]
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    first = module.register_forward_hook(lambda m, args, kwargs, y: seen.append("forward"), with_kwargs=True)
    module.register_forward_hook(lambda m, args, y: y * 2)
    module.register_full_backward_hook(lambda *args: seen.append("backward"))
    module.register_state_dict_post_hook(lambda m, state, prefix, _: seen.append("state"))
    module.register_load_state_dict_pre_hook(lambda m, *args: seen.append(type(m).__name__))
    module.conv0.register_state_dict_post_hook(lambda m, state, prefix, _: seen.append("state of a child"))
    x = torch.randn(1, 4, 6, 5, requires_grad=True)
    before = model(x)
    seen.clear()
    assert fk.accelerate(model).swapped and not seen, "hooks are not called by the comparison"
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    once = ["pre", "forward"]
    assert seen == [*once, *once, "backward", "state of a child", "state", "StripAttention"]
    first.remove()
    seen.clear()
    model(x)
    assert seen == ["pre"]


def test_other_settings_of_the_caller_are_not_touched():
    model = nn.Sequential(AttentionModule(3))
    torch.set_float32_matmul_precision("high")
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert fk.accelerate(model).swapped
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- operators without code for the device ----------------------------------------------------------------------


def no_kernel(*args):
    raise NotImplementedError("carafe: no implementation for device cpu\nmore lines")


class CARAFE(nn.Module):
    """mmcv's, without its CUDA operator."""

    def __init__(self, kernel_size, group_size, scale_factor):
        super().__init__()
        self.kernel_size, self.group_size, self.scale_factor = kernel_size, group_size, scale_factor

    def forward(self, features, masks):
        return no_kernel(features, masks, self.kernel_size, self.group_size, self.scale_factor)


def mmcv_pack(sharper=1.0):
    def feature_reassemble(self, x, mask):
        return no_kernel(x, mask, self.up_kernel, self.up_group, self.scale_factor)

    def forward(self, x):
        mask = self.content_encoder(self.channel_compressor(x)) * sharper
        return self.feature_reassemble(x, self.kernel_normalizer(mask))

    methods = {"kernel_normalizer": fk.FeatureAwareUpsample.kernel_normalizer, "feature_reassemble": feature_reassemble}
    return carafe_like(forward=forward, **methods)


def test_mmcv_without_its_operator(monkeypatch):
    pack, wrong, alone = mmcv_pack(), mmcv_pack(1.01), CARAFE(3, 2, 2)
    model = nn.ModuleDict({"pack": pack, "alone": alone})
    left = fk.accelerate(model).left
    assert "no implementation for device cpu" in left["pack"] and "more lines" not in left["pack"]
    assert "no implementation" in left["alone"]

    mmcv = types.SimpleNamespace(CARAFEPack=type(pack), CARAFE=CARAFE)
    monkeypatch.setitem(sys.modules, "mmcv.ops.carafe", mmcv)
    swapped = fk.accelerate(model).swapped
    assert "our carafe in the place of mmcv's" in swapped["pack"] and "no implementation" in swapped["pack"]
    assert "not compared" in swapped["alone"]
    assert type(alone) is Carafe
    features, masks = torch.randn(1, 4, 5, 4), torch.rand(1, 18, 10, 8)
    assert torch.equal(alone(features, masks), fk.carafe(features, masks, 3, 2, 2))
    assert pack(torch.randn(1, 4, 5, 4)).shape == (1, 4, 10, 8)

    mmcv.CARAFEPack = type(wrong)
    assert "differs" in fk.accelerate(nn.Sequential(wrong)).left["0"], "the rest of the module is compared"


def test_vmamba_without_its_kernel():
    class Kernel(SS2D):
        def forward_corem0(self, x, dstate, selective_scan_backend=None):
            if selective_scan_backend != "torch":
                raise RuntimeError("0 active drivers")
            return super().forward_corem0(x, dstate)

    Kernel.__name__ = "SS2D"
    model = nn.Sequential(Kernel(8, 4))
    assert "in PyTorch, as its kernel does not run here: RuntimeError: 0 active" in fk.accelerate(model).swapped["0"]


# --- wrapped models ---------------------------------------------------------------------------------------------


def test_torchscript_is_refused_by_name():
    traced = torch.jit.trace(Model().eval(), torch.randn(1, 1, 6, 5))
    report = fk.accelerate(traced)
    assert not report.swapped and report.left.keys() == {"encoder.1", "up"}
    assert all("TorchScript" in reason for reason in report.left.values())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_runs_what_it_became(in_place):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Model().eval(), torch.randn(1, 1, 9, 8)
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    before = compiled(x)
    assert len(fk.accelerate(compiled).swapped) == 2
    torch.testing.assert_close(compiled(x), before, rtol=1e-4, atol=1e-5)
    with torch.profiler.profile() as profile:
        compiled(x)
    assert any("strip_conv2d" in event.name for event in profile.events())


def test_a_ddp_model(tmp_path):
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, x = Model(), torch.randn(1, 1, 9, 8)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(x).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        assert fk.accelerate(wrapped).swapped.keys() == {"module.encoder.1", "module.up"}
        model.zero_grad()
        wrapped(x).square().sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)
    finally:
        torch.distributed.destroy_process_group()


def test_a_swapped_model_is_saved_whole(tmp_path):
    model, x = Model(), torch.randn(1, 1, 9, 8)
    fk.accelerate(model)
    torch.save(model.encoder[1], tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(again(model.encoder[0](x)), model.encoder(x))
