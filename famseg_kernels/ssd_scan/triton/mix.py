"""Y of a chunk, and the gradient of X: with one direction, and with both of an axis."""

from __future__ import annotations

import triton
import triton.language as tl

from famseg_kernels.ssd_scan.triton.steps import (
    difference,
    load_sums,
    load_total,
    pixels_of,
    row,
    sequences,
    state_of_zeros,
)


@triton.jit
def gram_of(
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
def add_product(result, matrix, reads, tile, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """result + matrix · tile, where row i is to read only the rows j of the tile of which reads[i, j]: the others it
    multiplies by 0, which is NaN of what is not finite. So that is left out and put in its places by itself."""
    wide = tile.to(tl.float32)
    finite = tl.where(tl.abs(wide) < float("inf"), wide, 0.0)
    result = tl.dot(matrix, finite.to(DOT), result, input_precision=PRECISION)
    if tl.sum(tl.sum(wide * 0.0, 1), 0) != 0.0:  # of a NaN, which anything not finite makes of the sum, it is true
        spoilt = tl.dot(reads.to(DOT), tl.where(wide * 0.0 == 0.0, 0.0, 1.0).to(DOT), input_precision="tf32")
        result = tl.where(spoilt > 0.0, float("nan"), result)
    return result


@triton.jit
def _add_state(
    result, rows, matrix, factor, live, states, at, p0, p, n0, n,
    P: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """result + (factor ∘ rows) Sᵀ, in blocks of P and N; rows: B or C of the tokens, S: the state numbered `at`."""
    n_inside = n0 + n < N
    element = (p0 + p[:, None]) * N + n0 + n[None, :]
    column = matrix + n0 + n[None, :]
    tile = tl.load(rows + column, mask=live[:, None] & n_inside[None, :], other=0.0)
    inside = (p0 + p < P)[:, None] & n_inside[None, :]
    state = tl.load(states + at * (P * N) + element, mask=inside, other=0.0)
    scaled = (tile.to(tl.float32) * factor[:, None]).to(DOT)
    return tl.dot(scaled, tl.trans(state.to(DOT)), result, input_precision=PRECISION)


@triton.jit
def mix_direction(
    u, left, right, sums, resets, skip, states, gate, y_gradient, gate_gradient, y, sizes,
    TRANSPOSED: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = M u + D u + what the states add, of a chunk and HEADS heads; TRANSPOSED: with Mᵀ, for the gradient of x.

    u: X, left: C, right: B, states: those that enter. TRANSPOSED: u: dY, left: B, right: C, states: the gradients of
    those that leave. y, gate and the gradients are (batch, tokens, heads, P). gate: y is multiplied by silu(gate). With
    y_gradient, y is not written: gate_gradient is, and silu(gate) · y_gradient in the place of y.
    """
    chunks, heads, tokens = sizes.chunks, sizes.heads, sizes.height * sizes.width
    program = tl.program_id(0)
    head_block = program % (heads // HEADS)
    program //= heads // HEADS
    chunk = program % chunks
    batch = (program // chunks).to(tl.int64)
    matrix = head_block * HEADS // (heads // sizes.groups) * N

    lane = tl.arange(0, CHUNK)
    token = chunk * CHUNK + lane
    live = token < tokens
    pixels = pixels_of(token, 0, sizes)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    left_pointer = left.pointer + batch * left.batch
    right_pointer = right.pointer + batch * right.batch
    gram = gram_of(
        left_pointer + matrix, pixels * left.pixel, live, right_pointer + matrix, pixels * right.pixel, live,
        N, CHUNK, BLOCK_N, DOT, PRECISION,
    )  # fmt: skip

    # On its own side of the diagonal no sum of log-decays is positive.
    side = (lane[:, None] <= lane[None, :]) if TRANSPOSED else (lane[:, None] >= lane[None, :])
    if resets is not None:
        sequence = sequences(resets, batch, pixels, tokens, live)
        side &= sequence[:, None] == sequence[None, :]
        reached = sequence == (tl.max(sequence, 0) if TRANSPOSED else 0)  # which tokens the states have to do with

    for h in range(HEADS):
        head = head_block * HEADS + h
        step, high, low = load_sums(sums, 0, batch, head, token, sizes, CHUNK)
        decay = difference(high, low, high, low)
        # A token's step goes with what it gives: that is a column of M and a row of its transpose.
        if TRANSPOSED:
            mixing = tl.where(side, gram * tl.exp2(-decay) * step[:, None], 0.0)
        else:
            mixing = tl.where(side, gram * tl.exp2(decay) * step[None, :], 0.0)
        mixing = mixing.to(DOT)
        if states is not None:
            if TRANSPOSED:
                total_high, total_low = load_total(sums, 0, batch, head, chunk, sizes, CHUNK)
                factor = tl.exp2((total_high - high) + (total_low - low)) * step
            else:
                factor = tl.exp2(high + low)
        elif not TRANSPOSED:
            entering = state_of_zeros(high)
            if resets is not None:
                entering = tl.where(reached, entering, 0.0)

        for p0 in range(0, P, BLOCK_P):
            inside = live[:, None] & (p0 + p < P)[None, :]
            column = head * P + p0 + p[None, :]
            u_tile = tl.load(row(u, batch, pixels[:, None]) + column, mask=inside, other=0.0)
            result = tl.zeros((CHUNK, BLOCK_P), tl.float32)
            if states is not None:
                for n0 in range(0, N, BLOCK_N):
                    at = (batch * chunks + chunk) * heads + head
                    result = _add_state(
                        result, row(left, batch, pixels[:, None]), matrix, factor, live, states, at,
                        p0, p, n0, n, P, N, DOT, PRECISION,
                    )  # fmt: skip
                if resets is not None:
                    result = tl.where(reached[:, None], result, 0.0)
            elif not TRANSPOSED:
                result += entering[:, None]
            result = add_product(result, mixing, side, u_tile, DOT, PRECISION)
            if skip is not None:
                weight_of_u = tl.load(skip + column, mask=(p0 + p < P)[None, :], other=0.0).to(tl.float32)
                result += u_tile.to(tl.float32) * weight_of_u
            place = (batch * sizes.height * sizes.width + pixels[:, None]) * heads * P + column
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


@triton.jit
def mix_axis(
    u, left, right, sums, skip, states, part, y, sizes,
    TRANSPOSED: tl.constexpr, AXIS: tl.constexpr, SHARED: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of both directions of an axis in one matrix; part: what the other axis gave, like y, or None."""
    batches, chunks, heads, groups = sizes.batches, sizes.chunks, sizes.heads, sizes.groups
    program = tl.program_id(0)
    head_block = program % (heads // HEADS)
    program //= heads // HEADS
    chunk = program % chunks
    batch = (program // chunks).to(tl.int64)
    group = head_block * HEADS // (heads // groups)

    lane = tl.arange(0, CHUNK)
    token = chunk * CHUNK + lane
    live = token < sizes.height * sizes.width
    pixels = pixels_of(token, AXIS, sizes)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    rows, columns = lane[:, None], lane[None, :]
    # Which direction fills the lower triangle and which the upper one.
    lower: tl.constexpr = 2 * AXIS + (1 if TRANSPOSED else 0)
    upper: tl.constexpr = 2 * AXIS + (0 if TRANSPOSED else 1)
    left_pointer = left.pointer + batch * left.batch
    right_pointer = right.pointer + batch * right.batch
    lower_matrix = ((0 if SHARED else lower) * groups + group) * N
    upper_matrix = ((0 if SHARED else upper) * groups + group) * N

    gram = gram_of(
        left_pointer + lower_matrix, pixels * left.pixel, live, right_pointer + lower_matrix, pixels * right.pixel,
        live, N, CHUNK, BLOCK_N, DOT, PRECISION,
    )  # fmt: skip
    other_gram = gram
    if not SHARED:
        other_gram = gram_of(
            left_pointer + upper_matrix, pixels * left.pixel, live, right_pointer + upper_matrix, pixels * right.pixel,
            live, N, CHUNK, BLOCK_N, DOT, PRECISION,
        )  # fmt: skip
    # The diagonal belongs to both sides: the upper one's is kept apart.
    upper_diagonal = tl.sum(tl.where(rows == columns, other_gram, 0.0), 1)
    if not SHARED:
        gram = tl.where(rows >= columns, gram, other_gram)

    for h in range(HEADS):
        head = head_block * HEADS + h
        lower_step, lower_high, lower_low = load_sums(sums, lower, batch, head, token, sizes, CHUNK)
        upper_step, upper_high, upper_low = load_sums(sums, upper, batch, head, token, sizes, CHUNK)
        below = difference(lower_high, lower_low, lower_high, lower_low)
        above = difference(upper_high, upper_low, upper_high, upper_low)
        decay = tl.where(rows >= columns, below, above)
        # A token's step goes with what it gives: that is a column of M and a row of its transpose.
        lower_weight = lower_step[:, None] if TRANSPOSED else lower_step[None, :]
        upper_weight = upper_step[:, None] if TRANSPOSED else upper_step[None, :]
        # On its own side of the diagonal no sum of log-decays is positive.
        mixing = gram * tl.exp2(-decay if TRANSPOSED else decay) * tl.where(rows >= columns, lower_weight, upper_weight)
        mixing += tl.where(rows == columns, (upper_diagonal * upper_step)[:, None], 0.0)
        mixing = mixing.to(DOT)
        if states is not None:
            if TRANSPOSED:
                total_high, total_low = load_total(sums, lower, batch, head, chunk, sizes, CHUNK)
                lower_factor = tl.exp2((total_high - lower_high) + (total_low - lower_low)) * lower_step
                total_high, total_low = load_total(sums, upper, batch, head, chunk, sizes, CHUNK)
                upper_factor = tl.exp2((total_high - upper_high) + (total_low - upper_low)) * upper_step
            else:
                lower_factor, upper_factor = tl.exp2(lower_high + lower_low), tl.exp2(upper_high + upper_low)
        elif not TRANSPOSED:
            entering = state_of_zeros(lower_high + upper_high)  # of a chunk neither is as large by other means

        for p0 in range(0, P, BLOCK_P):
            inside = live[:, None] & (p0 + p < P)[None, :]
            column = head * P + p0 + p[None, :]
            u_tile = tl.load(row(u, batch, pixels[:, None]) + column, mask=inside, other=0.0)
            result = tl.zeros((CHUNK, BLOCK_P), tl.float32)
            if states is not None:
                for n0 in range(0, N, BLOCK_N):
                    left_rows = left_pointer + pixels[:, None] * left.pixel
                    lower_at = ((lower * batches + batch) * chunks + chunk) * heads + head
                    upper_at = ((upper * batches + batch) * chunks + chunk) * heads + head
                    result = _add_state(
                        result, left_rows, lower_matrix, lower_factor, live, states, lower_at,
                        p0, p, n0, n, P, N, DOT, PRECISION,
                    )  # fmt: skip
                    result = _add_state(
                        result, left_rows, upper_matrix, upper_factor, live, states, upper_at,
                        p0, p, n0, n, P, N, DOT, PRECISION,
                    )  # fmt: skip
            elif not TRANSPOSED:
                result += entering[:, None]
            # Every token reads every other one: no zeros to mind.
            result = tl.dot(mixing, u_tile.to(DOT), result, input_precision=PRECISION)
            if skip is not None:
                weight_of_u = tl.load(skip + column, mask=(p0 + p < P)[None, :], other=0.0).to(tl.float32)
                result += u_tile.to(tl.float32) * weight_of_u
            place = (batch * sizes.height * sizes.width + pixels[:, None]) * heads * P + column
            if part is not None:
                result += tl.load(part + place, mask=inside, other=0.0)
            tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
