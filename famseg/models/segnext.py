"""SegNeXt-T (arXiv 2209.08575), FAMSeg's point of departure: its MSCAN encoder and LightHam head, key for key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from famseg.models.blocks import LayerNorm2d, StripBlock, segnext_stem
from famseg.models.hamburger import LightHam
from famseg.models.padded import PaddedNetwork
from famseg_kernels import StripConv2d
from famseg_kernels.strip_conv.layer import init_convolutions

WIDTHS = (32, 64, 160, 256)
DEPTHS = (3, 3, 5, 2)
MLP_RATIOS = (8, 8, 4, 4)
DROP_PATH = 0.1
HEAD_WIDTH = 256


class SegNeXt(PaddedNetwork):
    """(N, in_channels, H, W) → logits (N, num_classes, H, W), for any H, W ≥ 1."""

    stride = 1  # its strided convolutions take any size

    def __init__(self, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__()
        self.encoder = MSCAN(in_channels)
        self.decoder = Decoder()
        self.classifier = nn.Conv2d(HEAD_WIDTH, num_classes, 1)
        init_convolutions(self)
        for module in self.modules():
            if isinstance(module, StripConv2d):
                module.reset_parameters()
        nn.init.normal_(self.classifier.weight, std=0.01)

    def published_tensors(self) -> dict[str, Tensor]:
        """Encoder and head by the names of a published checkpoint; they share the model's memory."""
        head = {f"decode_head.{name}": value for name, value in self.decoder.head.state_dict().items()}
        return self.encoder.state_dict() | head


class MSCAN(nn.Module):
    """Features at strides 4, 8, 16, 32."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        rates = iter(torch.linspace(0, DROP_PATH, sum(DEPTHS), device="cpu").tolist())
        cin = in_channels
        for i, (width, depth, ratio) in enumerate(zip(WIDTHS, DEPTHS, MLP_RATIOS, strict=True), 1):
            self.add_module(f"patch_embed{i}", Stem(cin, width) if i == 1 else PatchEmbed(cin, width))
            self.add_module(f"block{i}", nn.ModuleList(StripBlock(width, ratio, next(rates)) for _ in range(depth)))
            self.add_module(f"norm{i}", LayerNorm2d(width))
            cin = width

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for i in range(1, len(WIDTHS) + 1):
            x = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x)
            x = getattr(self, f"norm{i}")(x)
            features.append(x)
        return features


class Stem(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.proj = segnext_stem(cin, cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PatchEmbed(nn.Sequential):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(OrderedDict(proj=nn.Conv2d(cin, cout, 3, 2, 1), norm=nn.BatchNorm2d(cout)))


class Decoder(nn.Module):
    """LightHam over the last three stages, at stride 8."""

    def __init__(self) -> None:
        super().__init__()
        self.head = LightHam(WIDTHS[1:], HEAD_WIDTH)
        self.dropout = nn.Dropout2d(0.1)

    @property
    def layers(self) -> nn.ModuleList:
        return nn.ModuleList([self.head.squeeze, self.head.hamburger, self.head.align])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.dropout(self.head(features[1:]))
