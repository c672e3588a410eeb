"""A trained network as inference wants it: what only training needs is in the weights, and fewer steps touch memory.

What is folded is exact algebra, so that outputs change by rounding alone:

- a batch norm into the convolution before it, or into the 1×1 convolution behind it, which pads nothing;
- layer scales, and the weights of layer and RMS norms, into the 1×1 convolution beside them.

The rest is layout. All maps are channels_last, where a 1×1 convolution is a matrix product over pixels. Activations,
gates and sums work in place. The Mamba block's x, B, C, z and dt have a projection each, so that none has to be copied
out of another. oneDNN applies an activation while it still has the convolution's result in registers.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Self, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from famseg.memory import keeps_freed_memory
from famseg.models.blocks import BottleMamba, ConvBlock, StripBlock, strip_maps
from famseg.models.famseg import FAMSeg
from famseg.models.segnext import MLP_RATIOS, WIDTHS, SegNeXt
from famseg_kernels import DepthwiseConv2d, Mamba2Scan2d, ssd_scan_2d, strip_conv2d
from famseg_kernels.children import altered, patched
from famseg_kernels.ssd_scan.layer import NORM_EPSILON, rates
from famseg_kernels.strip_conv.layer import other_convolution

# Elements of the largest map that a CPU makes at once, where freed memory is not kept (famseg.memory): as many images
# of a batch go through a FAMSeg together. From 32 MB on malloc has the system map, and clear, new pages for each.
_LARGEST_MAP = 1 << 22


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same outputs up to rounding, in less time; `model` itself is not changed.

    Of a FAMSeg or SegNeXt everything that this module's description names is folded and rearranged; of another network
    the batch norms that follow a convolution in an nn.Sequential. A convolution that is not plain (hooks, an adapter, a
    parametrization) is left as it is, and a FAMSeg or SegNeXt with such a part is treated like another network.

    The copy records no gradients. Its `train()` raises a RuntimeError: train the model that it was made from. It runs
    on any device, in any dtype and with any backend; the time is won on a CPU in fp32.
    """
    _keep_memory()
    folded = fold_norms(model).requires_grad_(False)
    if type(model) not in (FAMSeg, SegNeXt) or patched() or not all(map(_known, model.modules())):
        return _Optimized(folded)
    # A pixel's share of the largest map: the last upsampling's result, or the hidden one of the first blocks' MLPs.
    channels = WIDTHS[0] * MLP_RATIOS[0] // 16
    if isinstance(model, FAMSeg):
        channels = max(model.config.context_channels >> 3, 8)
    rewritten = _rewritten(folded).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _Optimized(rewritten, _LARGEST_MAP // channels)


def fold_norms(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode in which each convolution has taken in the batch norm behind it in an nn.Sequential."""
    model = copy.deepcopy(model).eval()
    for sequence in filter(_is_sequence, model.modules()):
        for index, (first, second) in enumerate(itertools.pairwise(sequence)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d) and _plain(first) and _plain(second):
                sequence[index] = fuse_conv_bn_eval(first, second)
                sequence[index + 1] = nn.Identity()
    return model


def _plain(module: nn.Module) -> bool:
    """Whether what a module computes is known from its type and its tensors."""
    if isinstance(module, nn.Conv2d):
        return not altered(module)
    if isinstance(module, nn.BatchNorm2d) and (module.running_var is None or module.weight is None):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _known(module: nn.Module) -> bool:
    """Whether this file knows a part of a FAMSeg or SegNeXt."""
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    return _plain(module) and type(module).__module__.partition(".")[0] in ("famseg", "famseg_kernels", "torch")


def _is_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _keep_memory() -> None:
    """Have glibc keep the memory of maps for the next ones: clearing the system's pages anew took a tenth of the time.

    It keeps blocks up to the size of the largest one that it has mapped and been given back, which it looks at up to
    32 MB. This one is never written to, so it costs nothing.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)


class _Optimized(nn.Module):
    """What `optimize_for_inference` returns.

    Where this process gives freed memory back, a CPU takes whole images of about `pixels` pixels, if given, at a time.
    """

    def __init__(self, model: nn.Module, pixels: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.pixels = pixels
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if self.pixels is None or x.device.type != "cpu" or keeps_freed_memory():
            return self.model(x)
        together = max(self.pixels // max(x.shape[2] * x.shape[3], 1), 1)
        parts = [self.model(part) for part in x.split(together)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise RuntimeError("optimize_for_inference: its batch norms are folded; train the model it was made from")
        return super().train(False)


def _rewritten(module: nn.Module) -> nn.Module:
    """What stands for a part of a network with folded batch norms; the part itself, with other children, or new."""
    if isinstance(module, StripBlock):
        return _StripBlock(module)
    if isinstance(module, ConvBlock):
        return _Residual(_rewritten(module.main), _rewritten(module.side))
    if isinstance(module, BottleMamba):
        if isinstance(module.shortcut, nn.Sequential):
            norm, scan = module.shortcut
            assert isinstance(norm, nn.LayerNorm) and isinstance(scan, Mamba2Scan2d)
            return _Residual(_rewritten(module.main), _Scan(norm, scan))
        return _Residual(_rewritten(module.main), module.shortcut)
    if _is_sequence(module):
        return nn.Sequential(*_steps([m for m in module if not isinstance(m, nn.Identity)]))
    if isinstance(module, nn.Conv2d):
        return _convolution(module)
    for name, child in module.named_children():
        if name != "content_encoder":  # of a FeatureAwareUpsample, which reads its weight
            setattr(module, name, _rewritten(child))
    return module


def _steps(modules: list[nn.Module]) -> list[nn.Module]:
    """The modules of a sequence, with an activation inside the convolution before it."""
    steps: list[nn.Module] = []
    for before, module in zip([None, *modules], modules, strict=False):
        if isinstance(before, nn.Conv2d) and isinstance(module, nn.ReLU):
            steps[-1] = _convolution(before, "relu")
        elif isinstance(before, nn.Conv2d) and isinstance(module, nn.GELU) and module.approximate == "none":
            steps[-1] = _convolution(before, "gelu")
        else:
            steps.append(_rewritten(module))
    return steps


# --- its parts, which hand on channels_last maps (N, C, H, W), and compute on their pixels (N·H·W, C) ---


# What oneDNN calls them, how it computes them, and the same in place.
_ACTIVATIONS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "": ("none", "", lambda x: x),
    "relu": ("relu", "", torch.relu_),
    "gelu": ("gelu", "none", torch.ops.aten.gelu_),
    "silu": ("swish", "", functools.partial(F.silu, inplace=True)),
}


# Multiply–adds from which on oneDNN's preparation of a call is worth while. MKL, which torch's own product goes to, has
# half of oneDNN's rate on an AMD CPU with AVX-512, and oneDNN's with an activation needs no second pass.
_LEAST_PRODUCT = 1 << 22


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    here = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return here and plain and torch.backends.mkldnn.is_available()


class _Product(nn.Module):
    """A 1×1 convolution of pixels: (P, C) → (P, C').

    y = after(W · before(x) + b), where `before` and `after` are (scale, shift) of each channel, then the activation.
    """

    weight: Tensor  # (C', C)
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        before: tuple[Tensor, Tensor | None] | None = None,
        after: tuple[Tensor, Tensor] | None = None,
        activation: str = "",
    ) -> None:
        super().__init__()
        dtype, weight = weight.dtype, weight.flatten(1).double()
        bias = None if bias is None else bias.double()
        if before is not None:
            scale, shift = before
            if shift is not None:
                bias = weight @ shift + (0 if bias is None else bias)
            weight = weight * scale
        if after is not None:
            scale, shift = after
            bias = shift if bias is None else scale * bias + shift
            weight = scale[:, None] * weight
        self.register_buffer("weight", weight.to(dtype).contiguous())
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        name, algorithm, activate = _ACTIVATIONS[self.activation]
        if x.shape[0] * self.weight.numel() >= _LEAST_PRODUCT and _by_onednn(x, self.weight):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return activate(F.linear(x, self.weight, self.bias))


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N·H·W, C); no copy where x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """(N·H·W, C) → (N, C, H, W), channels_last, of the size of `like`."""
    n, _, h, w = like.shape
    return pixels.view(n, h, w, pixels.shape[1]).permute(0, 3, 1, 2)


class _Pointwise(nn.Module):
    """A 1×1 convolution: (N, C, H, W) → (N, C', H/stride, W/stride), channels_last."""

    def __init__(self, conv: nn.Conv2d, activation: str) -> None:
        super().__init__()
        self.product = _Product(conv.weight, conv.bias, activation=activation)
        self.stride = conv.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return _image(self.product(_pixels(x)), x)


# Elements of a map from which on a pass over it takes longer than oneDNN needs to prepare a call with an activation.
_LEAST_FUSED = 1 << 16


class _Convolution(nn.Module):
    """A convolution, or `part` of a depthwise one's channels, and an activation: in one call where oneDNN is there."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, activation: str = "", part: slice = slice(None)) -> None:
        super().__init__()
        self.register_buffer("weight", conv.weight[part])
        self.register_buffer("bias", None if conv.bias is None else conv.bias[part])
        assert not isinstance(conv.padding, str)
        self.padding, self.stride, self.dilation = conv.padding, conv.stride, conv.dilation
        self.depthwise = type(conv) is DepthwiseConv2d and not other_convolution(conv, None)
        self.groups = conv.groups if part == slice(None) else len(self.weight)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, groups = self.weight, self.bias, self.groups
        name, algorithm, activate = _ACTIVATIONS[self.activation]
        if x.numel() >= _LEAST_FUSED and _by_onednn(x, weight):
            shape = self.padding, self.stride, self.dilation, groups
            return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, name, [], algorithm)
        if self.depthwise:
            return activate(strip_conv2d(x, weight, bias, [], None, [], None))
        return activate(F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups))


def _convolution(conv: nn.Conv2d, activation: str = "") -> nn.Module:
    """oneDNN is faster than a matrix product where that would have few columns."""
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1 or conv.out_channels <= 8:
        return _Convolution(conv, activation)
    return _Pointwise(conv, activation)


class _StripBlock(nn.Module):
    """blocks.StripBlock without its two batch norms and two layer scales."""

    passed: Tensor

    def __init__(self, block: StripBlock) -> None:
        super().__init__()
        attn, mlp, dtype = block.attn, block.mlp, block.layer_scale_1.dtype
        scale_1, scale_2 = block.layer_scale_1.double(), block.layer_scale_2.double()
        norm_1, norm_2 = _affine(block.norm1), _affine(block.norm2)
        # x + scale_1 · (u + proj_2(…)) with u = norm1(x): that much of x goes by.
        self.register_buffer("passed", (1 + scale_1 * norm_1[0]).to(dtype))
        self.proj_1 = _Product(attn.proj_1.weight, attn.proj_1.bias, before=norm_1, activation="gelu")
        self.strip = attn.spatial_gating_unit
        self.conv3 = _Product(self.strip.conv3.weight, self.strip.conv3.bias)
        self.proj_2 = _Product(attn.proj_2.weight, attn.proj_2.bias, after=(scale_1, scale_1 * norm_1[1]))
        self.fc1 = _Product(mlp.fc1.weight, mlp.fc1.bias, before=norm_2)
        self.dwconv = _Convolution(mlp.dwconv.dwconv, "gelu")
        self.fc2 = _Product(mlp.fc2.weight, mlp.fc2.bias, after=(scale_2, torch.zeros_like(scale_2)))

    def forward(self, x: Tensor) -> Tensor:
        pixels = _pixels(x)
        a = self.proj_1(pixels)
        gated = self.conv3(_pixels(strip_maps(self.strip, _image(a, x)))).mul_(a)
        pixels = self.proj_2(gated).addcmul_(pixels, self.passed)
        hidden = self.dwconv(_image(self.fc1(pixels), x))
        return _image(self.fc2(_pixels(hidden)).add_(pixels), x)


class _Residual(nn.Module):
    """blocks.ConvBlock and blocks.BottleMamba: relu(main(x) + side(x))."""

    def __init__(self, main: nn.Module, side: nn.Module) -> None:
        super().__init__()
        self.main, self.side = main, side

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).add_(self.side(x)).relu_()


class _Scan(nn.Module):
    """The bottle block's LayerNorm2d and Mamba2Scan2d."""

    A: Tensor
    D: Tensor
    dt_bias: Tensor

    def __init__(self, norm: nn.LayerNorm, scan: Mamba2Scan2d) -> None:
        super().__init__()
        inner, bc = scan.d_inner, scan.bc_directions * scan.ngroups * scan.d_state
        assert scan.in_proj.bias is not None
        before = norm.weight.double(), norm.bias.double()
        widths = (inner, inner, bc, bc, scan.directions * scan.heads)
        rows = zip(scan.in_proj.weight.split(widths), scan.in_proj.bias.split(widths), strict=True)
        z, *xbc, dt = (_Product(weight, bias, before) for weight, bias in rows)
        parts = slice(0, inner), slice(inner, inner + bc), slice(inner + bc, None)
        self.z, self.xbc, self.dt = z, nn.ModuleList(xbc), dt
        self.convolutions = nn.ModuleList(_Convolution(scan.conv2d, "silu", part) for part in parts)
        self.out = _Product(scan.out_proj.weight, None, before=(scan.norm_weight.double(), None))
        self.register_buffer("A", rates(scan.A_log))
        self.register_buffer("D", scan.D.detach())
        self.register_buffer("dt_bias", scan.dt_bias.detach())
        self.epsilon, self.chunk_size = norm.eps, scan.chunk_size
        states = scan.bc_directions, scan.ngroups, scan.d_state
        self.sizes = (scan.heads, scan.headdim), states, states, (scan.directions, scan.heads)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, h, w = x.shape
        u = F.layer_norm(_pixels(x), (channels,), eps=self.epsilon)
        xbc = [
            conv(_image(project(u), x)).permute(0, 2, 3, 1)
            for project, conv in zip(self.xbc, self.convolutions, strict=True)
        ]
        inputs, B, C, dt = (t.reshape(n, h, w, *size) for t, size in zip((*xbc, self.dt(u)), self.sizes, strict=True))
        y = ssd_scan_2d(
            *(inputs, dt, self.A, B, C, self.D), dt_bias=self.dt_bias, dt_softplus=True, chunk_size=self.chunk_size
        )
        z = self.z(u)
        y = y.view(z.shape).mul_(F.silu(z, inplace=True))
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        y = y.mul_(torch.rsqrt(wide.square().mean(1, keepdim=True) + NORM_EPSILON))
        return _image(self.out(y), x)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each channel, in evaluation."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - scale * norm.running_mean.double()
