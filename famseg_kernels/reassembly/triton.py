"""reassemble and carafe on NVIDIA GPUs with Triton: predicted kernels as banded matrices, shared by all channels.

Along a row of the image, a block of B pixels needs the B + k − 1 source columns around it, its window. For each row
of the predicted kernels their weights fill a band, so that for every channel at once

    y[c, (dy, j, dx)] = Σ_ky x[c, row i + ky − r, window] · Band_ky[window, (dy, j, dx)]

is a matrix product with the channels as rows. The alternative, a thread a pixel, needs for k = 5, s = 2 a load, an
address and a conversion for every 4 FMAs: about 230 instructions an element of x, where reading and writing 5 E + M at
an H200's rate leaves time for 80 in bf16 and 160 in fp32. Here an element costs 640 multiply–adds on tensor cores (a
third of a clock and SM) and a share of making the band, which C_BLOCK channels split: as compiled for sm_90, 220
instructions at 64 channels and 120 at 128, more than half of them for the softmax and the band. So 16-bit forward
should be bound by instruction issue at up to 1.5 times the bytes' time with many channels and 3 times with 64; fp32
("tf32x3": three TF32 products that keep 22 bits of each factor) by tensor cores. x is read in whole rows of a window.

The softmax over the taps is taken from the logits where the band is made; its running maximum and sum take one pass
more over the same logits, which then come from the first cache. Neither a softmaxed, nor a pixel-shuffled, nor an
unfolded tensor exists.

Backward: x gathers from the s²·k² results that used it (the same bands turned round), weights are the diagonals of
x[window]ᵀ · dy summed over the group's channels; no two programs write the same place. The second leaves the softmax's
maximum and sum (2 fp32 numbers a result pixel) for the first. No GPU has run this yet.

x, y and dy are taken with any strides (channels_last is as good as contiguous here: channels are a tile's rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from famseg_kernels import backends, checks, launch
from famseg_kernels.finite import finite, nan_unless_finite
from famseg_kernels.reassembly import spec
from famseg_kernels.spec import Backend

# --- the kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _weight_offsets(i, j, dy, dx, height, width, S: tl.constexpr, SOFTMAX: tl.constexpr):
    """Where a tap's weight of result pixel (S·i + dy, S·j + dx) lies, from the tap's first: logits are planes of
    (dy, dx), masks are images. Negative places are masked by the caller."""
    if SOFTMAX:
        return ((dy * S + dx) * height + i).to(tl.int64) * width + j
    return (i * S + dy).to(tl.int64) * (width * S) + j * S + dx


@triton.jit
def _columns(i, height, width):
    """How many columns row i has: none outside the image. (Triton 3.9's interpreter cannot & a number with a block.)"""
    return tl.where((i >= 0) & (i < height), width, 0)


@triton.jit
def _larger(a, b):
    """The larger one, NaN if either is: PTX's plain maximum gives the other operand for a NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _softmax(logits, wanted, valid, area, K: tl.constexpr, K_PADDED: tl.constexpr, SIZE: tl.constexpr):
    """Maximum and 1 / Σ exp(logit − maximum) over the taps, which lie `area` apart, a kernel row at a time.

    Each column of the kernel keeps its own maximum and sum until the end: reductions inside the loop cost more
    shuffles than all the rest."""
    maximum = tl.full([K_PADDED, SIZE], -3.0e38, tl.float32)  # not −∞: ∞ − ∞ where the first logit is −∞
    total = tl.zeros([K_PADDED, SIZE], tl.float32)
    for ky in range(K):
        logit = tl.load(logits + ky * K * area, mask=wanted, other=float("-inf")).to(tl.float32)
        larger = _larger(maximum, logit)
        total = total * tl.exp(maximum - larger) + tl.exp(logit - larger)
        maximum = larger
    largest = tl.where(valid, tl.reduce(maximum, 0, _larger), 0.0)
    total = tl.sum(total * tl.exp(maximum - largest[None, :]), 0)
    return largest, 1.0 / tl.where(valid, total, 1.0)


@triton.jit
def _runs(result, runs):
    """2 where the result is not finite: the zeros of a band make NaN of what is not finite in a tile, too far away. So
    all is done again without that, which then is added where the definition has it, times 0."""
    return tl.where(nan_unless_finite(result) == 0.0, runs, 2)


@triton.jit
def _forward(
    x,
    weights,
    y,
    channels,
    groups,
    height,
    width,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_h,
    y_w,
    channel_blocks,
    column_blocks,
    row_blocks,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,  # the next power of 2, at least 4
    S: tl.constexpr,
    SOFTMAX: tl.constexpr,
    C_BLOCK: tl.constexpr,  # channels of a program
    B: tl.constexpr,  # source pixels of a block
    WINDOW: tl.constexpr,  # columns around it
    D: tl.constexpr,  # values of dy, and of dx, of a program, powers of 2
    E: tl.constexpr,
    ROWS: tl.constexpr,  # image rows of a program, one after the other: they share rows of x in the first cache
    DOT: tl.constexpr,  # dtype of the factors of products
):
    program = tl.program_id(0)
    channel = (program % channel_blocks) * C_BLOCK + tl.arange(0, C_BLOCK)
    program //= channel_blocks
    first = (program % column_blocks) * B
    program //= column_blocks
    top = (program % row_blocks) * ROWS
    program //= row_blocks
    group = program % groups
    n = program // groups
    area = tl.cast(height, tl.int64) * width * (S * S)
    weights += (n * groups + group).to(tl.int64) * (K * K) * area

    place = tl.arange(0, D * B * E)
    dx = place % E
    j = (place // E) % B
    dy = tl.program_id(1) * D + place // (B * E)
    PAD: tl.constexpr = (WINDOW - B) // 2
    source = tl.arange(0, WINDOW)
    column = first - PAD + source
    kx = tl.arange(0, K_PADDED)
    kx_of = source[:, None] - j[None, :] + (K // 2 - PAD)  # the tap that takes a source column to a place
    in_band = (kx_of >= 0) & (kx_of < K)
    kx_clipped = tl.where(in_band, kx_of, 0)
    in_group = channel < channels
    # A tile's channels lie up to C · H · W elements apart: 64 bits.
    channel = (group * channels + channel).to(tl.int64)
    x += n.to(tl.int64) * x_n + channel[:, None] * x_c
    y += n.to(tl.int64) * y_n + channel[:, None] * y_c + ((first + j) * S + dx).to(tl.int64)[None, :] * y_w
    for row in range(ROWS):
        i = top + row
        valid = (dx < S) & (dy < S) & (first + j < _columns(i, height, width))
        wanted = (kx < K)[:, None] & valid[None, :]
        taps = weights + kx[:, None] * area + _weight_offsets(i, first + j, dy, dx, height, width, S, SOFTMAX)[None, :]
        if SOFTMAX:
            maximum, scale = _softmax(taps, wanted, valid, area, K, K_PADDED, D * B * E)
        result = tl.zeros([C_BLOCK, D * B * E], tl.float32)
        run, runs = 0, 1
        while run < runs:
            result = tl.zeros([C_BLOCK, D * B * E], tl.float32)
            for ky in range(K):
                weight = tl.load(taps + ky * K * area, mask=wanted, other=0.0).to(tl.float32)
                if SOFTMAX:
                    weight = tl.exp(weight - maximum[None, :]) * scale[None, :]
                band = tl.where(in_band, tl.gather(weight, kx_clipped, 0), 0.0)
                line = i + ky - K // 2
                inside = (column >= 0) & (column < _columns(line, height, width))
                place_x = line.to(tl.int64) * x_h + column.to(tl.int64)[None, :] * x_w
                tile = finite(tl.load(x + place_x, mask=in_group[:, None] & inside[None, :], other=0.0), run)
                result = tl.dot(tile.to(DOT), band.to(DOT), result, input_precision="tf32x3")
            run += 1
            runs = _runs(result, runs)
        if runs > 1:
            for tap in range(K * K):
                line, near = i + tap // K - K // 2, first + j + tap % K - K // 2
                inside = (near >= 0) & (near < _columns(line, height, width))
                place_x = line.to(tl.int64) * x_h + near.to(tl.int64)[None, :] * x_w
                result += tl.load(x + place_x, mask=in_group[:, None] & inside[None, :], other=0.0).to(tl.float32) * 0.0
        tl.store(y + (i * S + dy).to(tl.int64)[None, :] * y_h, result, mask=in_group[:, None] & valid[None, :])


@triton.jit
def _source_gradient(
    dy_tensor,
    weights,
    softmax,
    dx_tensor,
    channels,
    groups,
    height,
    width,
    g_n,
    g_c,
    g_h,
    g_w,
    x_n,
    x_c,
    x_h,
    x_w,
    channel_blocks,
    column_blocks,
    row_blocks,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,  # the next power of 2, at least 4
    S: tl.constexpr,
    SOFTMAX: tl.constexpr,
    C_BLOCK: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    DOT: tl.constexpr,
):
    """dx[c, block] = Σ_ky,dy dy[c, row S·(i − ky + r) + dy, window] · Band[window, block]."""
    program = tl.program_id(0)
    channel = (program % channel_blocks) * C_BLOCK + tl.arange(0, C_BLOCK)
    program //= channel_blocks
    first = (program % column_blocks) * B
    program //= column_blocks
    top = (program % row_blocks) * ROWS
    program //= row_blocks
    group = program % groups
    n = program // groups
    area = tl.cast(height, tl.int64) * width * (S * S)
    weights += (n * groups + group).to(tl.int64) * (K * K) * area
    softmax += (n * groups + group).to(tl.int64) * 2 * area

    place = tl.arange(0, WINDOW * E)
    dx = place % E
    j = first - (WINDOW - B) // 2 + place // E
    block = tl.arange(0, B)
    kx = tl.arange(0, K_PADDED)
    kx_of = first + block[None, :] - j[:, None] + K // 2  # the tap that takes a block's column to a result's place
    in_band = (kx_of >= 0) & (kx_of < K)
    kx_clipped = tl.where(in_band, kx_of, 0)
    in_window = (dx < S) & (j >= 0)
    in_group = channel < channels
    channel = (group * channels + channel).to(tl.int64)
    dy_tensor += n.to(tl.int64) * g_n + channel[:, None] * g_c
    dx_tensor += n.to(tl.int64) * x_n + channel[:, None] * x_c + (first + block).to(tl.int64)[None, :] * x_w
    for row in range(ROWS):
        result = tl.zeros([C_BLOCK, B], tl.float32)
        run, runs = 0, 1
        while run < runs:
            result = tl.zeros([C_BLOCK, B], tl.float32)
            for step in range(K * S):
                ky = step // S
                dy = step % S
                i = top + row + K // 2 - ky
                valid = in_window & (j < _columns(i, height, width))
                offset = _weight_offsets(i, j, dy, dx, height, width, S, SOFTMAX)
                if SOFTMAX:
                    maximum = tl.load(softmax + offset, mask=valid, other=0.0)
                    scale = tl.load(softmax + area + offset, mask=valid, other=0.0)
                wanted = valid[:, None] & (kx < K)[None, :]
                taps = offset[:, None] + (ky * K + kx)[None, :] * area
                weight = tl.load(weights + taps, mask=wanted, other=0.0).to(tl.float32)
                if SOFTMAX:
                    weight = tl.exp(weight - maximum[:, None]) * scale[:, None]
                band = tl.where(in_band, tl.gather(weight, kx_clipped, 1), 0.0)
                place_g = (i * S + dy).to(tl.int64) * g_h + (j * S + dx).to(tl.int64)[None, :] * g_w
                tile = finite(tl.load(dy_tensor + place_g, mask=in_group[:, None] & valid[None, :], other=0.0), run)
                result = tl.dot(tile.to(DOT), band.to(DOT), result, input_precision="tf32x3")
            run += 1
            runs = _runs(result, runs)
        if runs > 1:
            for step in range(K * K * S * S):
                tap, part = step // (S * S), step % (S * S)
                line, near = top + row + K // 2 - tap // K, first + block + K // 2 - tap % K
                inside = (near >= 0) & (near < _columns(line, height, width))
                place_g = (line * S + part // S).to(tl.int64) * g_h + (near * S + part % S).to(tl.int64)[None, :] * g_w
                tile = tl.load(dy_tensor + place_g, mask=in_group[:, None] & inside[None, :], other=0.0)
                result += tile.to(tl.float32) * 0.0
        inside = first + block < _columns(top + row, height, width)
        tl.store(dx_tensor + (top + row).to(tl.int64) * x_h, result, mask=in_group[:, None] & inside[None, :])


@triton.jit
def _weight_gradient(
    dy_tensor,
    x,
    weights,
    softmax,
    dw,
    channels,
    groups,
    height,
    width,
    g_n,
    g_c,
    g_h,
    g_w,
    x_n,
    x_c,
    x_h,
    x_w,
    column_blocks,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,  # the next power of 2, at least 4
    S: tl.constexpr,
    SOFTMAX: tl.constexpr,
    C_BLOCK: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    DOT: tl.constexpr,
):
    """dw[ky, kx, place] = Σ_c x[c, row i + ky − r, column j + kx − r] · dy[c, place], then through the softmax."""
    program = tl.program_id(0)
    first = (program % column_blocks) * B
    program //= column_blocks
    i = program % height
    program //= height
    group = program % groups
    n = program // groups
    area = tl.cast(height, tl.int64) * width * (S * S)
    offset = (n * groups + group).to(tl.int64) * (K * K) * area

    SIZE: tl.constexpr = D * B * E
    place = tl.arange(0, SIZE)
    dx = place % E
    j = (place // E) % B
    dy = tl.program_id(1) * D + place // (B * E)
    valid = (dx < S) & (dy < S) & (first + j < width)
    position = _weight_offsets(i, first + j, dy, dx, height, width, S, SOFTMAX)
    kx = tl.arange(0, K_PADDED)
    taps = offset + kx.to(tl.int64)[:, None] * area + position[None, :]
    wanted = (kx < K)[:, None] & valid[None, :]
    if SOFTMAX:
        maximum, scale = _softmax(weights + taps, wanted, valid, area, K, K_PADDED, SIZE)
        softmax += (n * groups + group).to(tl.int64) * 2 * area + position
        tl.store(softmax, maximum, mask=valid)
        tl.store(softmax + area, scale, mask=valid)
    if dw is not None:
        column = first - (WINDOW - B) // 2 + tl.arange(0, WINDOW)
        channel = tl.arange(0, C_BLOCK)
        start = (group * channels).to(tl.int64) + channel
        x += n.to(tl.int64) * x_n + (column.to(tl.int64) * x_w)[:, None]
        pixel = (i * S + dy).to(tl.int64) * g_h + ((first + j) * S + dx).to(tl.int64) * g_w
        dy_tensor += n.to(tl.int64) * g_n + pixel[None, :]
        window_of = tl.minimum(j[None, :] + kx[:, None] + ((WINDOW - B) // 2 - K // 2), WINDOW - 1)
        gradients, mean = (), tl.zeros([SIZE], tl.float32)
        for ky in tl.static_range(K):
            line = i + ky - K // 2
            inside = (column >= 0) & (column < _columns(line, height, width))
            products = tl.zeros([WINDOW, SIZE], tl.float32)
            for block in range(CHANNEL_BLOCKS):
                in_group = block * C_BLOCK + channel < channels
                c = start + block * C_BLOCK
                places = x + line.to(tl.int64) * x_h + c[None, :] * x_c
                tile = tl.load(places, mask=inside[:, None] & in_group[None, :], other=0.0)
                grad = tl.load(dy_tensor + c[:, None] * g_c, mask=in_group[:, None] & valid[None, :], other=0.0)
                products = tl.dot(tile.to(DOT), grad.to(DOT), products, input_precision="tf32x3")
            gradients += (tl.gather(products, window_of, 0),)  # each tap of a place is one of the window's columns
            if SOFTMAX:
                logit = tl.load(weights + taps + ky * K * area, mask=wanted, other=0.0).to(tl.float32)
                weight = tl.exp(logit - maximum[None, :]) * scale[None, :]
                mean += tl.sum(tl.where(wanted, weight * gradients[ky], 0.0), 0)  # taps beyond K may not be finite
        for ky in tl.static_range(K):
            gradient = gradients[ky]
            if SOFTMAX:
                logit = tl.load(weights + taps + ky * K * area, mask=wanted, other=0.0).to(tl.float32)
                gradient = tl.exp(logit - maximum[None, :]) * scale[None, :] * (gradient - mean[None, :])
            tl.store(dw + taps + ky * K * area, gradient, mask=wanted)


# --- launch configurations ---------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """What `python -m benchmarks.tune` tunes. Shapes of the kernels' tiles follow from it in `_Plan`."""

    channels: int  # of a program, at most
    rows: int  # of the image, one after the other
    num_warps: int
    num_stages: int


# By compute capability × 10; 0 stands for every other chip and for the interpreter.
CONFIGURATIONS = {
    80: Configuration(channels=128, rows=4, num_warps=4, num_stages=2),
    90: Configuration(channels=128, rows=4, num_warps=4, num_stages=2),
    0: Configuration(channels=128, rows=4, num_warps=4, num_stages=2),
}
BLOCK = 16  # source pixels of a block: the narrowest that tensor cores take wastes least of a band
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Plan:
    """How one call is cut into programs, for forward and backward."""

    def __init__(self, x: Tensor, kernel_size: int, scale: int, groups: int, softmax: bool) -> None:
        n, c, self.height, self.width = x.shape
        self.groups, self.channels = groups, c // groups
        tuned = CONFIGURATIONS.get(launch.capability(x.device), CONFIGURATIONS[0])
        self.config = launch.Config(tuned.num_warps, tuned.num_stages)
        # fp32 factors take twice the registers, and their parts as much again.
        most = tuned.channels // (4 if x.dtype == torch.float32 else 1)
        self.c_block = max(16, min(most, triton.next_power_of_2(self.channels)))
        self.channel_blocks = triton.cdiv(self.channels, self.c_block)
        self.column_blocks = triton.cdiv(self.width, BLOCK)
        self.rows = max(1, min(tuned.rows, self.height))
        self.row_blocks = triton.cdiv(self.height, self.rows)
        self.dx = triton.next_power_of_2(scale)
        self.dy = self.dx if self.dx <= 2 else 1
        self.images = n * groups
        # NumPy has no bf16 arithmetic: the interpreter multiplies in fp32.
        dot = torch.float32 if backends.TRITON_INTERPRETS and x.dtype == torch.bfloat16 else x.dtype
        self.constants = {
            "K": kernel_size,
            # Of one or two taps tl.gather does not compile (Triton 3.6 fails an assertion).
            "K_PADDED": max(4, triton.next_power_of_2(kernel_size)),
            "S": scale,
            "SOFTMAX": softmax,
            "C_BLOCK": self.c_block,
            "B": BLOCK,
            "WINDOW": triton.next_power_of_2(BLOCK + kernel_size - 1),
            "E": self.dx,
            "DOT": _TL[dot],
        }


# --- the backend -------------------------------------------------------------------------------------------------


def _unsupported(softmax: bool, x: Tensor, weights: Tensor, kernel_size: int, scale: int, groups: int) -> str | None:
    if x.dtype == torch.float64:
        return "its kernels compute in fp32, x is float64"
    # Every tap's weight of a block's results is held in registers at once.
    held = kernel_size * triton.next_power_of_2(kernel_size) * BLOCK * max(4, triton.next_power_of_2(scale))
    return None if held <= 2**14 else f"kernels of size {kernel_size} at scale {scale} do not fit in registers"


def _run_forward(softmax: bool, x: Tensor, weights: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    """y (N, C, sH, sW) in x's dtype and memory format."""
    n, c, h, w = x.shape
    y = torch.empty((n, c, h * scale, w * scale), dtype=x.dtype, device=x.device, memory_format=checks.image_format(x))
    if not y.numel():
        return y
    plan = _Plan(x, kernel_size, scale, groups, softmax)
    programs = plan.images * plan.channel_blocks * plan.column_blocks * plan.row_blocks
    with launch.on(x.device):
        launch.run(
            _forward,
            (programs, triton.cdiv(scale, plan.dy)),
            plan.config,
            x,
            weights.contiguous(),
            y,
            plan.channels,
            groups,
            h,
            w,
            *x.stride(),
            *y.stride(),
            plan.channel_blocks,
            plan.column_blocks,
            plan.row_blocks,
            D=plan.dy,
            ROWS=plan.rows,
            **plan.constants,
        )
    return y


def _run_backward(
    softmax: bool,
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    weights: Tensor,
    kernel_size: int,
    scale: int,
    groups: int,
) -> list[Tensor | None]:
    """Gradients of x and of the logits or masks where `needs`, None elsewhere."""
    dense = weights.contiguous()
    dx, dw = (torch.empty_like(t) if need else None for t, need in zip((x, dense), needs, strict=True))
    if not x.numel():  # weights may have elements although there are no channels to sum over
        return [dx, None if dw is None else dw.zero_()]
    n, _, h, w = x.shape
    plan = _Plan(x, kernel_size, scale, groups, softmax)
    stats = torch.empty((n, groups, 2, scale**2, h, w), dtype=torch.float32, device=x.device) if softmax else dense
    # The weights' gradient sums over channels, 64 at a time: more would not share anything more.
    channels = min(plan.c_block, 64)
    with launch.on(x.device):
        if softmax or dw is not None:
            launch.run(
                _weight_gradient,
                (plan.images * h * plan.column_blocks, triton.cdiv(scale, plan.dy)),
                plan.config,
                grad,
                x,
                dense,
                stats,
                dw,
                plan.channels,
                groups,
                h,
                w,
                *grad.stride(),
                *x.stride(),
                plan.column_blocks,
                CHANNEL_BLOCKS=triton.cdiv(plan.channels, channels),
                D=plan.dy,
                **{**plan.constants, "C_BLOCK": channels},
            )
        if dx is not None:
            launch.run(
                _source_gradient,
                (plan.images * plan.channel_blocks * plan.column_blocks * plan.row_blocks,),
                plan.config,
                grad,
                dense,
                stats,
                dx,
                plan.channels,
                groups,
                h,
                w,
                *grad.stride(),
                *dx.stride(),
                plan.channel_blocks,
                plan.column_blocks,
                plan.row_blocks,
                ROWS=plan.rows,
                **plan.constants,
            )
    return [dx, dw]


reassemble = Backend(spec.of_logits(_run_forward), spec.of_logits(_run_backward), spec.of_logits(_unsupported))
carafe = Backend(spec.of_masks(_run_forward), spec.of_masks(_run_backward), spec.of_masks(_unsupported))
