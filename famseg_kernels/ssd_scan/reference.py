"""The scans in plain PyTorch: the definitions that every kernel is held to.

`recurrence` is the definition word for word, a loop over tokens. `_scan` computes the same sums in chunks, as matrix
products (arXiv 2405.21060, section 6), so that the reference can train a network; tests hold it to `recurrence`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from famseg_kernels.ssd_scan import spec

# exp(-110) is 0 in fp32 (and 1e-48 in fp64): clamping a step's log-decay here changes nothing, but keeps one huge dt
# from swallowing the digits of its neighbours in a sum.
LOWEST_LOG_DECAY = -110.0

DEFAULT_CHUNK = 64


def step_size(dt: Tensor, dt_bias: Tensor | None, softplus: bool, low: float, high: float) -> Tensor:
    """dt' = clamp(softplus?(dt + dt_bias), low, high)."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = F.softplus(dt)  # identity above 20
    return dt.clamp(low, high)


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_tᵀ, y_t = C_t h_t, token by token (no option, finished dt).

    x (b, l, h, p), dt (b, l, h), A (h,), B and C (b, l, g, n) → y (b, l, h, p).
    """
    b, length, heads, headdim = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(b, heads, headdim, B.shape[3])
    y = torch.empty_like(x)
    for t in range(length):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y[:, t] = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
    return y


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """y (b, l, h, p) and the final state (b, h, p, n) of the recurrence, in chunks.

    segments (b, l): non-decreasing ids; the state is zero where the id grows, `initial` belongs to id 0.
    """
    b, length, heads, headdim = x.shape
    groups, n = B.shape[2:]
    q = min(chunk_size or DEFAULT_CHUNK, max(length, 1))
    chunks = -(-length // q)
    pad = chunks * q - length  # padded tokens have dt = 0: they keep the state and add nothing
    if segments is None:
        segments = torch.zeros((b, length), dtype=torch.long, device=x.device)
    tail = segments[:, -1:].expand(b, pad)
    segments = torch.cat([segments, tail], 1).view(b, chunks, q)
    x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)).view(b, chunks, q, *t.shape[2:]) for t in (x, B, C))
    dt = F.pad(dt, (0, 0, 0, pad)).view(b, chunks, q, heads)

    log_decay = (dt * A).clamp(min=LOWEST_LOG_DECAY).permute(0, 1, 3, 2)  # (b, c, h, q)
    weighted = (x * dt[..., None]).view(b, chunks, q, groups, heads // groups, headdim)

    # decay[i, j] = exp(Σ_{j<t≤i} log_decay_t): summed term by term, never as a difference of long sums; masked
    # before exp, so that neither the value nor the gradient meets an overflow.
    lower = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    steps = log_decay[..., None].expand(*log_decay.shape, q).masked_fill(~lower.tril(-1), 0.0)
    same = segments[:, :, None, :, None] == segments[:, :, None, None, :]
    decay = steps.cumsum(-2).masked_fill(~(lower & same), -torch.inf).exp()

    gram = torch.einsum("bcign,bcjgn->bcgij", C, B)
    mixing = gram[:, :, :, None] * decay.view(b, chunks, groups, heads // groups, q, q)
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", mixing, weighted)

    to_end = decay[..., -1, :].view(b, chunks, groups, heads // groups, q)
    added = torch.einsum("bcgrj,bcjgrp,bcjgn->bcgrpn", to_end, weighted, B).view(b, chunks, heads, headdim, n)
    from_start = log_decay.cumsum(-1).exp()
    state = x.new_zeros(b, heads, headdim, n) if initial is None else initial
    owner = segments.new_zeros(b)
    entering = []
    for c in range(chunks):
        entering.append(state * (segments[:, c, 0] == owner)[:, None, None, None])
        owner = segments[:, c, -1]
        survives = (segments[:, c, 0] == owner)[:, None, None, None]
        state = entering[-1] * from_start[:, c, :, -1, None, None] * survives + added[:, c]
    if chunks:
        # A token in a later segment than its chunk's first one has no part of the entering state.
        reach = from_start * (segments == segments[:, :, :1])[:, :, None]
        states = torch.stack(entering, 1).view(b, chunks, groups, heads // groups, headdim, n)
        reach = reach.view(b, chunks, groups, heads // groups, q)
        y = y + torch.einsum("bcign,bcgrpn,bcgri->bcigrp", C, states, reach)
    return y.reshape(b, chunks * q, heads, headdim)[:, :length], state


def _scan(
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
) -> list[Tensor]:
    dtype = x.dtype
    x, dt, A, B, C, D, z, dt_bias, initial = _wide(x, dt, A, B, C, D, z, dt_bias, initial_states)
    step = step_size(dt, dt_bias, dt_softplus, dt_min, dt_max)
    y, state = _chunked(x, step, A, B, C, initial, _segments(seq_idx), chunk_size)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z)
    results = [y.to(dtype).contiguous()]
    if return_final_states:
        results.append(state)
    if return_varlen_states:
        # Each packed sequence by itself: its own tokens, and the initial state where it starts the row.
        states = []
        for tokens, first in spec.packed(cu_seqlens, initial):
            px, pdt, pB, pC = (t[:, tokens] for t in (x, step, B, C))
            states.append(_chunked(px, pdt, A, pB, pC, first, None, chunk_size)[1])
        results.append(torch.cat(states))
    return results


def _segments(seq_idx: Tensor | None) -> Tensor | None:
    """Ids that grow by one wherever seq_idx changes, 0 where the initial state holds (seq_idx 0 from the start)."""
    resets = spec.resets(seq_idx)
    if resets is None:
        return None
    return resets.cumsum(1)


def _scan_2d(
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
) -> Tensor:
    """Scan the image as one sequence a direction and add: the directions are further heads and groups of one scan."""
    dtype = x.dtype
    n, h, w, heads, headdim = x.shape
    directions = dt.shape[3]
    x, dt, A, B, C, D, dt_bias = _wide(x, dt, A, B, C, D, dt_bias)
    step = step_size(dt, dt_bias, dt_softplus, dt_min, dt_max)
    sequences = []
    for image in (x[:, :, :, None].expand(-1, -1, -1, directions, -1, -1), step[..., None], B, C):
        image = image.expand(-1, -1, -1, directions, -1, -1)
        parts = [_unroll(image[:, :, :, k], k) for k in range(directions)]
        sequences.append(torch.stack(parts, 2).flatten(2, 3))
    px, pdt, pB, pC = sequences
    y, _ = _chunked(px, pdt[..., 0], A.flatten(), pB, pC, None, None, chunk_size)
    y = y.view(n, h * w, directions, heads, headdim)
    total = torch.zeros_like(x)
    for k in range(directions):
        total = total + _roll_up(y[:, :, k], k, h, w)
    if D is not None:
        total = total + (D if D.dim() == 1 else D.sum(0))[:, None] * x
    return total.to(dtype).contiguous()


def _unroll(image: Tensor, direction: int) -> Tensor:
    """(N, H, W, ...) → (N, H·W, ...): 0 row-major, 1 row-major backward, 2 column-major, 3 column-major backward."""
    sequence = (image.transpose(1, 2) if direction >= 2 else image).flatten(1, 2)
    return sequence.flip(1) if direction % 2 else sequence


def _roll_up(sequence: Tensor, direction: int, h: int, w: int) -> Tensor:
    """The inverse of `_unroll`."""
    sequence = sequence.flip(1) if direction % 2 else sequence
    if direction >= 2:
        return sequence.unflatten(1, (w, h)).transpose(1, 2)
    return sequence.unflatten(1, (h, w))


def _wide(*tensors: Tensor | None) -> list[Any]:
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]


scan = SimpleNamespace(forward=_scan)
scan_2d = SimpleNamespace(forward=_scan_2d)
