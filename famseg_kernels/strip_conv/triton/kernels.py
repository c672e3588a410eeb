"""The kernels of strip_conv2d: y or da of all branches, and the gradients of their weights.

Names are the operation's: a = square(x), r = row(a) of a branch, y = a + Σ column(r), and da, dr, dx their gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from famseg_kernels.finite import finite, nan_unless_finite


class Square(NamedTuple):
    """The square stage; without a weight a = x."""

    weight: Any
    bias: Any  # or None


class Branches(NamedTuple):
    """Weights of each branch, and biases or None."""

    rows: tuple[Any, ...]
    row_biases: tuple[Any, ...]
    cols: tuple[Any, ...]
    col_biases: tuple[Any, ...]


@triton.jit
def _taps(weight, tap, K: tl.constexpr, FLIP: tl.constexpr):
    """Entries of a band: the weight of each tap number, 0 outside the kernel."""
    inside = (tap >= 0) & (tap < K)
    return tl.load(weight + ((K - 1 - tap) if FLIP else tap), mask=inside, other=0.0)


@triton.jit
def _dense_band(weight, K: tl.constexpr, F: tl.constexpr, FLIP: tl.constexpr, DOT: tl.constexpr):
    """[F, F] band that convolves along a frame when multiplied from the left."""
    return _taps(weight, tl.arange(0, F)[None, :] - tl.arange(0, F)[:, None] + K // 2, K, FLIP).to(DOT)


@triton.jit
def _window_band(
    weight, FIRST: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, FLIP: tl.constexpr, DOT
):
    """[SIZE, B] band from the columns FIRST … FIRST + SIZE − 1, counted from the block's first, to the block."""
    return _taps(weight, tl.arange(0, SIZE)[:, None] + FIRST - tl.arange(0, B)[None, :] + K // 2, K, FLIP).to(DOT)


@triton.jit
def _tile(plane, rows, cols, height, width, row_stride, col_stride):
    """[rows, cols] of a plane, 0 outside."""
    inside = ((rows >= 0) & (rows < height))[:, None] & ((cols >= 0) & (cols < width))[None, :]
    # 64 bits: a plane may hold more than 2³¹ elements.
    offsets = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(plane + offsets, mask=inside, other=0.0)


@triton.jit
def _place(tiles, segments, channels):
    """This program's plane, channel, frame number and segment number."""
    program = tl.program_id(0)
    plane = program // (tiles * segments)
    return plane, plane % channels, (program // segments) % tiles, program % segments


@triton.jit
def _spoil(
    x, y, frame, sizes, TALL: tl.constexpr, WIDE: tl.constexpr, F: tl.constexpr, B: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """NaN into this program's pixels of y with something not finite in x at most TALL rows and WIDE columns away."""
    row, mine, segment = frame
    _, height, width = sizes
    for step in range(STEPS):
        col = (segment * STEPS + step) * B + tl.arange(0, B)
        reached = tl.zeros([F, B], tl.float32)
        for down in range(-TALL, TALL + 1):
            for right in range(-WIDE, WIDE + 1):
                reached += _tile(x, row + down, col + right, height, width, width, 1).to(tl.float32) * 0.0
        place = y + row.to(tl.int64)[:, None] * width + col[None, :]
        tl.store(place, reached, mask=mine[:, None] & (col < width)[None, :] & (reached != 0.0))  # of a NaN it is true


@triton.jit
def _stream(
    x, y, square, branches, square_bands, row_bands, col_bands, channel, frame, sizes, run,
    SQUARE: tl.constexpr, FLIP: tl.constexpr, F: tl.constexpr, B: tl.constexpr, WINDOW: tl.constexpr,
    STEPS: tl.constexpr, HOISTED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """All of a program's blocks; from the second run on without what is not finite. NaN if something is not, else 0."""
    BRANCHES: tl.constexpr = len(col_bands)
    row, mine, segment = frame
    _, height, width = sizes
    inside_rows = (row >= 0) & (row < height)
    PAD: tl.constexpr = (WINDOW - B) // 2
    REACH: tl.constexpr = 1 if BRANCHES > 0 else 0  # blocks of `a` needed on either side
    a_previous = tl.zeros([F, B], DOT)
    a = tl.zeros([F, B], tl.float32)
    seen = tl.zeros([F, B], tl.float32)
    for step in range(STEPS + 2 * REACH):
        first = (segment * STEPS + step - REACH) * B
        col = first + tl.arange(0, B)
        if SQUARE == 0:
            a_next = _tile(x, row, col, height, width, width, 1).to(tl.float32)
            seen += a_next * 0.0
            a_next = finite(a_next, 1)
        else:
            a_next = tl.zeros([F, B], tl.float32)
            window = first - PAD + tl.arange(0, WINDOW)
            if HOISTED:
                for dy in tl.static_range(SQUARE):
                    shifted = finite(_tile(x, row + (dy - SQUARE // 2), window, height, width, width, 1), run)
                    a_next = tl.dot(shifted.to(DOT), square_bands[dy], a_next, input_precision="tf32x3")
            else:
                for dy in range(SQUARE):
                    kernel_row = square.weight + (channel * SQUARE + ((SQUARE - 1 - dy) if FLIP else dy)) * SQUARE
                    band = _window_band(kernel_row, -PAD, SQUARE, WINDOW, B, FLIP, DOT)
                    shifted = finite(_tile(x, row + (dy - SQUARE // 2), window, height, width, width, 1), run)
                    a_next = tl.dot(shifted.to(DOT), band, a_next, input_precision="tf32x3")
            if square.bias is not None:
                a_next += tl.load(square.bias + channel).to(tl.float32)
            a_next = tl.where(inside_rows[:, None] & ((col >= 0) & (col < width))[None, :], a_next, 0.0)
        if step >= 2 * REACH:
            if REACH == 0:
                result = a_next
                out = col
            else:
                result = a
                out = col - B
                inside = inside_rows[:, None] & (out < width)[None, :]
                for i in tl.static_range(BRANCHES):
                    r = tl.dot(a_previous, row_bands[3 * i], input_precision="tf32x3")
                    r = tl.dot(a.to(DOT), row_bands[3 * i + 1], r, input_precision="tf32x3")
                    r = tl.dot(a_next.to(DOT), row_bands[3 * i + 2], r, input_precision="tf32x3")
                    if branches.row_biases[i] is not None:
                        r += tl.load(branches.row_biases[i] + channel).to(tl.float32)
                    r = tl.where(inside, r, 0.0).to(DOT)
                    result = tl.dot(col_bands[i], r, result, input_precision="tf32x3")
                    if branches.col_biases[i] is not None:
                        result += tl.load(branches.col_biases[i] + channel).to(tl.float32)
            if SQUARE > 0:
                seen += result * 0.0
            offsets = row.to(tl.int64)[:, None] * width + out[None, :]
            tl.store(y + offsets, result, mask=mine[:, None] & (out < width)[None, :])
        a_previous = a.to(DOT)
        a = a_next
    return nan_unless_finite(seen)


@triton.jit
def convolve(
    x,
    y,
    square,
    branches,
    sizes,
    tiles,
    segments,
    SQUARE: tl.constexpr,  # size of the square kernel, 0: a = x
    ROWS: tl.constexpr,  # sizes of the row and column kernels, one a branch
    COLS: tl.constexpr,
    FLIP: tl.constexpr,  # turn every kernel round: the transposed convolution
    F: tl.constexpr,  # rows of a frame
    HALO: tl.constexpr,  # of which so many on either side belong to the neighbours
    B: tl.constexpr,  # columns of a block
    WINDOW: tl.constexpr,  # columns of x that the square stage of a block loads
    STEPS: tl.constexpr,  # blocks of a program
    HOISTED: tl.constexpr,  # the square kernel's bands stay in registers
    DOT: tl.constexpr,  # dtype of the factors of products
):
    """y of frames of planes: a program streams over STEPS blocks of one."""
    channels, height, width = sizes
    plane, channel, tile, segment = _place(tiles, segments, channels)
    x += plane.to(tl.int64) * height * width
    y += plane.to(tl.int64) * height * width
    row = tile * (F - 2 * HALO) - HALO + tl.arange(0, F)
    mine = (tl.arange(0, F) >= HALO) & (tl.arange(0, F) < F - HALO) & (row < height)
    frame = (row, mine, segment)
    PAD: tl.constexpr = (WINDOW - B) // 2

    # Bands that stay the same for all blocks; Triton does not hoist their loads out of the loop by itself.
    square_bands = ()
    if HOISTED:
        for dy in tl.static_range(SQUARE):
            kernel_row = square.weight + (channel * SQUARE + ((SQUARE - 1 - dy) if FLIP else dy)) * SQUARE
            square_bands += (_window_band(kernel_row, -PAD, SQUARE, WINDOW, B, FLIP, DOT),)
    row_bands, col_bands = (), ()
    for i in tl.static_range(len(ROWS)):
        for block in tl.static_range(-1, 2):
            row_bands += (_window_band(branches.rows[i] + channel * ROWS[i], block * B, ROWS[i], B, B, FLIP, DOT),)
        col_bands += (_dense_band(branches.cols[i] + channel * COLS[i], COLS[i], F, FLIP, DOT),)

    # The zeros of a band make NaN of what is not finite, so that is left out and put in its places at the end. A square
    # stage loads an element many times: it leaves that out in a second run, for which only a NaN in the result asks.
    run, runs = 0, 1
    if SQUARE == 0:
        seen = _stream(
            x, y, square, branches, square_bands, row_bands, col_bands, channel, frame, sizes, run,
            SQUARE, FLIP, F, B, WINDOW, STEPS, HOISTED, DOT,
        )  # fmt: skip
        runs = tl.where(seen == 0.0, 1, 2)
    else:
        while run < runs:
            seen = _stream(
                x, y, square, branches, square_bands, row_bands, col_bands, channel, frame, sizes, run,
                SQUARE, FLIP, F, B, WINDOW, STEPS, HOISTED, DOT,
            )  # fmt: skip
            runs = tl.where(seen == 0.0, runs, 2)
            run += 1
    if runs > 1:
        tl.debug_barrier()  # what is written next, another thread may have written
        # Of each branch all that is as near as its kernels together reach: where the stages' zero padding cuts one way
        # from pixel to pixel off, there is another one inside the image.
        if len(ROWS) == 0:
            _spoil(x, y, frame, sizes, SQUARE // 2, SQUARE // 2, F, B, STEPS)
        for i in tl.static_range(len(ROWS)):
            _spoil(x, y, frame, sizes, SQUARE // 2 + COLS[i] // 2, SQUARE // 2 + ROWS[i] // 2, F, B, STEPS)


@triton.jit
def _diagonal_sums(products, K: tl.constexpr, B: tl.constexpr, WINDOW: tl.constexpr, T: tl.constexpr):
    """products [B, WINDOW] of a block's columns with the window around it, summed by distance → [T], tap t < K."""
    place = tl.arange(0, B)[:, None] + tl.arange(0, T)[None, :] + (WINDOW - B) // 2 - K // 2
    place = tl.minimum(tl.maximum(place, 0), WINDOW - 1)  # only where T reaches beyond K
    return tl.sum(tl.gather(products, place, 1), 0)


@triton.jit
def strip_gradients(
    source,
    other,
    partial,
    weights,
    biases,
    channels,
    frame_size,
    stream_size,
    frame_stride,
    stream_stride,
    tiles,
    segments,
    ALONG: tl.constexpr,  # sizes of the kernels along the frame, whose convolution of `source` is one factor
    WANTED: tl.constexpr,  # sizes of the kernels along the stream, whose gradients are wanted
    FLIP: tl.constexpr,  # rows are wanted: turn the kernels that convolve; else (columns): turn the gradients
    F: tl.constexpr,
    HALO: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    STEPS: tl.constexpr,
    DOT: tl.constexpr,
    T: tl.constexpr,  # a power of 2 that holds every wanted kernel
    LENGTH: tl.constexpr,  # of a program's partial sums: for each branch the taps' gradients and the factor's sum
):
    """Gradients of row weights: dr = Colᵀ · dy times a, summed by distance; of column weights: the same with the image
    turned, r = a · Row + bias times dy. Each program writes its own sums. source: dy or a, other: a or dy."""
    plane, channel, tile, segment = _place(tiles, segments, channels)
    source += plane.to(tl.int64) * frame_size * stream_size
    other += plane.to(tl.int64) * frame_size * stream_size
    partial += tl.program_id(0).to(tl.int64) * LENGTH
    row = tile * (F - 2 * HALO) - HALO + tl.arange(0, F)
    mine = (tl.arange(0, F) >= HALO) & (tl.arange(0, F) < F - HALO) & (row < frame_size)
    bands, products, sums = (), (), ()
    for i in tl.static_range(len(ALONG)):
        bands += (_dense_band(weights[i] + channel * ALONG[i], ALONG[i], F, FLIP, DOT),)
        products += (tl.zeros([B, WINDOW], tl.float32),)
        sums += (tl.zeros([F], tl.float32),)
    for step in range(STEPS):
        first = (segment * STEPS + step) * B
        col = first + tl.arange(0, B)
        window = first - (WINDOW - B) // 2 + tl.arange(0, WINDOW)
        block = _tile(source, row, col, frame_size, stream_size, frame_stride, stream_stride).to(DOT)
        around = _tile(other, row, window, frame_size, stream_size, frame_stride, stream_stride).to(DOT)
        inside = mine[:, None] & (col < stream_size)[None, :]
        new_products, new_sums = (), ()
        for i in tl.static_range(len(ALONG)):
            factor = tl.dot(bands[i], block, input_precision="tf32x3")
            if biases[i] is not None:
                factor += tl.load(biases[i] + channel).to(tl.float32)
            factor = tl.where(inside, factor, 0.0)
            new_sums += (sums[i] + tl.sum(factor, 1),)
            factor = tl.trans(factor.to(DOT))
            new_products += (tl.dot(factor, around, products[i], input_precision="tf32x3"),)
        products = new_products
        sums = new_sums
    for i in tl.static_range(len(ALONG)):
        taps = _diagonal_sums(products[i], WANTED[i], B, WINDOW, T)
        tap = tl.arange(0, T)
        tl.store(partial + (tap if FLIP else (WANTED[i] - 1 - tap)), taps, mask=tap < WANTED[i])
        partial += WANTED[i]
        tl.store(partial, tl.sum(sums[i], 0))
        partial += 1


@triton.jit
def square_gradients(
    da,
    x,
    partial,
    sizes,
    tiles,
    segments,
    SQUARE: tl.constexpr,
    GROUP: tl.constexpr,  # kernel rows of a program
    F: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    STEPS: tl.constexpr,
    DOT: tl.constexpr,
    T: tl.constexpr,
):
    """Gradient of the square weight: da times x shifted by dy rows, summed by column distance."""
    channels, height, width = sizes
    plane, _, tile, segment = _place(tiles, segments, channels)
    da += plane.to(tl.int64) * height * width
    x += plane.to(tl.int64) * height * width
    partial += tl.program_id(0).to(tl.int64) * SQUARE * SQUARE
    row = tile * F + tl.arange(0, F)
    top = tl.program_id(1) * GROUP
    products = ()
    for _i in tl.static_range(GROUP):
        products += (tl.zeros([B, WINDOW], tl.float32),)
    for step in range(STEPS):
        first = (segment * STEPS + step) * B
        window = first - (WINDOW - B) // 2 + tl.arange(0, WINDOW)
        factor = tl.trans(_tile(da, row, first + tl.arange(0, B), height, width, width, 1).to(DOT))
        new = ()
        for i in tl.static_range(GROUP):
            shifted = _tile(x, row + (top + i - SQUARE // 2), window, height, width, width, 1).to(DOT)
            new += (tl.dot(factor, shifted, products[i], input_precision="tf32x3"),)
        products = new
    for i in tl.static_range(GROUP):
        taps = _diagonal_sums(products[i], SQUARE, B, WINDOW, T)
        tap = tl.arange(0, T)
        place = (top + i) * SQUARE + tap
        tl.store(partial + place, taps, mask=(tap < SQUARE) & (place < SQUARE * SQUARE))
