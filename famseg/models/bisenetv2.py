"""BiSeNetV2 (arXiv 2004.02147): a wide shallow branch for detail, a narrow deep one for meaning, and their aggregation.

The paper's booster heads, which training alone has, are left out: the training loop has one loss, of one map of logits,
for all networks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg.models.blocks import ConvBNReLU
from famseg.models.padded import PaddedNetwork

WIDTH = 128  # of both branches' last maps


class BiSeNetV2(PaddedNetwork):
    """(N, in_channels, H, W) → logits (N, num_classes, H, W), for any H, W ≥ 1."""

    def __init__(self, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels)
        self.decoder = Decoder()
        self.classifier = nn.Conv2d(Decoder.HIDDEN, num_classes, 1)


class Encoder(nn.Module):
    """(detail at stride 8, semantics at stride 32), both of WIDTH channels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.detail = nn.Sequential(
            *(ConvBNReLU(in_channels, 64, 3, 2), ConvBNReLU(64, 64, 3)),
            *(ConvBNReLU(64, 64, 3, 2), ConvBNReLU(64, 64, 3), ConvBNReLU(64, 64, 3)),
            *(ConvBNReLU(64, 128, 3, 2), ConvBNReLU(128, 128, 3), ConvBNReLU(128, WIDTH, 3)),
        )
        self.semantic = nn.Sequential(
            Stem(in_channels, 16),
            *(GatherExpansion(16, 32, 2), GatherExpansion(32, 32)),
            *(GatherExpansion(32, 64, 2), GatherExpansion(64, 64)),
            *(GatherExpansion(64, WIDTH, 2), *(GatherExpansion(WIDTH, WIDTH) for _ in range(3))),
            ContextEmbedding(WIDTH),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.detail(x), self.semantic(x)


class Decoder(nn.Module):
    """Aggregation at stride 8, and the wide convolution before the classifier."""

    HIDDEN = 1024

    def __init__(self) -> None:
        super().__init__()
        head = nn.Sequential(ConvBNReLU(WIDTH, self.HIDDEN, 3), nn.Dropout(0.1))
        self.layers = nn.ModuleList([Aggregation(WIDTH), head])

    def forward(self, branches: tuple[Tensor, Tensor]) -> Tensor:
        aggregate, head = self.layers
        return head(aggregate(*branches))


def _conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm, linear."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout))


class Stem(nn.Module):
    """To stride 4 by convolutions and by pooling, side by side."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.first = ConvBNReLU(in_channels, channels, 3, 2)
        self.convolved = nn.Sequential(
            ConvBNReLU(channels, channels // 2, 1), ConvBNReLU(channels // 2, channels, 3, 2)
        )
        self.pooled = nn.MaxPool2d(3, 2, 1)
        self.fuse = ConvBNReLU(2 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.fuse(torch.cat([self.convolved(x), self.pooled(x)], 1))


class GatherExpansion(nn.Module):
    """3×3 convolution, depthwise 3×3 to six times the channels, 1×1 back; a second depthwise one where it strides."""

    def __init__(self, cin: int, cout: int, stride: int = 1, expansion: int = 6) -> None:
        super().__init__()
        hidden = cin * expansion
        self.main = nn.Sequential(ConvBNReLU(cin, cin, 3), _conv(cin, hidden, 3, stride, groups=cin))
        if stride != 1:
            self.main.append(_conv(hidden, hidden, 3, groups=hidden))
        self.main.append(nn.ReLU(inplace=True))
        self.main.append(_conv(hidden, cout, 1))
        self.side: nn.Module = nn.Identity()
        if stride != 1:
            self.side = nn.Sequential(_conv(cin, cin, 3, stride, groups=cin), _conv(cin, cout, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.side(x))


class ContextEmbedding(nn.Module):
    """The image's mean, added to every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.project = ConvBNReLU(channels, channels, 1)
        self.conv = ConvBNReLU(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + self.project(self.norm(x.mean((2, 3), keepdim=True))))


class Aggregation(nn.Module):
    """Bilateral guided aggregation: each branch weighted by the other one's sigmoid, at both of their sizes."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def separable() -> nn.Sequential:
            return nn.Sequential(_conv(channels, channels, 3, groups=channels), nn.Conv2d(channels, channels, 1))

        self.detail = separable()
        self.detail_down = nn.Sequential(_conv(channels, channels, 3, 2), nn.AvgPool2d(3, 2, 1))
        self.semantic = separable()
        self.semantic_up = _conv(channels, channels, 3)
        self.conv = _conv(channels, channels, 3)

    def forward(self, detail: Tensor, semantic: Tensor) -> Tensor:
        size = detail.shape[2:]

        def up(x: Tensor) -> Tensor:
            return F.interpolate(x, size, mode="bilinear", align_corners=False)

        fine = self.detail(detail) * up(self.semantic_up(semantic)).sigmoid()
        coarse = self.detail_down(detail) * self.semantic(semantic).sigmoid()
        return self.conv(fine + up(coarse))
