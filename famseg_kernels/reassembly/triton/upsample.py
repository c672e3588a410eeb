"""The forward of feature_aware_upsample: the encoder's product, the softmax and the weighted sum in one kernel.

The logits of P pixels are a product of tensor cores, [P, N]: N columns for a group's taps and parts, a sum over the
encoder's taps and the compressed channels. Splitting that tile in halves until each is a column makes the compiler
bring it, once and through shared memory, to the layout in which a pixel belongs to a thread. There its weights stay in
registers for all channels, so each is made once; `reassemble_forward`, which has no product to share, makes them again
for every 16 channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from famseg_kernels.reassembly.triton.kernels import _at, _by_channel, _by_pixel, _inside, _larger, _pixels, _zeros


class Encoder(NamedTuple):
    """weight: (k_e², groups, S² / PARTS, 1, N, C_d), zeros where N and C_d are padded; 2 of them instead of 1 in fp32,
    the leading 11 bits and then the others. bias: as the operation was given it."""

    weight: Any
    bias: Any
    channels: Any  # C_d without padding
    dilation: Any


@triton.jit
def _columns(tile, P: tl.constexpr, N: tl.constexpr):
    """The columns of a tile [P, N], each a block [P]. N is a power of two, at most 128."""
    found = (tile,)
    for level in tl.static_range(7):
        if N >> level > 1:
            halves = ()
            for i in tl.static_range(2**level):
                halves += tl.split(tl.permute(tl.reshape(found[i], (P, 2, N >> (level + 1))), (0, 2, 1)))
            found = halves
    columns = ()
    for i in tl.static_range(N):
        columns += (tl.reshape(found[i], (P,)),)
    return columns


@triton.jit
def _logits(
    compressed,
    encoder,
    n,
    group,
    part_block,
    i,
    j,
    sizes,
    K: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    TAPS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D_BLOCKS: tl.constexpr,
    DOT: tl.constexpr,
):
    """[P, N]; column part · TAPS + tap. An fp32 product is three of TF32, whose sum of small terms is kept apart: there
    infinity times 0 would be NaN."""
    SPLIT: tl.constexpr = compressed.pointer.dtype.element_ty == tl.float32
    part_blocks: tl.constexpr = S * S // PARTS
    column, d = tl.arange(0, N), tl.arange(0, D)
    logits, small = tl.zeros([P, N], tl.float32), tl.zeros([P, N], tl.float32)
    for step in range(E * E * D_BLOCKS):
        tap, channel = step // D_BLOCKS, step % D_BLOCKS * D + d
        row_inside, row = _inside(i + (tap // E - E // 2) * encoder.dilation, sizes.height)
        column_inside, col = _inside(j + (tap % E - E // 2) * encoder.dilation, sizes.width)
        place = row * compressed.h + col * compressed.w
        left = tl.load(
            compressed.pointer + n * compressed.n + (place[:, None] + (channel * compressed.c)[None, :]),
            mask=(row_inside & column_inside)[:, None] & (channel < encoder.channels)[None, :],
            other=0.0,
        )
        tile = ((tap * sizes.groups + group) * part_blocks + part_block) * (2 if SPLIT else 1)
        weight = encoder.weight + tl.cast(tile, tl.int64) * (N * D * D_BLOCKS)
        weight += column[:, None] * (D * D_BLOCKS) + channel[None, :]
        right = tl.trans(tl.load(weight))
        if SPLIT:
            high = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            logits = tl.dot(high, right, logits, input_precision="tf32")
            small = tl.dot(high, tl.trans(tl.load(weight + N * D * D_BLOCKS)), small, input_precision="tf32")
            small = tl.dot(left - high, right, small, input_precision="tf32")
        else:
            logits = tl.dot(left.to(DOT), right.to(DOT), logits)
    if SPLIT:
        logits += tl.where(tl.abs(small) < float("inf"), small, 0.0)
    if encoder.bias is not None:
        tap, part = column % TAPS, column // TAPS
        at = (group * (K * K) + tap) * (S * S) + part_block * PARTS + part
        bias = tl.load(encoder.bias + at, mask=(tap < K * K) & (part < PARTS), other=0.0)
        logits += bias.to(tl.float32)[None, :]
    return logits


@triton.jit
def upsample_forward(
    x,
    compressed,
    encoder,
    y,
    sizes,
    pixel_blocks,
    K: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,  # kernel size of the encoder
    PARTS: tl.constexpr,  # of a program
    TAPS: tl.constexpr,  # K² and padding
    N: tl.constexpr,  # TAPS · (PARTS and padding)
    P: tl.constexpr,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,  # tiles of C channels, which share the weights
    EVEN: tl.constexpr,  # CHUNKS · C divides a group's channels
    D: tl.constexpr,  # compressed channels of a product
    D_BLOCKS: tl.constexpr,
    DOT: tl.constexpr,
):
    """y of P pixels. Within an image of x or compressed, places are numbers of 32 bits."""
    channels, groups, height, width = sizes
    program = tl.program_id(0)
    valid, i, j = _pixels((program % pixel_blocks) * P, width, height * width, P)
    program //= pixel_blocks
    group, n = program % groups, (program // groups).to(tl.int64)
    part_block = tl.program_id(1)

    columns = _columns(
        _logits(
            compressed, encoder, n, group, part_block, i, j, sizes, K, S, E, PARTS, TAPS, N, P, D, D_BLOCKS, DOT
        ),
        P, N,
    )  # fmt: skip
    row_insides, rows = (), ()
    for ky in tl.static_range(K):
        row_inside, row = _inside(i + ky - K // 2, height)
        row_insides += (row_inside,)
        rows += (row * x.h + j * x.w,)
    factors = ()
    for part in tl.static_range(PARTS):
        maximum = columns[part * TAPS]
        for tap in tl.static_range(1, K * K):
            maximum = _larger(maximum, columns[part * TAPS + tap])
        total, exponentials = tl.zeros([P], tl.float32), ()
        for tap in tl.static_range(K * K):
            exponentials += (tl.exp(columns[part * TAPS + tap] - maximum),)
            total += exponentials[tap]
        # Weights share what is not finite, so they may be left out above and below the image. Beside it, 0 is loaded.
        for tap in tl.static_range(K * K):
            factors += (exponentials[tap] * tl.where(row_insides[tap // K], 1.0 / total, 0.0),)

    for chunk in range(CHUNKS):
        channel = (tl.program_id(2) * CHUNKS + chunk) * C + tl.arange(0, C)
        in_group = channel < channels
        offset = (group * channels + channel) * x.c
        results = ()
        for _ in tl.static_range(PARTS):
            results += (_zeros(P, C),)
        for ky in tl.static_range(K):
            # All loads first: they are under way together.
            tiles = ()
            source = x.pointer + n * x.n + (_by_pixel(rows[ky]) + _by_channel(offset))
            for kx in tl.static_range(K):
                mask = _by_pixel((j + kx - K // 2 >= 0) & (j + kx - K // 2 < width))
                if not EVEN:
                    mask &= _by_channel(in_group)
                tiles += (tl.load(source + (kx - K // 2) * x.w, mask=mask, other=0.0),)
            for kx in tl.static_range(K):
                old_results, results = results, ()
                wide = tiles[kx].to(tl.float32)
                for part in tl.static_range(PARTS):
                    results += (old_results[part] + wide * _by_pixel(factors[(part * K + ky) * K + kx]),)
        for part in tl.static_range(PARTS):
            which = part_block * PARTS + part
            to = _at(y, n, group * channels, i * S + which // S, j * S + which % S)
            to = _by_pixel(to) + _by_channel(channel.to(tl.int64) * y.c)
            tl.store(to, results[part], mask=_by_pixel(valid) & _by_channel(in_group))
