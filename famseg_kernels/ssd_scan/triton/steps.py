"""Where the tokens of a scan lie, their steps and their decays: what all kernels of the scan share."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# exp(-110) is 0 in fp32. The gradient of a step's decay is 0 below, as that of torch.clamp.
LOWEST = tl.constexpr(-110.0 * 1.4426950408889634)
_ONE = tl.constexpr(float(1 << 33))  # of the fixed-point numbers
# In the place of a log-decay that is NaN or has an infinite decay. 2 to the power of any sum with it is infinite, and
# no sum of 1024 others is as large: they lie between LOWEST and _HIGHEST.
_NO_NUMBER = tl.constexpr(float(1 << 19))
_HIGHEST = tl.constexpr(128.0)


class Rows(NamedTuple):
    """A tensor (batch, pixel, feature) as the kernels take it; features lie side by side."""

    pointer: Any
    batch: Any  # strides
    pixel: Any


class Steps(NamedTuple):
    """What the steps of tokens are made of; columns are directions and heads."""

    dt: Rows
    A: Any
    bias: Any  # or None
    low: Any
    high: Any


class Sums(NamedTuple):
    """What `running_sums` makes of the steps, (direction, batch, head, chunk, token of the chunk).

    Tokens in the order of the axis, those beyond the image too. Sums of log-decays to base 2, as two floats: from where
    the direction enters the chunk to the token.
    """

    step: Any
    high: Any
    low: Any


class Sizes(NamedTuple):
    """Of the tensors; `chunks` of a sequence of height · width tokens."""

    batches: Any
    height: Any
    width: Any
    chunks: Any
    heads: Any
    groups: Any


@triton.jit
def row(rows, batch, pixels):
    """Where the features of these pixels start."""
    return rows.pointer + batch * rows.batch + pixels * rows.pixel


@triton.jit
def pixels_of(token, axis, sizes):
    """Where the tokens of an axis (0: row-major, 1: column-major) lie in the image; 64 bits for the offsets."""
    return tl.where(axis == 0, token, (token % sizes.height) * sizes.width + token // sizes.height).to(tl.int64)


@triton.jit
def unclamped(raw, SOFTPLUS: tl.constexpr):
    """softplus(raw), the identity above 20. log(1 + u) with the rounding of 1 + u divided out again: u is small."""
    if SOFTPLUS:
        u = tl.exp(tl.minimum(raw, 20.0, propagate_nan=tl.PropagateNan.ALL))
        w = 1.0 + u
        series = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
        raw = tl.where(raw > 20.0, raw, series)
    return raw


@triton.jit
def clamped(value, low, high):
    """Between low and high, and NaN stays NaN: PTX's plain minimum and maximum give the other operand for it."""
    raised = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_steps(steps, batch, pixels, live, column, SOFTPLUS: tl.constexpr):
    """Steps, and their log-decays to base 2 in fixed point. Tokens that are not live keep the state and add nothing.

    A decay that is not a finite number is infinite: so is then each product of decays with it, and no other.
    """
    raw = tl.load(row(steps.dt, batch, pixels) + column, mask=live, other=0.0).to(tl.float32)
    if steps.bias is not None:
        raw += tl.load(steps.bias + column).to(tl.float32)
    step = clamped(unclamped(raw, SOFTPLUS), steps.low, steps.high)
    log_decay = step * (tl.load(steps.A + column).to(tl.float32) * LOG2_E)
    log_decay = tl.maximum(log_decay, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    log_decay = tl.where(log_decay < _HIGHEST, log_decay, _NO_NUMBER)  # of a NaN it is false
    return tl.where(live, step, 0.0), (tl.where(live, log_decay, 0.0) * _ONE).to(tl.int64)


@triton.jit
def running_sums(
    steps, step, high, low, sizes,
    SOFTPLUS: tl.constexpr, BY_PIXEL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The steps of a chunk, a direction and a head, and their log-decays summed: `Sums`. BY_PIXEL: of an image of one
    chunk, in the order of its pixels."""
    head = tl.program_id(0) % sizes.heads
    program = tl.program_id(0) // sizes.heads
    chunk = program % sizes.chunks
    program //= sizes.chunks
    batch = (program % sizes.batches).to(tl.int64)
    direction = program // sizes.batches
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    live = token < sizes.height * sizes.width
    pixels = pixels_of(token, direction // 2, sizes)
    value, log_decay = load_steps(steps, batch, pixels, live, direction * sizes.heads + head, SOFTPLUS)
    sums = tl.cumsum(log_decay, 0)
    sums = tl.where(direction % 2 == 0, sums, tl.sum(log_decay, 0) - sums + log_decay)
    # A fixed-point number as two floats, so that differences of large ones keep their digits.
    higher = sums.to(tl.float32)
    lower = (sums - higher.to(tl.int64)).to(tl.float32)
    place = ((direction * sizes.batches + batch) * sizes.heads + head) * sizes.chunks * CHUNK
    place += pixels if BY_PIXEL else token
    written = live if BY_PIXEL else token >= 0
    tl.store(step + place, value, mask=written)
    tl.store(high + place, higher * (1.0 / _ONE), mask=written)
    tl.store(low + place, lower * (1.0 / _ONE), mask=written)


@triton.jit
def load_sums(sums, direction, batch, head, token, sizes, CHUNK: tl.constexpr):
    """Step and sum, as two floats, of these tokens."""
    place = ((direction * sizes.batches + batch) * sizes.heads + head) * sizes.chunks * CHUNK + token
    return tl.load(sums.step + place), tl.load(sums.high + place), tl.load(sums.low + place)


@triton.jit
def load_total(sums, direction, batch, head, chunk, sizes, CHUNK: tl.constexpr):
    """The sum of a whole chunk, as two floats: that of the token where the direction leaves it."""
    last = chunk * CHUNK + tl.where(direction % 2 == 0, CHUNK - 1, 0)
    _, high, low = load_sums(sums, direction, batch, head, last, sizes, CHUNK)
    return high, low


@triton.jit
def state_of_zeros(high):
    """What a state of zeros adds, by the sum of the log-decays up to a token: NaN once one of them was no number."""
    return tl.where(high > 0.5 * _NO_NUMBER, float("nan"), 0.0)


@triton.jit
def sequences(resets, batch, pixels, tokens, live):
    """How many sequences have started in the chunk up to each token."""
    return tl.cumsum((tl.load(resets + batch * tokens + pixels, mask=live, other=0) != 0).to(tl.int32), 0)


@triton.jit
def difference(left_high, left_low, right_high, right_low):
    """left[i] - right[j] of numbers that were split, to base 2 as they are."""
    return (left_high[:, None] - right_high[None, :]) + (left_low[:, None] - right_low[None, :])
