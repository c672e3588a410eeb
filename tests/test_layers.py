"""Layers: checkpoints of SegNeXt and mmcv load and mean the same; children that were altered; the scan block."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import famseg_kernels as fk
from benchmarks.models import AttentionModule, CARAFEPack
from famseg_kernels.ssd_scan import layer as scan_layer


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


def test_layers_run_on_meta_tensors():
    x = torch.randn(1, 4, 6, 6, device="meta")
    for layer in (fk.StripConv2d(4), fk.Mamba2Scan2d(4, 4, 4), fk.FeatureAwareUpsample(4)):
        assert layer.to("meta")(x).device.type == "meta"


# --- children of StripConv2d and StripAttention that are no plain convolutions any more ---------------------


class Adapter(nn.Module):
    """As LoRA's: in the place of a layer, whose weight it shows."""

    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, nn.Conv2d(base.in_channels, base.out_channels, 1)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.extra(x)


def one_by_one(layer, x):
    """The layer by its children, as SegNeXt has it."""
    a = x if layer.conv0 is None else layer.conv0(x)
    strips = [getattr(layer, f"conv{i}_2")(getattr(layer, f"conv{i}_1")(a)) for i in range(layer.branches)]
    return layer.conv3(sum(strips, a)) * x


ALTERED = {
    "an adapter": lambda m: setattr(m, "conv0", Adapter(m.conv0)),
    "an adapter of a strip": lambda m: setattr(m, "conv1_2", Adapter(m.conv1_2)),
    "a forward hook": lambda m: m.conv0.register_forward_hook(lambda m, args, y: 2 * y) and None,
    "a pre-hook": lambda m: m.conv2_1.register_forward_pre_hook(lambda m, args: (2 * args[0],)) and None,
    "a backward hook": lambda m: m.conv2_1.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],)) and None,
    "a backward pre-hook": lambda m: m.conv0_2.register_full_backward_pre_hook(lambda m, go: (2 * go[0],)) and None,
    "weight norm": lambda m: parametrizations.weight_norm(m.conv0) and None,
    "old weight norm": lambda m: nn.utils.weight_norm(m.conv0_1) and None,
    "spectral norm": lambda m: parametrizations.spectral_norm(m.conv1_1).eval() and None,
    "orthogonal": lambda m: parametrizations.orthogonal(m.conv1_1) and None,
    "pruning": lambda m: prune.random_unstructured(m.conv0, "weight", 0.5) and None,
    "an identity": lambda m: setattr(m, "conv0", nn.Identity()),
    "quantisation stubs": lambda m: setattr(m, "conv0", torch.ao.quantization.QuantWrapper(m.conv0)),
    "circular padding": lambda m: setattr(m.conv1_1, "padding_mode", "circular"),
    "a dilation": lambda m: setattr(m, "conv0", nn.Conv2d(4, 4, 5, padding=4, dilation=2, groups=4)),
    "a dense convolution": lambda m: setattr(m, "conv0", nn.Conv2d(4, 4, 5, padding=2)),
    "two groups": lambda m: setattr(m, "conv0_1", nn.Conv2d(4, 4, (1, 7), padding=(0, 3), groups=2)),
    "a turned strip": lambda m: setattr(m, "conv0_1", nn.Conv2d(4, 4, (7, 1), padding=(3, 0), groups=4)),
    "a square strip": lambda m: setattr(m, "conv0_1", nn.Conv2d(4, 4, 3, padding=1, groups=4)),
    "an oblong square": lambda m: setattr(m, "conv0", nn.Conv2d(4, 4, (5, 3), padding=(2, 1), groups=4)),
    "another forward": lambda m: setattr(m.conv0, "forward", lambda x: 3 * x),
    "a sequence": lambda m: setattr(m, "conv0", nn.Sequential(m.conv0, nn.GELU())),
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_children_are_called(name):
    torch.manual_seed(0)
    layer = fk.StripAttention(4)
    ALTERED[name](layer)
    layer.double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # pruning failed in the second backward
        with pytest.warns(UserWarning, match=r"StripAttention: conv\d.* (is|has) .*one by one"):
            y = layer(x)
        expected = one_by_one(layer, x)
        torch.testing.assert_close(y, expected)
        wanted = [x, *layer.parameters()]
        both = [torch.autograd.grad(out.square().sum(), wanted, allow_unused=True) for out in (y, expected)]
        torch.testing.assert_close(*both)


@pytest.mark.parametrize("name", ["an adapter", "a forward hook", "weight norm", "pruning"])
@pytest.mark.filterwarnings("ignore")
def test_altered_children_are_called_in_a_compiled_graph(name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = fk.StripAttention(4), torch.randn(2, 4, 9, 8)
    if name != "a forward hook":  # a compiled module does not see hooks that come later, ours as little as any
        torch.compile(layer, backend="eager", fullgraph=True)(x)
    ALTERED[name](layer)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


UNALTERED = {
    "nothing": lambda m: None,
    "a larger kernel": lambda m: setattr(m, "conv0", nn.Conv2d(4, 4, 7, padding=3, groups=4)),
    "same padding": lambda m: setattr(m, "conv0", nn.Conv2d(4, 4, 7, padding="same", groups=4)),
    "no bias": lambda m: setattr(m.conv1_1, "bias", None),
    "a hook on the last": lambda m: m.conv3.register_forward_hook(lambda m, args, y: 2 * y) and None,
    "an adapter of the last": lambda m: setattr(m, "conv3", Adapter(m.conv3)),
    "a hook on the state": lambda m: m.conv0.register_state_dict_post_hook(lambda *args: None) and None,
}


@pytest.mark.parametrize("name", UNALTERED)
def test_plain_children_are_fused(name):
    torch.manual_seed(0)
    layer, x = fk.StripAttention(4), torch.randn(2, 4, 9, 8)
    UNALTERED[name](layer)
    with warnings.catch_warnings(), torch.profiler.profile() as profile:
        warnings.simplefilter("error")
        y = layer(x)
    assert any("famseg::strip_conv2d" in event.name for event in profile.events())
    torch.testing.assert_close(y, one_by_one(layer, x), rtol=1e-4, atol=1e-5)


def test_hooks_on_all_modules_see_the_children():
    layer, seen = fk.StripConv2d(3, strip_kernels=(7,)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        y = layer(torch.ones(1, 3, 5, 5))
    finally:
        handle.remove()
    assert seen == [layer.conv0, layer.conv0_1, layer.conv0_2, layer]
    torch.testing.assert_close(y, layer(torch.ones(1, 3, 5, 5)))


def test_flop_counter_mode_counts_the_op():
    layer, x = fk.StripConv2d(3), torch.randn(1, 3, 6, 5)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_flop_counts()["Global"] == {torch.ops.famseg.strip_conv2d: 206 * x.numel()}


def test_a_patch_of_all_convolutions_is_honoured(monkeypatch):
    forward = nn.Conv2d.forward
    layer, x = fk.StripConv2d(3, None, (7,)), torch.randn(1, 3, 5, 5)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * forward(self, x))
    with pytest.warns(UserWarning, match="nn.Conv2d has another forward"):
        y = layer(x)
    torch.testing.assert_close(y, x + layer.conv0_2(layer.conv0_1(x)))


def test_a_removed_hook_gives_the_fused_op_back():
    layer, x = fk.StripConv2d(3), torch.randn(1, 3, 5, 5)
    handle = layer.conv0.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="conv0 has hooks"):
        layer(x)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


@pytest.mark.parametrize("options", [{"square_kernel": 4}, {"strip_kernels": (7, 65)}, {"strip_kernels": (6,)}])
def test_kernels_that_the_op_refuses_are_refused_by_the_layer(options):
    with pytest.raises(ValueError, match="kernel"):
        fk.StripConv2d(2, **options)(torch.zeros(1, 2, 8, 8))


# --- DepthwiseConv2d as nn.Conv2d ----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "bias"), [(1, True), (3, False), (5, True)])
def test_a_depthwise_convolution_is_torchs_with_another_kernel(size, bias):
    torch.manual_seed(0)
    theirs = nn.Conv2d(6, 6, size, padding=size // 2, groups=6, bias=bias)
    torch.manual_seed(0)
    ours = fk.DepthwiseConv2d(6, size, bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.weight, theirs.weight)
    x = torch.randn(2, 6, 7, 9)
    with torch.profiler.profile() as profile:
        y = ours(x)
    assert any("famseg::strip_conv2d" in event.name for event in profile.events())
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)


def altered_depthwise(change):
    """A layer after `change`, and torch's convolution after the same."""
    torch.manual_seed(0)
    ours, theirs = fk.DepthwiseConv2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=4)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        change(layer)
    return ours, theirs


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: setattr(conv, "stride", (2, 2)),
        lambda conv: setattr(conv, "padding", (0, 0)),
        lambda conv: setattr(conv, "dilation", (2, 2)),
        lambda conv: conv.register_forward_hook(lambda module, args, y: 3 * y),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: parametrizations.weight_norm(conv),
    ],
    ids=["stride", "padding", "dilation", "hook", "pruned", "weight_norm"],
)
def test_what_is_changed_on_a_depthwise_convolution_takes_effect(change):
    ours, theirs = altered_depthwise(change)
    x = torch.randn(2, 4, 7, 9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_patch_of_all_convolutions_is_honoured_by_a_depthwise_one(monkeypatch):
    ours, x = fk.DepthwiseConv2d(4), torch.randn(1, 4, 5, 5)
    y = ours(x)
    own = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *args: 2 * own(self, *args))
    torch.testing.assert_close(ours(x), 2 * y, rtol=1e-4, atol=1e-5)


def test_a_layer_reads_the_weight_of_a_depthwise_convolution_in_place_of_torch_s():
    layer, x = fk.StripConv2d(3, 5, (7,)), torch.randn(1, 3, 6, 5)
    expected, conv0 = layer(x), fk.DepthwiseConv2d(3, 5)
    conv0.load_state_dict(layer.conv0.state_dict())
    layer.conv0 = conv0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(x), expected)
    # A subclass may do anything.
    layer.conv0.__class__ = type("Other", (fk.DepthwiseConv2d,), {})
    with pytest.warns(UserWarning, match="conv0 is a .*Other"):
        layer(x)


def test_a_depthwise_convolution_refuses_an_even_size():
    with pytest.raises(ValueError, match="kernel_size: expected an odd size, got 4"):
        fk.DepthwiseConv2d(2, 4)


@pytest.mark.parametrize("name", ["conv2d", "in_proj"])
def test_hooks_on_the_children_of_a_scan_block_take_effect(name):
    layer, seen = fk.Mamba2Scan2d(4, 4, 4), []
    getattr(layer, name).register_forward_hook(lambda *args: seen.append(name))
    layer(torch.randn(1, 4, 3, 3))
    assert seen == [name]


# --- FeatureAwareUpsample as mmcv's CARAFEPack --------------------------------------------------------------


def test_the_attributes_and_methods_of_mmcv():
    layer = fk.FeatureAwareUpsample(6, 3, 3, 2, 5, 2, 7)
    assert (layer.channels, layer.scale_factor, layer.up_kernel, layer.up_group) == (6, 3, 3, 2)
    assert (layer.encoder_kernel, layer.encoder_dilation, layer.compressed_channels) == (5, 2, 7)
    nn.init.normal_(layer.content_encoder.weight)
    x = torch.randn(2, 6, 5, 4)
    mask = layer.kernel_normalizer(layer.content_encoder(layer.channel_compressor(x)))
    assert mask.shape == (2, 2 * 9, 15, 12)
    torch.testing.assert_close(mask.view(2, 2, 9, 15, 12).sum(2), torch.ones(2, 2, 15, 12))
    torch.testing.assert_close(layer.feature_reassemble(x, mask), layer(x))
    layer.init_weights()
    assert 0.0005 < layer.content_encoder.weight.std() < 0.002 and not layer.content_encoder.bias.any()


def encoder_of(layer, **changes):
    """A content encoder with the layer's sizes but for `changes`."""
    old = layer.content_encoder
    sizes = {"kernel_size": 3, "padding": 1, **changes}
    return nn.Conv2d(old.in_channels, old.out_channels, **sizes)


ENCODERS = {  # and whether the op reads its weight
    "as it is": (lambda m: m.content_encoder, True),
    "same padding": (lambda m: encoder_of(m, padding="same"), True),
    "no bias": (lambda m: encoder_of(m, bias=False), True),
    "a dilation": (lambda m: encoder_of(m, padding=2, dilation=2), True),
    "a point": (lambda m: encoder_of(m, kernel_size=1, padding=0), True),
    "circular padding": (lambda m: encoder_of(m, padding_mode="circular"), False),
    "groups": (lambda m: encoder_of(m, groups=2), False),
    "an oblong kernel": (lambda m: encoder_of(m, kernel_size=(3, 1), padding=(1, 0)), False),
    "an adapter": (lambda m: Adapter(m.content_encoder), False),
    "weight norm": (lambda m: parametrizations.weight_norm(m.content_encoder), False),
    "pruning": (lambda m: prune.random_unstructured(m.content_encoder, "weight", 0.5), False),
    "a hook": (
        lambda m: m.content_encoder.register_forward_hook(lambda m, args, y: 2 * y) and m.content_encoder,
        False,
    ),
}


def upsampled_by(layer, x):
    """The result, and whether it came from the op that reads the encoder's weight."""
    with torch.profiler.profile() as profile:
        y = layer(x)
    return y, any(event.name == "famseg::feature_aware_upsample" for event in profile.events())


@pytest.mark.parametrize("name", ENCODERS)
def test_a_plain_encoder_is_read_and_any_other_is_called(name):
    torch.manual_seed(0)
    layer, x = fk.FeatureAwareUpsample(4, compressed_channels=8), torch.randn(2, 4, 6, 5, requires_grad=True)
    layer.content_encoder, plain = ENCODERS[name][0](layer), ENCODERS[name][1]
    for parameter in layer.content_encoder.parameters():
        nn.init.normal_(parameter)
    y, fused = upsampled_by(layer, x)
    assert fused == plain
    expected = fk.reassemble(x, layer.content_encoder(layer.channel_compressor(x)))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    wanted = [x, *layer.parameters()]
    both = [torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected)]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)


def test_training_on_a_cpu_with_many_compressed_channels_keeps_the_logits():
    x = torch.randn(1, 4, 6, 5)
    for channels, recording in ((8, True), (9, False)):
        layer = fk.FeatureAwareUpsample(4, compressed_channels=channels)
        assert upsampled_by(layer, x)[1] == recording
        with torch.no_grad():
            assert upsampled_by(layer, x)[1]
        assert upsampled_by(layer.requires_grad_(False), x)[1]


def test_hooks_on_all_modules_see_the_encoder():
    layer, seen = fk.FeatureAwareUpsample(4, compressed_channels=8), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        layer(torch.ones(1, 4, 5, 5))
    finally:
        handle.remove()
    assert seen == [layer.channel_compressor, layer.content_encoder, layer]


class Sharper(fk.FeatureAwareUpsample):
    def kernel_normalizer(self, mask):
        return super().kernel_normalizer(3 * mask)


def test_other_steps_than_mmcv_s_are_taken():
    torch.manual_seed(0)
    layer, x = Sharper(4), torch.randn(1, 4, 5, 4)
    nn.init.normal_(layer.content_encoder.weight)
    steps = layer.feature_reassemble(x, layer.kernel_normalizer(layer.content_encoder(layer.channel_compressor(x))))
    torch.testing.assert_close(layer(x), steps)
    layer.feature_reassemble = lambda x, mask: mask.sum()
    torch.testing.assert_close(layer(x), torch.tensor(1.0 * 10 * 8))
    layer.content_encoder.register_forward_hook(lambda m, args, y: y.fill_(float("nan")))
    assert layer(x).isnan()


# --- what may be done to a layer ----------------------------------------------------------------------------

LAYERS = {
    "StripAttention": lambda: fk.StripAttention(4),
    "DepthwiseConv2d": lambda: fk.DepthwiseConv2d(4),
    "StripConv2d": lambda: fk.StripConv2d(4, None, (5,), bias=False),
    "FeatureAwareUpsample": lambda: fk.FeatureAwareUpsample(4),
    "Mamba2Scan2d": lambda: fk.Mamba2Scan2d(4, 4, 4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_transparent(name):
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(1, 4, 8, 9)
    expected = layer(x)
    for transformed in (
        torch.jit.trace(layer, x),
        torch.fx.symbolic_trace(layer),
        torch.export.export(layer, (x,)).module(),
        torch.export.export(layer, (x,), strict=True).module(),
    ):
        torch.testing.assert_close(transformed(x), expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in layer.named_parameters()})
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)
    batch = torch.randn(3, 1, 4, 8, 9)
    torch.testing.assert_close(torch.vmap(layer)(batch), torch.stack([layer(x) for x in batch]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_scan_block_s_A_keeps_its_digits(dtype, monkeypatch):
    layer, seen = fk.Mamba2Scan2d(8, 4, 4).to(dtype), []
    monkeypatch.setattr(scan_layer, "ssd_scan_2d", lambda x, dt, A, *rest, **options: seen.append(A) or x)
    layer(torch.randn(1, 8, 3, 3, dtype=dtype))
    expected = -layer.A_log.double().exp()
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
