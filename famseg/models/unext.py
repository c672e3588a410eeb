"""UNeXt (arXiv 2203.04967) and SC-UNeXt, which adds attentive skips and pyramid fusion to it.

SC-UNeXt's paper gives no code, and its Eq. 2 and its parts' widths can be read in several ways. This reading has its
published size: 243.63 × 1024 parameters and 0.13 G multiply–adds at 256 × 256. Here they are 249,481 and 0.135 G. In
the same units UNeXt-S has its own published size, 247.62 × 1024 and 0.10 G.

- Base: UNeXt-S.
- Skip (section 3.3, Eq. 2): z ← f(z · x + z), where x is the encoder's level behind CBAM (section 3.2), z the upsampled
  decoder level, and f a 1×1 convolution, or nothing at stride 16. Features are multiplied instead of concatenated. It
  stands for the tokenised MLP that UNeXt has behind the deepest sum.
- Pyramid fusion (section 3.4): twofold deconvolutions, 32 → 16 → 8 channels, bring the decoder's levels to the size of
  the first one, where they are added. The last convolution runs at full size.
- The joint loss is `ce+dice+edge` (famseg.training.loss).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg.models.blocks import Levels
from famseg_kernels import DepthwiseConv2d

WIDTHS = (8, 16, 32, 64, 128)  # UNeXt-S
LARGE_WIDTHS = (16, 32, 128, 160, 256)  # UNeXt
SHIFTS = (2, 1, 0, -1, -2)  # pixels by which five groups of channels are moved


class UNeXt(nn.Module):
    """(N, in_channels, H, W) → logits (N, num_classes, H, W), for any H, W ≥ 1.

    Three levels of convolutions, two of tokenised MLPs, and the way back. With three channels and one class UNeXt-S has
    its published 253,561 parameters and UNeXt its 1,471,921.

    Args:
        num_classes: output classes.
        in_channels: of the image.
        skip: SC-UNeXt's skips (else: addition).
        fuse: SC-UNeXt's pyramid fusion (else: the last level alone is classified).
        widths: channels of the five levels.
    """

    def __init__(
        self,
        num_classes: int = 3,
        in_channels: int = 1,
        skip: bool = False,
        fuse: bool = False,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, widths)
        self.decoder = Decoder(widths, skip, fuse)
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.decoder.steps

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        return self.classifier(F.relu(_resize(self.decoder(self.encoder(x), size), size)))


class Encoder(Levels):
    """Features at strides 2, 4, 8, 16, 32."""

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        c1, c2, c3, c4, c5 = widths
        convolutions = [_down(in_channels, c1), _down(c1, c2), _down(c2, c3)]
        super().__init__([*convolutions, TokenStage(c3, c4), TokenStage(c4, c5)])


class Decoder(nn.Module):
    """From the deepest level to stride 2, with pyramid fusion to full size."""

    def __init__(self, widths: Sequence[int], skip: bool, fuse: bool) -> None:
        super().__init__()
        # UNeXt mixes tokens once more behind the two deepest sums.
        self.steps = nn.ModuleList(
            UpStep(low, high, i, skip, mix=i == 1 or (i == 0 and not skip))
            for i, (low, high) in enumerate(itertools.pairwise(widths[::-1]))
        )
        levels = itertools.pairwise(widths[2::-1]) if fuse else ()
        self.pyramid = nn.ModuleList(nn.ConvTranspose2d(low, high, 2, 2) for low, high in levels)
        self.last = nn.Conv2d(widths[0], widths[0], 3, padding=1)

    def forward(self, features: list[Tensor], size: torch.Size) -> Tensor:
        *sides, x = features
        levels = []
        for step in self.steps:
            x = step(x, sides.pop())
            levels.append(x)
        if not self.pyramid:
            return self.last(x)
        x = levels[1]
        for up, finer in zip(self.pyramid, levels[2:], strict=True):
            x = finer + up(x)[:, :, : finer.shape[2], : finer.shape[3]]
        return self.last(_resize(x, size))


class UpStep(nn.Module):
    """Convolve, upsample twofold, join with the encoder's level; `place` counts from the deepest one."""

    def __init__(self, low: int, high: int, place: int, skip: bool, mix: bool) -> None:
        super().__init__()
        self.conv = _conv_norm(low, high)
        self.skip = AttentiveSkip(high, project=place > 0) if skip else None
        self.mix = TokenMLP(high) if mix else nn.Identity()

    def forward(self, z: Tensor, side: Tensor) -> Tensor:
        z = F.relu(_resize(self.conv(z), side.shape[2:]))
        return self.mix(z + side if self.skip is None else self.skip(z, side))


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _conv_norm(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout))


def _down(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(cin, cout), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU())


class TokenStage(nn.Module):
    """Overlapping patches of stride 2, a shifted MLP, layer norm."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(cin, cout, 3, 2, 1)
        self.norm1 = nn.LayerNorm(cout)
        self.mlp = TokenMLP(cout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.embed(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.mlp(x)


class TokenMLP(nn.Module):
    """UNeXt's tokenised MLP with its residual: shift along columns, mix, 3×3 depthwise, shift along rows, mix; norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.dwconv = DepthwiseConv2d(channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm2(x.permute(0, 2, 3, 1))
        tokens = self.fc1(_shift(tokens, 1)).permute(0, 3, 1, 2)
        tokens = F.gelu(self.dwconv(tokens)).permute(0, 2, 3, 1)
        tokens = self.fc2(_shift(tokens, 2))
        return self.norm(x.permute(0, 2, 3, 1) + tokens).permute(0, 3, 1, 2)


def _shift(tokens: Tensor, axis: int) -> Tensor:
    """(N, H, W, C): groups of channels moved along the axis, zeros coming in."""
    size = tokens.shape[axis]
    padded = F.pad(tokens, (0, 0, 2, 2) if axis == 2 else (0, 0, 0, 0, 2, 2))
    groups = padded.chunk(len(SHIFTS), -1)
    return torch.cat([group.narrow(axis, 2 + by, size) for by, group in zip(SHIFTS, groups, strict=False)], -1)


class AttentiveSkip(nn.Module):
    """Eq. 2: the encoder's level x, where attention finds it worth it, scales the decoder's: z ← f(z · x + z)."""

    def __init__(self, channels: int, project: bool) -> None:
        super().__init__()
        self.attention = CBAM(channels)
        self.project = nn.Conv2d(channels, channels, 1, bias=False) if project else nn.Identity()

    def forward(self, z: Tensor, side: Tensor) -> Tensor:
        return self.project(z * self.attention(side) + z)


class CBAM(nn.Module):
    """Convolutional block attention (arXiv 1807.06521; Eq. 1): first channels, then pixels."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        squeeze = nn.Linear(channels, hidden)
        with torch.no_grad():
            # Levels are not negative: of few hidden units, one with negative weights may never fire, and never learn.
            squeeze.weight.abs_()
        self.channel = nn.Sequential(squeeze, nn.ReLU(), nn.Linear(hidden, channels))
        self.pixel = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.channel(x.mean((2, 3))) + self.channel(x.amax((2, 3)))
        x = x * weight.sigmoid()[:, :, None, None]
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.pixel(pooled).sigmoid()
