"""The kernels of reassemble and carafe: y, the gradient of x, and that of logits or masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from famseg_kernels.finite import finite, nan_unless_finite


class Image(NamedTuple):
    """A tensor (N, C, H, W) with its strides."""

    pointer: Any
    n: Any
    c: Any
    h: Any
    w: Any


class Sizes(NamedTuple):
    """Of the source image; channels are those of a group."""

    channels: Any
    groups: Any
    height: Any
    width: Any


class Blocks(NamedTuple):
    """How many there are of programs along channels, columns and rows."""

    channels: Any
    columns: Any
    rows: Any


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
def _program(groups, blocks, C_BLOCK: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):
    """Of a program: its channels of the group, its first column, its first row, its group and its image."""
    program = tl.program_id(0)
    channel = (program % blocks.channels) * C_BLOCK + tl.arange(0, C_BLOCK)
    program //= blocks.channels
    first = (program % blocks.columns) * B
    program //= blocks.columns
    top = (program % blocks.rows) * ROWS
    program //= blocks.rows
    return channel, first, top, program % groups, program // groups


@triton.jit
def reassemble_forward(
    x,
    weights,
    y,
    sizes,
    blocks,
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
    """y of C_BLOCK channels and ROWS rows of a block."""
    channels, groups, height, width = sizes
    channel, first, top, group, n = _program(groups, blocks, C_BLOCK, B, ROWS)
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
    x_rows = x.pointer + (n.to(tl.int64) * x.n + channel[:, None] * x.c)
    y_rows = y.pointer + (
        n.to(tl.int64) * y.n + channel[:, None] * y.c + ((first + j) * S + dx).to(tl.int64)[None, :] * y.w
    )
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
                place_x = line.to(tl.int64) * x.h + column.to(tl.int64)[None, :] * x.w
                tile = finite(tl.load(x_rows + place_x, mask=in_group[:, None] & inside[None, :], other=0.0), run)
                result = tl.dot(tile.to(DOT), band.to(DOT), result, input_precision="tf32x3")
            run += 1
            runs = _runs(result, runs)
        if runs > 1:
            for tap in range(K * K):
                line, near = i + tap // K - K // 2, first + j + tap % K - K // 2
                inside = (near >= 0) & (near < _columns(line, height, width))
                place_x = line.to(tl.int64) * x.h + near.to(tl.int64)[None, :] * x.w
                tile = tl.load(x_rows + place_x, mask=in_group[:, None] & inside[None, :], other=0.0)
                result += tile.to(tl.float32) * 0.0
        tl.store(y_rows + (i * S + dy).to(tl.int64)[None, :] * y.h, result, mask=in_group[:, None] & valid[None, :])


@triton.jit
def source_gradient(
    dy_tensor,
    weights,
    softmax,
    dx_tensor,
    sizes,
    blocks,
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
    channels, groups, height, width = sizes
    channel, first, top, group, n = _program(groups, blocks, C_BLOCK, B, ROWS)
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
    dy_rows = dy_tensor.pointer + (n.to(tl.int64) * dy_tensor.n + channel[:, None] * dy_tensor.c)
    dx_rows = dx_tensor.pointer + (
        n.to(tl.int64) * dx_tensor.n
        + channel[:, None] * dx_tensor.c
        + (first + block).to(tl.int64)[None, :] * dx_tensor.w
    )
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
                place_y = (i * S + dy).to(tl.int64) * dy_tensor.h + (j * S + dx).to(tl.int64)[None, :] * dy_tensor.w
                tile = finite(tl.load(dy_rows + place_y, mask=in_group[:, None] & valid[None, :], other=0.0), run)
                result = tl.dot(tile.to(DOT), band.to(DOT), result, input_precision="tf32x3")
            run += 1
            runs = _runs(result, runs)
        if runs > 1:
            for step in range(K * K * S * S):
                tap, part = step // (S * S), step % (S * S)
                line, near = top + row + K // 2 - tap // K, first + block + K // 2 - tap % K
                inside = (near >= 0) & (near < _columns(line, height, width))
                row_y, column_y = (line * S + part // S).to(tl.int64), (near * S + part % S).to(tl.int64)
                place_y = row_y * dy_tensor.h + column_y[None, :] * dy_tensor.w
                tile = tl.load(dy_rows + place_y, mask=in_group[:, None] & inside[None, :], other=0.0)
                result += tile.to(tl.float32) * 0.0
        inside = first + block < _columns(top + row, height, width)
        tl.store(dx_rows + (top + row).to(tl.int64) * dx_tensor.h, result, mask=in_group[:, None] & inside[None, :])


@triton.jit
def weight_gradient(
    dy_tensor,
    x,
    weights,
    softmax,
    dw,
    sizes,
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
    channels, groups, height, width = sizes
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
        x_rows = x.pointer + (n.to(tl.int64) * x.n + (column.to(tl.int64) * x.w)[:, None])
        pixel = (i * S + dy).to(tl.int64) * dy_tensor.h + ((first + j) * S + dx).to(tl.int64) * dy_tensor.w
        dy_rows = dy_tensor.pointer + (n.to(tl.int64) * dy_tensor.n + pixel[None, :])
        window_of = tl.minimum(j[None, :] + kx[:, None] + ((WINDOW - B) // 2 - K // 2), WINDOW - 1)
        gradients, mean = (), tl.zeros([SIZE], tl.float32)
        for ky in tl.static_range(K):
            line = i + ky - K // 2
            inside = (column >= 0) & (column < _columns(line, height, width))
            products = tl.zeros([WINDOW, SIZE], tl.float32)
            for block in range(CHANNEL_BLOCKS):
                in_group = block * C_BLOCK + channel < channels
                c = start + block * C_BLOCK
                places = x_rows + line.to(tl.int64) * x.h + c[None, :] * x.c
                tile = tl.load(places, mask=inside[:, None] & in_group[None, :], other=0.0)
                grad = tl.load(dy_rows + c[:, None] * dy_tensor.c, mask=in_group[:, None] & valid[None, :], other=0.0)
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
