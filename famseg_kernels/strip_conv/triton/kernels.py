"""The kernels of strip_conv2d: sums over taps on FMA units.

Names are the operation's: a = square(x), r = row(a) of a branch, y = a + Σ column(r), and da, dr, dx their gradients.
Every program goes down `rows` rows of its lanes' columns, those of its place in the second axis of the grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from famseg_kernels.strip_conv.triton.pixels import columns_of, lanes_of, load_row, split, store_row, store_sums


class Branches(NamedTuple):
    """Weights of each branch, and biases or None."""

    rows: tuple[Any, ...]
    row_biases: tuple[Any, ...]
    cols: tuple[Any, ...]
    col_biases: tuple[Any, ...]


@triton.jit
def _taps(weight, channel, used, SIZE: tl.constexpr, FLIP: tl.constexpr):
    """A tuple of the weights [LANES] of a lane's channel, in fp32."""
    taps = ()
    for first in tl.static_range(0, SIZE, 8):  # few accesses: Triton takes long to compile many
        tap = first + tl.arange(0, 8)[None, :]
        place = weight + channel[:, None] * SIZE + (SIZE - 1 - tap if FLIP else tap)
        tile = tl.load(place, mask=used[:, None] & (tap < SIZE), other=0.0).to(tl.float32)
        taps += split(tile, channel.shape[0], 8)
    return taps[:SIZE]


@triton.jit
def _times(value, COUNT: tl.constexpr):
    """A tuple of COUNT times the same."""
    values = ()
    for _ in tl.static_range(COUNT):
        values += (value,)
    return values


@triton.jit
def _bias(bias, channel, used):
    """[LANES] in fp32, 0 for None."""
    if bias is None:
        return channel * 0.0
    else:
        return tl.load(bias + channel, mask=used, other=0.0).to(tl.float32)


@triton.jit
def convolve_square(
    x, y, weight, bias, sizes, rows,
    SQUARE: tl.constexpr,  # size of the kernel
    FLIP: tl.constexpr,  # turn the kernel round: the transposed convolution
    ROWS: tl.constexpr,  # rows at a time
    STRIDE: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """y: a convolution with a square kernel."""
    LANES: tl.constexpr = SLOW * FAST
    REACH: tl.constexpr = SQUARE // 2
    SEEN: tl.constexpr = GROUP + 2 * REACH
    offset, channel, col, used = lanes_of(sizes, STRIDE, SLOW, FAST, GROUP)
    constant = _bias(bias, channel, used)
    taps = ()
    if SQUARE <= 7:  # else they do not fit in registers
        taps = _taps(weight, channel, used, SQUARE * SQUARE, FLIP)
    first = tl.program_id(1) * rows
    end = tl.minimum(first + rows, sizes[2])
    top = first
    while top < end:
        if SQUARE <= 7:
            seen = ()
            for i in tl.static_range(ROWS + SQUARE - 1):
                raw = load_row(x + offset, top + i - REACH, col, used, sizes, STRIDE, GROUP, REACH, PIECE)
                seen += columns_of(raw, LANES, GROUP, REACH, PIECE)
            for i in tl.static_range(ROWS):
                result = ()
                for j in tl.static_range(GROUP):
                    total = constant
                    for dy in tl.static_range(SQUARE):
                        for dx in tl.static_range(SQUARE):
                            total = tl.fma(taps[dy * SQUARE + dx], seen[(i + dy) * SEEN + j + dx], total)
                    result += (total,)
                mine = used & (top + i < end)
                store_row(y + offset, top + i, col, mine, sizes, result, LANES, STRIDE, GROUP, PIECE)
        else:
            tl.static_assert(ROWS == 1)
            result = _times(constant, GROUP)
            for dy in range(SQUARE):
                raw = load_row(x + offset, top + dy - REACH, col, used, sizes, STRIDE, GROUP, REACH, PIECE)
                seen = columns_of(raw, LANES, GROUP, REACH, PIECE)
                kernel_row = weight + (SQUARE - 1 - dy if FLIP else dy) * SQUARE
                for dx in tl.static_range(SQUARE):
                    place = kernel_row + channel * SQUARE * SQUARE + (SQUARE - 1 - dx if FLIP else dx)
                    tap = tl.load(place, mask=used, other=0.0).to(tl.float32)
                    totals = ()
                    for j in tl.static_range(GROUP):
                        totals += (tl.fma(tap, seen[j + dx], result[j]),)
                    result = totals
            store_row(y + offset, top, col, used, sizes, result, LANES, STRIDE, GROUP, PIECE)
        top += ROWS


@triton.jit
def convolve_strips(
    a, y, branches, sizes, rows,
    ROWS: tl.constexpr,  # sizes of the row and column kernels, one a branch
    COLS: tl.constexpr,
    WIDE: tl.constexpr,  # half of the longest of each
    TALL: tl.constexpr,
    FLIP: tl.constexpr,  # turn every kernel round: the transposed convolution
    STRIDE: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """y = a + Σ column(row(a)): each row of r is added to the sums of all rows of y that it reaches.

    Turned round it is the gradient of a: without biases row and column convolutions commute.
    """
    LANES: tl.constexpr = SLOW * FAST
    offset, channel, col, used = lanes_of(sizes, STRIDE, SLOW, FAST, GROUP)
    row_taps, col_taps, row_biases = (), (), ()
    constant = channel * 0.0
    for i in tl.static_range(len(ROWS)):
        row_taps += (_taps(branches.rows[i], channel, used, ROWS[i], FLIP),)
        col_taps += (_taps(branches.cols[i], channel, used, COLS[i], FLIP),)
        row_biases += (_bias(branches.row_biases[i], channel, used),)
        constant += _bias(branches.col_biases[i], channel, used)
    sums = _times(constant, (2 * TALL + 1) * GROUP)  # of the rows from TALL above the row of r to TALL below it
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, sizes[2])
    first = tl.maximum(begin - TALL, 0)
    last = tl.minimum(end + TALL, sizes[2]) - 1
    raw = load_row(a + offset, first, col, used, sizes, STRIDE, GROUP, WIDE, PIECE)
    row = first
    while row <= last:  # the interpreter's range takes no tensors
        seen = columns_of(raw, LANES, GROUP, WIDE, PIECE)
        raw = load_row(a + offset, tl.minimum(row + 1, last), col, used, sizes, STRIDE, GROUP, WIDE, PIECE)
        r = ()
        for i in tl.static_range(len(ROWS)):
            for j in tl.static_range(GROUP):
                total = row_biases[i]
                for tap in tl.static_range(len(row_taps[i])):
                    total = tl.fma(row_taps[i][tap], seen[WIDE - ROWS[i] // 2 + j + tap], total)
                r += (total,)
        totals = ()
        for t in tl.static_range(2 * TALL + 1):
            for j in tl.static_range(GROUP):
                total = sums[(t + 1) * GROUP + j] if t < 2 * TALL else constant
                for i in tl.static_range(len(COLS)):
                    if t >= TALL - COLS[i] // 2 and t <= TALL + COLS[i] // 2:
                        total = tl.fma(col_taps[i][COLS[i] // 2 + TALL - t], r[i * GROUP + j], total)
                if t == TALL:
                    total += seen[WIDE + j]
                totals += (total,)
        sums = totals
        mine = used & (row - TALL >= begin)
        store_row(y + offset, row - TALL, col, mine, sizes, sums[:GROUP], LANES, STRIDE, GROUP, PIECE)
        row += 1
    for t in tl.static_range(1, TALL + 1):  # below the last row r is zero
        row = last - TALL + t
        mine = used & (row >= begin) & (row < end)
        store_row(y + offset, row, col, mine, sizes, sums[t * GROUP : (t + 1) * GROUP], LANES, STRIDE, GROUP, PIECE)


@triton.jit
def square_gradients(
    da, x, partial, sizes, rows,
    SQUARE: tl.constexpr,
    DEPTH: tl.constexpr,  # kernel rows of a program, those of its place in the third axis of the grid
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Sums of da times x shifted, for each tap of DEPTH kernel rows, and of da."""
    LANES: tl.constexpr = SLOW * FAST
    REACH: tl.constexpr = SQUARE // 2
    offset, channel, col, used = lanes_of(sizes, STRIDE, SLOW, FAST, GROUP)
    up = tl.program_id(2) * DEPTH - REACH
    sums = _times(channel * 0.0, DEPTH * SQUARE + 1)
    first = tl.program_id(1) * rows
    top = first
    end = tl.minimum(first + rows, sizes[2])
    while top < end:
        grads = ()
        for i in tl.static_range(ROWS):
            raw = load_row(da + offset, top + i, col, used, sizes, STRIDE, GROUP, 0, PIECE)
            grads += columns_of(raw, LANES, GROUP, 0, PIECE)
        seen = ()
        for i in tl.static_range(ROWS + DEPTH - 1):
            raw = load_row(x + offset, top + i + up, col, used, sizes, STRIDE, GROUP, REACH, PIECE)
            seen += columns_of(raw, LANES, GROUP, REACH, PIECE)
        totals = ()
        for dy in tl.static_range(DEPTH):
            for dx in tl.static_range(SQUARE):
                total = sums[dy * SQUARE + dx]
                for i in tl.static_range(ROWS):
                    for j in tl.static_range(GROUP):
                        total = tl.fma(grads[i * GROUP + j], seen[(i + dy) * (GROUP + 2 * REACH) + j + dx], total)
                totals += (total,)
        total = sums[DEPTH * SQUARE]
        for i in tl.static_range(ROWS * GROUP):
            total += grads[i]
        totals += (total,)
        sums = totals
        top += ROWS
    partial += tl.program_id(2) * len(sums) * sizes[1]
    store_sums(partial, sums, sizes, tl.num_programs(2) * len(sums), STRIDE, SLOW, FAST, GROUP)


@triton.jit
def row_gradients(
    dy, a, partial, weights, sizes, rows,
    WANTED: tl.constexpr,  # sizes of the row kernels, and of the column kernels
    ALONG: tl.constexpr,
    WIDE: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr,
    STRIDE: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Of each branch sums of dr times a shifted, for each tap of the row kernel, and of dr; then the sum of dy."""
    LANES: tl.constexpr = SLOW * FAST
    offset, channel, col, used = lanes_of(sizes, STRIDE, SLOW, FAST, GROUP)
    zero = channel * 0.0
    taps, sums = (), ()
    for i in tl.static_range(len(ALONG)):
        taps += (_taps(weights[i], channel, used, ALONG[i], True),)
        sums += (_times(zero, WANTED[i] + 1),)
    dy_sum = zero
    first = tl.program_id(1) * rows
    top = first
    end = tl.minimum(first + rows, sizes[2])
    while top < end:
        dr = _times(zero, len(ALONG) * ROWS * GROUP)
        for q in tl.static_range(-TALL, ROWS + TALL):
            raw = load_row(dy + offset, top + q, col, used, sizes, STRIDE, GROUP, 0, PIECE)
            seen = columns_of(raw, LANES, GROUP, 0, PIECE)
            totals = ()
            for i in tl.static_range(len(ALONG)):
                for row in tl.static_range(ROWS):
                    for j in tl.static_range(GROUP):
                        total = dr[(i * ROWS + row) * GROUP + j]
                        if q - row >= -(ALONG[i] // 2) and q - row <= ALONG[i] // 2:
                            total = tl.fma(taps[i][q - row + ALONG[i] // 2], seen[j], total)
                        totals += (total,)
            dr = totals
            if q >= 0 and q < ROWS:
                for j in tl.static_range(GROUP):
                    dy_sum += seen[j]
        seen = ()
        for row in tl.static_range(ROWS):
            raw = load_row(a + offset, top + row, col, used, sizes, STRIDE, GROUP, WIDE, PIECE)
            seen += columns_of(raw, LANES, GROUP, WIDE, PIECE)
        new = ()
        for i in tl.static_range(len(ALONG)):
            totals = ()
            for tap in tl.static_range(len(sums[i]) - 1):
                total = sums[i][tap]
                for row in tl.static_range(ROWS):
                    for j in tl.static_range(GROUP):
                        place = seen[row * (GROUP + 2 * WIDE) + WIDE - WANTED[i] // 2 + j + tap]
                        total = tl.fma(dr[(i * ROWS + row) * GROUP + j], place, total)
                totals += (total,)
            total = sums[i][len(sums[i]) - 1]
            for row in tl.static_range(ROWS):
                for j in tl.static_range(GROUP):
                    total += tl.where(top + row < sizes[2], dr[(i * ROWS + row) * GROUP + j], 0.0)
            totals += (total,)
            new += (totals,)
        sums = new
        top += ROWS
    flat = ()
    for i in tl.static_range(len(sums)):
        flat += sums[i]
    flat += (dy_sum,)
    store_sums(partial, flat, sizes, len(flat), STRIDE, SLOW, FAST, GROUP)


@triton.jit
def col_gradients(
    a, dy, partial, weights, biases, sizes, rows,
    WANTED: tl.constexpr,  # sizes of the column kernels, and of the row kernels
    ALONG: tl.constexpr,
    WIDE: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr,
    STRIDE: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Of each branch sums of r times dy shifted, for each tap of the column kernel."""
    LANES: tl.constexpr = SLOW * FAST
    offset, channel, col, used = lanes_of(sizes, STRIDE, SLOW, FAST, GROUP)
    taps, constants, sums = (), (), ()
    for i in tl.static_range(len(ALONG)):
        taps += (_taps(weights[i], channel, used, ALONG[i], False),)
        constants += (_bias(biases[i], channel, used),)
        sums += (_times(channel * 0.0, WANTED[i]),)
    first = tl.program_id(1) * rows
    top = first
    end = tl.minimum(first + rows, sizes[2])
    while top < end:
        r = ()  # of a row after the other, each branch
        for row in tl.static_range(ROWS):
            raw = load_row(a + offset, top + row, col, used, sizes, STRIDE, GROUP, WIDE, PIECE)
            seen = columns_of(raw, LANES, GROUP, WIDE, PIECE)
            for i in tl.static_range(len(ALONG)):
                constant = tl.where(top + row < sizes[2], constants[i], 0.0)
                for j in tl.static_range(GROUP):
                    total = constant
                    for tap in tl.static_range(len(taps[i])):
                        total = tl.fma(taps[i][tap], seen[WIDE - ALONG[i] // 2 + j + tap], total)
                    r += (total,)
        for q in tl.static_range(-TALL, ROWS + TALL):
            raw = load_row(dy + offset, top + q, col, used, sizes, STRIDE, GROUP, 0, PIECE)
            seen = columns_of(raw, LANES, GROUP, 0, PIECE)
            new = ()
            for i in tl.static_range(len(ALONG)):
                totals = ()
                for tap in tl.static_range(len(sums[i])):
                    total = sums[i][tap]
                    if q + tap - WANTED[i] // 2 >= 0 and q + tap - WANTED[i] // 2 < ROWS:
                        for j in tl.static_range(GROUP):
                            total = tl.fma(r[((q + tap - WANTED[i] // 2) * len(ALONG) + i) * GROUP + j], seen[j], total)
                    totals += (total,)
                new += (totals,)
            sums = new
        top += ROWS
    flat = ()
    for i in tl.static_range(len(sums)):
        flat += sums[i]
    store_sums(partial, flat, sizes, len(flat), STRIDE, SLOW, FAST, GROUP)
