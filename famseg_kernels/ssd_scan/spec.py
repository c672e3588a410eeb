"""ssd_scan and ssd_scan_2d: what they take and what they cost.

Mamba-2's state space duality (arXiv 2405.21060, section 6) in 1D, with the meaning of mamba_ssm's
mamba_chunk_scan_combined, and over an image in one, two or four directions (FAMSeg section 3.2.2).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from famseg_kernels import checks
from famseg_kernels.spec import Spec
from famseg_kernels.ssd_scan import cases

SCAN_SCHEMA = (
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, SymInt? chunk_size, bool dt_softplus, "
    "float dt_min, float dt_max, bool return_final_states, bool return_varlen_states) -> Tensor[]"
)
SCAN_2D_SCHEMA = (
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, SymInt? chunk_size, "
    "bool dt_softplus, float dt_min, float dt_max) -> Tensor"
)


class ScanArguments(NamedTuple):
    """A call of ssd_scan, as its schema has it: the only other place that lists what it takes."""

    x: Tensor  # (batch, length, heads, headdim)
    dt: Tensor  # (batch, length, heads)
    A: Tensor  # (heads,)
    B: Tensor  # (batch, length, groups, state)
    C: Tensor
    D: Tensor | None  # (heads,) or (heads, headdim)
    z: Tensor | None  # like x
    dt_bias: Tensor | None  # (heads,)
    initial_states: Tensor | None  # (batch, heads, headdim, state)
    seq_idx: Tensor | None  # (batch, length), int32 or int64
    cu_seqlens: Tensor | None  # (sequences + 1,), int32 or int64
    chunk_size: int | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    return_final_states: bool
    return_varlen_states: bool


class Scan2dArguments(NamedTuple):
    """A call of ssd_scan_2d, likewise."""

    x: Tensor  # (N, H, W, heads, headdim)
    dt: Tensor  # (N, H, W, directions, heads)
    A: Tensor  # (directions, heads)
    B: Tensor  # (N, H, W, directions or 1, groups, state)
    C: Tensor
    D: Tensor | None  # (heads,) or (directions, heads)
    dt_bias: Tensor | None  # (directions, heads)
    chunk_size: int | None
    dt_softplus: bool
    dt_min: float
    dt_max: float


def options_of(call: ScanArguments | Scan2dArguments) -> tuple[int | None, bool, float, float]:
    """No property of a call: torch.compile of torch 2.6 cannot trace that."""
    return call.chunk_size, call.dt_softplus, call.dt_min, call.dt_max


def check_scan(*arguments: Any) -> None:
    call = ScanArguments(*arguments)
    x = call.x
    checks.data("x", x, 4)
    b, length, heads, headdim = x.shape
    _check_parameter("dt", call.dt, x, (b, length, heads), "(batch, length, heads)")
    _check_parameter("A", call.A, x, (heads,), "(heads,)")
    checks.tensor("B", call.B, 4)
    groups, state = call.B.shape[2:]
    for name, value in (("B", call.B), ("C", call.C)):
        checks.companion(name, value, x, 4)
        checks.shape(name, value, (b, length, groups, state), "(batch, length, groups, state)")
    _check_groups(groups, heads)
    if call.D is not None:
        matrix = isinstance(call.D, Tensor) and call.D.dim() == 2
        expected = ((heads, headdim), "(heads, headdim)") if matrix else ((heads,), "(heads,) or (heads, headdim)")
        _check_parameter("D", call.D, x, *expected)
    if call.z is not None:
        checks.companion("z", call.z, x)
        checks.shape("z", call.z, tuple(x.shape), "like x")
    if call.dt_bias is not None:
        _check_parameter("dt_bias", call.dt_bias, x, (heads,), "(heads,)")
    if call.initial_states is not None:
        expected_states = (b, heads, headdim, state)
        _check_parameter("initial_states", call.initial_states, x, expected_states, "(batch, heads, headdim, state)")
    if call.seq_idx is not None:
        _check_index("seq_idx", call.seq_idx, x, (b, length), "(batch, length)")
    checks.boolean("return_final_states", call.return_final_states)
    checks.boolean("return_varlen_states", call.return_varlen_states)
    if call.cu_seqlens is not None:
        checks.tensor("cu_seqlens", call.cu_seqlens, 1)
        _check_index("cu_seqlens", call.cu_seqlens, x, (max(call.cu_seqlens.shape[0], 2),), "(sequences + 1,)")
    if call.return_varlen_states:
        if call.cu_seqlens is None:
            raise ValueError("cu_seqlens: expected a tensor with return_varlen_states=True, got None")
        if b != 1:
            raise ValueError(f"x: expected batch 1 with return_varlen_states=True, got {b}")
    _check_options(*options_of(call))


def check_scan_2d(*arguments: Any) -> None:
    call = Scan2dArguments(*arguments)
    x = call.x
    checks.data("x", x, 5)
    n, h, w, heads, _ = x.shape
    checks.tensor("dt", call.dt, 5)
    directions = call.dt.shape[3]
    if directions not in (1, 2, 4):
        raise ValueError(f"dt: expected 1, 2 or 4 directions in dimension 3, got shape {tuple(call.dt.shape)}")
    _check_parameter("dt", call.dt, x, (n, h, w, directions, heads), "(N, H, W, directions, heads)")
    _check_parameter("A", call.A, x, (directions, heads), "(directions, heads)")
    checks.tensor("B", call.B, 6)
    groups, state = call.B.shape[4:]
    shared = call.B.shape[3] if call.B.shape[3] in (1, directions) else directions
    for name, value in (("B", call.B), ("C", call.C)):
        checks.companion(name, value, x, 6)
        meaning = "(N, H, W, directions or 1, groups, state), B and C alike"
        checks.shape(name, value, (n, h, w, shared, groups, state), meaning)
    _check_groups(groups, heads)
    if call.D is not None:
        matrix = isinstance(call.D, Tensor) and call.D.dim() == 2
        expected = (directions, heads) if matrix else (heads,)
        _check_parameter("D", call.D, x, expected, "(heads,) or (directions, heads)")
    if call.dt_bias is not None:
        _check_parameter("dt_bias", call.dt_bias, x, (directions, heads), "(directions, heads)")
    _check_options(*options_of(call))


def _check_parameter(name: str, value: Any, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    checks.companion(name, value, x, fp32_allowed=True)
    checks.shape(name, value, expected, meaning)


def _check_index(name: str, value: Any, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    checks.tensor(name, value, len(expected))
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like x, got {value.device}")
    checks.shape(name, value, expected, meaning)


def _check_groups(groups: int, heads: int) -> None:
    if groups < 1:
        raise ValueError(f"B: expected at least one group, got {groups}")
    checks.divides("groups of B and C", groups, "heads", heads)


def _check_options(chunk_size: int | None, dt_softplus: bool, dt_min: float, dt_max: float) -> None:
    if chunk_size is not None:
        checks.integer("chunk_size", chunk_size, 1)
    checks.boolean("dt_softplus", dt_softplus)
    if not dt_min <= dt_max:
        raise ValueError(f"dt_limit: expected (low, high) with low ≤ high, got ({dt_min}, {dt_max})")


def wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the states."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def resets(seq_idx: Tensor | None) -> Tensor | None:
    """Where a sequence starts anew: where seq_idx changes, 0 before the first token."""
    return None if seq_idx is None else seq_idx != F.pad(seq_idx, (1, 0))[:, :-1]


def packed(cu_seqlens: Tensor | None, initial_states: Tensor | None, length: int) -> list[tuple[slice, Tensor | None]]:
    """The tokens of each packed sequence, and the initial state where it starts the row.

    Raises:
        ValueError: bounds that are no stretches of the row. A fake tensor has no values, so `check` cannot see them.
    """
    bounds = [] if cu_seqlens is None else cu_seqlens.tolist()
    if any(not 0 <= start <= end <= length for start, end in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens: expected bounds that rise from 0 or more to at most {length}, got {bounds}")
    return [(slice(start, end), initial_states if start == 0 else None) for start, end in itertools.pairwise(bounds)]


def fake_scan(*arguments: Any) -> list[Tensor]:
    call = ScanArguments(*arguments)
    x, state = call.x, (*call.x.shape[2:], call.B.shape[3])
    results = [torch.empty_like(x, memory_format=torch.contiguous_format)]
    if call.return_final_states:
        results.append(x.new_empty((x.shape[0], *state), dtype=wide(x)))
    if call.return_varlen_states and call.cu_seqlens is not None:
        results.append(x.new_empty((call.cu_seqlens.shape[0] - 1, *state), dtype=wide(x)))
    return results


def fake_scan_2d(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def flops_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, *_: Any) -> int:
    """Forward FLOPs of the recurrence: 4·headdim·state a token and head (update and read-out), 2·headdim for D.

    It is the count of the definition, the same for every chunk size and backend; chunked kernels trade more
    multiply–adds (2·chunk·headdim a token) for matrix products. exp, softplus and the gate z are not counted.
    """
    return x.numel() * (4 * B.shape[3] + (2 if D is not None else 0))


def flops_scan_2d(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, *_: Any) -> int:
    """Forward FLOPs of the recurrence: 4·headdim·state a token, head and direction; 2·headdim for D.

    See `flops_scan`. D per direction can be summed over directions first, so it costs the same.
    """
    return x.numel() * (4 * B.shape[5] * dt.shape[3] + (2 if D is not None else 0))


def moved_bytes(x: Tensor, *rest: Any) -> int:
    """Bytes to move: every tensor argument in once, y (like x) out."""
    tensors = [t for t in rest if isinstance(t, Tensor)]
    return 2 * x.numel() * x.element_size() + sum(t.numel() * t.element_size() for t in tensors)


SCAN = Spec("ssd_scan", SCAN_SCHEMA, check_scan, fake_scan, flops_scan, moved_bytes, cases.SCAN)
SCAN_2D = Spec("ssd_scan_2d", SCAN_2D_SCHEMA, check_scan_2d, fake_scan_2d, flops_scan_2d, moved_bytes, cases.SCAN_2D)
