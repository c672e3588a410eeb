"""Y of a small bf16 image and the gradient of X, of four directions in one matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from famseg_kernels.ssd_scan.triton.mix import gram_of
from famseg_kernels.ssd_scan.triton.steps import difference, load_sums, state_of_zeros


@triton.jit
def mix_image(
    u, left, right, sums, skip, y, sizes,
    TRANSPOSED: tl.constexpr, SHARED: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = M u + D u of CHUNK pixels and a head, with the M of four directions: what `mix_axis` does in two launches."""
    heads, groups = sizes.heads, sizes.groups
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
    tokens = sizes.height * sizes.width
    i = tile * CHUNK + lane
    live_i = i < tokens
    within_i = tl.minimum(i, tokens - 1)
    left_rows = i.to(tl.int64) * left.pixel
    column = head * P + block * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = column < head * P + P
    left_pointer = left.pointer + batch * left.batch
    right_pointer = right.pointer + batch * right.batch
    u_pointer = u.pointer + batch * u.batch

    result = tl.zeros((CHUNK, BLOCK_P), tl.float32)
    for tile_j in range(TILES):
        j = tile_j * CHUNK + lane
        live_j = j < tokens
        within_j = tl.minimum(j, tokens - 1)
        right_rows = j.to(tl.int64) * right.pixel
        both = live_i[:, None] & live_j[None, :]
        mixing = tl.zeros((CHUNK, CHUNK), tl.float32)
        for axis in tl.static_range(2):
            lower = 2 * axis + (1 if TRANSPOSED else 0)
            upper = 2 * axis + (0 if TRANSPOSED else 1)
            if axis == 0 or not SHARED:
                at = ((0 if SHARED else lower) * groups + group) * N
                gram = gram_of(
                    left_pointer + at, left_rows, live_i, right_pointer + at, right_rows, live_j,
                    N, CHUNK, BLOCK_N, DOT, PRECISION,
                )  # fmt: skip
                other_gram = gram
            if not SHARED:
                at = (upper * groups + group) * N
                other_gram = gram_of(
                    left_pointer + at, left_rows, live_i, right_pointer + at, right_rows, live_j,
                    N, CHUNK, BLOCK_N, DOT, PRECISION,
                )  # fmt: skip
            lower_i, high_i, low_i = load_sums(sums, lower, batch, head, within_i, sizes, TOKENS)
            lower_j, high_j, low_j = load_sums(sums, lower, batch, head, within_j, sizes, TOKENS)
            below = difference(high_i, low_i, high_j, low_j)
            upper_i, high_i, low_i = load_sums(sums, upper, batch, head, within_i, sizes, TOKENS)
            upper_j, high_j, low_j = load_sums(sums, upper, batch, head, within_j, sizes, TOKENS)
            above = difference(high_i, low_i, high_j, low_j)
            if TRANSPOSED:
                lower_weight, upper_weight = lower_i[:, None], upper_i[:, None]
            else:
                lower_weight = tl.where(live_j, lower_j, 0.0)[None, :]
                upper_weight = tl.where(live_j, upper_j, 0.0)[None, :]
            order_i = i if axis == 0 else i % sizes.width * sizes.height + i // sizes.width
            order_j = j if axis == 0 else j % sizes.width * sizes.height + j // sizes.width
            later = order_i[:, None] >= order_j[None, :]
            decay = tl.where(later, below, above)
            decay = tl.exp2(tl.where(both, -decay if TRANSPOSED else decay, float("-inf")))
            mixing += decay * tl.where(later, gram * lower_weight, other_gram * upper_weight)
            # The diagonal belongs to both sides.
            mixing += tl.where(i[:, None] == j[None, :], other_gram * upper_weight, 0.0)
        u_rows = u_pointer + j.to(tl.int64)[:, None] * u.pixel
        u_tile = tl.load(u_rows + column[None, :], mask=live_j[:, None] & exists[None, :], other=0.0)
        result = tl.dot(mixing.to(DOT), u_tile.to(DOT), result, input_precision=PRECISION)

    if not TRANSPOSED:
        for direction in tl.static_range(4):
            _, high, _ = load_sums(sums, direction, batch, head, within_i, sizes, TOKENS)
            result += state_of_zeros(high)[:, None]
    inside = live_i[:, None] & exists[None, :]
    if skip is not None:
        weight_of_u = tl.load(skip + column, mask=exists, other=0.0).to(tl.float32)
        u_rows = u_pointer + i.to(tl.int64)[:, None] * u.pixel
        own = tl.load(u_rows + column[None, :], mask=inside, other=0.0)
        result += own.to(tl.float32) * weight_of_u[None, :]
    place = (batch * tokens + i[:, None]) * heads * P + column[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
