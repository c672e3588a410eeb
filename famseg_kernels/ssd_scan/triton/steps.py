"""Where the tokens of a scan lie, their steps and their decays: what all kernels of the scan share."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# exp(-110) is 0 in fp32. The gradient of a step's decay is 0 below, as that of torch.clamp.
LOWEST = tl.constexpr(-110.0 * 1.4426950408889634)
_ONE = tl.constexpr(float(1 << 40))  # of the fixed-point numbers


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

    A step is NaN where the log-decay is not finite, which becomes 0: what a conversion makes of it depends on the chip.
    """
    raw = tl.load(row(steps.dt, batch, pixels) + column, mask=live, other=0.0).to(tl.float32)
    if steps.bias is not None:
        raw += tl.load(steps.bias + column).to(tl.float32)
    step = clamped(unclamped(raw, SOFTPLUS), steps.low, steps.high)
    log_decay = step * (tl.load(steps.A + column).to(tl.float32) * LOG2_E)
    log_decay = tl.maximum(log_decay, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    is_number = log_decay < float("inf")
    step = tl.where(live, tl.where(is_number, step, float("nan")), 0.0)
    return step, (tl.where(live & is_number, log_decay, 0.0) * _ONE).to(tl.int64)


@triton.jit
def zero_or_nan(t):
    """What is added to carry a NaN of t, and of t an infinity not."""
    return tl.where(t == t, 0.0, t)


@triton.jit
def sequences(resets, batch, pixels, tokens, live):
    """How many sequences have started in the chunk up to each token."""
    return tl.cumsum((tl.load(resets + batch * tokens + pixels, mask=live, other=0) != 0).to(tl.int32), 0)


@triton.jit
def two_floats(sums, step):
    """A fixed-point number as the sum of two floats, so that differences of large ones keep their digits; NaN where
    the token's own decay is."""
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.int64)).to(tl.float32)
    return high * (1.0 / _ONE) + zero_or_nan(step), low * (1.0 / _ONE)


@triton.jit
def decay_of(sums):
    return tl.exp2(sums.to(tl.float32) * (1.0 / _ONE))


@triton.jit
def difference(left_high, left_low, right_high, right_low):
    """left[i] - right[j] of numbers that were split, to base 2 as they are."""
    return (left_high[:, None] - right_high[None, :]) + (left_low[:, None] - right_low[None, :])
