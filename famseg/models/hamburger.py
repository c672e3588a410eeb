"""Global context by matrix factorisation: Hamburger (arXiv 2109.04553) as SegNeXt uses it.

SegNeXt draws new random bases at every forward, in evaluation too, so that its results differ from run to run. Here
they are drawn once from a fixed seed: the same input gives the same output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg.models.blocks import GroupNorm, without_autocast

_BASES_SEED = 20220918
_EPSILON = 1e-6
GROUPS = 32  # of the group norms; fewer channels make one group each


class NMF2d(nn.Module):
    """Low-rank reconstruction of (N, C, H, W) ≥ 0 by non-negative matrix factorisation; gradients flow through it.

    6 multiplicative updates in training, 7 in evaluation, rank R; always in fp32.
    """

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        start = torch.rand(channels, rank, generator=torch.Generator().manual_seed(_BASES_SEED))
        # Not in the state dict: SegNeXt's checkpoints have no such key, and the seed gives it back.
        self.bases: Tensor
        self.register_buffer("bases", F.normalize(start, dim=0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return self._factorise(x.float().flatten(2)).view(x.shape).to(x.dtype)

    def _factorise(self, x: Tensor) -> Tensor:
        bmm = torch.bmm  # as `@`, without its views: small products, of which there are four a step
        bases = self.bases.float().expand(x.shape[0], -1, -1)  # (N, C, R)
        coefficients = bmm(x.mT, bases).softmax(-1)  # (N, H·W, R)
        for _ in range(6 if self.training else 7):
            coefficients = self._update_coefficients(x, bases, coefficients)
            bases = bases * bmm(x, coefficients) / (bmm(bases, bmm(coefficients.mT, coefficients)) + _EPSILON)
        coefficients = self._update_coefficients(x, bases, coefficients)
        return bmm(bases, coefficients.mT)

    @staticmethod
    def _update_coefficients(x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
        bmm = torch.bmm
        return coefficients * bmm(x.mT, bases) / (bmm(coefficients, bmm(bases.mT, bases)) + _EPSILON)


class ConvGN(nn.Module):
    """Convolution and group norm under the names of mmcv's ConvModule (`conv`, `gn`)."""

    def __init__(self, cin: int, cout: int, relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 1, bias=False)
        self.gn = GroupNorm(min(GROUPS, cout), cout)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.conv(x))
        return F.relu(x) if self.relu else x


class _HamIn(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Hamburger(nn.Module):
    """relu(x + ham_out(NMF(relu(ham_in(x))))), with SegNeXt's keys. Shape: (N, C, H, W) → same."""

    def __init__(self, channels: int, rank: int = 16) -> None:
        super().__init__()
        self.ham_in = _HamIn(channels)
        self.ham = NMF2d(channels, rank)
        self.ham_out = ConvGN(channels, channels, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.ham_out(self.ham(F.relu(self.ham_in(x)))))


class LightHam(nn.Module):
    """SegNeXt's decode head without its classifier: features to the finest size, squeeze, hamburger, align.

    Keys are those of SegNeXt's LightHamHead. Input: feature maps from fine to coarse; output at the first one's size.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, rank: int = 16) -> None:
        super().__init__()
        self.squeeze = ConvGN(sum(in_channels), channels, relu=True)
        self.hamburger = Hamburger(channels, rank)
        self.align = ConvGN(channels, channels, relu=True)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[0].shape[2:]
        resized = [F.interpolate(f, size, mode="bilinear", align_corners=False) for f in features]
        return self.align(self.hamburger(self.squeeze(torch.cat(resized, 1))))


class AggregatedDepthConv(nn.Module):
    """The paper's aggregated depth convolution: stages 2–4 to one stride by strided depthwise + pointwise convolutions.

    Input: features at strides 8, 16, 32; output (N, channels, H/stride, W/stride), stride 32, 16 or 8. Features
    coarser than that are convolved at their own size and upsampled bilinearly.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, stride: int = 32) -> None:
        super().__init__()
        self.place = (8, 16, 32).index(stride)  # of the features that are as large as the output

        def branch(cin: int, kernel: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(cin, cin, kernel, stride, kernel // 2, groups=cin), nn.Conv2d(cin, channels, 1)
            )

        steps = [max(stride // own, 1) for own in (8, 16, 32)]
        self.branches = nn.ModuleList(
            branch(cin, 5 if step == 4 else 3, step) for cin, step in zip(in_channels, steps, strict=True)
        )
        self.norm = GroupNorm(min(GROUPS, channels), channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        size = features[self.place].shape[2:]
        maps = [branch(f) for branch, f in zip(self.branches, features, strict=True)]
        coarser = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[self.place + 1 :]]
        return F.gelu(self.norm(sum([*maps[: self.place + 1], *coarser])))
