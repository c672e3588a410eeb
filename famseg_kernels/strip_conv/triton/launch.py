"""What is launched for a call of strip_conv2d, and how images are cut into programs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from famseg_kernels import checks, launch
from famseg_kernels.spec import Backend
from famseg_kernels.strip_conv import spec
from famseg_kernels.strip_conv.problem import Problem
from famseg_kernels.strip_conv.triton.kernels import (
    Branches,
    col_gradients,
    convolve_square,
    convolve_strips,
    row_gradients,
    square_gradients,
)


class Configuration(NamedTuple):
    """What `python -m benchmarks.tune` tunes: how much of an image a program has."""

    rows: int  # of the square's kernels, at most: a multiple of 4
    gradient_rows: int  # at a time, where the strips' weights get their gradients
    warps: int  # of all kernels


# By compute capability × 10; 0 stands for the interpreter, which takes as long for a lane as for many.
CONFIGURATIONS = {
    80: Configuration(rows=32, gradient_rows=2, warps=1),
    90: Configuration(rows=32, gradient_rows=2, warps=1),
    0: Configuration(rows=32, gradient_rows=2, warps=16),
}


def _configuration(x: Tensor) -> Configuration:
    return CONFIGURATIONS.get(launch.capability(x.device), CONFIGURATIONS[80])


_PROGRAMS = 512  # a warp for each scheduler of the largest chip


class _Cut(NamedTuple):
    """Images cut into programs: of LANES groups of columns in NCHW, of channels and groups in channels_last."""

    programs: int
    parts: int  # programs one below the other, of `rows` rows
    config: launch.Config
    arguments: dict[str, Any]  # sizes, rows, STRIDE, SLOW, FAST, GROUP, PIECE as the kernels take them


def _cut(x: Tensor, group: int, reach: int, rows: int | None = None) -> _Cut:
    """Cut images into lanes of `group` columns that see `reach` more on either side, and go down `rows` rows.

    None: as many rows as leave enough programs. Each repeats some rows of those above and below.
    """
    n, channels, height, width = x.shape
    warps = _configuration(x).warps
    last = checks.image_format(x) == torch.channels_last
    groups = triton.cdiv(width, group)
    near, far = (channels, n * groups) if last else (groups, n * channels)
    fast = min(triton.next_power_of_2(near), 32)
    slow = 32 * warps // fast
    constants = {
        "STRIDE": channels if last else 1,
        "SLOW": slow,
        "FAST": fast,
        "GROUP": group,
        # Rows that are not aligned cannot be read in pieces, nor can channels_last.
        "PIECE": 0 if last or width % 16 else min(triton.next_power_of_2(max(reach, 1)), group, 4),
    }
    programs = triton.cdiv(near, fast) * triton.cdiv(far, slow)
    if rows is None:
        parts = max(1, min(triton.cdiv(_PROGRAMS, max(programs, 1)), height // 32))
        rows = max(4, triton.cdiv(height, 4 * parts) * 4)
    arguments = {"sizes": tuple(x.shape), "rows": rows, **constants}
    return _Cut(programs, triton.cdiv(height, rows), launch.Config(warps), arguments)


# --- the backend -------------------------------------------------------------------------------------------------


def _unsupported(x: Tensor, *_: Any) -> str | None:
    return "its kernels compute in fp32, x is float64" if x.dtype == torch.float64 else None


def _forward(*arguments: Any) -> Tensor:
    """y (N, C, H, W) in x's dtype and memory format."""
    x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases = Problem(*arguments)
    x = x.contiguous(memory_format=checks.image_format(x))
    with launch.on(x.device):
        a = _square(x, square_weight, square_bias)
        rows = (_dense(row_weights), _dense(spec.unpacked(row_biases, row_weights)))
        cols = (_dense(col_weights), _dense(spec.unpacked(col_biases, col_weights)))
        return _strips(a, Branches(*rows, *cols))


def _backward(grad: Tensor, needs: Sequence[bool], *arguments: Any) -> list[Tensor | None]:
    """Gradients of the flattened tensor arguments where `needs`, None elsewhere. Recomputes `a`, saves nothing."""
    x, square_weight, square_bias, row_weights, row_biases, col_weights, col_biases = Problem(*arguments)
    layout = checks.image_format(x)
    with launch.on(x.device):
        return _gradients(
            grad.contiguous(memory_format=layout),
            needs,
            x.contiguous(memory_format=layout),
            square_weight,
            square_bias,
            _dense(row_weights),
            _dense(row_biases),
            _dense(col_weights),
            len(col_biases),
        )


def _gradients(
    dy: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    square_weight: Tensor | None,
    square_bias: Tensor | None,
    rows: tuple[Tensor, ...],
    row_biases: tuple[Tensor, ...],
    cols: tuple[Tensor, ...],
    col_biases: int,
) -> list[Tensor | None]:
    """Contiguous arguments → gradients in any dtype and layout, None where not needed."""
    count = len(rows)
    nothing = (None,) * count
    need_x, need_square, need_square_bias = needs[:3]
    # Where each side's gradients stand in the flattened arguments: row weights, their biases, column weights, theirs.
    of_rows, of_row_biases, of_cols, of_col_biases, end = itertools.accumulate(
        (3, count, len(row_biases), count, col_biases)
    )
    found: list[Tensor | None] = [None] * len(needs)
    if need_x or need_square or need_square_bias:
        da = _strips(dy, Branches(rows, nothing, cols, nothing), flip=True)
        if need_x:
            found[0] = _square(da, square_weight, None, flip=True)
        if square_weight is not None and (need_square or need_square_bias):
            found[1], found[2] = _square_gradients(da, x, square_weight)
    if count and any(needs[of_rows:end]):
        a = _square(x, square_weight, square_bias)
        if any(needs[of_rows:of_cols]) or any(needs[of_col_biases:end]):
            taps, sums, dy_sum = _row_gradients(dy, a, rows, cols)
            found[of_rows:of_row_biases] = taps
            if row_biases:
                found[of_row_biases:of_cols] = sums
            found[of_col_biases:end] = [dy_sum] * col_biases  # a column bias is added to y as it is
        if any(needs[of_cols:of_col_biases]):
            found[of_cols:of_col_biases] = _col_gradients(a, dy, rows, row_biases or nothing, cols)
    return found


def _square(x: Tensor, weight: Tensor | None, bias: Tensor | None, flip: bool = False) -> Tensor:
    if weight is None:
        return x
    y = torch.empty_like(x, memory_format=checks.image_format(x))
    if x.numel():
        size = weight.shape[-1]
        cut = _square_cut(x, size)
        launch.run(
            convolve_square,
            (cut.programs, cut.parts),
            cut.config,
            x=x,
            y=y,
            weight=weight.contiguous(),
            bias=None if bias is None else bias.contiguous(),
            SQUARE=size,
            FLIP=flip,
            ROWS=4 if size <= _LARGEST else 1,
            **cut.arguments,
        )
    return y


_LARGEST = 7  # square whose weights fit in registers


def _square_cut(x: Tensor, size: int) -> _Cut:
    # As many bytes as an access can have.
    group = 16 // x.element_size() if size <= 3 else 4
    return _cut(x, min(group, triton.next_power_of_2(x.shape[3])), size // 2, _configuration(x).rows)


def _strips_cut(x: Tensor, sizes: Sequence[int], sums: int) -> _Cut:
    """`sizes` of all kernels, whose weights stay in registers beside so many sums for each of a lane's columns."""
    group = 4 if 4 * sums + sum(sizes) < 192 else 2 if 2 * sums + sum(sizes) < 192 else 1
    return _cut(x, min(group, triton.next_power_of_2(x.shape[3])), max(sizes) // 2)


def _sizes(rows: Sequence[Tensor], cols: Sequence[Tensor]) -> dict[str, Any]:
    wide, tall = tuple(t.shape[3] for t in rows), tuple(t.shape[2] for t in cols)
    return {"ROWS": wide, "COLS": tall, "WIDE": max(wide) // 2, "TALL": max(tall) // 2}


def _strips(a: Tensor, branches: Branches, flip: bool = False) -> Tensor:
    if not branches.rows:
        return a
    y = torch.empty_like(a, memory_format=checks.image_format(a))
    if a.numel():
        sizes = _sizes(branches.rows, branches.cols)
        cut = _strips_cut(a, (*sizes["ROWS"], *sizes["COLS"]), 2 * sizes["TALL"] + 1)
        launch.run(
            convolve_strips,
            (cut.programs, cut.parts),
            cut.config,
            a=a,
            y=y,
            branches=branches,
            FLIP=flip,
            **sizes,
            **cut.arguments,
        )
    return y


def _partial(cut: _Cut, x: Tensor, length: int) -> Tensor:
    """Room for the sums of every program."""
    n, channels, _, width = x.shape
    near, far = cut.arguments["FAST"], cut.arguments["SLOW"]
    groups = triton.cdiv(width, cut.arguments["GROUP"])
    count = n * triton.cdiv(groups, near) if cut.arguments["STRIDE"] == 1 else triton.cdiv(n * groups, far)
    return torch.empty((count * cut.parts, length, channels), dtype=torch.float32, device=x.device)


def _square_gradients(da: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the square weight and of its bias, in fp32."""
    size = weight.shape[-1]
    depth = size if size <= _LARGEST else 1
    cut = _square_cut(x, size)
    length = size // depth * (depth * size + 1)
    partial = _partial(cut, x, length)
    if partial.numel():
        launch.run(
            square_gradients,
            (cut.programs, cut.parts, size // depth),
            cut.config,
            da=da,
            x=x,
            partial=partial,
            SQUARE=size,
            DEPTH=depth,
            ROWS=4,
            **cut.arguments,
        )
    sums = partial.sum(0).view(size // depth, depth * size + 1, x.shape[1])
    return sums[:, :-1].reshape(size * size, -1).t().reshape(weight.shape), sums[0, -1]


def _row_gradients(
    dy: Tensor, a: Tensor, rows: tuple[Tensor, ...], cols: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of the row weights, of their biases, and the sum of dy, in fp32."""
    sizes = _sizes(rows, cols)
    cut = _gradient_cut(a, sizes)
    partial = _partial(cut, a, sum(sizes["ROWS"]) + len(rows) + 1)
    if partial.numel():
        launch.run(
            row_gradients,
            (cut.programs, cut.parts),
            cut.config,
            dy=dy,
            a=a,
            partial=partial,
            weights=cols,
            WANTED=sizes["ROWS"],
            ALONG=sizes["COLS"],
            **cut.arguments,
        )
    *pieces, dy_sum = partial.sum(0).split([k for size in sizes["ROWS"] for k in (size, 1)] + [1])
    taps = [piece.t().reshape(weight.shape) for piece, weight in zip(pieces[::2], rows, strict=True)]
    return taps, [piece[0] for piece in pieces[1::2]], dy_sum[0]


def _col_gradients(
    a: Tensor, dy: Tensor, rows: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], cols: tuple[Tensor, ...]
) -> list[Tensor]:
    """Gradients of the column weights, in fp32."""
    sizes = _sizes(rows, cols)
    cut = _gradient_cut(a, sizes)
    partial = _partial(cut, a, sum(sizes["COLS"]))
    if partial.numel():
        launch.run(
            col_gradients,
            (cut.programs, cut.parts),
            cut.config,
            a=a,
            dy=dy,
            partial=partial,
            weights=rows,
            biases=biases,
            WANTED=sizes["COLS"],
            ALONG=sizes["ROWS"],
            **cut.arguments,
        )
    pieces = partial.sum(0).split(list(sizes["COLS"]))
    return [piece.t().reshape(weight.shape) for piece, weight in zip(pieces, cols, strict=True)]


def _gradient_cut(x: Tensor, sizes: dict[str, Any]) -> _Cut:
    """As both kernels of the strips' gradients take it."""
    rows = _configuration(x).gradient_rows
    cut = _strips_cut(x, (*sizes["ROWS"], *sizes["COLS"]), rows * len(sizes["ROWS"]))
    return cut._replace(arguments={**cut.arguments, "WIDE": sizes["WIDE"], "TALL": sizes["TALL"], "ROWS": rows})


def _dense(tensors: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


strip_conv2d = Backend(_forward, _backward, _unsupported)
