"""Cross-scan and cross-merge in one pass over memory each, for the scan's peers on a GPU.

VMamba has such kernels before and after its scans; flips, transposes and stacks would charge a peer for several
passes that nobody has to make. Token (i, j) of an (H, W) image is number t in the sequence of direction k:

    k = 0: i W + j    k = 1: H W − 1 − (i W + j)    k = 2: j H + i    k = 3: H W − 1 − (j H + i)

`cross_scan` writes all sequences, from one image or one a direction; `cross_merge` sums them into an image. Each is
the other's gradient. Triton's interpreter runs them on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _move(images, sequences, H, W, D, K: tl.constexpr, EACH: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr):
    """One pixel of one image a program, its D numbers (or, with EACH, D of every direction) in blocks."""
    pixel = tl.program_id(0)
    n, i, j = tl.program_id(1).to(tl.int64), pixel // W, pixel % W
    area = H * W
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    at = n * area + pixel
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        token = pixel if k < 2 else j * H + i
        token = token if k % 2 == 0 else area - 1 - token
        sequence = sequences + ((n * area + token) * K + k) * D + d
        image = images + ((at * K + k) * D if EACH else at * D) + d
        if MERGE:
            value = tl.load(sequence, mask=inside, other=0.0)
            if EACH:
                tl.store(image, value, mask=inside)
            else:
                total += value.to(tl.float32)
        else:
            tl.store(sequence, tl.load(image, mask=inside, other=0.0), mask=inside)
    if MERGE and not EACH:
        tl.store(images + at * D + d, total.to(images.dtype.element_ty), mask=inside)


def _launch(images: Tensor, sequences: Tensor, directions: int, each: bool, merge: bool) -> None:
    n, h, w = images.shape[:3]
    numbers = images.numel() // max(n * h * w * (directions if each else 1), 1)
    block = min(1024, 1 << max(numbers - 1, 1).bit_length())
    grid = (h * w, n, math.ceil(numbers / block))
    warps = max(1, min(8, block // 128))
    _move[grid](images, sequences, h, w, numbers, directions, each, merge, block, num_warps=warps)


class _CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, directions: int, each: bool) -> Tensor:
        ctx.shape, ctx.directions, ctx.each = image.shape, directions, each
        n, h, w, *rest = image.shape
        rest = rest[1:] if each else rest
        sequences = image.new_empty((n, h * w, directions, *rest))
        _launch(image.contiguous(), sequences, directions, each, merge=False)
        return sequences

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        image = grad.new_empty(ctx.shape)
        _launch(image, grad.contiguous(), ctx.directions, ctx.each, merge=True)
        return image, None, None


class _CrossMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sequences: Tensor, height: int, width: int) -> Tensor:
        n, _, ctx.directions, *rest = sequences.shape
        image = sequences.new_empty((n, height, width, *rest))
        _launch(image, sequences.contiguous(), ctx.directions, each=False, merge=True)
        return image

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        n, h, w, *rest = grad.shape
        sequences = grad.new_empty((n, h * w, ctx.directions, *rest))
        _launch(grad.contiguous(), sequences, ctx.directions, each=False, merge=False)
        return sequences, None, None


def cross_scan(image: Tensor, directions: int, each: bool) -> Tensor:
    """(N, H, W, ...), or with `each` one image a direction, (N, H, W, K, ...) → (N, H·W, K, ...)."""
    return _CrossScan.apply(image, directions, each)


def cross_merge(sequences: Tensor, height: int, width: int) -> Tensor:
    """(N, H·W, K, ...) → their sum over directions as an image (N, H, W, ...), added in fp32."""
    return _CrossMerge.apply(sequences, height, width)
