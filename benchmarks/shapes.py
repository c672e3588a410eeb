"""What is timed: the shapes of MSCAN, VMamba, CARAFE and FAMSeg that the targets name, and a small one each.

A GPU gets batches of 16: at batch 2 most of it would stand idle, and a launch would cost as much as the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from famseg_kernels.registry import Case


def strip(name: str, n: int, c: int, h: int, w: int) -> Case:
    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        rows = [rand(c, 1, 1, k) / k for k in (7, 11, 21)]
        cols = [rand(c, 1, k, 1) / k for k in (7, 11, 21)]
        biases = [[rand(c) for _ in range(3)] for _ in range(2)]
        return rand(n, c, h, w), rand(c, 1, 5, 5) / 5, rand(c), rows, biases[0], cols, biases[1]

    return Case(name, make)


def scan_2d(name: str, n: int, side: int, heads: int, headdim: int, state: int, shared: bool = False) -> Case:
    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        k = 1 if shared else 4
        x, dt = rand(n, side, side, heads, headdim), rand(n, side, side, 4, heads)
        B, C = rand(n, side, side, k, 1, state), rand(n, side, side, k, 1, state)
        return x, dt, -rand(4, heads).abs(), B, C, rand(heads), rand(4, heads), None, True, 0.0, float("inf")

    return Case(name, make)


def scan(name: str, b: int, length: int, heads: int, headdim: int, state: int) -> Case:
    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        x, dt = rand(b, length, heads, headdim), rand(b, length, heads)
        B, C = rand(b, length, 1, state), rand(b, length, 1, state)
        nothing = (None, None, None, None, None)
        return x, dt, -rand(heads).abs(), B, C, rand(heads), *nothing, None, True, 0.0, float("inf"), False, False

    return Case(name, make)


def reassembly(name: str, n: int, c: int, h: int, w: int, k: int = 5, s: int = 2) -> Case:
    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        return rand(n, c, h, w), rand(n, k * k * s * s, h, w), k, s, 1

    return Case(name, make)


def carafe(name: str, n: int, c: int, h: int, w: int, k: int = 5, s: int = 2) -> Case:
    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        return rand(n, c, h, w), rand(n, 1, k * k, s * h, s * w).softmax(2).flatten(1, 2), k, 1, s

    return Case(name, make)


# The first case of each operation is the smoke test.
SHAPES: dict[str, tuple[Case, ...]] = {
    "strip_conv2d": (
        strip("small", 1, 4, 16, 16),
        strip("mscan_s_stage1", 2, 64, 128, 128),
        strip("mscan_s_stage2", 2, 128, 64, 64),
        strip("mscan_s_stage3", 2, 320, 32, 32),
        strip("mscan_s_stage4", 2, 512, 16, 16),
    ),
    "ssd_scan_2d": (
        scan_2d("small", 1, 8, 2, 8, 8),
        scan_2d("heads5_32x32", 2, 32, 5, 64, 64),
        scan_2d("heads5_32x32_shared", 2, 32, 5, 64, 64, shared=True),
        scan_2d("vmamba_56x56", 1, 56, 6, 16, 64),
    ),
    "ssd_scan": (scan("small", 1, 32, 2, 8, 8), scan("mamba2_1024", 2, 1024, 8, 64, 64)),
    "reassemble": (
        reassembly("small", 1, 8, 8, 8),
        reassembly("carafe_64x64", 1, 64, 64, 64),
        reassembly("famseg_32x32", 2, 128, 32, 32),
    ),
    "carafe": (carafe("small", 1, 8, 8, 8), carafe("carafe_64x64", 1, 64, 64, 64)),
}

GPU_SHAPES: dict[str, tuple[Case, ...]] = {
    "strip_conv2d": (
        SHAPES["strip_conv2d"][0],
        strip("mscan_s_stage1_n16", 16, 64, 128, 128),
        strip("mscan_s_stage2_n16", 16, 128, 64, 64),
        strip("mscan_s_stage3_n16", 16, 320, 32, 32),
        strip("mscan_s_stage4_n16", 16, 512, 16, 16),
    ),
    "ssd_scan_2d": (
        SHAPES["ssd_scan_2d"][0],
        scan_2d("heads5_32x32_n16", 16, 32, 5, 64, 64),
        scan_2d("heads5_32x32_shared_n16", 16, 32, 5, 64, 64, shared=True),
        scan_2d("vmamba_56x56_n16", 16, 56, 6, 16, 64),
        scan_2d("heads8_16x16_n16", 16, 16, 8, 64, 64),
    ),
    "ssd_scan": (SHAPES["ssd_scan"][0], scan("mamba2_2048_n8", 8, 2048, 24, 64, 128)),
    "reassemble": (
        SHAPES["reassemble"][0],
        reassembly("carafe_64x64_n16", 16, 64, 64, 64),
        reassembly("famseg_32x32_n16", 16, 128, 32, 32),
    ),
    "carafe": (SHAPES["carafe"][0], carafe("carafe_64x64_n16", 16, 64, 64, 64)),
}


def shapes_for(name: str, device: str) -> tuple[Case, ...]:
    """The cases of an operation on "cpu" or "cuda"."""
    return (GPU_SHAPES if device == "cuda" else SHAPES)[name]
