"""ResUNet++ (arXiv 1911.07067): residual units with squeeze and excitation, atrous pyramids, attentive upward steps."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg.models.blocks import Levels
from famseg.models.padded import PaddedNetwork

WIDTHS = (16, 32, 64, 128, 256)  # of the stem, three residual units, and the bridge


class ResUNetPlusPlus(PaddedNetwork):
    """(N, in_channels, H, W) → logits (N, num_classes, H, W), for any H, W ≥ 1."""

    stride = 8

    def __init__(self, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels)
        self.decoder = Decoder()
        self.classifier = nn.Conv2d(WIDTHS[0], num_classes, 1)


class Encoder(Levels):
    """Features at strides 1, 2, 4, 8."""

    def __init__(self, in_channels: int) -> None:
        units = [
            nn.Sequential(Residual(*pair, stride=2), Excitation(pair[1])) for pair in itertools.pairwise(WIDTHS[:4])
        ]
        super().__init__([nn.Sequential(Residual(in_channels, WIDTHS[0], stem=True), Excitation(WIDTHS[0])), *units])


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bridge = AtrousPyramid(WIDTHS[3], WIDTHS[4])
        lows, outs = WIDTHS[:1:-1], WIDTHS[3:0:-1]
        self.layers = nn.ModuleList(UpStep(*widths) for widths in zip(lows, WIDTHS[2::-1], outs, strict=True))
        self.pyramid = AtrousPyramid(WIDTHS[1], WIDTHS[0])

    def forward(self, features: list[Tensor]) -> Tensor:
        *sides, x = features
        x = self.bridge(x)
        for layer in self.layers:
            x = layer(x, sides.pop())
        return self.pyramid(x)


def _act_conv(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    """Batch norm and ReLU before the convolution."""
    return nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, cout, 3, stride, 1))


class Residual(nn.Module):
    """Two convolutions beside a 1×1 one; the stem's first reads the image as it is."""

    def __init__(self, cin: int, cout: int, stride: int = 1, stem: bool = False) -> None:
        super().__init__()
        first = nn.Conv2d(cin, cout, 3, stride, 1) if stem else _act_conv(cin, cout, stride)
        self.main = nn.Sequential(first, _act_conv(cout, cout))
        self.side = nn.Sequential(nn.Conv2d(cin, cout, 1, stride), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.side(x)


class Excitation(nn.Module):
    """Squeeze and excitation: each channel weighted by what all channels' means say."""

    def __init__(self, channels: int, ratio: int = 8) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.Linear(channels, channels // ratio, bias=False),
            nn.ReLU(),
            nn.Linear(channels // ratio, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x.mean((2, 3)))[:, :, None, None]


class AtrousPyramid(nn.Module):
    """3×3 convolutions of dilation 6, 12, 18 and 1, each with its batch norm, summed; 1×1."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(cin, cout, 3, padding=by, dilation=by), nn.BatchNorm2d(cout))
            for by in (6, 12, 18, 1)
        )
        self.project = nn.Conv2d(cout, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.stack([branch(x) for branch in self.branches]).sum(0))


class UpStep(nn.Module):
    """The deeper map, weighted by what the encoder's level says, upsampled, joined with that level, convolved."""

    def __init__(self, low: int, side: int, cout: int) -> None:
        super().__init__()
        self.gate_side = nn.Sequential(_act_conv(side, low), nn.MaxPool2d(2))
        self.gate_low = _act_conv(low, low)
        self.gate = _act_conv(low, low)
        self.conv = Residual(low + side, cout)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        x = x * self.gate(self.gate_side(side) + self.gate_low(x))
        return self.conv(torch.cat([F.interpolate(x, scale_factor=2.0), side], 1))
