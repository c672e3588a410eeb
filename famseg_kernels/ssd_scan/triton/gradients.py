"""The gradients of all but X: of B, C, D, and of the steps through softplus and clamp."""

from __future__ import annotations

import triton
import triton.language as tl

from famseg_kernels.ssd_scan.triton.mix import add_product, gram_of
from famseg_kernels.ssd_scan.triton.steps import (
    LOG2_E,
    LOWEST,
    clamped,
    difference,
    load_sums,
    load_total,
    pixels_of,
    row,
    sequences,
    state_of_zeros,
    unclamped,
)


@triton.jit
def _group_of(splits, sizes, directions):
    """Of the program: direction, batch, chunk, group and split of its heads."""
    program = tl.program_id(0)
    split = program % splits
    program //= splits
    group = program % sizes.groups
    program //= sizes.groups
    chunk = program % sizes.chunks
    program //= sizes.chunks
    return program // sizes.batches, (program % sizes.batches).to(tl.int64), chunk, group, split


@triton.jit
def _tokens_of(direction, chunk, sizes, CHUNK: tl.constexpr):
    """Of a chunk: lanes, the token of each in the direction's own order, whether there is one, and its pixel."""
    lane = tl.arange(0, CHUNK)
    token = chunk * CHUNK + tl.where(direction % 2 == 0, lane, CHUNK - 1 - lane)
    return lane, token, token < sizes.height * sizes.width, pixels_of(token, direction // 2, sizes)


@triton.jit
def pair_gradients(
    x, dy, B, C, sums, resets, of_gram, of_step, of_log, of_skip, sizes, splits, directions, matrices,
    P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the pairs of a chunk's tokens give to G, to the steps and to their log-decays, of HEADS heads of a group:

        dM = dY Xᵀ     dG = dM ∘ L · step

    of_gram (program, CHUNK, CHUNK), of_step, of_log (batch, tokens, directions, heads), of_skip (batch, chunk, head,
    P): the sums of dY ∘ X.

    A log-decay's gradient is the sum over all pairs of tokens it lies between, built up term by term: a difference of
    running sums would lose small ones beside large.
    """
    heads = sizes.heads
    direction, batch, chunk, group, split = _group_of(splits, sizes, directions)
    lane, token, live, pixels = _tokens_of(direction, chunk, sizes, CHUNK)
    tokens = sizes.height * sizes.width
    rows, columns = lane[:, None], lane[None, :]
    p = tl.arange(0, BLOCK_P)
    matrix = (tl.where(matrices > 1, direction, 0) * sizes.groups + group) * N
    gram = gram_of(
        C.pointer + batch * C.batch + matrix, pixels * C.pixel, live,
        B.pointer + batch * B.batch + matrix, pixels * B.pixel, live, N, CHUNK, BLOCK_N, DOT, PRECISION,
    )  # fmt: skip
    side = rows >= columns
    if resets is not None:
        sequence = sequences(resets, batch, pixels, tokens, live)
        side &= sequence[:, None] == sequence[None, :]
    from_here = rows <= columns

    dG = tl.zeros((CHUNK, CHUNK), tl.float32)
    for h in range(HEADS):
        head = (group * splits + split) * HEADS + h
        step, high, low = load_sums(sums, direction, batch, head, token, sizes, CHUNK)
        dM = tl.zeros((CHUNK, CHUNK), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p_inside = p0 + p < P
            tile_inside = live[:, None] & p_inside[None, :]
            place = head * P + p0 + p[None, :]
            x_tile = tl.load(row(x, batch, pixels[:, None]) + place, mask=tile_inside, other=0.0)
            dy_tile = tl.load(row(dy, batch, pixels[:, None]) + place, mask=tile_inside, other=0.0)
            dM = tl.dot(dy_tile.to(DOT), tl.trans(x_tile.to(DOT)), dM, input_precision=PRECISION)
            if of_skip is not None:
                product = tl.sum(x_tile.to(tl.float32) * dy_tile.to(tl.float32), 0)
                skip_at = ((batch * sizes.chunks + chunk) * heads + head) * P + p0 + p
                # Once: by direction 0.
                tl.store(of_skip + skip_at, product, mask=p0 + p < tl.where(direction == 0, P, 0))
        pair = dM * tl.exp2(tl.where(side, difference(high, low, high, low), float("-inf")))
        # Chosen, here and below, and not multiplied by 0: that is NaN of what is not finite.
        dG += tl.where(side, pair * step[None, :], 0.0)
        products = tl.where(side, pair * gram, 0.0)
        d_step = tl.sum(products, 0)
        products = tl.where(side, products * step[None, :], 0.0)
        # across[t, j], read where t > j: over the tokens i ≥ t that read token j.
        across = tl.zeros((CHUNK, CHUNK), tl.float32)
        across = add_product(across, from_here.to(DOT), from_here, products, DOT, PRECISION)
        d_log = tl.sum(tl.where(columns < rows, across, 0.0), 1)
        at = (batch * tokens + pixels) * (directions * heads) + direction * heads + head
        tl.store(of_step + at, d_step, mask=live)
        tl.store(of_log + at, d_log, mask=live)
    element = tl.program_id(0).to(tl.int64) * (CHUNK * CHUNK) + rows * CHUNK + columns
    tl.store(of_gram + element, dG.to(of_gram.dtype.element_ty))


@triton.jit
def matrix_gradients(
    x, dy, B, C, sums, resets, states, state_gradients, of_gram, of_B, of_C, of_step, of_log, sizes, splits,
    directions, matrices,
    P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C, and what the states give to those of the steps and of their log-decays, of a chunk,
    direction and HEADS heads of a group. With dS the gradient of the state that leaves:

        dC = dG B + arrive ∘ (dY S)     dB = dGᵀ C + weight ∘ (X dS)

    A block of N per program along axis 1 of the grid. of_B, of_C (splits, batch, tokens, directions, groups, N);
    of_step, of_log (1 + blocks of N, batch, tokens, directions, heads), of which `pair_gradients` writes the first.
    """
    batches, chunks, heads, groups = sizes.batches, sizes.chunks, sizes.heads, sizes.groups
    block = tl.program_id(1)
    direction, batch, chunk, group, split = _group_of(splits, sizes, directions)
    lane, token, live, pixels = _tokens_of(direction, chunk, sizes, CHUNK)
    tokens = sizes.height * sizes.width
    rows, columns = lane[:, None], lane[None, :]
    p = tl.arange(0, BLOCK_P)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < N
    inside = live[:, None] & n_inside[None, :]
    matrix = (tl.where(matrices > 1, direction, 0) * groups + group) * N + n[None, :]
    B_tile = tl.load(row(B, batch, pixels[:, None]) + matrix, mask=inside, other=0.0)
    C_tile = tl.load(row(C, batch, pixels[:, None]) + matrix, mask=inside, other=0.0)
    side = rows >= columns
    if resets is not None:
        sequence = sequences(resets, batch, pixels, tokens, live)
        last = tl.max(sequence, 0)
        side &= sequence[:, None] == sequence[None, :]
        enters, leaves = sequence == 0, sequence == last

    dB = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dC = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    for h in range(HEADS):
        head = (group * splits + split) * HEADS + h
        step, high, low = load_sums(sums, direction, batch, head, token, sizes, CHUNK)
        total_high, total_low = load_total(sums, direction, batch, head, chunk, sizes, CHUNK)
        from_state = tl.zeros((CHUNK, BLOCK_N), tl.float32)
        to_state = tl.zeros((CHUNK, BLOCK_N), tl.float32)
        passing = tl.zeros((BLOCK_P,), tl.float32)
        at = ((direction * batches + batch) * chunks + chunk) * heads + head
        if states is not None:
            for p0 in range(0, P, BLOCK_P):
                p_inside = p0 + p < P
                tile_inside = live[:, None] & p_inside[None, :]
                place = head * P + p0 + p[None, :]
                x_tile = tl.load(row(x, batch, pixels[:, None]) + place, mask=tile_inside, other=0.0)
                dy_tile = tl.load(row(dy, batch, pixels[:, None]) + place, mask=tile_inside, other=0.0)
                element = (at * P + p0 + p[:, None]) * N + n[None, :]
                state_inside = p_inside[:, None] & n_inside[None, :]
                state = tl.load(states + element, mask=state_inside, other=0.0)
                from_state = tl.dot(dy_tile.to(DOT), state.to(DOT), from_state, input_precision=PRECISION)
                dS = tl.load(state_gradients + element, mask=state_inside, other=0.0)
                to_state = tl.dot(x_tile.to(DOT), dS.to(DOT), to_state, input_precision=PRECISION)
                passing += tl.sum(state.to(tl.float32) * dS.to(tl.float32), 1)
            from_state = tl.exp2(high + low)[:, None] * from_state
            arriving = tl.sum(from_state * C_tile.to(tl.float32), 1)
        else:
            arriving = state_of_zeros(high)
            from_state = arriving[:, None]
        if resets is not None:
            from_state = tl.where(enters[:, None], from_state, 0.0)
            arriving = tl.where(enters, arriving, 0.0)
        dC += from_state
        leave = tl.exp2((total_high - high) + (total_low - low))
        weight = leave * step
        if resets is not None:
            to_state = tl.where(leaves[:, None], to_state, 0.0)
            weight = tl.where(leaves, weight, 0.0)
        leaving = tl.sum(to_state * B_tile.to(tl.float32), 1)
        if resets is not None:
            leaving = tl.where(leaves, leaving, 0.0)
        if states is not None:
            dB += weight[:, None] * to_state
            d_step = leave * leaving
            carried = weight * leaving
        else:
            d_step = tl.zeros((CHUNK,), tl.float32)
            carried = d_step
        # The decay of token t lies between the entering state and the tokens from t on, between the tokens j < t and
        # the leaving state, and between both states.
        d_log = tl.sum(tl.where(columns < rows, carried[None, :], arriving[None, :]), 1)
        through = tl.exp2(total_high + total_low) * tl.sum(passing, 0)
        if resets is not None:
            through = tl.where(last > 0, 0.0, through)
        part = ((block + 1) * batches + batch) * tokens + pixels
        place = part * (directions * heads) + direction * heads + head
        tl.store(of_step + place, d_step, mask=live)
        tl.store(of_log + place, d_log + through, mask=live)

    dG = tl.load(of_gram + tl.program_id(0).to(tl.int64) * (CHUNK * CHUNK) + rows * CHUNK + columns).to(DOT)
    dC = add_product(dC, dG, side, B_tile, DOT, PRECISION)
    dB = add_product(dB, tl.trans(dG), tl.trans(side), C_tile, DOT, PRECISION)
    place = ((split * batches + batch) * tokens + pixels[:, None]) * directions + direction
    place = (place * groups + group) * N + n[None, :]
    tl.store(of_B + place, dB.to(of_B.dtype.element_ty), mask=inside)
    tl.store(of_C + place, dC.to(of_C.dtype.element_ty), mask=inside)


@triton.jit
def step_gradients(
    steps, resets, of_step, of_log, of_dt, of_A, of_bias, rows, tokens, columns,
    SOFTPLUS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the gradients of steps and log-decays (parts, rows, columns) those of dt, A and dt_bias.

    rows: pixels of all images, columns: directions and heads. of_A, of_bias (blocks of rows, columns): partial sums.
    """
    blocks = tl.cdiv(columns, COLUMNS)
    row_block = tl.program_id(0) // blocks
    pixel = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    inside = (pixel < rows)[:, None] & exists[None, :]
    at = (pixel // tokens * steps.dt.batch + pixel % tokens * steps.dt.pixel)[:, None] + column[None, :]
    raw = tl.load(steps.dt.pointer + at, mask=inside, other=0.0).to(tl.float32)
    if steps.bias is not None:
        raw += tl.load(steps.bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    decay_rate = tl.load(steps.A + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    value = unclamped(raw, SOFTPLUS)
    step = clamped(value, steps.low, steps.high)
    d_step = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_log = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in range(PARTS):
        place = (pixel + part * rows)[:, None] * columns + column[None, :]
        d_step += tl.load(of_step + place, mask=inside, other=0.0)
        d_log += tl.load(of_log + place, mask=inside, other=0.0)
    # 0, but NaN of what is not finite, as 0 times it is in the recurrence.
    d_log = tl.where(step * (decay_rate * LOG2_E) < LOWEST, d_log * 0.0, d_log)
    from_log, from_step = d_log * decay_rate, d_log * step
    if resets is not None:  # A token that starts a sequence has no decay: not even 0 times an A that is NaN.
        starts = (tl.load(resets + pixel, mask=pixel < rows, other=0) != 0)[:, None]
        from_log, from_step = tl.where(starts, 0.0, from_log), tl.where(starts, 0.0, from_step)
    # As of torch.clamp 0 for a NaN.
    d_raw = tl.where((value >= steps.low) & (value <= steps.high), d_step + from_log, 0.0)
    if SOFTPLUS:
        d_raw = tl.where(raw > 20.0, d_raw, d_raw / (1.0 + tl.exp(-raw)))
    tl.store(of_dt + pixel[:, None] * columns + column[None, :], d_raw.to(of_dt.dtype.element_ty), mask=inside)
    sum_at = row_block * columns + column
    tl.store(of_A + sum_at, tl.sum(tl.where(inside, from_step, 0.0), 0), mask=exists)
    tl.store(of_bias + sum_at, tl.sum(tl.where(inside, d_raw, 0.0), 0), mask=exists)
