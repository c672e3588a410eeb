"""The states between chunks: what each chunk adds, and the recurrence over chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from famseg_kernels.ssd_scan.triton.steps import load_sums, load_total, pixels_of, row, sequences


@triton.jit
def chunk_states(
    u, v, sums, resets, states, first, last, sizes, chunks, directions, matrices,
    GRADIENT: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk, S ← through · S + Xᵀ (weight ∘ B) from one to the next; GRADIENT: the gradient
    of the one that leaves it, dS ← through · dS + dYᵀ (arrive ∘ C), from the last chunk to the first.

    u: X or dY, v: B or C. A block of P and N of one direction and head a program, which walks along the chunks with it.
    states (direction, batch, chunk, head, P, N). first, last (batch, head, P, N) or None: the state before the first
    chunk and after the last one, of direction 0.
    """
    batches, heads = sizes.batches, sizes.heads
    tokens = sizes.height * sizes.width
    blocks_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    block = program % (blocks_p * blocks_n)
    program //= blocks_p * blocks_n
    head = program % heads
    program //= heads
    batch = (program % batches).to(tl.int64)
    direction = program // batches

    p = block // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    element = p[:, None] * N + n[None, :]
    matrix = tl.where(matrices > 1, direction, 0) * sizes.groups + head // (heads // sizes.groups)
    u_column = head * P + p[None, :]
    v_column = matrix * N + n[None, :]
    lane = tl.arange(0, CHUNK)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if first is not None:
        state = tl.load(first + (batch * heads + head) * (P * N) + element, mask=inside, other=0.0).to(tl.float32)
    for i in range(chunks):
        chunk = tl.where((direction % 2 == 0) != GRADIENT, i, chunks - 1 - i)
        token = chunk * CHUNK + lane
        live = token < tokens
        pixels = pixels_of(token, direction // 2, sizes)
        step, high, low = load_sums(sums, direction, batch, head, token, sizes, CHUNK)
        total_high, total_low = load_total(sums, direction, batch, head, chunk, sizes, CHUNK)
        factor = tl.exp2(high + low) if GRADIENT else tl.exp2((total_high - high) + (total_low - low)) * step
        through = tl.exp2(total_high + total_low)
        if resets is not None:
            # Only the first sequence reads the state that enters, only the last one adds to the state that leaves.
            sequence = sequences(resets, batch, pixels, tokens, live)
            begun = tl.max(sequence, 0)
            # The others are not loaded either: 0 times a NaN of theirs is NaN.
            live &= sequence == (0 if GRADIENT else begun)
        u_tile = tl.load(row(u, batch, pixels[:, None]) + u_column, mask=live[:, None] & (p < P)[None, :], other=0.0)
        v_tile = tl.load(row(v, batch, pixels[:, None]) + v_column, mask=live[:, None] & (n < N)[None, :], other=0.0)
        at = ((direction * batches + batch) * chunks + chunk) * heads + head
        tl.store(states + at * (P * N) + element, state.to(states.dtype.element_ty), mask=inside)
        scaled = tl.where(live, factor, 0.0)[:, None] * v_tile.to(tl.float32)
        state *= through
        if resets is not None:
            # Not by a factor of 0: 0 times a NaN or an infinity of another sequence is NaN.
            state = tl.where(begun > 0, 0.0, state)
        state = tl.dot(tl.trans(u_tile.to(DOT)), scaled.to(DOT), state, input_precision=PRECISION)
    if last is not None:
        place = (batch * heads + head) * (P * N) + element
        tl.store(last + place, state, mask=inside & (p < tl.where(direction == 0, P, 0))[:, None])
