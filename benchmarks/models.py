"""Models of others, as published and on plain PyTorch: what fk.accelerate is tested and timed on."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class AttentionModule(nn.Module):
    """SegNeXt's multi-scale convolutional attention: names, kernel sizes and paddings as published."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        for i, k in enumerate((7, 11, 21)):
            setattr(self, f"conv{i}_1", nn.Conv2d(dim, dim, (1, k), padding=(0, k // 2), groups=dim))
            setattr(self, f"conv{i}_2", nn.Conv2d(dim, dim, (k, 1), padding=(k // 2, 0), groups=dim))
        self.conv3 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        attn = self.conv0(x)
        branches = [getattr(self, f"conv{i}_2")(getattr(self, f"conv{i}_1")(attn)) for i in range(3)]
        return self.conv3(attn + sum(branches)) * x


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.spatial_gating_unit = AttentionModule(dim)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))


class _Block(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        self.attn = _Attention(dim)
        hidden = dim * ratio
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            nn.Conv2d(hidden, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.01 * self.attn(self.norm1(x))
        return x + 0.01 * self.mlp(self.norm2(x))


class MSCAN(nn.Module):
    """SegNeXt's backbone: a stem to stride 4, then four stages of strip attention blocks; returns the last stage."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], ratios: Sequence[int] = (8, 8, 4, 4)) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        cin = 3
        for i, (width, depth, ratio) in enumerate(zip(widths, depths, ratios, strict=True)):
            if i == 0:
                stages += [nn.Conv2d(cin, width // 2, 3, 2, 1), nn.BatchNorm2d(width // 2), nn.GELU()]
                cin = width // 2
            stages += [nn.Conv2d(cin, width, 3, 2, 1), nn.BatchNorm2d(width)]
            stages += [_Block(width, ratio) for _ in range(depth)]
            cin = width
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)


class CARAFEPack(nn.Module):
    """mmcv's upsampler: attribute and parameter names as published."""

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        self.channels, self.scale_factor, self.up_kernel, self.up_group = channels, scale_factor, up_kernel, up_group
        self.encoder_kernel, self.encoder_dilation = encoder_kernel, encoder_dilation
        self.compressed_channels = compressed_channels
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        out = up_kernel**2 * up_group * scale_factor**2
        padding = (encoder_kernel - 1) * encoder_dilation // 2
        self.content_encoder = nn.Conv2d(
            compressed_channels, out, encoder_kernel, padding=padding, dilation=encoder_dilation
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = F.pixel_shuffle(self.content_encoder(self.channel_compressor(x)), self.scale_factor)
        n, _, h, w = mask.shape
        mask = mask.view(n, self.up_group, self.up_kernel**2, h, w).softmax(2)
        patches = F.unfold(x, self.up_kernel, padding=self.up_kernel // 2).view(n, -1, *x.shape[2:])
        patches = F.interpolate(patches, scale_factor=self.scale_factor)
        patches = patches.view(n, self.up_group, -1, self.up_kernel**2, h, w)
        return (patches * mask[:, :, None]).sum(3).view(n, -1, h, w)


class CarafeNeck(nn.Module):
    """A top-down path with two CARAFE upsamplers, as in a feature pyramid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up1, self.up2 = CARAFEPack(channels, 2), CARAFEPack(channels, 2)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.smooth(self.up2(F.relu(self.up1(x))))
