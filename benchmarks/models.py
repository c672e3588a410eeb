"""Models of others, as published and on plain PyTorch: what fk.accelerate is tested and timed on."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import scan_matmul


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


class SS2D(nn.Module):
    """VMamba's scan block in its Mamba-2 form (forward_type "m0"): names and data flow as published.

    Four sequences are unrolled from the image, scanned as 1D sequences (by the batched chunks of `peers`; upstream
    has a Triton kernel for GPUs, einsum elsewhere) and merged again.
    """

    def __init__(self, d_model: int, d_state: int = 64, dt_rank: int | None = None) -> None:
        super().__init__()
        inner, heads = 2 * d_model, dt_rank or math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.randn(4, heads + 2 * d_state, inner) * inner**-0.5)
        self.Ds = nn.Parameter(torch.ones(4, heads, inner // heads))
        self.A_logs = nn.Parameter(torch.zeros(4, heads))
        self.dt_projs_bias = nn.Parameter(0.1 * torch.rand(4, heads))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.forward_core = functools.partial(self.forward_corem0, dstate=d_state)

    def forward_corem0(self, x: Tensor, dstate: int) -> Tensor:
        n, h, w, _ = x.shape
        directions, heads, headdim = self.Ds.shape
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
        xs = torch.stack([rows, columns, rows.flip(1), columns.flip(1)], 2)
        projected = torch.einsum("nlkd,kcd->nlkc", xs, self.x_proj_weight)
        dts, Bs, Cs = projected.split([heads, dstate, dstate], -1)
        xs = xs.unflatten(-1, (heads, headdim)).flatten(2, 3)
        A, D, bias = -self.A_logs.exp().flatten(), self.Ds.flatten(0, 1), self.dt_projs_bias.flatten()
        ys = scan_matmul(xs, dts.flatten(2), A, Bs, Cs, D, None, bias, None, None, None, 64, True)
        ys = ys.unflatten(2, (directions, heads)).flatten(-2)
        y = ys[:, :, 0] + ys[:, :, 2].flip(1)
        column = ys[:, :, 1] + ys[:, :, 3].flip(1)
        y = y.view(n, h, w, -1) + column.view(n, w, h, -1).transpose(1, 2)
        return self.out_norm(y).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.out_proj(self.forward_core(x) * F.silu(z))


class VMambaStage(nn.Module):
    """Two blocks of VMamba: scan and MLP with residuals, on (N, C, H, W)."""

    def __init__(self, dim: int, headdim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(dim),
                    "op": SS2D(dim, dt_rank=2 * dim // headdim),
                    "norm2": nn.LayerNorm(dim),
                    "mlp": nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
                }
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = x + block["op"](block["norm"](x))
            x = x + block["mlp"](block["norm2"](x))
        return x.permute(0, 3, 1, 2)
