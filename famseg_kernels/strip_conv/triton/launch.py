"""What is launched for a call of strip_conv2d, and how planes are cut into programs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from famseg_kernels import backends, checks, launch
from famseg_kernels.spec import Backend
from famseg_kernels.strip_conv import spec
from famseg_kernels.strip_conv.problem import Problem
from famseg_kernels.strip_conv.triton.kernels import Branches, Square, convolve, square_gradients, strip_gradients


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


def _unsupported(x: Tensor, *_: Any) -> str | None:
    return "its kernels compute in fp32, x is float64" if x.dtype == torch.float64 else None


def _forward(*arguments: Any) -> Tensor:
    """y (N, C, H, W) in x's dtype and memory format."""
    x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases = Problem(*arguments)
    with launch.on(x.device):
        square = Square(*_dense((square_weight, square_bias)))
        rows = (_dense(row_weights), _dense(spec.unpacked(row_biases, row_weights)))
        cols = (_dense(col_weights), _dense(spec.unpacked(col_biases, col_weights)))
        # channels_last goes through a copy: a program reads planes, and one channel of 32-byte sectors is 16 planes.
        y = _convolve(x.contiguous(), square, Branches(*rows, *cols))
        return y.contiguous(memory_format=checks.image_format(x))


def _backward(grad: Tensor, needs: Sequence[bool], *arguments: Any) -> list[Tensor | None]:
    """Gradients of the flattened tensor arguments where `needs`, None elsewhere. Recomputes `a`, saves nothing."""
    x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases = Problem(*arguments)
    with launch.on(x.device):
        return _gradients(
            grad.contiguous(),
            needs,
            x.contiguous(),
            Square(*_dense((square_weight, square_bias))),
            _dense(row_weights),
            _dense(row_biases),
            _dense(col_weights),
            len(col_biases),
        )


_NO_SQUARE = Square(None, None)
_NO_BRANCHES = Branches((), (), (), ())


def _gradients(
    dy: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    square: Square,
    rows: tuple[Tensor, ...],
    row_biases: tuple[Tensor, ...],
    cols: tuple[Tensor, ...],
    col_biases: int,
) -> list[Tensor | None]:
    """Contiguous arguments → gradients in any dtype and layout, None where not needed."""
    weight = square.weight
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
        da = _convolve(dy, _NO_SQUARE, Branches(rows, nothing, cols, nothing), flip=True) if count else dy
        if need_x:
            found[0] = da if weight is None else _convolve(da, Square(weight, None), _NO_BRANCHES, flip=True)
        if need_square and weight is not None:
            found[1] = _correlate_square(da, x, weight)
        if need_square_bias:
            found[2] = _sum_by_channel(da)
    if need_rows or need_row_biases or need_cols:
        a = x if weight is None else _convolve(x, square, _NO_BRANCHES)
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


def _convolve(x: Tensor, square: Square, branches: Branches, flip: bool = False) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n, channels, height, width = x.shape
    if not x.numel():
        return y
    size = 0 if square.weight is None else square.weight.shape[-1]
    wide, tall = tuple(t.shape[3] for t in branches.rows), tuple(t.shape[2] for t in branches.cols)
    cut = _cut(x, height, width, max(tall, default=1), max(wide, default=1))
    launch.run(
        convolve,
        (n * channels * cut.tiles * cut.segments,),
        cut.config,
        x=x,
        y=y,
        square=square,
        branches=branches,
        sizes=(channels, height, width),
        tiles=cut.tiles,
        segments=cut.segments,
        SQUARE=size,
        ROWS=wide,
        COLS=tall,
        FLIP=flip,
        WINDOW=triton.next_power_of_2(cut.constants["B"] + size - 1) if size else 0,
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
            strip_gradients,
            (n * channels * parts,),
            cut.config,
            source=source,
            other=other,
            partial=partial,
            weights=weights,
            biases=biases,
            channels=channels,
            frame_size=size[0],
            stream_size=size[1],
            frame_stride=strides[0],
            stream_stride=strides[1],
            tiles=cut.tiles,
            segments=cut.segments,
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
            square_gradients,
            (n * channels * parts, triton.cdiv(size, group)),
            cut.config,
            da=da,
            x=x,
            partial=partial,
            sizes=(channels, height, width),
            tiles=cut.tiles,
            segments=cut.segments,
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


strip_conv2d = Backend(_forward, _backward, _unsupported)
