"""Layers on strip_conv2d, with the parameter names of SegNeXt's AttentionModule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from famseg_kernels import children
from famseg_kernels.strip_conv.op import strip_conv2d


def unfusable(square: nn.Module | None, rows: Sequence[nn.Module], cols: Sequence[nn.Module]) -> str:
    """Which of a StripConv2d's children has to be called, as its weight and bias do not say all, and why; or ""."""
    if children.patched():
        return "nn.Conv2d has another forward"
    if square is not None and (reason := _departure(square, None)):
        return f"conv0 {reason}"
    for i, (row, col) in enumerate(zip(rows, cols, strict=True)):
        if reason := _departure(row, 0):
            return f"conv{i}_1 {reason}"
        if reason := _departure(col, 1):
            return f"conv{i}_2 {reason}"
    return ""


def _departure(conv: nn.Module, thin: int | None) -> str:
    """Why `conv` is not a plain "same" depthwise convolution, of size 1 along axis `thin` or square; or ""."""
    return children.altered(conv) or other_convolution(conv, thin)


def other_convolution(conv: nn.Module, thin: int | None) -> str:
    """The same of its attributes alone, whatever its type and hooks."""
    own = conv.__dict__  # twice as fast as attributes: this runs for every child in every forward
    height, width = size = own["kernel_size"]
    if height != width if thin is None else size[thin] != 1:
        return f"has kernel size {size}"
    if own["padding"] != (height // 2, width // 2) and own["padding"] != "same":
        return f"has padding {own['padding']}"
    if own["stride"] != (1, 1) or own["dilation"] != (1, 1) or own["padding_mode"] != "zeros":
        return f"has stride {own['stride']}, dilation {own['dilation']}, padding mode {own['padding_mode']}"
    return "" if own["groups"] == own["in_channels"] == own["out_channels"] else "is not depthwise"


def init_convolutions(module: nn.Module) -> None:
    """SegNeXt's initialisation for every convolution: N(0, √(2 / fan_out)), bias 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / fan_out))
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with "same" zero padding: nn.Conv2d's parameters and hooks, `strip_conv2d`'s kernels.

    It is a strip convolution without strips. Where its attributes were changed to those of another convolution, or
    nn.Conv2d has another forward, that is what runs.

    Args:
        channels: C.
        kernel_size: odd size of the square kernel.
        bias: whether there is one.

    Shape: (N, C, H, W) → (N, C, H, W).

    Raises:
        ValueError: kernel_size is not odd.
    """

    stands_for = nn.Conv2d  # what it computes with its weight and bias, for `children.altered`

    def __init__(self, channels: int, kernel_size: int = 3, bias: bool = True) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd size, got {kernel_size}")
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # torch's name
        if children.patched() or other_convolution(self, None):
            return super()._conv_forward(input, weight, bias)
        return strip_conv2d(input, weight, bias, [], None, [], None)


class StripConv2d(nn.Module):
    """Multi-branch strip depthwise convolution, y = a + Σ_i col_i(row_i(a)) with a = square(x).

    Parameters are named as in SegNeXt: conv0 (square), conv{i}_1 (row) and conv{i}_2 (column) of branch i, each a
    depthwise nn.Conv2d. One fused op reads their weights and computes all of them. Where one of them is not a plain
    convolution any more (an adapter in its place, hooks, pruning, a parametrization, another padding), all are called
    one after the other instead, and a warning names it. Hooks on all modules have the same effect, without a warning.

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
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        modules: Any = self._modules  # an attribute of a module costs ten times as much
        square = self.conv0
        rows = [modules[f"conv{i}_1"] for i in range(self.branches)]
        cols = [modules[f"conv{i}_2"] for i in range(self.branches)]
        reason = unfusable(square, rows, cols)
        if reason and not torch.compiler.is_compiling():
            warnings.warn(f"{type(self).__name__}: {reason}; its convolutions run one by one, unfused", stacklevel=2)
        if reason or children.watched():
            y = a = x if square is None else square(x)
            for row, col in zip(rows, cols, strict=True):
                y = y + col(row(a))
            return y
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
    MSCAN weights load. Args and shape are those of StripConv2d.
    """

    def __init__(
        self,
        channels: int,
        square_kernel: int | None = 5,
        strip_kernels: Sequence[int] = (7, 11, 21),
        bias: bool = True,
    ) -> None:
        super().__init__(channels, square_kernel, strip_kernels, bias)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(super().forward(x)) * x
