"""ssd_scan_2d in ONNX nodes, for any N, H and W: products of small matrices, and nothing is turned round.

A direction is an order of the pixels, row- or column-major, and a sense, forward or backward. The backward sense keeps
the order: a token reads the ones behind it. So all directions are chunks in the same few products. Their tensors are
(sense s, N, head h, chunk c, …); the chunks of the rows come first, then those of the columns. Sums of log-decays are
products with matrices of 0 and 1: as exact as in the reference, where a difference of long sums is not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnxscript import opset18

from famseg_kernels.onnx import floats, ints
from famseg_kernels.ssd_scan.reference import LOWEST_LOG_DECAY

# Of 16, 32 and 64 tokens the fastest, or nearly, in both runtimes at the shapes of famseg_nano and famseg_tiny.
_CHUNK = 32
# Chunks in a block at most: states go from chunk to chunk within blocks, then from block to block.
_BLOCK = 16


def ssd_scan_2d(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    dt_bias: Any,
    chunk_size: int | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str = "auto",
) -> Any:
    """Arguments of `torch.ops.famseg.ssd_scan_2d`, fp32; N, H and W may be free. chunk_size is not used."""
    heads, headdim = x.shape[3:]
    groups, n = B.shape[4:]
    layout = _Layout(x, directions=dt.shape[3])
    senses = layout.senses

    step = dt if dt_bias is None else opset18.Add(dt, dt_bias)
    if dt_softplus:
        step = opset18.Softplus(step)
    if dt_min > (0.0 if dt_softplus else -math.inf):
        step = opset18.Max(step, floats(dt_min))
    if dt_max < math.inf:
        step = opset18.Min(step, floats(dt_max))
    log_decay = opset18.Max(opset18.Mul(step, A), floats(LOWEST_LOG_DECAY))

    x_chunks = opset18.Transpose(layout.chunks(x, 1, heads, headdim), perm=[3, 0, 4, 1, 2, 5])  # (1, N, h, c, q, p)
    B, C = (layout.chunks(t, t.shape[3], groups, n) for t in (B, C))
    B, C = (opset18.Transpose(t, perm=[3, 0, 4, 1, 2, 5]) for t in (B, C))
    if 1 < groups < heads:
        group = ints(*(head // (heads // groups) for head in range(heads)))
        B, C = (opset18.Gather(t, group, axis=2) for t in (B, C))
    B = opset18.Transpose(B, perm=[0, 1, 2, 3, 5, 4])  # runtimes make it part of both products
    steps = layout.chunks(opset18.Concat(step, log_decay, axis=4), dt.shape[3], 2 * heads)
    steps = opset18.Transpose(steps, perm=[3, 0, 4, 1, 2])
    step, log_decay = opset18.Split(steps, axis=2, num_outputs=2)  # (s, N, h, c, q)
    x_chunks = opset18.Mul(x_chunks, opset18.Unsqueeze(step, ints(-1)))  # (s, N, h, c, q, p)

    # What a token has from its own chunk: tokens i, from tokens j.
    between, to_end, from_start, reads = (t[:senses] for t in _sums(_CHUNK))
    decay = opset18.Exp(opset18.MatMul(log_decay, floats(between[:, None, None])))
    decay = opset18.Reshape(decay, ints(0, 0, 0, 0, _CHUNK, _CHUNK))
    gram = opset18.Mul(opset18.MatMul(C, B), floats(reads[:, None, None, None]))
    y = opset18.MatMul(opset18.Mul(gram, decay), x_chunks)
    # And from the others, by the state that its chunk finds.
    to_end, from_start = (
        opset18.Exp(opset18.MatMul(log_decay, floats(t[:, None, None]))) for t in (to_end, from_start)
    )
    added = opset18.MatMul(B, opset18.Mul(x_chunks, opset18.Unsqueeze(to_end, ints(-1))))  # (s, N, h, c, n, p)
    states = _states(layout, opset18.ReduceSum(log_decay, ints(4), keepdims=0), added, n * headdim)
    states = opset18.Reshape(states, ints(0, 0, 0, -1, n, headdim))
    y = opset18.Add(y, opset18.Mul(opset18.MatMul(C, states), opset18.Unsqueeze(from_start, ints(-1))))

    y = layout.image(opset18.ReduceSum(y, ints(0), keepdims=0), heads, headdim)
    if D is None:
        return y
    D = D if len(D.shape) == 1 else opset18.ReduceSum(D, ints(0), keepdims=0)
    return opset18.Add(y, opset18.Mul(x, opset18.Unsqueeze(D, ints(1))))


class _Layout:
    """Images as chunks in both orders, and back; the sizes are nodes."""

    def __init__(self, x: Any, directions: int) -> None:
        self.senses, self.orders = min(directions, 2), max(directions // 2, 1)
        self.batch, self.height, self.width = (opset18.Shape(x, start=axis, end=axis + 1) for axis in range(3))
        self.length = opset18.Mul(self.height, self.width)
        chunks = _ceil(self.length, ints(_CHUNK))
        self.blocks = _ceil(chunks, ints(_BLOCK))
        self.block = _ceil(chunks, self.blocks)  # chunks in each: alike, so that few are empty
        self.padding = opset18.Sub(opset18.Mul(opset18.Mul(self.blocks, self.block), ints(_CHUNK)), self.length)

    def chunks(self, t: Any, directions: int, *features: int) -> Any:
        """(N, H, W, …) with the features of all directions, or of one for all → (N, c, q, senses or 1, *features)."""
        senses = min(directions, self.senses)
        size = senses * math.prod(features)
        t = opset18.Reshape(t, ints(0, 0, 0, -1))
        each = [t] * self.orders
        if directions > 2:
            each = opset18.Split(t, axis=3, num_outputs=2)
        nothing = opset18.Expand(floats(0.0), opset18.Concat(self.batch, self.padding, ints(size), axis=0))
        parts = [opset18.Reshape(each[0], ints(0, -1, size)), nothing]
        if self.orders == 2:
            parts += [opset18.Reshape(opset18.Transpose(each[1], perm=[0, 2, 1, 3]), ints(0, -1, size)), nothing]
        return opset18.Reshape(opset18.Concat(*parts, axis=1), ints(0, -1, _CHUNK, senses, *features))

    def image(self, y: Any, heads: int, headdim: int) -> Any:
        """(N, h, c, q, p) → (N, H, W, h, p), the sum over the orders."""
        y = opset18.Reshape(y, ints(0, 0, self.orders, -1, headdim))
        y = opset18.Slice(y, ints(0), self.length, ints(3))
        rows, *columns = [y] if self.orders == 1 else opset18.Split(y, axis=2, num_outputs=2)
        shape = opset18.Concat(ints(0, heads), self.height, self.width, ints(headdim), axis=0)
        total = opset18.Transpose(opset18.Reshape(rows, shape), perm=[0, 2, 3, 1, 4])
        for part in columns:
            shape = opset18.Concat(ints(0, heads), self.width, self.height, ints(headdim), axis=0)
            total = opset18.Add(total, opset18.Transpose(opset18.Reshape(part, shape), perm=[0, 3, 2, 1, 4]))
        return total


def _states(layout: _Layout, log_decay: Any, added: Any, size: int) -> Any:
    """The state that each chunk finds, flat: (s, N, h, c), (s, N, h, c, n, p) → (s, N, h, blocks, chunks, size)."""
    chunks = floats(_before(_BLOCK)[: layout.senses, None, None, None])
    before = opset18.Slice(chunks, ints(0, 0), opset18.Concat(layout.block, layout.block, axis=0), ints(4, 5))
    total = opset18.Reshape(log_decay, opset18.Concat(ints(0, 0, 0, -1), layout.block, axis=0))
    added = opset18.Reshape(added, opset18.Concat(ints(0, 0, 0, -1), layout.block, ints(size), axis=0))
    behind, inside = _passed_on(total, added, before)
    # What the chunks of a block add to the state behind it, and what each block finds.
    of_block = opset18.MatMul(opset18.Exp(opset18.ReduceSum(behind, ints(4), keepdims=1)), added)
    of_block = opset18.Reshape(of_block, ints(0, 0, 0, layout.orders, -1, size))
    sums = opset18.Reshape(opset18.ReduceSum(total, ints(4), keepdims=0), ints(0, 0, 0, layout.orders, -1))
    index = opset18.Range(floats(0.0), opset18.Cast(opset18.Squeeze(layout.blocks), to=1), floats(1.0))
    distance = opset18.Sub(opset18.Unsqueeze(index, ints(1)), index)
    sign = floats(np.array([1.0, -1.0])[: layout.senses].reshape(-1, 1, 1, 1, 1, 1))
    before_block = opset18.Clip(opset18.Mul(distance, sign), floats(0.0), floats(1.0))
    _, found = _passed_on(sums, of_block, before_block)
    found = opset18.Reshape(found, ints(0, 0, 0, -1, 1, size))
    reach = opset18.Exp(opset18.MatMul(before, opset18.Unsqueeze(total, ints(5))))
    return opset18.Add(inside, opset18.Mul(reach, found))


def _passed_on(log_decay: Any, added: Any, before: Any) -> tuple[Any, Any]:
    """(…, M), (…, M, size), (…, M, M) → log-decays of the t behind j, (…, t, j); what each i finds of the j before."""
    behind = opset18.Mul(opset18.Unsqueeze(log_decay, ints(5)), before)
    decay = opset18.Mul(opset18.Exp(opset18.MatMul(before, behind)), before)
    return behind, opset18.MatMul(decay, added)


def _before(size: int) -> np.ndarray:
    """[s, i, j]: 1 where j comes before i in the sense s."""
    lower = np.tril(np.ones((size, size)), -1)
    return np.stack([lower, lower.T])


def _sums(q: int) -> tuple[np.ndarray, ...]:
    """For each sense, which log-decays t of a chunk to add up, and which tokens j a token i reads.

    From j to i [s, t, i·q + j], from j to the end of the chunk [s, t, j], from the start to i [s, t, i]; [s, i, j].
    """
    t, i, j = np.ogrid[:q, :q, :q]
    between = np.stack([(j < t) & (t <= i), (i <= t) & (t < j)]).reshape(2, q, q * q)
    to_end, reads = _before(q), _before(q) + np.eye(q)
    return between, to_end, reads.transpose(0, 2, 1), reads


def _ceil(a: Any, b: Any) -> Any:
    return opset18.Div(opset18.Sub(opset18.Add(a, b), ints(1)), b)
