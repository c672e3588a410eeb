"""The kernels of reassemble and carafe: y, the gradient of logits or masks, and that of x.

Tiles are of P pixels × C channels; what belongs to a pixel alone, a tap's weight above all, is a block [P]. Pixels are
those of x, row by row. A part is one of the S² results of a pixel: S·i + part // S, S·j + part % S.

A tap outside the image has the closest pixel inside read in its place, which is another tap of the same pixel, and its
weight made 0: so a value that is not finite reaches no pixel that it does not reach anyway, and no load has a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Whether a tile is [C, P], or else [P, C]. Lanes shall have a pixel each where channels do not follow each other in
# memory. That pixels do, the compiler does not see. Triton up to 3.6 then gives lanes to the first dimension, later
# ones to the last; with the other one every weight would go through shared memory, and registers to the stack.
_PIXELS_LAST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))


class Image(NamedTuple):
    """A tensor (N, C, H, W) with its strides."""

    pointer: Any
    n: Any
    c: Any
    h: Any
    w: Any


class Sizes(NamedTuple):
    """Of x; channels are those of a group."""

    channels: Any
    groups: Any
    height: Any
    width: Any


class Blocks(NamedTuple):
    """How many there are of blocks of channels, and of pixels."""

    channels: Any
    pixels: Any


@triton.jit
def _larger(a, b):
    """The larger one, NaN if either is: PTX's plain maximum gives the other operand for a NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pixels(first, width, count, P: tl.constexpr):
    """Which of P pixels are among the `count` ones, and the row and column of each; the last one's for the others."""
    pixel = first + tl.arange(0, P)
    valid = pixel < count
    pixel = tl.minimum(pixel, count - 1)
    return valid, pixel // width, pixel % width


@triton.jit
def _inside(position, size):
    """Whether a row or column is one of the image; itself, or the closest one that is."""
    return (position >= 0) & (position < size), tl.minimum(tl.maximum(position, 0), size - 1)


@triton.jit
def _by_pixel(block):
    """A block [P] as a part of tiles."""
    return block[None, :] if _PIXELS_LAST else block[:, None]


@triton.jit
def _by_channel(block):
    """A block [C] as a part of tiles."""
    return block[:, None] if _PIXELS_LAST else block[None, :]


@triton.jit
def _zeros(P: tl.constexpr, C: tl.constexpr):
    """A tile of them."""
    return tl.zeros([C, P] if _PIXELS_LAST else [P, C], tl.float32)


@triton.jit
def _sum_of_channels(tile):
    """A block [P]."""
    return tl.sum(tile, 0 if _PIXELS_LAST else 1)


@triton.jit
def _place(image, i, j):
    """Where pixels lie in a channel."""
    return i.to(tl.int64) * image.h + j.to(tl.int64) * image.w


@triton.jit
def _at(image, n, channel, i, j):
    """Addresses of elements. Channels may lie 2³¹ elements apart and more."""
    return image.pointer + (n * image.n + tl.cast(channel, tl.int64) * image.c) + _place(image, i, j)


@triton.jit
def _weight_at(weights, n, group, i, j, part, K: tl.constexpr, S: tl.constexpr, SOFTMAX: tl.constexpr):
    """Addresses of the first tap's weights: logits are planes of parts, masks are images as large as y."""
    if SOFTMAX:
        return _at(weights, n, group * (K * K * S * S) + part, i, j)
    return _at(weights, n, group * (K * K), i * S + part // S, j * S + part % S)


@triton.jit
def _tap_stride(weights, S: tl.constexpr, SOFTMAX: tl.constexpr):
    return tl.cast(weights.c, tl.int64) * (S * S if SOFTMAX else 1)


@triton.jit
def _load(channels, pixels, in_group, EVEN: tl.constexpr):
    """A tile, by the addresses of its channels and where its pixels lie in each; with EVEN all are of the group."""
    if EVEN:
        return tl.load(_by_channel(channels) + _by_pixel(pixels))
    return tl.load(_by_channel(channels) + _by_pixel(pixels), mask=_by_channel(in_group), other=0.0)


@triton.jit
def reassemble_forward(
    x,
    weights,
    y,
    sizes,
    blocks,
    K: tl.constexpr,
    S: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PARTS: tl.constexpr,  # of a program
    P: tl.constexpr,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,  # tiles of C channels, which share the weights
    EVEN: tl.constexpr,  # CHUNKS · C divides a group's channels
):
    """y of P pixels. The softmax is taken a kernel row at a time: results are those of the taps so far, and change
    with the maximum and the sum of exponentials. (A sum divided by after the loop would bring every weight into
    the layout in which the loop leaves that sum, through shared memory.)"""
    channels, groups, height, width = sizes
    program = tl.program_id(0)
    first = (program % blocks.channels) * (C * CHUNKS) + tl.arange(0, C)
    program //= blocks.channels
    valid, i, j = _pixels((program % blocks.pixels) * P, width, height * width, P)
    program //= blocks.pixels
    group, n = program % groups, (program // groups).to(tl.int64)
    part_0 = tl.program_id(1) * PARTS

    tap_stride = _tap_stride(weights, S, SOFTMAX)
    taps, maxima, totals, results = (), (), (), ()
    for part in tl.static_range(PARTS):
        taps += (_weight_at(weights, n, group, i, j, part_0 + part, K, S, SOFTMAX),)
        maxima += (tl.full([P], -3.0e38, tl.float32),)  # not −∞: ∞ − ∞ where the first logit is −∞
        totals += (tl.zeros([P], tl.float32),)
        for _ in tl.static_range(CHUNKS):
            results += (_zeros(P, C),)
    x_channels = x.pointer + n * x.n + (group * channels + first).to(tl.int64) * x.c
    for ky in range(K):
        row_inside, row = _inside(i + ky - K // 2, height)
        # All loads first: they are under way together.
        tiles, insides, factors, scales = (), (), (), ()
        for kx in tl.static_range(K):
            column_inside, column = _inside(j + kx - K // 2, width)
            insides += (tl.where(row_inside & column_inside, 1.0, 0.0),)
            place = _place(x, row, column)
            for chunk in tl.static_range(CHUNKS):
                from_chunk = x_channels + tl.cast(x.c, tl.int64) * (chunk * C)
                tiles += (_load(from_chunk, place, first + chunk * C < channels, EVEN),)
        for part in tl.static_range(PARTS):
            for kx in tl.static_range(K):
                factors += (tl.load(taps[part] + (ky * K + kx) * tap_stride).to(tl.float32),)
        if SOFTMAX:
            logits, factors = factors, ()
            old_maxima, old_totals, old_results = maxima, totals, results
            maxima, totals, results, scales = (), (), (), ()
            for part in tl.static_range(PARTS):
                maximum = old_maxima[part]
                for kx in tl.static_range(K):
                    maximum = _larger(maximum, logits[part * K + kx])
                before = old_totals[part] * tl.exp(old_maxima[part] - maximum)
                total, exponentials = before, ()
                for kx in tl.static_range(K):
                    exponentials += (tl.exp(logits[part * K + kx] - maximum),)
                    total += exponentials[kx]
                # There may be nothing but −∞ so far, but not in the end.
                scale = 1.0 / tl.where((total == 0.0) & (ky < K - 1), 1.0, total)
                factors += exponentials
                scales += (scale,)
                for chunk in tl.static_range(CHUNKS):
                    results += (old_results[part * CHUNKS + chunk] * _by_pixel(before * scale),)
                maxima += (maximum,)
                totals += (total,)
        for kx in tl.static_range(K):
            old_results, results = results, ()
            for part in tl.static_range(PARTS):
                # Times 0, not 0: the weight outside may be NaN.
                factor = factors[part * K + kx] * (insides[kx] * scales[part] if SOFTMAX else insides[kx])
                for chunk in tl.static_range(CHUNKS):
                    tile = tiles[kx * CHUNKS + chunk].to(tl.float32)
                    results += (old_results[part * CHUNKS + chunk] + tile * _by_pixel(factor),)
    for part in tl.static_range(PARTS):
        at = _at(y, n, group * channels, i * S + (part_0 + part) // S, j * S + (part_0 + part) % S)
        for chunk in tl.static_range(CHUNKS):
            channel = first + chunk * C
            to = _by_pixel(at) + _by_channel(channel.to(tl.int64) * y.c)
            tl.store(to, results[part * CHUNKS + chunk], mask=_by_pixel(valid) & _by_channel(channel < channels))


@triton.jit
def weight_gradient(
    dy,
    x,
    weights,
    softmax,
    dw,
    sizes,
    pixel_blocks,
    K: tl.constexpr,
    S: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PARTS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,  # tiles of C channels, one after the other
    EVEN: tl.constexpr,
):
    """dw[tap, part] = Σ_c x[c, the tap's pixel] · dy[c, part], then through the softmax. Its log Σ exp is left in
    `softmax` (N · groups, S², H, W) for the gradient of x. Here loads outside have a mask: without a softmax
    a pixel's taps do not share what is not finite."""
    channels, groups, height, width = sizes
    program = tl.program_id(0)
    valid, i, j = _pixels((program % pixel_blocks) * P, width, height * width, P)
    program //= pixel_blocks
    group, n = program % groups, (program // groups).to(tl.int64)
    part_0 = tl.program_id(1) * PARTS

    gradients, dy_places = (), ()
    for part in tl.static_range(PARTS):
        dy_places += (_place(dy, i * S + (part_0 + part) // S, j * S + (part_0 + part) % S),)
    for _ in tl.static_range(K * K * PARTS):
        gradients += (tl.zeros([P], tl.float32),)
    if dw is not None:
        for block in range(CHANNEL_BLOCKS):
            channel = block * C + tl.arange(0, C)
            in_group = channel < channels
            c = (group * channels + channel).to(tl.int64)
            x_channels, dy_channels = x.pointer + n * x.n + c * x.c, dy.pointer + n * dy.n + c * dy.c
            grads = ()
            for part in tl.static_range(PARTS):
                grads += (_load(dy_channels, dy_places[part], in_group, EVEN).to(tl.float32),)
            old_gradients, gradients = gradients, ()
            for tap in tl.static_range(K * K):
                row_inside, row = _inside(i + tap // K - K // 2, height)
                column_inside, column = _inside(j + tap % K - K // 2, width)
                mask = _by_pixel(row_inside & column_inside)
                if not EVEN:
                    mask &= _by_channel(in_group)
                tile = tl.load(_by_channel(x_channels) + _by_pixel(_place(x, row, column)), mask=mask, other=0.0)
                for part in tl.static_range(PARTS):
                    products = _sum_of_channels(tile.to(tl.float32) * grads[part])
                    gradients += (old_gradients[tap * PARTS + part] + products,)
    tap_stride = _tap_stride(weights, S, SOFTMAX)
    for part in tl.static_range(PARTS):
        factors, mean = (), tl.zeros([P], tl.float32)
        if SOFTMAX:
            at = _weight_at(weights, n, group, i, j, part_0 + part, K, S, SOFTMAX)
            logits, maximum = (), tl.full([P], -3.0e38, tl.float32)
            for tap in tl.static_range(K * K):
                logits += (tl.load(at + tap * tap_stride).to(tl.float32),)
                maximum = _larger(maximum, logits[tap])
            total = tl.zeros([P], tl.float32)
            for tap in tl.static_range(K * K):
                factors += (tl.exp(logits[tap] - maximum),)
                total += factors[tap]
                mean += factors[tap] * gradients[tap * PARTS + part]
            scale = 1.0 / total
            mean *= scale
            plane = (n * groups + group) * (S * S) + part_0 + part
            tl.store(softmax + plane * (height * width) + (i * width + j), maximum + tl.log(total), mask=valid)
        if dw is not None:
            to = _weight_at(dw, n, group, i, j, part_0 + part, K, S, SOFTMAX)
            dw_stride = _tap_stride(dw, S, SOFTMAX)
            for tap in tl.static_range(K * K):
                gradient = gradients[tap * PARTS + part]
                if SOFTMAX:
                    gradient = factors[tap] * scale * (gradient - mean)
                tl.store(to + tap * dw_stride, gradient, mask=valid)


@triton.jit
def source_gradient(
    dy,
    weights,
    softmax,
    dx,
    sizes,
    blocks,
    K: tl.constexpr,
    S: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,  # of x: a tile of dy is of use to pixels of several
    P: tl.constexpr,  # pixels of one row and those below them
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dx[i, j] = Σ over taps and parts of weight · dy of the pixel (i − ky + r, j − kx + r), which used (i, j)."""
    channels, groups, height, width = sizes
    program = tl.program_id(0)
    first = (program % blocks.channels) * (C * CHUNKS) + tl.arange(0, C)
    program //= blocks.channels
    valid, i, j = _pixels((program % blocks.pixels) * P, width, tl.cdiv(height, ROWS) * width, P)
    program //= blocks.pixels
    group, n = program % groups, (program // groups).to(tl.int64)
    i *= ROWS

    tap_stride = _tap_stride(weights, S, SOFTMAX)
    results = ()
    for _ in tl.static_range(ROWS * CHUNKS):
        results += (_zeros(P, C),)
    dy_channels = dy.pointer + n * dy.n + (group * channels + first).to(tl.int64) * dy.c
    for step in range(K * S * S):
        kx, part = step // (S * S), step % (S * S)
        column_inside, column = _inside(j + K // 2 - kx, width)
        plane = ((n * groups + group) * (S * S) + part) * (height * width)
        tiles, insides, factors, log_totals = (), (), (), ()
        for line in tl.static_range(ROWS + K - 1):
            row_inside, row = _inside(i + line - K // 2, height)
            insides += (row_inside & column_inside,)
            if SOFTMAX:
                log_totals += (tl.load(softmax + plane + (row * width + column)),)
            at = _weight_at(weights, n, group, row, column, part, K, S, SOFTMAX)
            for down in tl.static_range(ROWS):  # the kernel row that takes this line to the row so far down
                if line <= down + K - 1 and line >= down:
                    factors += (tl.load(at + ((down + K - 1 - line) * K + kx) * tap_stride),)
                else:
                    factors += (0.0,)
            place = _place(dy, row * S + part // S, column * S + part % S)
            for chunk in tl.static_range(CHUNKS):
                from_chunk = dy_channels + tl.cast(dy.c, tl.int64) * (chunk * C)
                tiles += (_load(from_chunk, place, first + chunk * C < channels, EVEN),)
        for line in tl.static_range(ROWS + K - 1):
            old_results, results = results, ()
            for down in tl.static_range(ROWS):
                if line <= down + K - 1 and line >= down:
                    factor = factors[line * ROWS + down].to(tl.float32)
                    if SOFTMAX:
                        factor = tl.exp(factor - log_totals[line])
                    factor = tl.where(insides[line], factor, 0.0)
                    for chunk in tl.static_range(CHUNKS):
                        tile = tiles[line * CHUNKS + chunk].to(tl.float32)
                        results += (old_results[down * CHUNKS + chunk] + tile * _by_pixel(factor),)
                else:
                    for chunk in tl.static_range(CHUNKS):
                        results += (old_results[down * CHUNKS + chunk],)
    for down in tl.static_range(ROWS):
        at = _at(dx, n, group * channels, i + down, j)
        for chunk in tl.static_range(CHUNKS):
            channel = first + chunk * C
            to = _by_pixel(at) + _by_channel(channel.to(tl.int64) * dx.c)
            inside = _by_pixel(valid & (i + down < height)) & _by_channel(channel < channels)
            tl.store(to, results[down * CHUNKS + chunk], mask=inside)
