"""What loads and stores of a warp cost: wavefronts in shared memory, sectors of 32 bytes in global memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32


@dataclass
class Access:
    """Of one instruction, over the blocks that were run. `warps` with no lane to serve are not counted."""

    warps: int = 0
    wavefronts: int = 0
    sectors: int = 0
    lines: int = 0  # of 128 bytes, which is what the first level of cache looks up
    unknown: int = 0  # warps whose addresses are data: counted as if they were one after the other


def wavefronts(addresses: np.ndarray, active: np.ndarray, size: int) -> int:
    """Cycles of shared memory for accesses (warps, 32) of `size` bytes a lane.

    128 bytes a cycle: lanes whose words lie in the same of 32 banks take turns, unless the words are the same. Of 8
    bytes a lane a cycle serves half of a warp, of 16 bytes a quarter.
    """
    words, lanes = max(1, size // 4), 32 // max(1, size // 4)
    rows = np.repeat(addresses >> np.uint64(2), words, axis=1) + np.tile(np.arange(words, dtype=np.uint64), 32)
    return _turns(rows.reshape(-1, lanes * words), np.repeat(active, words, axis=1).reshape(-1, lanes * words))


def _turns(words: np.ndarray, active: np.ndarray) -> int:
    words = np.where(active, words, np.uint64(1 << 40))
    words = np.sort(words, axis=1)
    new = np.ones(words.shape, bool)
    new[:, 1:] = words[:, 1:] != words[:, :-1]
    new &= words < (1 << 40)
    bank = np.arange(len(words), dtype=np.int64)[:, None] * 32 + (words & np.uint64(31)).astype(np.int64)
    found = np.bincount(bank[new], minlength=32 * len(words))
    return int(found.reshape(-1, 32).max(1).sum())


def matrix_wavefronts(addresses: np.ndarray, active: np.ndarray, count: int) -> int:
    """LDSM, STSM: lane 8 m + r has the address of row r, 16 bytes, of matrix m."""
    lanes = slice(0, 8 * count)
    rows = np.repeat(addresses[:, lanes] >> np.uint64(2), 4, axis=1) + np.tile(np.arange(4, dtype=np.uint64), 8 * count)
    return _turns(rows.reshape(-1, 32), np.repeat(active[:, lanes], 4, axis=1).reshape(-1, 32))


@dataclass
class Memory:
    """All accesses of the blocks that are run."""

    blocks: int
    bases: Sequence[int] = ()  # of tensors, ascending
    accesses: dict[int, Access] = field(default_factory=lambda: defaultdict(Access))
    _sectors: dict[bool, list[np.ndarray]] = field(default_factory=lambda: {False: [], True: []})
    _known: dict[tuple[object, ...], int] = field(default_factory=dict)

    def shared(self, pc: int, addresses: np.ndarray | int | None, active: np.ndarray, size: int, matrices: int) -> None:
        access, warps = self.accesses[pc], int(active.any(1).sum())
        access.warps += warps
        least = matrices or max(1, size // 4)
        if addresses is None:
            access.unknown += warps
            access.wavefronts += warps * least
        elif isinstance(addresses, int) or addresses.shape[1] == 1:
            access.wavefronts += warps  # one word for all
        else:
            relative = addresses - (addresses[:, :1] & np.uint64(~127 & (1 << 64) - 1))
            key = (size, matrices, relative.tobytes(), active.tobytes())
            if key not in self._known:
                whole = np.broadcast_to(relative + np.uint64(1 << 20), active.shape)
                self._known[key] = (
                    matrix_wavefronts(whole, active, matrices) if matrices else wavefronts(whole, active, size)
                )
            access.wavefronts += self._known[key]

    def globally(
        self, pc: int, addresses: np.ndarray | int | None, active: np.ndarray, size: int, block: np.ndarray, store: bool
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """`block` (warps, 1): whose sectors they are. Returns each warp's sectors and whose they are; None: unknown."""
        access, warps = self.accesses[pc], int(active.any(1).sum())
        access.warps += warps
        if addresses is None:
            access.unknown += warps
            access.sectors += warps * size
            access.lines += warps * max(1, size // 4)
            return None
        if isinstance(addresses, int):
            addresses = np.array([[addresses]], np.uint64)
        places = np.broadcast_to(addresses, active.shape)
        first, last = places // np.uint64(SECTOR), (places + np.uint64(size - 1)) // np.uint64(SECTOR)
        row = np.broadcast_to(np.arange(len(active), dtype=np.uint64)[:, None] << np.uint64(48), active.shape)
        keys = np.unique(np.concatenate([(row | first)[active], (row | last)[active]]))
        access.sectors += len(keys)
        access.lines += len(np.unique(keys >> np.uint64(2)))
        sector, which = keys & np.uint64((1 << 48) - 1), (keys >> np.uint64(48)).astype(np.int64)
        self._sectors[store].append(sector | block[which, 0].astype(np.uint64) << np.uint64(48))
        if len(self._sectors[store]) > 2000:
            self._sectors[store] = [np.unique(np.concatenate(self._sectors[store]))]
        return sector, which

    def touched(self, store: bool) -> dict[int, int]:
        """Bytes of sectors of each tensor (by its base) that a block touches, each once, added up over the blocks."""
        if not self._sectors[store]:
            return {}
        found = np.unique(np.concatenate(self._sectors[store])) & np.uint64((1 << 48) - 1)
        bases = np.array(self.bases, np.uint64)
        place = np.searchsorted(bases, (found + np.uint64(1)) * np.uint64(SECTOR) - np.uint64(1), side="right") - 1
        return {
            int(bases[i]) if i >= 0 else 0: int(n) * SECTOR
            for i, n in zip(*np.unique(place, return_counts=True), strict=True)
        }
