"""What networks of a fixed stride share: images of any size."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class PaddedNetwork(nn.Module):
    """(N, in_channels, H, W) → logits (N, num_classes, H, W) by `encoder`, `decoder` and `classifier`.

    The image is padded with zeros to a multiple of `stride`, right and below. Logits of a coarser grid are upsampled
    bilinearly, then cropped to the image.
    """

    stride = 32
    encoder: nn.Module
    decoder: Any
    classifier: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        logits = self.classifier(self.decoder(self.encoder(x)))
        if logits.shape[2:] != x.shape[2:]:
            logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's layers, deepest first."""
        return self.decoder.layers
