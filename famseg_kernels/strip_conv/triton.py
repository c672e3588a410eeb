"""strip_conv2d on NVIDIA GPUs with Triton: depthwise convolutions as products with banded matrices.

Triton can neither shift a tensor that lives in registers nor index shared memory, and a strip convolution is nothing
but shifts. A product with a banded Toeplitz matrix is a shift and a sum in one, it runs on tensor cores, and cutting
the band off at the border is the zero padding. So a plane's result is

    y = a + Σ_i Col_i · (inside ∘ (a · Row_i + row_bias_i)) + col_bias_i,   a = inside ∘ (Σ_dy x↓dy · Square_dy + bias)

A program owns some rows of one (n, c) plane, its frame, and streams over the columns in blocks of B: `a` of the next
block comes from x by loads shifted by dy, a row convolution reaches one block to either side (B is at least half a
kernel), a column convolution is one dense product over the frame. Nothing but x and y touches memory; a plane higher
than a frame is cut into frames that overlap by the longest column kernel.

Without biases the strips commute, Col · (a · Row) = (Col · a) · Row, so the gradient of `a` is the same kernel over
the incoming gradient with the weights turned round, and the gradient of x is its square stage alone, likewise.

Cost an element, for 5 and (7, 11, 21), frame F = 64, B = 16: 5·32 + 3·48 + 3·F = 496 multiply–adds on tensor
cores where 103 are useful, 0.24 clocks of an SM at an H200's dense bf16 rate (2048 a clock; an A100 has 1024), and as
compiled for sm_90 65 instructions a thread, 0.5 clocks to issue; both times 1.5 for the overlap of frames on 128 rows,
1 on 64. 103 FMAs take 0.8 clocks, 2 passes over memory 0.2. So forward in 16 bits should be bound by issuing
instructions, at or below the FMA bound; the gradient of x is two such launches. fp32 takes "tf32x3", three TF32
products that keep 22 bits of each factor, and is bound by tensor cores: Triton's own fp32 dot runs on FMA units, where
496 instead of 103 multiply–adds could not win. Plain TF32 is never used. No GPU has run this yet.

A product with a band multiplies zeros too, which makes NaN of what is not finite in x beyond the kernels' reach: where
that shows, a program leaves it out and puts it in its places by itself. Gradients of weights have no such places: what
is not finite in a channel may spoil all of that channel's, but none of another's. Intermediate `a` and row results are
rounded to x's dtype, as tensor cores take them; sums are fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from famseg_kernels import backends, checks, launch
from famseg_kernels.finite import finite, nan_unless_finite
from famseg_kernels.spec import Backend
from famseg_kernels.strip_conv import spec

# --- the kernels -----------------------------------------------------------------------------------------------


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
    x, y, row, mine, segment, height, width, TALL: tl.constexpr, WIDE: tl.constexpr, F: tl.constexpr, B: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """NaN into this program's pixels of y with something not finite in x at most TALL rows and WIDE columns away."""
    for step in range(STEPS):
        col = (segment * STEPS + step) * B + tl.arange(0, B)
        reached = tl.zeros([F, B], tl.float32)
        for down in range(-TALL, TALL + 1):
            for right in range(-WIDE, WIDE + 1):
                reached += _tile(x, row + down, col + right, height, width, width, 1).to(tl.float32) * 0.0
        place = y + row.to(tl.int64)[:, None] * width + col[None, :]
        tl.store(place, reached, mask=mine[:, None] & (col < width)[None, :] & (reached != 0.0))  # of a NaN it is true


@triton.jit
def _run(
    x, y, square, square_bias, square_bands, row_bands, row_biases, col_bands, col_biases, channel, row, mine, segment,
    height, width, run, SQUARE: tl.constexpr, ROWS: tl.constexpr, FLIP: tl.constexpr, F: tl.constexpr, B: tl.constexpr,
    WINDOW: tl.constexpr, STEPS: tl.constexpr, HOISTED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """All of a program's blocks. NaN if something is not finite, else 0."""
    inside_rows = (row >= 0) & (row < height)
    PAD: tl.constexpr = (WINDOW - B) // 2
    REACH: tl.constexpr = 1 if len(ROWS) > 0 else 0  # blocks of `a` needed on either side
    before = tl.zeros([F, B], DOT)
    here = tl.zeros([F, B], tl.float32)
    seen = tl.zeros([F, B], tl.float32)
    for step in range(STEPS + 2 * REACH):
        first = (segment * STEPS + step - REACH) * B
        col = first + tl.arange(0, B)
        if SQUARE == 0:
            ahead = _tile(x, row, col, height, width, width, 1).to(tl.float32)
            seen += ahead * 0.0
            ahead = finite(ahead, 1)
        else:
            ahead = tl.zeros([F, B], tl.float32)
            window = first - PAD + tl.arange(0, WINDOW)
            if HOISTED:
                for dy in tl.static_range(SQUARE):
                    shifted = finite(_tile(x, row + (dy - SQUARE // 2), window, height, width, width, 1), run)
                    ahead = tl.dot(shifted.to(DOT), square_bands[dy], ahead, input_precision="tf32x3")
            else:
                for dy in range(SQUARE):
                    kernel_row = square + (channel * SQUARE + ((SQUARE - 1 - dy) if FLIP else dy)) * SQUARE
                    band = _window_band(kernel_row, -PAD, SQUARE, WINDOW, B, FLIP, DOT)
                    shifted = finite(_tile(x, row + (dy - SQUARE // 2), window, height, width, width, 1), run)
                    ahead = tl.dot(shifted.to(DOT), band, ahead, input_precision="tf32x3")
            if square_bias is not None:
                ahead += tl.load(square_bias + channel).to(tl.float32)
            ahead = tl.where(inside_rows[:, None] & ((col >= 0) & (col < width))[None, :], ahead, 0.0)
        if step >= 2 * REACH:
            if REACH == 0:
                result = ahead
                out = col
            else:
                result = here
                out = col - B
                inside = inside_rows[:, None] & (out < width)[None, :]
                for i in tl.static_range(len(ROWS)):
                    strip = tl.dot(before, row_bands[3 * i], input_precision="tf32x3")
                    strip = tl.dot(here.to(DOT), row_bands[3 * i + 1], strip, input_precision="tf32x3")
                    strip = tl.dot(ahead.to(DOT), row_bands[3 * i + 2], strip, input_precision="tf32x3")
                    if row_biases[i] is not None:
                        strip += tl.load(row_biases[i] + channel).to(tl.float32)
                    strip = tl.where(inside, strip, 0.0).to(DOT)
                    result = tl.dot(col_bands[i], strip, result, input_precision="tf32x3")
                    if col_biases[i] is not None:
                        result += tl.load(col_biases[i] + channel).to(tl.float32)
            if SQUARE > 0:
                seen += result * 0.0
            offsets = row.to(tl.int64)[:, None] * width + out[None, :]
            tl.store(y + offsets, result, mask=mine[:, None] & (out < width)[None, :])
        before = here.to(DOT)
        here = ahead
    return nan_unless_finite(seen)


@triton.jit
def _strips(
    x,
    y,
    square,
    square_bias,
    rows,
    row_biases,
    cols,
    col_biases,
    channels,
    height,
    width,
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
    plane, channel, tile, segment = _place(tiles, segments, channels)
    x += plane.to(tl.int64) * height * width
    y += plane.to(tl.int64) * height * width
    row = tile * (F - 2 * HALO) - HALO + tl.arange(0, F)
    mine = (tl.arange(0, F) >= HALO) & (tl.arange(0, F) < F - HALO) & (row < height)
    PAD: tl.constexpr = (WINDOW - B) // 2

    # Bands that stay the same for all blocks; Triton does not hoist their loads out of the loop by itself.
    square_bands = ()
    if HOISTED:
        for dy in tl.static_range(SQUARE):
            kernel_row = square + (channel * SQUARE + ((SQUARE - 1 - dy) if FLIP else dy)) * SQUARE
            square_bands += (_window_band(kernel_row, -PAD, SQUARE, WINDOW, B, FLIP, DOT),)
    row_bands, col_bands = (), ()
    for i in tl.static_range(len(ROWS)):
        for block in tl.static_range(-1, 2):
            row_bands += (_window_band(rows[i] + channel * ROWS[i], block * B, ROWS[i], B, B, FLIP, DOT),)
        col_bands += (_dense_band(cols[i] + channel * COLS[i], COLS[i], F, FLIP, DOT),)

    # The zeros of a band make NaN of what is not finite, so that is left out and put in its places at the end. A square
    # stage loads an element many times: it leaves that out in a second run, for which only a NaN in the result asks.
    run, runs = 0, 1
    if SQUARE == 0:
        seen = _run(
            x, y, square, square_bias, square_bands, row_bands, row_biases, col_bands, col_biases, channel, row, mine,
            segment, height, width, run, SQUARE, ROWS, FLIP, F, B, WINDOW, STEPS, HOISTED, DOT,
        )  # fmt: skip
        runs = tl.where(seen == 0.0, 1, 2)
    else:
        while run < runs:
            seen = _run(
                x, y, square, square_bias, square_bands, row_bands, row_biases, col_bands, col_biases, channel, row,
                mine, segment, height, width, run, SQUARE, ROWS, FLIP, F, B, WINDOW, STEPS, HOISTED, DOT,
            )  # fmt: skip
            runs = tl.where(seen == 0.0, runs, 2)
            run += 1
    if runs > 1:
        tl.debug_barrier()  # what is written next, another thread may have written
        # Of each branch all that is as near as its kernels together reach: where the stages' zero padding cuts one way
        # from pixel to pixel off, there is another one inside the image.
        if len(ROWS) == 0:
            _spoil(x, y, row, mine, segment, height, width, SQUARE // 2, SQUARE // 2, F, B, STEPS)
        for i in tl.static_range(len(ROWS)):
            _spoil(
                x, y, row, mine, segment, height, width, SQUARE // 2 + COLS[i] // 2, SQUARE // 2 + ROWS[i] // 2, F, B,
                STEPS,
            )  # fmt: skip


@triton.jit
def _diagonal_sums(products, K: tl.constexpr, B: tl.constexpr, WINDOW: tl.constexpr, T: tl.constexpr):
    """products [B, WINDOW] of a block's columns with the window around it, summed by distance → [T], tap t < K."""
    place = tl.arange(0, B)[:, None] + tl.arange(0, T)[None, :] + (WINDOW - B) // 2 - K // 2
    place = tl.minimum(tl.maximum(place, 0), WINDOW - 1)  # only where T reaches beyond K
    return tl.sum(tl.gather(products, place, 1), 0)


@triton.jit
def _strip_gradients(
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
    """Gradients of row weights: (Colᵀ · dy) times `a`, summed by distance; of column weights: the same with the
    image turned, (a · Row + bias) times dy. Each program writes its own sums."""
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
def _square_gradients(
    source,
    other,
    partial,
    channels,
    height,
    width,
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
    plane, _, tile, segment = _place(tiles, segments, channels)
    source += plane.to(tl.int64) * height * width
    other += plane.to(tl.int64) * height * width
    partial += tl.program_id(0).to(tl.int64) * SQUARE * SQUARE
    row = tile * F + tl.arange(0, F)
    top = tl.program_id(1) * GROUP
    products = ()
    for _i in tl.static_range(GROUP):
        products += (tl.zeros([B, WINDOW], tl.float32),)
    for step in range(STEPS):
        first = (segment * STEPS + step) * B
        window = first - (WINDOW - B) // 2 + tl.arange(0, WINDOW)
        factor = tl.trans(_tile(source, row, first + tl.arange(0, B), height, width, width, 1).to(DOT))
        new = ()
        for i in tl.static_range(GROUP):
            shifted = _tile(other, row + (top + i - SQUARE // 2), window, height, width, width, 1).to(DOT)
            new += (tl.dot(factor, shifted, products[i], input_precision="tf32x3"),)
        products = new
    for i in tl.static_range(GROUP):
        taps = _diagonal_sums(products[i], SQUARE, B, WINDOW, T)
        tap = tl.arange(0, T)
        place = (top + i) * SQUARE + tap
        tl.store(partial + place, taps, mask=(tap < SQUARE) & (place < SQUARE * SQUARE))


# --- launch configurations ---------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """What `python -m benchmarks.tune` tunes. Shapes of the kernels' tiles follow from it in `_cut`."""

    frame: int  # largest frame, where halos leave the choice
    steps: int  # blocks of a program, at most
    rows_per_warp: int
    num_stages: int


# By compute capability × 10; 0 stands for every other chip and for the interpreter.
CONFIGURATIONS = {
    80: Configuration(frame=64, steps=8, rows_per_warp=16, num_stages=2),
    90: Configuration(frame=64, steps=8, rows_per_warp=16, num_stages=2),
    0: Configuration(frame=64, steps=8, rows_per_warp=16, num_stages=2),
}


class _Cut(NamedTuple):
    """A plane cut into `tiles` frames of F rows that overlap by 2 · HALO, and `segments` of STEPS blocks."""

    tiles: int
    segments: int
    config: launch.Config
    constants: dict[str, Any]  # F, HALO, B, STEPS, DOT as the kernels take them


def _cut(x: Tensor, height: int, width: int, tall: int, wide: int) -> _Cut:
    """Cut planes of height × width for convolutions of sizes `tall` along the frame and `wide` along the stream."""
    capability = launch.capability(x.device)
    tuned = CONFIGURATIONS.get(capability, CONFIGURATIONS[0])
    block = 16 if wide <= 33 else 32  # a row convolution reaches one block to either side: half a kernel at most
    halo = tall // 2
    frame = max(16, triton.next_power_of_2(height))
    if frame > tuned.frame:
        # The overlap must leave a frame room of its own.
        frame = tuned.frame if tuned.frame >= 4 * halo else 128
    if frame >= height:
        halo = 0
    tiles = triton.cdiv(height, frame - 2 * halo)
    blocks = triton.cdiv(width, block)
    steps = max(1, min(tuned.steps, blocks))  # an empty image has no blocks
    # NumPy has no bf16 arithmetic: the interpreter multiplies in fp32.
    dot = torch.float32 if backends.TRITON_INTERPRETS and x.dtype == torch.bfloat16 else x.dtype
    rows, stages = tuned.rows_per_warp, tuned.num_stages
    if x.dtype == torch.float32:
        # Factors take twice the registers, and their three parts as much again: no room for loads of the next block,
        # nor for as many rows. But on Hopper four warps share 64 rows of a product: more of them hold the other factor
        # again.
        rows, stages = rows if capability == 90 else rows // 2, 1
    config = launch.Config(max(1, frame // rows), stages)
    constants = {"F": frame, "HALO": halo, "B": block, "STEPS": steps, "DOT": _TL[dot]}
    return _Cut(tiles, triton.cdiv(blocks, steps), config, constants)


_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- the backend -------------------------------------------------------------------------------------------------


def unsupported(x: Tensor, *_: Any) -> str | None:
    return "its kernels compute in fp32, x is float64" if x.dtype == torch.float64 else None


def forward(
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Sequence[Tensor],
    col_weights: Sequence[Tensor],
    col_biases: Sequence[Tensor],
) -> Tensor:
    """y (N, C, H, W) in x's dtype and memory format."""
    with launch.on(x.device):
        square = _dense((square_weight, square_bias))
        rows = (_dense(row_weights), _dense(spec.unpacked(row_biases, row_weights)))
        cols = (_dense(col_weights), _dense(spec.unpacked(col_biases, col_weights)))
        # channels_last goes through a copy: a program reads planes, and one channel of 32-byte sectors is 16 planes.
        y = _convolve(x.contiguous(), square, *rows, *cols)
        return y.contiguous(memory_format=checks.image_format(x))


def backward(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    row_weights: Sequence[Tensor],
    row_biases: Sequence[Tensor],
    col_weights: Sequence[Tensor],
    col_biases: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of the flattened tensor arguments where `needs`, None elsewhere. Recomputes `a`, saves nothing."""
    with launch.on(x.device):
        return _gradients(
            grad.contiguous(),
            needs,
            x.contiguous(),
            _dense((square_weight, square_bias)),
            _dense(row_weights),
            _dense(row_biases),
            _dense(col_weights),
            len(col_biases),
        )


_NOTHING = (None, None)  # no square stage


def _gradients(
    dy: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    square: tuple[Any, Any],
    rows: tuple[Tensor, ...],
    row_biases: tuple[Tensor, ...],
    cols: tuple[Tensor, ...],
    col_biases: int,
) -> list[Tensor | None]:
    """Contiguous arguments → gradients in any dtype and layout, None where not needed."""
    weight = square[0]
    count = len(rows)
    nothing = (None,) * count
    need_x, need_square, need_square_bias = needs[:3]
    # Where each side's gradients stand in the flattened arguments: row weights, their biases, column weights, theirs.
    of_rows, of_row_biases, of_cols, of_col_biases, end = itertools.accumulate(
        (3, count, len(row_biases), count, col_biases)
    )
    need_rows, need_row_biases = any(needs[of_rows:of_row_biases]), any(needs[of_row_biases:of_cols])
    need_cols, need_col_biases = any(needs[of_cols:of_col_biases]), any(needs[of_col_biases:end])
    found: list[Tensor | None] = [None] * len(needs)
    if need_x or need_square or need_square_bias:
        da = _convolve(dy, _NOTHING, rows, nothing, cols, nothing, flip=True) if count else dy
        if need_x:
            found[0] = da if weight is None else _convolve(da, (weight, None), (), (), (), (), flip=True)
        if need_square and weight is not None:
            found[1] = _correlate_square(da, x, weight)
        if need_square_bias:
            found[2] = _sum_by_channel(da)
    if need_rows or need_row_biases or need_cols:
        a = x if weight is None else _convolve(x, square, (), (), (), ())
        # Branches share a launch and its loads; in fp32 the bands of one fill the registers.
        together = 1 if x.dtype == torch.float32 else 3
        for start in range(0, count, together):
            some = slice(start, start + together)
            if need_rows or need_row_biases:
                taps, sums = _correlate_strips(dy, a, cols[some], nothing[some], rows[some], columns=False)
                found[of_rows + start : of_rows + start + len(taps)] = taps
                if row_biases:
                    found[of_row_biases + start : of_row_biases + start + len(sums)] = sums
            if need_cols:
                taps, _ = _correlate_strips(a, dy, rows[some], (row_biases or nothing)[some], cols[some], columns=True)
                found[of_cols + start : of_cols + start + len(taps)] = taps
    if need_col_biases:
        found[of_col_biases:end] = [_sum_by_channel(dy)] * col_biases  # a column bias is added to y as it is
    return found


def _convolve(
    x: Tensor,
    square: tuple[Any, Any],
    rows: tuple[Tensor, ...],
    row_biases: tuple[Tensor | None, ...],
    cols: tuple[Tensor, ...],
    col_biases: tuple[Tensor | None, ...],
    flip: bool = False,
) -> Tensor:
    weight, bias = square
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n, channels, height, width = x.shape
    if not x.numel():
        return y
    size = 0 if weight is None else weight.shape[-1]
    wide, tall = tuple(t.shape[3] for t in rows), tuple(t.shape[2] for t in cols)
    cut = _cut(x, height, width, max(tall, default=1), max(wide, default=1))
    window = triton.next_power_of_2(cut.constants["B"] + size - 1) if size else 0
    launch.run(
        _strips,
        (n * channels * cut.tiles * cut.segments,),
        cut.config,
        x,
        y,
        weight,
        bias,
        rows,
        row_biases,
        cols,
        col_biases,
        channels,
        height,
        width,
        cut.tiles,
        cut.segments,
        SQUARE=size,
        ROWS=wide,
        COLS=tall,
        FLIP=flip,
        WINDOW=window,
        # Bands of a longer square kernel would not fit in registers, nor would those of fp32, split into three parts.
        HOISTED=size <= (3 if x.dtype == torch.float32 else 7),
        **cut.constants,
    )
    return y


def _correlate_strips(
    source: Tensor,
    other: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    wanted: tuple[Tensor, ...],
    columns: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients (C, K) of the wanted weights and (C,) of the sums of their factors, in fp32."""
    n, channels, height, width = source.shape
    along, across = tuple(max(t.shape[2:]) for t in weights), tuple(max(t.shape[2:]) for t in wanted)
    size, strides = ((width, height), (1, width)) if columns else ((height, width), (width, 1))
    cut = _cut(source, *size, max(along), max(across))
    length = sum(across) + len(across)
    parts = cut.tiles * cut.segments
    partial = torch.empty((n, channels, parts, length), dtype=torch.float32, device=source.device)
    if partial.numel():
        launch.run(
            _strip_gradients,
            (n * channels * parts,),
            cut.config,
            source,
            other,
            partial,
            weights,
            biases,
            channels,
            *size,
            *strides,
            cut.tiles,
            cut.segments,
            ALONG=along,
            WANTED=across,
            FLIP=not columns,
            WINDOW=triton.next_power_of_2(cut.constants["B"] + max(across) - 1),
            T=triton.next_power_of_2(max(across)),
            LENGTH=length,
            **cut.constants,
        )
    pieces = partial.sum((0, 2)).split([size for k in across for size in (k, 1)], 1)
    taps = tuple(piece.view_as(weight) for piece, weight in zip(pieces[::2], wanted, strict=True))
    return taps, tuple(piece.squeeze(1) for piece in pieces[1::2])


def _correlate_square(da: Tensor, x: Tensor, square: Tensor) -> Tensor:
    """Gradient of the square weight, in fp32."""
    n, channels, height, width = x.shape
    size = square.shape[-1]
    cut = _cut(x, height, width, 1, size)
    block = cut.constants["B"]
    window = triton.next_power_of_2(block + size - 1)
    group = max(1, min(size, 4096 // (block * window)))  # sums in registers: at most 32 a thread of 4 warps
    parts = cut.tiles * cut.segments
    partial = torch.empty((n, channels, parts, size * size), dtype=torch.float32, device=x.device)
    if partial.numel():
        constants = {name: value for name, value in cut.constants.items() if name != "HALO"}
        launch.run(
            _square_gradients,
            (n * channels * parts, triton.cdiv(size, group)),
            cut.config,
            da,
            x,
            partial,
            channels,
            height,
            width,
            cut.tiles,
            cut.segments,
            SQUARE=size,
            GROUP=group,
            WINDOW=window,
            T=triton.next_power_of_2(size),
            **constants,
        )
    return partial.sum((0, 2)).view_as(square)


def _sum_by_channel(t: Tensor) -> Tensor:
    return t.sum((0, 2, 3), dtype=torch.float32)


def _dense(tensors: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


strip_conv2d = Backend(forward, backward, unsupported)
