"""ssd_scan and ssd_scan_2d: what they take and what they cost.

Mamba-2's state space duality (arXiv 2405.21060, section 6) in 1D, with the meaning of mamba_ssm's
mamba_chunk_scan_combined, and over an image in one, two or four directions (FAMSeg section 3.2.2).
"""

from __future__ import annotations

import itertools
from typing import Any

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


def check_scan(
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
) -> None:
    checks.data("x", x, 4)
    b, length, heads, headdim = x.shape
    _check_parameter("dt", dt, x, (b, length, heads), "(batch, length, heads)")
    _check_parameter("A", A, x, (heads,), "(heads,)")
    checks.tensor("B", B, 4)
    groups, state = B.shape[2:]
    for name, value in (("B", B), ("C", C)):
        checks.companion(name, value, x, 4)
        checks.shape(name, value, (b, length, groups, state), "(batch, length, groups, state)")
    _check_groups(groups, heads)
    if D is not None:
        matrix = isinstance(D, Tensor) and D.dim() == 2
        expected = ((heads, headdim), "(heads, headdim)") if matrix else ((heads,), "(heads,) or (heads, headdim)")
        _check_parameter("D", D, x, *expected)
    if z is not None:
        checks.companion("z", z, x)
        checks.shape("z", z, tuple(x.shape), "like x")
    if dt_bias is not None:
        _check_parameter("dt_bias", dt_bias, x, (heads,), "(heads,)")
    if initial_states is not None:
        expected_states = (b, heads, headdim, state)
        _check_parameter("initial_states", initial_states, x, expected_states, "(batch, heads, headdim, state)")
    if seq_idx is not None:
        _check_index("seq_idx", seq_idx, x, (b, length), "(batch, length)")
    checks.boolean("return_final_states", return_final_states)
    checks.boolean("return_varlen_states", return_varlen_states)
    if cu_seqlens is not None:
        checks.tensor("cu_seqlens", cu_seqlens, 1)
        _check_index("cu_seqlens", cu_seqlens, x, (max(cu_seqlens.shape[0], 2),), "(sequences + 1,)")
    if return_varlen_states:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens: expected a tensor with return_varlen_states=True, got None")
        if b != 1:
            raise ValueError(f"x: expected batch 1 with return_varlen_states=True, got {b}")
    _check_options(chunk_size, dt_softplus, dt_min, dt_max)


def check_scan_2d(
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
) -> None:
    checks.data("x", x, 5)
    n, h, w, heads, _ = x.shape
    checks.tensor("dt", dt, 5)
    directions = dt.shape[3]
    if directions not in (1, 2, 4):
        raise ValueError(f"dt: expected 1, 2 or 4 directions in dimension 3, got shape {tuple(dt.shape)}")
    _check_parameter("dt", dt, x, (n, h, w, directions, heads), "(N, H, W, directions, heads)")
    _check_parameter("A", A, x, (directions, heads), "(directions, heads)")
    checks.tensor("B", B, 6)
    groups, state = B.shape[4:]
    shared = B.shape[3] if B.shape[3] in (1, directions) else directions
    for name, value in (("B", B), ("C", C)):
        checks.companion(name, value, x, 6)
        meaning = "(N, H, W, directions or 1, groups, state), B and C alike"
        checks.shape(name, value, (n, h, w, shared, groups, state), meaning)
    _check_groups(groups, heads)
    if D is not None:
        matrix = isinstance(D, Tensor) and D.dim() == 2
        expected = (directions, heads) if matrix else (heads,)
        _check_parameter("D", D, x, expected, "(heads,) or (directions, heads)")
    if dt_bias is not None:
        _check_parameter("dt_bias", dt_bias, x, (directions, heads), "(directions, heads)")
    _check_options(chunk_size, dt_softplus, dt_min, dt_max)


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


def fake_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> list[Tensor]:
    cu_seqlens, return_final_states, return_varlen_states = rest[6], rest[-2], rest[-1]
    b, _, heads, headdim = x.shape
    results = [torch.empty_like(x, memory_format=torch.contiguous_format)]
    if return_final_states:
        results.append(x.new_empty((b, heads, headdim, B.shape[3]), dtype=wide(x)))
    if return_varlen_states:
        results.append(x.new_empty((cu_seqlens.shape[0] - 1, heads, headdim, B.shape[3]), dtype=wide(x)))
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
