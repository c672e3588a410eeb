"""What the kernels of strip_conv2d share: which pixels a lane owns, and rows of them in registers.

A lane owns GROUP neighbouring columns of one channel. Tiles are tuples of tensors [LANES], one for each column that the
lane sees, so that a shift along the row is another place in the tuple and costs nothing.

STRIDE is the distance of neighbouring columns in memory: 1 in NCHW, the number of channels in channels_last. Where rows
of NCHW are aligned, a lane reads its GROUP columns in one access, and those beside them PIECE at a time. With PIECE 0
each column is an access.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lanes_of(sizes, STRIDE: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr):
    """Of each lane [SLOW · FAST]: where its first row begins, its channel, its first column, and if it is in use.

    The FAST axis lies side by side in memory: the groups of a plane in NCHW, the channels in channels_last.
    """
    images, channels, height, width = sizes
    groups = tl.cdiv(width, GROUP)
    programs = tl.cdiv(groups if STRIDE == 1 else channels, FAST)
    lane = tl.arange(0, SLOW * FAST)
    near = (tl.program_id(0) % programs) * FAST + lane % FAST
    far = (tl.program_id(0) // programs) * SLOW + lane // FAST
    if STRIDE == 1:
        channel, col = far % channels, near * GROUP
        offset = far.to(tl.int64) * height * width + col
        used = (near < groups) & (far < images * channels)
    else:
        channel, col = near, (far % groups) * GROUP
        offset = ((far // groups).to(tl.int64) * height * width + col) * STRIDE + channel
        used = (near < channels) & (far < images * groups)
    return offset, channel, col, used


@triton.jit
def _piece(start, col, used, width, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """[LANES, SIZE] columns of a row in NCHW from the lane's column + FIRST, in one access."""
    if SIZE == 1:
        return tl.load(start + FIRST, mask=used & (col + FIRST >= 0) & (col + FIRST < width), other=0.0)
    else:
        place = FIRST + tl.arange(0, SIZE)[None, :]
        inside = used[:, None] & (col[:, None] + place >= 0) & (col[:, None] + place < width)
        return tl.load(start[:, None] + place, mask=inside, other=0.0)


@triton.jit
def load_row(
    start, row, col, used, sizes, STRIDE: tl.constexpr, GROUP: tl.constexpr, REACH: tl.constexpr, PIECE: tl.constexpr
):
    """The lanes' columns and REACH more on either side as they lie in memory, 0 outside: for `columns_of`."""
    _, _, height, width = sizes
    used = used & (row >= 0) & (row < height)
    start += row.to(tl.int64) * width * STRIDE  # 64 bits: a plane may hold more than 2³¹ elements
    raw = ()
    if PIECE > 0:
        PIECES: tl.constexpr = (REACH + PIECE - 1) // PIECE
        for i in tl.static_range(PIECES):
            raw += (_piece(start, col, used, width, (i - PIECES) * PIECE, PIECE),)
        raw += (_piece(start, col, used, width, 0, GROUP),)
        for i in tl.static_range(PIECES):
            raw += (_piece(start, col, used, width, GROUP + i * PIECE, PIECE),)
    else:
        for i in tl.static_range(-REACH, GROUP + REACH):
            raw += (tl.load(start + i * STRIDE, mask=used & (col + i >= 0) & (col + i < width), other=0.0),)
    return raw


@triton.jit
def split(tile, LANES: tl.constexpr, SIZE: tl.constexpr):
    """[LANES, SIZE] → a tuple of its SIZE columns [LANES]."""
    parts = (tile,)
    if SIZE == 1:
        parts = (tl.reshape(tile, [LANES]),)
    for _ in tl.static_range(3):  # at most 8 columns
        if len(parts) < SIZE:
            evens, odds = (), ()
            for i in tl.static_range(len(parts)):
                even, odd = tl.split(
                    tl.reshape(parts[i], [LANES, SIZE // len(parts) // 2, 2] if 2 * len(parts) < SIZE else [LANES, 2])
                )
                evens += (even,)
                odds += (odd,)
            parts = evens + odds
    return parts


@triton.jit
def join(columns, LANES: tl.constexpr, SIZE: tl.constexpr):
    """SIZE columns [LANES] → [LANES, SIZE], a power of 2 from 2 to 8."""
    parts = columns
    for _ in tl.static_range(3):
        if len(parts) > 1:
            joined = ()
            for i in tl.static_range(len(parts) // 2):
                pairs = tl.join(parts[i], parts[i + len(parts) // 2])
                joined += (tl.reshape(pairs, [LANES, 2 * SIZE // len(parts)]),)
            parts = joined
    return parts[0]


@triton.jit
def columns_of(raw, LANES: tl.constexpr, GROUP: tl.constexpr, REACH: tl.constexpr, PIECE: tl.constexpr):
    """What `load_row` has loaded: a tuple of the GROUP + 2 · REACH columns [LANES], in fp32."""
    if PIECE > 0:
        pieces = ()
        for i in tl.static_range(len(raw)):
            pieces += split(raw[i].to(tl.float32), LANES, GROUP if 2 * i == len(raw) - 1 else PIECE)
    else:
        pieces = raw
    columns = ()
    for i in tl.static_range(GROUP + 2 * REACH):
        columns += (pieces[(len(pieces) - GROUP) // 2 - REACH + i].to(tl.float32),)
    return columns


@triton.jit
def store_row(
    start, row, col, used, sizes, columns,
    LANES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Store GROUP columns of a row."""
    width = sizes[3]
    start += row.to(tl.int64) * width * STRIDE
    if PIECE > 0 and GROUP > 1:
        place = tl.arange(0, GROUP)[None, :]
        tile = join(columns, LANES, GROUP)
        tl.store(start[:, None] + place, tile, mask=used[:, None] & (col[:, None] + place < width))
    else:
        for i in tl.static_range(GROUP):
            tl.store(start + i * STRIDE, columns[i], mask=used & (col + i < width))


@triton.jit
def store_sums(
    partial, sums, sizes, length, STRIDE: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Add up the lanes of a channel and store them, each of a tuple: to [partial sum, length, channel]."""
    images, channels, _, width = sizes
    groups = tl.cdiv(width, GROUP)
    programs = tl.cdiv(groups if STRIDE == 1 else channels, FAST)
    near, far = tl.program_id(0) % programs, tl.program_id(0) // programs
    if STRIDE == 1:
        plane = far * SLOW + tl.arange(0, SLOW)
        channel, used = plane % channels, plane < images * channels
        number = ((plane // channels) * programs + near) * tl.num_programs(1) + tl.program_id(1)
    else:
        channel = near * FAST + tl.arange(0, FAST)
        used = channel < channels
        number = far * tl.num_programs(1) + tl.program_id(1)
    place = partial + number.to(tl.int64) * length * channels + channel
    for first in tl.static_range(0, len(sums), 8):  # few accesses: Triton takes long to compile many
        some = sums[first : first + 8]
        for _ in tl.static_range(8 - len(some)):
            some += (some[0],)
        tile = tl.reshape(join(some, SLOW * FAST, 8), [SLOW, FAST, 8])
        total = tl.sum(tile, 1 if STRIDE == 1 else 0)
        i = first + tl.arange(0, 8)[None, :]
        tl.store(place[:, None] + i * channels, total, mask=used[:, None] & (i < len(sums)))
