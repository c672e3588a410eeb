"""The encoder's blocks: ConvBlock and BottleMamba (FAMSeg section 3.2.2), SegNeXt's strip block (section 3.2.1)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg_kernels import DepthwiseConv2d, Mamba2Scan2d, StripAttention, StripConv2d, strip_conv2d
from famseg_kernels.children import watched
from famseg_kernels.strip_conv.layer import unfusable

Shortcut = Literal["mamba", "identity"]
StripForm = Literal["cascade", "independent", "stacked", "square"]


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off for x's device, where it is on: torch.export makes a graph of its own of every such region."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch has no autocast for meta tensors
        return nullcontext()
    return torch.autocast(device, enabled=False)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W), in x's dtype: autocast would give fp32, to be cast back."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with without_autocast(x):
            y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, weight, bias, self.eps)
            return y.permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in x's dtype, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch of whole samples with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.rate
        return x * keep / (1.0 - self.rate)


class Levels(nn.ModuleList):
    """An encoder's levels, one after the other: the maps that each of them makes."""

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for level in self:
            x = level(x)
            features.append(x)
        return features


def segnext_stem(cin: int, cout: int) -> nn.Sequential:
    """SegNeXt's beginning, to stride 4."""
    return nn.Sequential(
        nn.Conv2d(cin, cout // 2, 3, 2, 1),
        nn.BatchNorm2d(cout // 2),
        nn.GELU(),
        nn.Conv2d(cout // 2, cout, 3, 2, 1),
        nn.BatchNorm2d(cout),
    )


class ConvBNReLU(nn.Sequential):
    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
        )


def bottleneck(cin: int, cout: int, stride: int, ratio: int) -> nn.Sequential:
    """The main branch of both residual blocks: 1×1 → 3×3 (stride) → 1×1, with cout / ratio channels between."""
    hidden = max(cout // ratio, 1)
    return nn.Sequential(
        ConvBNReLU(cin, hidden, 1),
        ConvBNReLU(hidden, hidden, 3, stride),
        nn.Conv2d(hidden, cout, 1, bias=False),
        nn.BatchNorm2d(cout),
    )


class ConvBlock(nn.Module):
    """The paper's convolution block: bottleneck beside a strided 1×1 convolution, summed, ReLU."""

    def __init__(self, cin: int, cout: int, stride: int, ratio: int) -> None:
        super().__init__()
        self.main = bottleneck(cin, cout, stride, ratio)
        self.side = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.side(x))


class BottleMamba(nn.Module):
    """The paper's bottle block: a bottleneck whose shortcut is a Mamba-2 scan that filters raw noise.

    shortcut="identity" is the ablation "No mamba" (Table 3). The scan starts near the identity of its normalised input,
    so that a fresh network behaves like a residual network.
    """

    def __init__(
        self,
        channels: int,
        shortcut: Shortcut,
        d_state: int,
        headdim: int,
        directions: int,
        shared_bc: bool,
        ratio: int,
    ) -> None:
        super().__init__()
        self.main = bottleneck(channels, channels, 1, ratio)
        self.shortcut: nn.Module = nn.Identity()
        if shortcut == "mamba":
            scan = Mamba2Scan2d(channels, d_state, headdim, directions=directions, shared_bc=shared_bc)
            scan.init_identity()
            self.shortcut = nn.Sequential(LayerNorm2d(channels), scan)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


class SeparateStrips(StripAttention):
    """Strip attention whose rows and columns scan the features separately, instead of one after the other.

    With a = square(x), the row convolutions 1×K_i and the column convolutions K_i×1 both read a:

    - independent: y = conv3(a + Σ row_i(a) + Σ col_i(a)) · x. Keys, parameters and multiplications are the cascade's.
    - stacked: y = conv3([a + Σ row_i(a), a + Σ col_i(a)]) · x. The two views are concatenated, and conv3 is a 1×1
      convolution from 2C channels that mixes them.

    `strip_conv2d` computes each sum in one pass: the other convolution of a branch is 1×1 with the weight 1.
    """

    def __init__(self, channels: int, stacked: bool) -> None:
        super().__init__(channels)
        self.stacked = stacked
        self.one: Tensor
        self.register_buffer("one", torch.ones(channels, 1, 1, 1), persistent=False)
        if stacked:
            self.conv3 = nn.Conv2d(2 * channels, channels, 1)

    def maps(self, x: Tensor) -> Tensor:
        """What conv3 reads: (N, C, H, W) → (N, C, H, W), stacked (N, 2C, H, W)."""
        square = self.conv0
        assert square is not None
        rows = [getattr(self, f"conv{i}_1") for i in range(self.branches)]
        cols = [getattr(self, f"conv{i}_2") for i in range(self.branches)]
        if unfusable(square, rows, cols) or watched():  # an adapter or a hook: each has to be called
            a = square(x)
            views = [rows, cols] if self.stacked else [[*rows, *cols]]
            return torch.cat([sum((conv(a) for conv in view), a) for view in views], 1)
        ones, none = [self.one] * self.branches, [None] * self.branches
        row, row_bias = [conv.weight for conv in rows], [conv.bias for conv in rows]
        col, col_bias = [conv.weight for conv in cols], [conv.bias for conv in cols]
        if not self.stacked:
            biases = [*row_bias, *none], [*none, *col_bias]
            return strip_conv2d(x, square.weight, square.bias, [*row, *ones], biases[0], [*ones, *col], biases[1])
        a = strip_conv2d(x, square.weight, square.bias, [], None, [], None)
        across = strip_conv2d(a, None, None, row, row_bias, ones, None)
        return torch.cat([across, strip_conv2d(a, None, None, ones, None, col, col_bias)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.maps(x)) * x


def strip_attention(channels: int, form: StripForm) -> StripAttention:
    """The reading of section 3.2.1 that `form` names; "square" has the 5×5 convolution alone."""
    if form in ("independent", "stacked"):
        return SeparateStrips(channels, form == "stacked")
    return StripAttention(channels, strip_kernels=() if form == "square" else (7, 11, 21))


def strip_maps(attention: StripAttention, x: Tensor) -> Tensor:
    """What the attention's 1×1 convolution reads."""
    return attention.maps(x) if isinstance(attention, SeparateStrips) else StripConv2d.forward(attention, x)


class SpatialAttention(nn.Module):
    """SegNeXt's attention: 1×1 → GELU → strip attention → 1×1, plus the input."""

    def __init__(self, channels: int, strip_form: StripForm = "cascade") -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.spatial_gating_unit = strip_attention(channels, strip_form)
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))


class DWConv(nn.Module):
    """SegNeXt's name for the depthwise 3×3 of its MLP."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class Mlp(nn.Module):
    """SegNeXt's MLP: 1×1 → depthwise 3×3 → GELU → 1×1."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels * ratio, 1)
        self.dwconv = DWConv(channels * ratio)
        self.fc2 = nn.Conv2d(channels * ratio, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class StripBlock(nn.Module):
    """SegNeXt's MSCAN block, key for key: x + ls1·attn(bn1(x)), then x + ls2·mlp(bn2(x))."""

    def __init__(
        self, channels: int, mlp_ratio: int, drop_path: float = 0.0, strip_form: StripForm = "cascade"
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attn = SpatialAttention(channels, strip_form)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = Mlp(channels, mlp_ratio)
        self.layer_scale_1 = nn.Parameter(1e-2 * torch.ones(channels))
        self.layer_scale_2 = nn.Parameter(1e-2 * torch.ones(channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        # In x's dtype: under autocast an fp32 scale would make the rest of the stage fp32, and each block cast it back.
        scale_1, scale_2 = self.layer_scale_1.to(x.dtype), self.layer_scale_2.to(x.dtype)
        x = x + self.drop_path(scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(scale_2[:, None, None] * self.mlp(self.norm2(x)))
