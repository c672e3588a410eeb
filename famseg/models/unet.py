"""The plain U-Net (arXiv 1505.04597), with batch norms and "same" convolutions: the fine-tuning studies' baseline."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from famseg.models.blocks import ConvBNReLU, Levels
from famseg.models.padded import PaddedNetwork

WIDTHS = (64, 128, 256, 512, 1024)


class UNet(PaddedNetwork):
    """(N, in_channels, H, W) → logits (N, num_classes, H, W), for any H, W ≥ 1."""

    stride = 16

    def __init__(self, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels)
        self.decoder = Decoder()
        self.classifier = nn.Conv2d(WIDTHS[0], num_classes, 1)


def _double(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(ConvBNReLU(cin, cout, 3), ConvBNReLU(cout, cout, 3))


class Encoder(Levels):
    """Features at strides 1, 2, 4, 8, 16."""

    def __init__(self, in_channels: int) -> None:
        deeper = (nn.Sequential(nn.MaxPool2d(2), _double(*pair)) for pair in itertools.pairwise(WIDTHS))
        super().__init__([_double(in_channels, WIDTHS[0]), *deeper])


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(UpStep(*pair) for pair in itertools.pairwise(WIDTHS[::-1]))

    def forward(self, features: list[Tensor]) -> Tensor:
        *sides, x = features
        for layer in self.layers:
            x = layer(x, sides.pop())
        return x


class UpStep(nn.Module):
    """Transposed convolution, concatenation with the encoder's level, two convolutions."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(low, high, 2, 2)
        self.conv = _double(low, high)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        return self.conv(torch.cat([side, self.up(x)], 1))
