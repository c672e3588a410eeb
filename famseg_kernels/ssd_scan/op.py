"""fk.ssd_scan and fk.ssd_scan_2d: the functional forms."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from famseg_kernels.spec import Later
from famseg_kernels.ssd_scan import cpu, reference
from famseg_kernels.ssd_scan.spec import SCAN, SCAN_2D
from famseg_kernels.torch_op import Operation, autocast

SCAN_OPERATION = Operation(
    SCAN,
    {
        "reference": reference.scan,
        "cpu": cpu.scan,
        "triton": Later("famseg_kernels.ssd_scan.triton", "scan"),
    },
)
SCAN_2D_OPERATION = Operation(
    SCAN_2D,
    {
        "reference": reference.scan_2d,
        "cpu": cpu.scan_2d,
        "triton": Later("famseg_kernels.ssd_scan.triton", "scan_2d"),
    },
)


def ssd_scan_2d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int | None = None,
) -> Tensor:
    """Mamba-2 (SSD) scan of an image in K = 1, 2 or 4 directions, merged by summing (FAMSeg section 3.2.2).

    Directions: 0 row-major forward, 1 row-major backward, 2 column-major forward, 3 column-major backward, each over
    the whole image as one sequence. Per direction, in fp32 or better (arXiv 2405.21060, Eq. 1):
    dt' = clamp(softplus?(dt + dt_bias), dt_limit), h_t = exp(dt'_t A) h_{t-1} + dt'_t B_t x_tᵀ, y_t = C_t h_t.

    Args:
        x: (N, H, W, heads, headdim); fp32, bf16, fp16 or fp64.
        dt: (N, H, W, K, heads), x's dtype or fp32.
        A: (K, heads), negative, x's dtype or fp32 (beside fp64 too).
        B: (N, H, W, K, groups, state), or 1 in place of K (shared by all directions), as C; x's dtype. Head h reads
            group h // (heads / groups).
        C: like B.
        D: (heads,), applied once, or (K, heads), summed over directions; x's dtype or fp32.
        dt_bias: (K, heads), x's dtype or fp32.
        dt_softplus: apply softplus (identity above 20) to dt + dt_bias.
        dt_limit: (low, high), two numbers with low ≤ high: the clamp of dt.
        chunk_size: any integer ≥ 1 or None; changes speed only.

    Returns:
        (N, H, W, heads, headdim), contiguous, in x's dtype: the sum over directions plus D·x.

    Raises:
        TypeError, ValueError: arguments of another dtype, device or shape; K other than 1, 2, 4.

    A NaN or infinity in a token reaches the tokens after it in each direction, as the recurrence says, and no others.
    Calls with such results take the loop over tokens on the CPU, slower by far.
    """
    tensors = (x, dt, A, B, C, D, dt_bias)
    if has_torch_function(tensors):
        options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "chunk_size": chunk_size}
        return handle_torch_function(ssd_scan_2d, tensors, x, dt, A, B, C, D, **options)
    x, B, C = autocast((x, B, C))
    args = (x, dt, A, B, C, D, dt_bias, chunk_size, dt_softplus, *_limits(dt_limit))
    SCAN_2D.check(*args)
    return SCAN_2D_OPERATION(*args)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2 (SSD) scan of sequences: mamba_ssm's `mamba_chunk_scan_combined` by meaning and argument order.

    Args:
        x: (batch, length, heads, headdim); fp32, bf16, fp16 or fp64.
        dt: (batch, length, heads), x's dtype or fp32.
        A: (heads,), negative, x's dtype or fp32.
        B: (batch, length, groups, state), x's dtype.
        C: like B.
        chunk_size: any integer ≥ 1 or None; changes speed only.
        D: (heads,) or (heads, headdim): adds D·x.
        z: like x: the result is multiplied by silu(z).
        dt_bias: (heads,), x's dtype or fp32, as D and initial_states.
        initial_states: (batch, heads, headdim, state), the state before the first token; it belongs to seq_idx 0.
        seq_idx: (batch, length) int32 or int64; a change of it resets the state. Below 0 it marks padding.
        cu_seqlens: (sequences + 1,) int32 or int64 bounds of packed sequences, for return_varlen_states only.
        dt_softplus: as in `ssd_scan_2d`.
        dt_limit: as in `ssd_scan_2d`.
        return_final_states: also return the state after the last token, (batch, heads, headdim, state); 0 where the
            row ends in padding.
        return_varlen_states: also return each packed sequence's own final state, (sequences, heads, headdim, state);
            needs batch 1 and cu_seqlens.
        state_dtype: of the returned states; None: fp32 (fp64 for fp64 input).

    Returns:
        y (batch, length, heads, headdim) in x's dtype, or (y, final_states), (y, varlen_states) or
        (y, final_states, varlen_states) as asked for.

    Raises:
        TypeError, ValueError: arguments of another dtype, device or shape; bounds outside the row.

    A NaN or infinity in a token reaches later tokens of its own sequence, as the recurrence says, and no others. Calls
    with such results take the loop over tokens on the CPU, slower by far.

    Where mamba_ssm's result depends on where its chunks end, this one does not:
        seq_idx that returns (0, 1, 0): a sequence of its own each time. There, tokens of the same index in one chunk
            share a state across what lies between.
        Padding: scanned as a sequence of its own, as there within one chunk; it adds nothing to another's state.
        initial_states before a row that starts with padding or another index: not read. There, tokens of index 0 in
            the first chunk read them all the same.
        Varlen states: each sequence's own tokens, and the initial state where it starts the row, whatever seq_idx is.
            There, the initial state is dropped.
        A NaN or infinity: there, it may spoil all of its chunk.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
    if has_torch_function(tensors):
        states = (z, dt_bias, initial_states, seq_idx, cu_seqlens)
        asked = (dt_softplus, dt_limit, return_final_states, return_varlen_states, state_dtype)
        return handle_torch_function(ssd_scan, tensors, x, dt, A, B, C, chunk_size, D, *states, *asked)
    x, B, C, z = autocast((x, B, C, z))
    options = (chunk_size, dt_softplus, *_limits(dt_limit), return_final_states, return_varlen_states)
    args = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, *options)
    SCAN.check(*args)
    if state_dtype is not None and not (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point):
        raise TypeError(f"state_dtype: expected a floating-point torch.dtype or None, got {state_dtype!r}")
    results = list(SCAN_OPERATION(*args))
    if return_final_states and seq_idx is not None and x.shape[1] > 0:
        results[1] = results[1].masked_fill((seq_idx[:, -1] < 0)[:, None, None, None], 0.0)
    if len(results) == 1:
        return results[0]
    return (results[0], *(state.to(state_dtype or state.dtype) for state in results[1:]))


def _limits(dt_limit: Any) -> tuple[float, float]:
    pair = dt_limit if isinstance(dt_limit, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(value, Real) and not isinstance(value, bool) for value in pair):
        raise TypeError(f"dt_limit: expected (low, high), two numbers, got {dt_limit!r}")
    try:
        return float(pair[0]), float(pair[1])
    except OverflowError:
        raise ValueError("dt_limit: expected numbers that a float can hold, got a larger one") from None
