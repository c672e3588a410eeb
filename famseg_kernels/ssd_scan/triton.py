"""ssd_scan and ssd_scan_2d on NVIDIA GPUs, in Triton.

The scan is computed in chunks of Q tokens (arXiv 2405.21060, section 6). A forward direction and the backward one of
the same axis share one index order, so nothing is reversed, and column-major order is only another way from token to
pixel, so nothing is transposed. Per chunk and head, with X (Q, p), B and C (Q, n), G = C Bᵀ of either direction f, b:

    M = tril(G_f ∘ L_f · step_f) + triu(G_b ∘ L_b · step_b)      L: the decay between two tokens
    Y = M X + [arrive_f ∘ C_f | arrive_b ∘ C_b] [S_f; S_b]       S: the state that enters the chunk
    S ← through · S + Xᵀ (weight ∘ B)                            the state that leaves it

An element of M off the diagonal belongs to one direction only, so two directions cost one exponential and one product
M X. Kernels: `_chunk_states` (each chunk's own Xᵀ (weight ∘ B)), `_pass_states` (the recurrence over chunks, in place)
and `_mix` (Y), once an axis; the column launch adds to what the row launch has left. A sequence of a single chunk (64
tokens in bf16, else 32) needs `_mix` alone. Of a bf16 image of at most 600 pixels one matrix holds all four directions,
and there are no states: `_running_sums` and `_mix_image` (docs/design/gpu-model.md counts both ways).

The gradient of X is the same computation on dY with M transposed, B and C swapped and the gradients of the states for
the states: `_mix` or `_mix_image` again. `_matrix_gradients` makes the rest, and `_step_gradients` takes the steps'
gradients through softplus and clamp. Only the inputs are kept for backward.

Log-decays are summed in fixed point, int64 with 40 bits after the point: the sum is exact, so a step of -110 costs its
neighbours no digits, as it would in fp32, and no segmented sum is needed. Integers hold no NaN: where a log-decay is
NaN, the token's step is made NaN, a factor of all that it gives to itself and to later tokens. In the gradients, all
that comes through a token's decay is read by the token as well: a NaN in the decays to it reaches what it should.

What is not finite reaches what the recurrence gives it, forward and in the gradients: rows of a triangle that do not
read a token must not multiply it by 0, so it is taken out of the product and put in its places (`_add_product`), and
what lies beyond a reset is chosen away, never weighed by 0. With both directions of an axis M has no zeros to mind.

Device memory, forward, a token and head, K = 4, e bytes an element: x is read once a direction for the states and once
an axis for Y (6·p·e), y is written, read and written (the row's part in fp32: 8·p + p·e), the chunks' states are
written, read and written by the recurrence, and read (16·K·p·n/Q); B and C serve the heads of a group from the L2
cache. At p = n = Q = 64 in bf16 that is 1.4 KB and 4.1 KB of states. Products are K/2·(2·Q·n + Q·p) + 2·K·p·n = 57 k
multiply–adds, with 128 exponentials. So bf16 should be bound by memory, and there by the states: 1.1 ns a token and
head on H200 (4.8 TB/s), 2.7 ns on A100 (2 TB/s), against 0.2 and 0.6 ns of products at 60 % of the tensor cores' peak.
fp32 should be bound by its FMA products (`ieee`: no silent TF32). No GPU has run this yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from famseg_kernels import backends, launch
from famseg_kernels.finite import finite, nan_unless_finite
from famseg_kernels.spec import Backend
from famseg_kernels.ssd_scan import spec

# --- steps and decays -----------------------------------------------------------------------------------

_LOG2_E = tl.constexpr(1.4426950408889634)
# exp(-110) is 0 in fp32. The gradient of a step's decay is 0 below, as that of torch.clamp.
_LOWEST = tl.constexpr(-110.0 * 1.4426950408889634)
_ONE = tl.constexpr(float(1 << 40))  # of the fixed-point numbers
_CUT = tl.constexpr(-(1 << 62))  # in the place of a chunk's sum of log-decays: a sequence starts anew in it


@triton.jit
def _unclamped(raw, SOFTPLUS: tl.constexpr):
    """softplus(raw), the identity above 20. log(1 + u) with the rounding of 1 + u divided out again: u is small."""
    if SOFTPLUS:
        u = tl.exp(tl.minimum(raw, 20.0, propagate_nan=tl.PropagateNan.ALL))
        w = 1.0 + u
        series = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
        raw = tl.where(raw > 20.0, raw, series)
    return raw


@triton.jit
def _clamped(value, low, high):
    """Between low and high, and NaN stays NaN: PTX's plain minimum and maximum give the other operand for it."""
    raised = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_steps(dt, dt_batch, dt_pixel, A, bias, batch, pixels, live, column, low, high, SOFTPLUS):
    """Steps, and their log-decays to base 2 in fixed point. Tokens that are not live keep the state and add nothing.

    A step is NaN where the log-decay is not finite, which becomes 0: what a conversion makes of it depends on the chip.
    """
    raw = tl.load(dt + batch * dt_batch + pixels * dt_pixel + column, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + column).to(tl.float32)
    step = _clamped(_unclamped(raw, SOFTPLUS), low, high)
    log_decay = step * (tl.load(A + column).to(tl.float32) * _LOG2_E)
    log_decay = tl.maximum(log_decay, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
    is_number = log_decay < float("inf")
    step = tl.where(live, tl.where(is_number, step, float("nan")), 0.0)
    return step, (tl.where(live & is_number, log_decay, 0.0) * _ONE).to(tl.int64)


@triton.jit
def _zero_or_nan(t):
    """What is added to carry a NaN of t, and of t an infinity not."""
    return tl.where(t == t, 0.0, t)


@triton.jit
def _sequences(resets, batch, pixels, tokens, live):
    """How many sequences have started in the chunk up to each token."""
    return tl.cumsum((tl.load(resets + batch * tokens + pixels, mask=live, other=0) != 0).to(tl.int32), 0)


@triton.jit
def _split(sums, step):
    """A fixed-point number as the sum of two floats, so that differences of large ones keep their digits; NaN where
    the token's own decay is."""
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.int64)).to(tl.float32)
    return high * (1.0 / _ONE) + _zero_or_nan(step), low * (1.0 / _ONE)


@triton.jit
def _decay_of(sums):
    return tl.exp2(sums.to(tl.float32) * (1.0 / _ONE))


@triton.jit
def _difference(left_high, left_low, right_high, right_low):
    """left[i] - right[j] of numbers that were split, to base 2 as they are."""
    return (left_high[:, None] - right_high[None, :]) + (left_low[:, None] - right_low[None, :])


@triton.jit
def _pixels_of(token, axis, height, width):
    """Where the tokens of an axis (0: row-major, 1: column-major) lie in the image; 64 bits for the offsets."""
    return tl.where(axis == 0, token, (token % height) * width + token // height).to(tl.int64)


# --- states -----------------------------------------------------------------------------------------------


@triton.jit
def _chunk_states(
    u, u_batch, u_pixel, v, v_batch, v_pixel, dt, dt_batch, dt_pixel, A, bias, resets, states, totals,
    batches, height, width, chunks, heads, groups, directions, matrices, low, high,
    SOFTPLUS: tl.constexpr, GRADIENT: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk by itself adds to the state, Xᵀ (weight ∘ B), or GRADIENT: to its gradient, dYᵀ (arrive ∘ C).

    u: X or dY, v: B or C. states (direction, batch, chunk, head, P, N), totals (direction, batch, chunk, head) fixed
    point. The tokens are taken in the order of the direction, so that each one is a forward scan.
    """
    blocks_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    block = program % (blocks_p * blocks_n)
    program //= blocks_p * blocks_n
    head = program % heads
    program //= heads
    chunk = program % chunks
    program //= chunks
    batch = (program % batches).to(tl.int64)
    direction = program // batches

    lane = tl.arange(0, CHUNK)
    token = chunk * CHUNK + tl.where(direction % 2 == 0, lane, CHUNK - 1 - lane)
    live = token < height * width
    pixels = _pixels_of(token, direction // 2, height, width)
    step, log_decay = _load_steps(
        dt, dt_batch, dt_pixel, A, bias, batch, pixels, live, direction * heads + head, low, high, SOFTPLUS
    )
    total = tl.sum(log_decay, 0)
    sums = tl.cumsum(log_decay, 0)
    factor = _decay_of(sums) + _zero_or_nan(step) if GRADIENT else _decay_of(total - sums) * step
    if resets is not None:
        # Only the first sequence reads the state that enters, only the last one adds to the state that leaves.
        sequence = _sequences(resets, batch, pixels, height * width, live)
        last = tl.max(sequence, 0)
        total = tl.where(last > 0, _CUT, total)
        # The others are not loaded either: 0 times a NaN of theirs is NaN.
        live &= sequence == (0 if GRADIENT else last)
        factor = tl.where(live, factor, 0.0)

    p = block // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = tl.where(matrices > 1, direction, 0) * groups + head // (heads // groups)
    u_tile = tl.load(
        u + batch * u_batch + pixels[:, None] * u_pixel + head * P + p[None, :],
        mask=live[:, None] & (p < P)[None, :], other=0.0,
    )  # fmt: skip
    v_tile = tl.load(
        v + batch * v_batch + pixels[:, None] * v_pixel + matrix * N + n[None, :],
        mask=live[:, None] & (n < N)[None, :], other=0.0,
    )  # fmt: skip
    scaled = v_tile.to(tl.float32) * factor[:, None]
    state = tl.dot(tl.trans(u_tile.to(DOT)), scaled.to(DOT), input_precision=PRECISION)
    at = ((direction * batches + batch) * chunks + chunk) * heads + head
    tl.store(states + (at * P + p[:, None]) * N + n[None, :], state, mask=(p < P)[:, None] & (n < N)[None, :])
    if not GRADIENT:
        tl.store(totals + at, total, mask=block == 0)


@triton.jit
def _pass_states(
    states, totals, first, last, batches, chunks, heads, size,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to the state that enters it, in place; GRADIENT: the one that leaves it.

    first, last (batch, head, size) or None: the state before the first chunk and after the last one, of direction 0.
    """
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    block = program % blocks
    program //= blocks
    head = program % heads
    program //= heads
    batch = (program % batches).to(tl.int64)
    direction = program // batches
    ascending = (direction % 2 == 0) != GRADIENT

    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    row = (batch * heads + head) * size + element
    state = tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        state = tl.load(first + row, mask=inside, other=0.0).to(tl.float32)
    done = 0
    while done < chunks:
        # A chunk's load waits for no other chunk: unrolled, they are all under way together.
        for i in tl.static_range(UNROLL):
            index = done + i
            exists = index < chunks
            chunk = tl.where(ascending, index, chunks - 1 - index)
            at = ((direction * batches + batch) * chunks + chunk) * heads + head
            # (Triton 3.9's interpreter cannot & a number with a block.)
            here = element < tl.where(exists, size, 0)
            added = tl.load(states + at * size + element, mask=here, other=0.0)
            total = tl.load(totals + at, mask=exists, other=0)
            tl.store(states + at * size + element, state, mask=here)
            # Not by a factor of 0: 0 times a NaN or an infinity of another sequence is NaN.
            state = tl.where(total == _CUT, 0.0, state * _decay_of(total)) + added
        done += UNROLL
    if last is not None:
        tl.store(last + row, state, mask=element < tl.where(direction == 0, size, 0))


# --- forward, and the gradient of x -------------------------------------------------------------------------


@triton.jit
def _gram(
    left, left_rows, left_live, right, right_rows, right_live,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left rightᵀ of CHUNK rows each, N wide."""
    gram = tl.zeros((CHUNK, CHUNK), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (n < N)[None, :]
        left_tile = tl.load(left + left_rows[:, None] + n[None, :], mask=left_live[:, None] & inside, other=0.0)
        right_tile = tl.load(right + right_rows[:, None] + n[None, :], mask=right_live[:, None] & inside, other=0.0)
        gram = tl.dot(left_tile.to(DOT), tl.trans(right_tile.to(DOT)), gram, input_precision=PRECISION)
    return gram


@triton.jit
def _add_product(result, matrix, reads, tile, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """result + matrix · tile, where row i is to read only the rows j of the tile of which reads[i, j]: the others it
    multiplies by 0, which is NaN of what is not finite. So that is left out and put in its places by itself."""
    wide = tile.to(tl.float32)
    result = tl.dot(matrix, finite(wide, 1).to(DOT), result, input_precision=PRECISION)
    if nan_unless_finite(wide) != 0.0:  # of a NaN it is true
        spoilt = tl.dot(reads.to(DOT), tl.where(wide * 0.0 == 0.0, 0.0, 1.0).to(DOT), input_precision="tf32")
        result = tl.where(spoilt > 0.0, float("nan"), result)
    return result


@triton.jit
def _mix(
    u, u_batch, u_pixel, left, left_batch, left_pixel, right, right_batch, right_pixel, dt, dt_batch, dt_pixel,
    A, bias, resets, skip, states, part, gate, y_gradient, gate_gradient, y,
    batches, height, width, chunks, heads, groups, low, high,
    SOFTPLUS: tl.constexpr, TRANSPOSED: tl.constexpr, AXIS: tl.constexpr, SIDES: tl.constexpr, SHARED: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = M u + D u + what the states add, of a chunk and HEADS heads; TRANSPOSED: with Mᵀ, for the gradient of x.

    u: X, left: C, right: B, states: those that enter. TRANSPOSED: u: dY, left: B, right: C, states: the gradients of
    those that leave. u, y, part, gate and the gradients are (batch, tokens, heads, P); only u may have gaps. part:
    what the other axis gave. gate: y is multiplied by silu(gate). With y_gradient, y is not written: gate_gradient
    is, and silu(gate) · y_gradient in the place of y.
    """
    program = tl.program_id(0)
    head_block = program % (heads // HEADS)
    program //= heads // HEADS
    chunk = program % chunks
    batch = (program // chunks).to(tl.int64)
    group = head_block * HEADS // (heads // groups)

    lane = tl.arange(0, CHUNK)
    token = chunk * CHUNK + lane
    live = token < height * width
    pixels = _pixels_of(token, AXIS, height, width)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    rows, columns = lane[:, None], lane[None, :]
    # Which direction fills the lower triangle and which the upper one. With one direction the other side is empty.
    lower: tl.constexpr = 2 * AXIS + (1 if TRANSPOSED else 0)
    upper: tl.constexpr = 2 * AXIS + (0 if TRANSPOSED else 1)
    left += batch * left_batch
    right += batch * right_batch
    lower_matrix = ((0 if SHARED else lower) * groups + group) * N
    upper_matrix = ((0 if SHARED else upper) * groups + group) * N

    matrix = upper_matrix if SIDES == 1 and TRANSPOSED else lower_matrix
    gram = _gram(
        left + matrix, pixels * left_pixel, live, right + matrix, pixels * right_pixel, live, N, CHUNK, BLOCK_N, DOT,
        PRECISION,
    )  # fmt: skip
    if SIDES == 2:
        other_gram = gram
        if not SHARED:
            other_gram = _gram(
                left + upper_matrix, pixels * left_pixel, live, right + upper_matrix, pixels * right_pixel, live, N,
                CHUNK, BLOCK_N, DOT, PRECISION,
            )  # fmt: skip
        # The diagonal belongs to both sides: the upper one's is kept apart.
        upper_diagonal = tl.sum(tl.where(rows == columns, other_gram, 0.0), 1)
        if not SHARED:
            gram = tl.where(rows >= columns, gram, other_gram)

    # On its own side of the diagonal no sum of log-decays is positive.
    side = (rows <= columns) if TRANSPOSED else (rows >= columns)
    if resets is not None:
        sequence = _sequences(resets, batch, pixels, height * width, live)
        side &= sequence[:, None] == sequence[None, :]
        reached = sequence == (tl.max(sequence, 0) if TRANSPOSED else 0)  # which tokens the states have to do with

    for h in range(HEADS):
        head = head_block * HEADS + h
        # Direction 0 or 2: sums from the chunk's start to the token. The decay of direction 1 or 3 from token j down
        # to token i < j is that of tokens i to j - 1: so its sums leave the token itself out.
        step, log_decay = _load_steps(
            dt, dt_batch, dt_pixel, A, bias, batch, pixels, live, 2 * AXIS * heads + head, low, high, SOFTPLUS
        )
        sums, total = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
        if SIDES == 2:
            other_step, log_decay = _load_steps(
                dt, dt_batch, dt_pixel, A, bias, batch, pixels, live, (2 * AXIS + 1) * heads + head, low, high,
                SOFTPLUS,
            )  # fmt: skip
            other_sums, other_total = tl.cumsum(log_decay, 0) - log_decay, tl.sum(log_decay, 0)
        else:
            other_step, other_sums, other_total = step, sums, total
        if TRANSPOSED:
            lower_step, lower_sums, upper_step, upper_sums = other_step, other_sums, step, sums
            upper_total = total
        else:
            lower_step, lower_sums, upper_step, upper_sums = step, sums, other_step, other_sums
            upper_total = other_total

        lower_high, lower_low = _split(lower_sums, lower_step)
        upper_high, upper_low = _split(upper_sums, upper_step)
        below = _difference(lower_high, lower_low, lower_high, lower_low)
        above = -_difference(upper_high, upper_low, upper_high, upper_low)
        # A token's step goes with what it gives: that is a column of M and a row of its transpose.
        lower_weight = lower_step[:, None] if TRANSPOSED else lower_step[None, :]
        upper_weight = upper_step[:, None] if TRANSPOSED else upper_step[None, :]
        if SIDES == 2:
            decay = tl.exp2(tl.where(rows >= columns, below, above))
            mixing = gram * decay * tl.where(rows >= columns, lower_weight, upper_weight)
            mixing += tl.where(rows == columns, (upper_diagonal * upper_step)[:, None], 0.0)
        elif TRANSPOSED:
            mixing = tl.where(side, gram * tl.exp2(above) * upper_weight, 0.0)
        else:
            mixing = tl.where(side, gram * tl.exp2(below) * lower_weight, 0.0)
        mixing = mixing.to(DOT)
        if states is not None:
            lower_factor = _decay_of(lower_sums)
            upper_factor = _decay_of(upper_total - upper_sums)
            if TRANSPOSED:
                lower_factor *= lower_step
                upper_factor *= upper_step

        for p0 in range(0, P, BLOCK_P):
            inside = live[:, None] & (p0 + p < P)[None, :]
            column = head * P + p0 + p[None, :]
            u_tile = tl.load(u + batch * u_batch + pixels[:, None] * u_pixel + column, mask=inside, other=0.0)
            result = tl.zeros((CHUNK, BLOCK_P), tl.float32)
            if states is not None:
                for n0 in range(0, N, BLOCK_N):
                    n_inside = n0 + n < N
                    tile_inside = live[:, None] & n_inside[None, :]
                    state_inside = (p0 + p < P)[:, None] & n_inside[None, :]
                    element = (p0 + p[:, None]) * N + n0 + n[None, :]
                    if SIDES == 2 or not TRANSPOSED:
                        at = lower_matrix + n0 + n[None, :]
                        tile = tl.load(left + pixels[:, None] * left_pixel + at, mask=tile_inside, other=0.0)
                        at = ((lower * batches + batch) * chunks + chunk) * heads + head
                        state = tl.load(states + at * (P * N) + element, mask=state_inside, other=0.0)
                        scaled = (tile.to(tl.float32) * lower_factor[:, None]).to(DOT)
                        result = tl.dot(scaled, tl.trans(state.to(DOT)), result, input_precision=PRECISION)
                    if SIDES == 2 or TRANSPOSED:
                        at = upper_matrix + n0 + n[None, :]
                        tile = tl.load(left + pixels[:, None] * left_pixel + at, mask=tile_inside, other=0.0)
                        at = ((upper * batches + batch) * chunks + chunk) * heads + head
                        state = tl.load(states + at * (P * N) + element, mask=state_inside, other=0.0)
                        scaled = (tile.to(tl.float32) * upper_factor[:, None]).to(DOT)
                        result = tl.dot(scaled, tl.trans(state.to(DOT)), result, input_precision=PRECISION)
                if resets is not None:
                    result = tl.where(reached[:, None], result, 0.0)
            if SIDES == 2:  # every token reads every other one
                result = tl.dot(mixing, u_tile.to(DOT), result, input_precision=PRECISION)
            else:
                result = _add_product(result, mixing, side, u_tile, DOT, PRECISION)
            if skip is not None:
                weight_of_u = tl.load(skip + column, mask=(p0 + p < P)[None, :], other=0.0).to(tl.float32)
                result += u_tile.to(tl.float32) * weight_of_u
            place = (batch * height * width + pixels[:, None]) * heads * P + column
            if part is not None:
                result += tl.load(part + place, mask=inside, other=0.0)
            if gate is not None:
                gates = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
                opened = 1.0 / (1.0 + tl.exp(-gates))
                if y_gradient is not None:
                    gradient = tl.load(y_gradient + place, mask=inside, other=0.0).to(tl.float32)
                    slope = opened * (1.0 + gates * (1.0 - opened))
                    of_gate = (gradient * result * slope).to(gate_gradient.dtype.element_ty)
                    tl.store(gate_gradient + place, of_gate, mask=inside)
                    result = gradient
                result *= gates * opened
            tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


# --- the same of a small image, in one matrix ---------------------------------------------------------------


@triton.jit
def _running_sums(
    dt, dt_batch, dt_pixel, A, bias, steps, sums_high, sums_low, batches, height, width, heads, low, high,
    SOFTPLUS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Steps and running sums of log-decays, (direction, batch, head, pixel), of images of at most TOKENS.

    The sums are those `_mix` makes of a chunk: along the direction's axis, and directions 1 and 3 leave the token out.
    """
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads % batches).to(tl.int64)
    direction = tl.program_id(0) // (heads * batches)
    token = tl.arange(0, TOKENS)
    live = token < height * width
    pixels = _pixels_of(token, direction // 2, height, width)
    step, log_decay = _load_steps(
        dt, dt_batch, dt_pixel, A, bias, batch, pixels, live, direction * heads + head, low, high, SOFTPLUS
    )
    higher, lower = _split(tl.cumsum(log_decay, 0) - tl.where(direction % 2 == 0, 0, log_decay), step)
    place = ((direction * batches + batch) * heads + head) * height * width + pixels
    tl.store(steps + place, step, mask=live)
    tl.store(sums_high + place, higher, mask=live)
    tl.store(sums_low + place, lower, mask=live)


@triton.jit
def _mix_image(
    u, u_batch, u_pixel, left, left_batch, left_pixel, right, right_batch, right_pixel, steps, sums_high, sums_low,
    skip, y, batches, height, width, heads, groups,
    TRANSPOSED: tl.constexpr, SHARED: tl.constexpr, TILES: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = M u + D u of CHUNK pixels and a head, with the M of four directions: what two launches of `_mix` would do."""
    blocks_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    block = program % blocks_p
    program //= blocks_p
    head = program % heads
    program //= heads
    tile = program % TILES
    batch = (program // TILES).to(tl.int64)
    group = head // (heads // groups)

    lane = tl.arange(0, CHUNK)
    tokens = height * width
    i = tile * CHUNK + lane
    live_i = i < tokens
    left_rows = i.to(tl.int64) * left_pixel
    column = head * P + block * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = column < head * P + P
    left += batch * left_batch
    right += batch * right_batch
    u += batch * u_batch

    result = tl.zeros((CHUNK, BLOCK_P), tl.float32)
    for tile_j in range(TILES):
        j = tile_j * CHUNK + lane
        live_j = j < tokens
        right_rows = j.to(tl.int64) * right_pixel
        both = live_i[:, None] & live_j[None, :]
        mixing = tl.zeros((CHUNK, CHUNK), tl.float32)
        for axis in tl.static_range(2):
            lower = 2 * axis + (1 if TRANSPOSED else 0)
            upper = 2 * axis + (0 if TRANSPOSED else 1)
            if axis == 0 or not SHARED:
                at = ((0 if SHARED else lower) * groups + group) * N
                gram = _gram(
                    left + at, left_rows, live_i, right + at, right_rows, live_j, N, CHUNK, BLOCK_N, DOT, PRECISION
                )
                other_gram = gram
            if not SHARED:
                at = (upper * groups + group) * N
                other_gram = _gram(
                    left + at, left_rows, live_i, right + at, right_rows, live_j, N, CHUNK, BLOCK_N, DOT, PRECISION
                )
            lower_at = ((lower * batches + batch) * heads + head) * tokens
            upper_at = ((upper * batches + batch) * heads + head) * tokens
            below = _difference(
                tl.load(sums_high + lower_at + i, mask=live_i, other=0.0),
                tl.load(sums_low + lower_at + i, mask=live_i, other=0.0),
                tl.load(sums_high + lower_at + j, mask=live_j, other=0.0),
                tl.load(sums_low + lower_at + j, mask=live_j, other=0.0),
            )
            above = -_difference(
                tl.load(sums_high + upper_at + i, mask=live_i, other=0.0),
                tl.load(sums_low + upper_at + i, mask=live_i, other=0.0),
                tl.load(sums_high + upper_at + j, mask=live_j, other=0.0),
                tl.load(sums_low + upper_at + j, mask=live_j, other=0.0),
            )
            if TRANSPOSED:
                lower_weight = tl.load(steps + lower_at + i, mask=live_i, other=0.0)[:, None]
                upper_weight = tl.load(steps + upper_at + i, mask=live_i, other=0.0)[:, None]
            else:
                lower_weight = tl.load(steps + lower_at + j, mask=live_j, other=0.0)[None, :]
                upper_weight = tl.load(steps + upper_at + j, mask=live_j, other=0.0)[None, :]
            order_i = i if axis == 0 else i % width * height + i // width
            order_j = j if axis == 0 else j % width * height + j // width
            later = order_i[:, None] >= order_j[None, :]
            decay = tl.exp2(tl.where(both, tl.where(later, below, above), float("-inf")))
            mixing += decay * tl.where(later, gram * lower_weight, other_gram * upper_weight)
            # The diagonal belongs to both sides.
            mixing += tl.where(i[:, None] == j[None, :], other_gram * upper_weight, 0.0)
        u_tile = tl.load(
            u + j.to(tl.int64)[:, None] * u_pixel + column[None, :], mask=live_j[:, None] & exists[None, :], other=0.0
        )
        result = tl.dot(mixing.to(DOT), u_tile.to(DOT), result, input_precision=PRECISION)

    inside = live_i[:, None] & exists[None, :]
    if skip is not None:
        weight_of_u = tl.load(skip + column, mask=exists, other=0.0).to(tl.float32)
        own = tl.load(u + i.to(tl.int64)[:, None] * u_pixel + column[None, :], mask=inside, other=0.0).to(tl.float32)
        result += own * weight_of_u[None, :]
    place = (batch * tokens + i[:, None]) * heads * P + column[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


# --- the other gradients -----------------------------------------------------------------------------------


@triton.jit
def _matrix_gradients(
    x, x_batch, x_pixel, y_gradient, y_batch, y_pixel, B, b_batch, b_pixel, C, c_batch, c_pixel,
    dt, dt_batch, dt_pixel, A, bias, resets, states, state_gradients, of_B, of_C, of_step, of_log, of_skip,
    batches, height, width, chunks, heads, groups, splits, directions, matrices, low, high,
    SOFTPLUS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C, of the steps and of their log-decays, of a chunk, direction and HEADS heads of a group.

    With dS the gradient of the state that leaves, and everything of the forward pass computed again:

        dM = dY Xᵀ     dG = dM ∘ L · step     dC = dG B + arrive ∘ (dY S)     dB = dGᵀ C + weight ∘ (X dS)

    A block of N per program: all of this but dM is linear in it. of_B, of_C (splits, batch, tokens, directions,
    groups, N), of_step, of_log (blocks of N, batch, tokens, directions, heads), of_skip (batch, chunk, heads, P): the
    sums of dY ∘ X.

    A log-decay's gradient is the sum over all pairs of tokens it lies between, built up term by term: a difference of
    running sums would lose small ones beside large.
    """
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    block = program % blocks_n
    program //= blocks_n
    split = program % splits
    program //= splits
    group = program % groups
    program //= groups
    chunk = program % chunks
    program //= chunks
    batch = (program % batches).to(tl.int64)
    direction = program // batches

    lane = tl.arange(0, CHUNK)
    # In the direction's own order.
    token = chunk * CHUNK + tl.where(direction % 2 == 0, lane, CHUNK - 1 - lane)
    tokens = height * width
    live = token < tokens
    pixels = _pixels_of(token, direction // 2, height, width)
    rows, columns = lane[:, None], lane[None, :]
    p = tl.arange(0, BLOCK_P)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < N
    inside = live[:, None] & n_inside[None, :]
    matrix = (tl.where(matrices > 1, direction, 0) * groups + group) * N + n[None, :]
    B_tile = tl.load(B + batch * b_batch + pixels[:, None] * b_pixel + matrix, mask=inside, other=0.0)
    C_tile = tl.load(C + batch * c_batch + pixels[:, None] * c_pixel + matrix, mask=inside, other=0.0)
    gram = tl.dot(C_tile.to(DOT), tl.trans(B_tile.to(DOT)), input_precision=PRECISION)

    side = rows >= columns
    if resets is not None:
        sequence = _sequences(resets, batch, pixels, tokens, live)
        last = tl.max(sequence, 0)
        side &= sequence[:, None] == sequence[None, :]
        enters, leaves = sequence == 0, sequence == last

    dG = tl.zeros((CHUNK, CHUNK), tl.float32)
    dB = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dC = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    for h in range(HEADS):
        head = (group * splits + split) * HEADS + h
        column = direction * heads + head
        step, log_decay = _load_steps(dt, dt_batch, dt_pixel, A, bias, batch, pixels, live, column, low, high, SOFTPLUS)
        sums, total = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)

        dM = tl.zeros((CHUNK, CHUNK), tl.float32)
        from_state = tl.zeros((CHUNK, BLOCK_N), tl.float32)
        to_state = tl.zeros((CHUNK, BLOCK_N), tl.float32)
        passing = tl.zeros((BLOCK_P,), tl.float32)
        at = ((direction * batches + batch) * chunks + chunk) * heads + head
        for p0 in range(0, P, BLOCK_P):
            p_inside = p0 + p < P
            tile_inside = live[:, None] & p_inside[None, :]
            place = head * P + p0 + p[None, :]
            x_tile = tl.load(x + batch * x_batch + pixels[:, None] * x_pixel + place, mask=tile_inside, other=0.0)
            dy_tile = tl.load(
                y_gradient + batch * y_batch + pixels[:, None] * y_pixel + place, mask=tile_inside, other=0.0
            )
            dM = tl.dot(dy_tile.to(DOT), tl.trans(x_tile.to(DOT)), dM, input_precision=PRECISION)
            element = (at * P + p0 + p[:, None]) * N + n[None, :]
            state_inside = p_inside[:, None] & n_inside[None, :]
            if states is not None:
                state = tl.load(states + element, mask=state_inside, other=0.0)
                from_state = tl.dot(dy_tile.to(DOT), state.to(DOT), from_state, input_precision=PRECISION)
            if state_gradients is not None:
                dS = tl.load(state_gradients + element, mask=state_inside, other=0.0)
                to_state = tl.dot(x_tile.to(DOT), dS.to(DOT), to_state, input_precision=PRECISION)
                if states is not None:
                    passing += tl.sum(state * dS, 1)
            if of_skip is not None:
                product = tl.sum(x_tile.to(tl.float32) * dy_tile.to(tl.float32), 0)
                skip_at = ((batch * chunks + chunk) * heads + head) * P + p0 + p
                # Once: by direction 0 and the first block of N.
                tl.store(of_skip + skip_at, product, mask=p0 + p < tl.where(direction + block == 0, P, 0))

        sums_high, sums_low = _split(sums, step)
        difference = _difference(sums_high, sums_low, sums_high, sums_low)
        pair = dM * tl.exp2(tl.where(side, difference, float("-inf")))
        # Chosen, here and below, and not multiplied by 0: that is NaN of what is not finite.
        weighted = tl.where(side, pair * step[None, :], 0.0)
        dG += weighted
        products = tl.where(side, pair * gram, 0.0)
        d_step = tl.sum(products, 0)
        products *= step[None, :]
        if resets is not None:
            products = tl.where(side, products, 0.0)
        # across[t, j], read where t > j: over the tokens i ≥ t that read token j.
        across = tl.cumsum(products, 0, reverse=True)
        arriving = tl.zeros((CHUNK,), tl.float32)
        if states is not None:
            if resets is not None:
                from_state = tl.where(enters[:, None], from_state, 0.0)
            arrive = _decay_of(sums)
            dC += arrive[:, None] * from_state
            arriving = arrive * tl.sum(from_state * C_tile.to(tl.float32), 1)
            if resets is not None:
                arriving = tl.where(enters, arriving, 0.0)
        if state_gradients is not None:
            leave = _decay_of(total - sums)
            weight = leave * step
            if resets is not None:
                to_state = tl.where(leaves[:, None], to_state, 0.0)
                weight = tl.where(leaves, weight, 0.0)
            dB += weight[:, None] * to_state
            leaving = tl.sum(to_state * B_tile.to(tl.float32), 1)
            if resets is not None:
                leaving = tl.where(leaves, leaving, 0.0)
            d_step += leave * leaving
            across += (weight * leaving)[None, :]
        # The decay of token t lies between the tokens j < t and those from t on, between the entering state and the
        # tokens from t on, between the tokens j < t and the leaving state, and between both states.
        d_log = tl.sum(tl.where(columns < rows, across, arriving[None, :]), 1) + _zero_or_nan(step)
        through = _decay_of(total) * tl.sum(passing, 0)
        if resets is not None:
            through = tl.where(last > 0, 0.0, through)
        d_log += through
        place = ((block * batches + batch) * tokens + pixels) * (directions * heads) + column
        tl.store(of_step + place, d_step, mask=live)
        tl.store(of_log + place, d_log, mask=live)

    dG = dG.to(DOT)
    dC = _add_product(dC, dG, side, B_tile, DOT, PRECISION)
    dB = _add_product(dB, tl.trans(dG), tl.trans(side), C_tile, DOT, PRECISION)
    place = ((split * batches + batch) * tokens + pixels[:, None]) * directions + direction
    place = (place * groups + group) * N + n[None, :]
    tl.store(of_B + place, dB.to(of_B.dtype.element_ty), mask=inside)
    tl.store(of_C + place, dC.to(of_C.dtype.element_ty), mask=inside)


@triton.jit
def _step_gradients(
    dt, dt_batch, dt_pixel, A, bias, of_step, of_log, of_dt, of_A, of_bias, rows, tokens, columns, low, high,
    SOFTPLUS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the gradients of steps and log-decays (parts, rows, columns) those of dt, A and dt_bias.

    rows: pixels of all images, columns: directions and heads. of_A, of_bias (blocks of rows, columns): partial sums.
    """
    blocks = tl.cdiv(columns, COLUMNS)
    row_block = tl.program_id(0) // blocks
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    inside = (row < rows)[:, None] & exists[None, :]
    at = (row // tokens * dt_batch + row % tokens * dt_pixel)[:, None] + column[None, :]
    raw = tl.load(dt + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    decay_rate = tl.load(A + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    value = _unclamped(raw, SOFTPLUS)
    step = _clamped(value, low, high)
    d_step = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_log = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in range(PARTS):
        place = (row + part * rows)[:, None] * columns + column[None, :]
        d_step += tl.load(of_step + place, mask=inside, other=0.0)
        d_log += tl.load(of_log + place, mask=inside, other=0.0)
    d_log = tl.where(step * (decay_rate * _LOG2_E) < _LOWEST, 0.0, d_log)
    d_raw = d_step + d_log * decay_rate
    d_raw = tl.where((value < low) | (value > high), 0.0, d_raw)
    if SOFTPLUS:
        d_raw = tl.where(raw > 20.0, d_raw, d_raw / (1.0 + tl.exp(-raw)))
    tl.store(of_dt + row[:, None] * columns + column[None, :], d_raw.to(of_dt.dtype.element_ty), mask=inside)
    sum_at = row_block * columns + column
    tl.store(of_A + sum_at, tl.sum(tl.where(inside, d_log * step, 0.0), 0), mask=exists)
    tl.store(of_bias + sum_at, tl.sum(tl.where(inside, d_raw, 0.0), 0), mask=exists)


# --- launches ---------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """How bf16 is cut. What runs in TF32 or by FMA takes at most 32 of everything."""

    chunk: int  # tokens of a chunk, at most
    tile: int  # of headdim and state that a program takes at once, at most; for states the larger of both
    # The same in backward: nothing but inputs is kept for it, so its chunks may be others.
    backward_chunk: int
    backward_tile: int
    image: int  # pixels, at most, of a bf16 image whose four directions are one matrix
    num_stages: int


# By compute capability × 10; 0 stands for every other chip and for the interpreter. These are the largest that sm_80
# and sm_90 hold in registers: a tile of 64 × 64 takes 32 of 255 with 4 warps. A product by FMA keeps rows of both
# factors as well: of 64 they would not fit.
CONFIGURATIONS = {
    80: Configuration(chunk=64, tile=32, backward_chunk=32, backward_tile=64, image=600, num_stages=2),
    90: Configuration(chunk=64, tile=32, backward_chunk=32, backward_tile=64, image=600, num_stages=2),
    0: Configuration(chunk=64, tile=32, backward_chunk=32, backward_tile=64, image=600, num_stages=2),
}
_WARPS = 4
# `_matrix_gradients` keeps seven tiles: of bf16 4 warps spill (up to 72 bytes a thread, by the compiler's version), 8
# hardly. A multiprocessor holds as many warps either way: two programs of 4 at 255 registers, or one of 8.
_GRADIENT_WARPS = 8
# Channels of the heads that share a program's G in _mix: narrow heads go together.
_WIDTH = 64


# --- one call -----------------------------------------------------------------------------------------------


def unsupported(x: Tensor, *_: Any) -> str | None:
    """None when these kernels can run the call, else the reason."""
    return "there is no kernel for float64" if x.dtype == torch.float64 else None


def _power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def _divisor(of: int, limit: int) -> int:
    """The largest divisor up to the limit."""
    return max(d for d in range(1, limit + 1) if of % d == 0)


class _Carried(NamedTuple):
    """The states that enter each chunk and the sums of the chunks' log-decays."""

    states: Tensor | None
    totals: Tensor | None


class _Problem:
    """One call, an image or a sequence (an image of one column, scanned in one direction); not an empty one.

    Tensors like x are (batch, tokens, heads · headdim) here, states (direction, batch, chunk, head, headdim, state).
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        step_rule: tuple[int | None, bool, float, float],
        resets: Tensor | None = None,
        *,
        backward: bool = False,
    ) -> None:
        image = x.dim() == 5
        self.batches, self.height, self.width = (*x.shape[:3],) if image else (*x.shape[:2], 1)
        self.heads, self.headdim = x.shape[-2:]
        self.groups, self.state = B.shape[-2:]
        self.directions, self.matrices = (dt.shape[3], B.shape[3]) if image else (1, 1)
        self.tokens = self.height * self.width
        self.x, self.dt, self.B, self.C = (self.rows(t) for t in (x, dt, B, C))
        self.A = A.contiguous()
        self.bias = None if dt_bias is None else dt_bias.contiguous()
        self.resets = resets
        if D is not None and D.dim() == 1:
            D = D[:, None].expand(self.heads, self.headdim)
        self.skip = None if D is None else D.contiguous()
        chunk, self.softplus, self.low, self.high = step_rule
        tuned = CONFIGURATIONS.get(launch.capability(x.device), CONFIGURATIONS[0])
        longest, tile = (tuned.backward_chunk, tuned.backward_tile) if backward else (tuned.chunk, tuned.tile)
        limit = 64 if x.dtype == torch.bfloat16 else 32
        # Of fp16, as TF32, `_matrix_gradients` takes all of 64 channels at once: unrolled by the compiler, a loop over
        # 16 or 32 of them keeps too much in registers (88 and 296 bytes of stack a thread, and none of 64).
        self.tile = min(64 if backward and x.dtype == torch.float16 else limit, tile)
        self.state_tile = min(limit, max(tuned.tile, tuned.backward_tile))
        self.config = launch.Config(_WARPS, tuned.num_stages)
        longest = min(limit, longest, longest if chunk is None else _power_of_two(chunk))
        self.chunk = max(16, min(longest, _power_of_two(self.tokens)))
        self.chunks = -(-self.tokens // self.chunk)
        # Not of narrow heads, which share G in `_mix`, nor without bf16: M would be made for every 32 channels again.
        suits = x.dtype == torch.bfloat16 and self.directions == 4 and self.headdim >= 32
        self.one_matrix = suits and self.tokens <= tuned.image

    def constants(self, tile: int) -> dict[str, Any]:
        """What the kernels that take tiles know at compile time."""
        # fp16 products run as TF32: as many digits, but steps and states may be beyond fp16's range. Triton's
        # interpreter has no product of bf16.
        narrow = self.x.dtype == torch.bfloat16 and not backends.TRITON_INTERPRETS
        return {
            "SOFTPLUS": self.softplus,
            "P": self.headdim,
            "N": self.state,
            "CHUNK": self.chunk,
            "BLOCK_P": max(16, min(tile, _power_of_two(self.headdim))),
            "BLOCK_N": max(16, min(tile, _power_of_two(self.state))),
            "DOT": tl.bfloat16 if narrow else tl.float32,
            "PRECISION": "ieee" if self.x.dtype == torch.float32 else "tf32",
        }

    def rows(self, t: Tensor) -> Tensor:
        """(batch, tokens, features); a copy only where tokens are not one stride apart or features have gaps."""
        t = t.reshape(self.batches, self.tokens, -1)
        return t if t.stride(2) == 1 else t.contiguous()

    def states(
        self, u: Tensor, v: Tensor, totals: Tensor, first: Tensor | None, last: Tensor | None, *, gradient: bool
    ) -> Tensor:
        """The states that enter each chunk, from X and B, or the gradients of those that leave it, from dY and C.

        totals (directions, batch, chunks, heads): written with the states, read with the gradients. first, last: the
        state of the sequence at its begin and at its end, last is written.
        """
        states = u.new_empty((*totals.shape, self.headdim, self.state), dtype=torch.float32)
        constants = self.constants(self.state_tile)
        blocks = -(-self.headdim // constants["BLOCK_P"]) * -(-self.state // constants["BLOCK_N"])
        launch.run(
            _chunk_states, (totals.numel() * blocks,), self.config,
            *_strided(u), *_strided(v), *_strided(self.dt), self.A, self.bias, self.resets, states, totals,
            self.batches, self.height, self.width, self.chunks, self.heads, self.groups, self.directions,
            self.matrices, self.low, self.high, GRADIENT=gradient, **constants,
        )  # fmt: skip
        size = self.headdim * self.state
        block = min(1024, _power_of_two(size))
        launch.run(
            _pass_states, (self.directions * self.batches * self.heads * -(-size // block),), launch.Config(_WARPS),
            states, totals, first, last, self.batches, self.chunks, self.heads, size, GRADIENT=gradient, BLOCK=block,
            UNROLL=8,
        )  # fmt: skip
        return states

    def carried(self, initial: Tensor | None, *others: Tensor | None, last: Tensor | None = None) -> _Carried:
        """States and totals, or None where nothing enters or leaves the only chunk."""
        if self.chunks == 1 and all(t is None for t in (initial, last, *others)):
            return _Carried(None, None)
        totals = self.x.new_empty((self.directions, self.batches, self.chunks, self.heads), dtype=torch.int64)
        return _Carried(self.states(self.x, self.B, totals, initial, last, gradient=False), totals)

    def mix(
        self,
        u: Tensor,
        states: Tensor | None,
        *,
        transposed: bool = False,
        gate: Tensor | None = None,
        y_gradient: Tensor | None = None,
        gate_gradient: Tensor | None = None,
    ) -> Tensor:
        """y from X and states, or (transposed) the gradient of x from dY and the states' gradients."""
        left, right = (self.B, self.C) if transposed else (self.C, self.B)
        if self.one_matrix:
            return self.mix_image(u, left, right, transposed)
        heads = _divisor(self.heads // self.groups, max(1, _WIDTH // self.headdim))
        y = None
        for axis in range(2 if self.directions == 4 else 1):
            # What the second axis adds to is kept in fp32.
            part, dtype = y, torch.float32 if self.directions == 4 and axis == 0 else self.x.dtype
            y = u.new_empty((self.batches, self.tokens, self.heads * self.headdim), dtype=dtype)
            launch.run(
                _mix, (self.batches * self.chunks * (self.heads // heads),), self.config,
                *_strided(u), *_strided(left), *_strided(right), *_strided(self.dt), self.A, self.bias,
                self.resets, self.skip if axis == 0 else None, states, part, gate, y_gradient, gate_gradient, y,
                self.batches, self.height, self.width, self.chunks, self.heads, self.groups, self.low, self.high,
                TRANSPOSED=transposed, AXIS=axis, SIDES=min(self.directions, 2), SHARED=self.matrices == 1, HEADS=heads,
                **self.constants(self.tile),
            )  # fmt: skip
        assert y is not None
        return y

    def mix_image(self, u: Tensor, left: Tensor, right: Tensor, transposed: bool) -> Tensor:
        steps, *sums = (self.fp32(self.directions, self.batches, self.heads, self.tokens) for _ in range(3))
        launch.run(
            _running_sums, (self.directions * self.batches * self.heads,), launch.Config(_WARPS),
            *_strided(self.dt), self.A, self.bias, steps, *sums, self.batches, self.height, self.width,
            self.heads, self.low, self.high, SOFTPLUS=self.softplus, TOKENS=_power_of_two(self.tokens),
        )  # fmt: skip
        # Of 64 pixels a program's tiles would not fit into registers.
        constants = self.constants(self.state_tile) | {"CHUNK": min(self.chunk, 32)}
        del constants["SOFTPLUS"]
        tiles = -(-self.tokens // constants["CHUNK"])
        blocks = -(-self.headdim // constants["BLOCK_P"])
        y = u.new_empty((self.batches, self.tokens, self.heads * self.headdim), dtype=self.x.dtype)
        launch.run(
            _mix_image, (self.batches * tiles * self.heads * blocks,), self.config,
            *_strided(u), *_strided(left), *_strided(right), steps, *sums, self.skip, y,
            self.batches, self.height, self.width, self.heads, self.groups,
            TRANSPOSED=transposed, SHARED=self.matrices == 1, TILES=tiles, **constants,
        )  # fmt: skip
        return y

    def gradients(
        self,
        dy: Tensor,
        carried: _Carried,
        needs: Sequence[bool],
        of_final: Tensor | None = None,
        of_initial: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Gradients of x, dt, A, B, C, D (heads, headdim) and dt_bias, by their elements, where `needs`.

        of_final: the gradient of the final states; of_initial, of the initial ones, is written.
        """
        states, state_gradients = carried.states, None
        if carried.totals is not None:
            state_gradients = self.states(dy, self.C, carried.totals, of_final, of_initial, gradient=True)
        of_x = self.mix(dy, state_gradients, transposed=True) if needs[0] else None
        if not any(needs[1:]):
            return [of_x, *itertools.repeat(None, 6)]
        constants = self.constants(self.tile)
        parts = -(-self.state // constants["BLOCK_N"])
        programs = self.directions * self.batches * self.chunks * self.groups * parts
        in_group = self.heads // self.groups
        # The heads of a group add to one gradient of B and C. Where there are too few programs for a GPU they are
        # split, and the shares added: fp32 and up to 8 times B and C, but of a problem that is small. Likewise each
        # direction has its share where all read the same B and C.
        splits = next((s for s in range(1, 9) if in_group % s == 0 and programs * s >= 256), _divisor(in_group, 8))
        alone = splits == 1 and self.matrices == self.directions
        shape = (splits, self.batches, self.tokens, self.directions, self.groups, self.state)
        of_B, of_C = (self.x.new_empty(shape, dtype=self.x.dtype if alone else torch.float32) for _ in "BC")
        columns = self.directions * self.heads
        of_step, of_log = (self.fp32(parts, self.batches, self.tokens, columns) for _ in range(2))
        of_D = None if self.skip is None else self.fp32(self.batches * self.chunks, self.heads, self.headdim)
        launch.run(
            _matrix_gradients, (programs * splits,), self.config._replace(num_warps=_GRADIENT_WARPS),
            *_strided(self.x), *_strided(dy), *_strided(self.B), *_strided(self.C), *_strided(self.dt), self.A,
            self.bias, self.resets, states, state_gradients, of_B, of_C, of_step, of_log, of_D,
            self.batches, self.height, self.width, self.chunks, self.heads, self.groups, splits, self.directions,
            self.matrices, self.low, self.high, HEADS=in_group // splits, **constants,
        )  # fmt: skip
        rows, row_block, column_block = self.batches * self.tokens, 64, min(32, _power_of_two(columns))
        row_blocks = -(-rows // row_block)
        of_dt = self.dt.new_empty((self.batches, self.tokens, columns))
        of_A, of_bias = (self.fp32(row_blocks, columns) for _ in range(2))
        launch.run(
            _step_gradients, (row_blocks * -(-columns // column_block),), launch.Config(_WARPS),
            *_strided(self.dt), self.A, self.bias, of_step, of_log, of_dt, of_A, of_bias, rows, self.tokens, columns,
            self.low, self.high, SOFTPLUS=self.softplus, PARTS=parts, ROWS=row_block, COLUMNS=column_block,
        )  # fmt: skip
        if not alone:
            shares = (0, 3) if self.matrices == 1 else (0,)
            of_B, of_C = of_B.sum(shares), of_C.sum(shares)
        found = [of_x, of_dt, of_A.sum(0), of_B, of_C, None if of_D is None else of_D.sum(0), of_bias.sum(0)]
        return [g if need else None for g, need in zip(found, needs, strict=True)]

    def fp32(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)


def _strided(t: Tensor) -> tuple[Tensor, int, int]:
    """A tensor (batch, tokens, features) as the kernels take it."""
    return t, t.stride(0), t.stride(1)


def _zeros(needs: Sequence[bool], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [torch.zeros_like(t) if need and t is not None else None for need, t in zip(needs, tensors, strict=True)]


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# --- the image ----------------------------------------------------------------------------------------------


def _forward_2d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    chunk_size: int | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    """y (N, H, W, heads, headdim) in x's dtype."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    problem = _Problem(x, dt, A, B, C, _summed(D), dt_bias, (chunk_size, dt_softplus, dt_min, dt_max))
    with launch.on(x.device):
        states = None if problem.one_matrix else problem.carried(None).states
        return problem.mix(problem.x, states).view(x.shape)


def _backward_2d(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    chunk_size: int | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> list[Tensor | None]:
    """Gradients of the tensor arguments where `needs`, None elsewhere."""
    tensors = (x, dt, A, B, C, D, dt_bias)
    if x.numel() == 0:
        return _zeros(needs, tensors)
    problem = _Problem(x, dt, A, B, C, _summed(D), dt_bias, (chunk_size, dt_softplus, dt_min, dt_max), backward=True)
    with launch.on(x.device):
        found = problem.gradients(problem.rows(grad), problem.carried(None), needs)
        if found[5] is not None and D is not None:
            found[5] = found[5].sum(1).expand(D.shape)
    return [None if g is None or t is None else g.reshape(t.shape) for g, t in zip(found, tensors, strict=True)]


def _summed(D: Tensor | None) -> Tensor | None:
    """D of all directions: it is applied once."""
    return D.float().sum(0) if D is not None and D.dim() == 2 else D


# --- the sequence -------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    return_final_states: bool,
    return_varlen_states: bool,
) -> list[Tensor]:
    """[y, final states if asked for, states of the packed sequences if asked for]."""
    step_rule = (chunk_size, dt_softplus, dt_min, dt_max)
    results = [torch.empty_like(x, memory_format=torch.contiguous_format)]
    with launch.on(x.device):
        final = _state_after(x, B, initial_states) if return_final_states else None
        if x.numel():
            problem = _Problem(x, dt, A, B, C, D, dt_bias, step_rule, _markers(seq_idx))
            states = problem.carried(_contiguous(initial_states), last=final).states
            results[0] = problem.mix(problem.x, states, gate=_contiguous(z)).view(x.shape)
        if final is not None:
            results.append(final)
        if return_varlen_states:
            ends = []
            for tokens, first in spec.packed(cu_seqlens, initial_states, x.shape[1]):
                part = (x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens])
                ends.append(_state_after(x, B, first))
                if part[0].numel():
                    _Problem(*part, None, dt_bias, step_rule).carried(_contiguous(first), last=ends[-1])
            results.append(torch.cat(ends))
    return results


def _backward(
    grads: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    return_final_states: bool,
    return_varlen_states: bool,
) -> list[Tensor | None]:
    """Gradients of the tensor arguments where `needs`, None elsewhere."""
    step_rule = (chunk_size, dt_softplus, dt_min, dt_max)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    found = _zeros(needs[:9], tensors)
    of_final = grads[1].contiguous() if return_final_states else None
    with launch.on(x.device):
        if x.numel():
            problem = _Problem(x, dt, A, B, C, D, dt_bias, step_rule, _markers(seq_idx), backward=True)
            carried = problem.carried(_contiguous(initial_states), of_final)
            dy, of_z = grads[0], None
            if z is not None:
                of_z = torch.empty_like(z, memory_format=torch.contiguous_format)
                dy = problem.mix(
                    problem.x, carried.states, gate=z.contiguous(), y_gradient=dy.contiguous(), gate_gradient=of_z
                )
            found = _sequence_gradients(problem, dy, carried, needs, tensors, of_z, of_final)
        elif found[8] is not None and of_final is not None:
            found[8] = of_final.clone()  # the packed sequences' shares are added to it
        for index, (tokens, first) in enumerate(
            spec.packed(cu_seqlens, initial_states, x.shape[1]) if return_varlen_states else ()
        ):
            end = grads[-1][index : index + 1].contiguous()
            part = (x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], None, None, dt_bias, first)
            if part[0].numel():
                problem = _Problem(*part[:6], dt_bias, step_rule, backward=True)
                carried = problem.carried(_contiguous(first), end)
                shares = _sequence_gradients(problem, torch.zeros_like(part[0]), carried, needs, part, None, end)
            else:
                shares = [*itertools.repeat(None, 8), end if first is not None else None]
            # A, dt_bias and the initial states are whole in every part; the others are a stretch of tokens.
            for place, share in enumerate(shares):
                whole = found[place]
                if share is not None and whole is not None:
                    (whole[:, tokens] if place in (0, 1, 3, 4) else whole).add_(share)
    return [*found, None, None]


def _sequence_gradients(
    problem: _Problem,
    dy: Tensor,
    carried: _Carried,
    needs: Sequence[bool],
    tensors: Sequence[Tensor | None],
    of_z: Tensor | None,
    of_final: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial states where `needs`, in their shapes."""
    of_initial = None if tensors[8] is None else dy.new_empty(tensors[8].shape, dtype=torch.float32)
    wanted = [*needs[:6], needs[7]]
    *found, of_bias = problem.gradients(problem.rows(dy), carried, wanted, of_final, of_initial)
    of_D, D = found[5], tensors[5]
    if of_D is not None and D is not None and D.dim() == 1:
        found[5] = of_D.sum(1)
    return [
        g.view(t.shape) if g is not None and t is not None and need else None
        for g, t, need in zip([*found, of_z, of_bias, of_initial], tensors, needs[:9], strict=True)
    ]


def _markers(seq_idx: Tensor | None) -> Tensor | None:
    resets = spec.resets(seq_idx)
    return None if resets is None else resets.int()


def _state_after(x: Tensor, B: Tensor, initial: Tensor | None) -> Tensor:
    """Room for final states, filled as they are where there is no token: with the initial ones."""
    states = x.new_zeros((x.shape[0], *x.shape[2:], B.shape[3]), dtype=torch.float32)
    return states if initial is None else states.copy_(initial)


scan = Backend(_forward, _backward, unsupported)
scan_2d = Backend(_forward_2d, _backward_2d, unsupported)
