"""The states between chunks: what each chunk adds, and the recurrence over chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from famseg_kernels.ssd_scan.triton.steps import decay_of, load_steps, pixels_of, row, sequences

_CUT = tl.constexpr(-(1 << 62))  # in the place of a chunk's sum of log-decays: a sequence starts anew in it


@triton.jit
def chunk_states(
    u, v, steps, resets, states, totals, sizes, directions, matrices,
    SOFTPLUS: tl.constexpr, GRADIENT: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk by itself adds to the state, Xᵀ (weight ∘ B), or GRADIENT: to its gradient, dYᵀ (arrive ∘ C).

    u: X or dY, v: B or C. states (direction, batch, chunk, head, P, N), totals (direction, batch, chunk, head) fixed
    point. The tokens are taken in the order of the direction, so that each one is a forward scan.
    """
    batches, chunks, heads = sizes.batches, sizes.chunks, sizes.heads
    tokens = sizes.height * sizes.width
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
    live = token < tokens
    pixels = pixels_of(token, direction // 2, sizes)
    step, log_decay = load_steps(steps, batch, pixels, live, direction * heads + head, SOFTPLUS)
    total = tl.sum(log_decay, 0)
    sums = tl.cumsum(log_decay, 0)
    factor = decay_of(sums) if GRADIENT else decay_of(total - sums) * step
    if resets is not None:
        # Only the first sequence reads the state that enters, only the last one adds to the state that leaves.
        sequence = sequences(resets, batch, pixels, tokens, live)
        last = tl.max(sequence, 0)
        total = tl.where(last > 0, _CUT, total)
        # The others are not loaded either: 0 times a NaN of theirs is NaN.
        live &= sequence == (0 if GRADIENT else last)
        factor = tl.where(live, factor, 0.0)

    p = block // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = tl.where(matrices > 1, direction, 0) * sizes.groups + head // (heads // sizes.groups)
    u_tile = tl.load(
        row(u, batch, pixels[:, None]) + head * P + p[None, :], mask=live[:, None] & (p < P)[None, :], other=0.0
    )
    v_tile = tl.load(
        row(v, batch, pixels[:, None]) + matrix * N + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0
    )
    scaled = v_tile.to(tl.float32) * factor[:, None]
    state = tl.dot(tl.trans(u_tile.to(DOT)), scaled.to(DOT), input_precision=PRECISION)
    at = ((direction * batches + batch) * chunks + chunk) * heads + head
    tl.store(states + (at * P + p[:, None]) * N + n[None, :], state, mask=(p < P)[:, None] & (n < N)[None, :])
    if not GRADIENT:
        tl.store(totals + at, total, mask=block == 0)


@triton.jit
def pass_states(
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
    place = (batch * heads + head) * size + element
    state = tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        state = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
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
            state = tl.where(total == _CUT, 0.0, state * decay_of(total)) + added
        done += UNROLL
    if last is not None:
        tl.store(last + place, state, mask=element < tl.where(direction == 0, size, 0))
