"""UNeXt (arXiv 2203.04967) and SC-UNeXt, which adds attentive skips and pyramid fusion to it.

SC-UNeXt's paper gives no code, and its Eq. 2 and its parts' widths can be read in several ways. Read here:

- Base: UNeXt-S; the published parameter counts (247.6 K and 243.6 K) are of that size.
- Skip (section 3.3, Eq. 2): z_i = f((up(x_{i+1}) + up(z_{i+1})) · x_i + up(z_{i+1})), with x of the encoder and z of
  the decoder, each brought to x_i's width; f is batch norm, ReLU and CBAM (section 3.2). Features are multiplied
  instead of concatenated.
- Pyramid fusion (section 3.4): deconvolutions bring all decoder levels to the size of the first one; their sum is
  classified. Depthwise, behind a 1×1 convolution, or they would double the network.
- The joint loss is `ce+dice+edge` (famseg.training.loss).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg_kernels import DepthwiseConv2d

WIDTHS = (8, 16, 32, 64, 128)  # UNeXt-S
SHIFTS = (2, 1, 0, -1, -2)  # pixels by which five groups of channels are moved


class UNeXt(nn.Module):
    """(N, 1, H, W) → logits (N, num_classes, H, W), for any H, W ≥ 1.

    Three levels of convolutions, two of tokenised MLPs, and the way back; the convolutions' names and UNeXt's widths
    give UNeXt-S its published 253 561 parameters (three channels in, one out).

    Args:
        num_classes: output classes.
        skip: SC-UNeXt's skips (else: addition).
        fuse: SC-UNeXt's pyramid fusion (else: the last level alone is classified).
        in_channels: of the image.
    """

    def __init__(self, num_classes: int = 3, skip: bool = False, fuse: bool = False, in_channels: int = 1) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels)
        self.decoder = Decoder(skip, fuse)
        self.classifier = nn.Conv2d(WIDTHS[0], num_classes, 1)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.decoder.steps

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(_resize(self.decoder(self.encoder(x)), x.shape[2:])))


class Encoder(nn.ModuleList):
    """Features at strides 2, 4, 8, 16, 32."""

    def __init__(self, in_channels: int) -> None:
        c1, c2, c3, c4, c5 = WIDTHS
        convolutions = [_down(in_channels, c1), _down(c1, c2), _down(c2, c3)]
        super().__init__([*convolutions, TokenStage(c3, c4), TokenStage(c4, c5)])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for level in self:
            x = level(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """From the deepest level to stride 2."""

    def __init__(self, skip: bool, fuse: bool) -> None:
        super().__init__()
        widths = WIDTHS[::-1]
        self.steps = nn.ModuleList(
            # UNeXt mixes tokens once more behind the two deepest sums.
            UpStep(low, high, skip, mix=i < 2)
            for i, (low, high) in enumerate(itertools.pairwise(widths))
        )
        scales = enumerate(WIDTHS[1:4], 1) if fuse else ()
        self.pyramid = nn.ModuleList(Deconvolution(width, WIDTHS[0], 2**i) for i, width in scales)
        self.last = nn.Conv2d(WIDTHS[0], WIDTHS[0], 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        *sides, x = features
        deeper = [*features[1:]]
        levels = []
        for step in self.steps:
            x = step(x, sides.pop(), deeper.pop())
            levels.append(x)
        for level, up in zip(levels[-2::-1], self.pyramid, strict=False):  # no pyramid: nothing is added
            x = x + up(level, x.shape[2:])
        return self.last(x)


class UpStep(nn.Module):
    """z_{i+1} → z_i: convolve, upsample twofold, join with x_i."""

    def __init__(self, low: int, high: int, skip: bool, mix: bool) -> None:
        super().__init__()
        self.conv = _conv_norm(low, high)
        self.skip = AttentiveSkip(low, high) if skip else None
        self.mix = TokenMLP(high) if mix else nn.Identity()

    def forward(self, z: Tensor, side: Tensor, deeper: Tensor) -> Tensor:
        z = F.relu(_resize(self.conv(z), side.shape[2:]))
        return self.mix(z + side if self.skip is None else self.skip(z, side, deeper))


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
    """Eq. 2: what the deeper levels say decides what of x_i passes."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(low, high, 1)
        self.norm = nn.BatchNorm2d(high)
        self.attention = CBAM(high)

    def forward(self, z: Tensor, side: Tensor, deeper: Tensor) -> Tensor:
        deeper = _resize(self.project(deeper), side.shape[2:])
        return self.attention(F.relu(self.norm((deeper + z) * side + z)))


class CBAM(nn.Module):
    """Convolutional block attention (arXiv 1807.06521; Eq. 1): first channels, then pixels."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(channels // reduction, 2)
        self.channel = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.pixel = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.channel(x.mean((2, 3))) + self.channel(x.amax((2, 3)))
        x = x * weight.sigmoid()[:, :, None, None]
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.pixel(pooled).sigmoid()


class Deconvolution(nn.Module):
    """A decoder level at the first one's width and size."""

    def __init__(self, cin: int, cout: int, scale: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(cin, cout, 1)
        self.up = nn.ConvTranspose2d(cout, cout, scale, scale, groups=cout)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.up(self.project(x))[:, :, : size[0], : size[1]]
