"""Layers on strip_conv2d, with the parameter names of SegNeXt's AttentionModule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from famseg_kernels.strip_conv.op import strip_conv2d


class StripConv2d(nn.Module):
    """Multi-branch strip depthwise convolution, y = a + Σ_i col_i(row_i(a)) with a = square(x).

    Parameters are named as in SegNeXt: conv0 (square), conv{i}_1 (row) and conv{i}_2 (column) of branch i, each a
    depthwise nn.Conv2d that holds weights and is never called: one fused op computes all of them.

    Args:
        channels: C.
        square_kernel: odd size of the square kernel, or None for a = x.
        strip_kernels: odd size of each branch.
        bias: whether every stage has a bias.

    Shape: (N, C, H, W) → (N, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        square_kernel: int | None = 5,
        strip_kernels: Sequence[int] = (7, 11, 21),
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.branches = len(strip_kernels)

        def depthwise(height: int, width: int) -> nn.Conv2d:
            padding = (height // 2, width // 2)
            return nn.Conv2d(channels, channels, (height, width), padding=padding, groups=channels, bias=bias)

        self.conv0 = None if square_kernel is None else depthwise(square_kernel, square_kernel)
        for i, k in enumerate(strip_kernels):
            self.add_module(f"conv{i}_1", depthwise(1, k))
            self.add_module(f"conv{i}_2", depthwise(k, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """SegNeXt's initialisation: N(0, √(2 / fan_out)) with fan_out = kernel area (depthwise), biases 0."""
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
                nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / fan_out))
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = [getattr(self, f"conv{i}_1") for i in range(self.branches)]
        cols = [getattr(self, f"conv{i}_2") for i in range(self.branches)]
        square = self.conv0
        return strip_conv2d(
            x,
            None if square is None else square.weight,
            None if square is None else square.bias,
            [conv.weight for conv in rows],
            [conv.bias for conv in rows],
            [conv.weight for conv in cols],
            [conv.bias for conv in cols],
        )


class StripAttention(StripConv2d):
    """SegNeXt's multi-scale convolutional attention: y = conv3(strip(x)) · x, conv3 a 1×1 convolution.

    State-dict keys and shapes are those of SegNeXt's AttentionModule (mmseg's MSCAAttention), so that published
    MSCAN weights load. Shape: (N, C, H, W) → (N, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(super().forward(x)) * x
