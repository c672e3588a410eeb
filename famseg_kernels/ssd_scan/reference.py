"""The scans in plain PyTorch: the definitions that every kernel is held to.

`recurrence` is the definition word for word, a loop over tokens. `forward` computes the same sums in chunks, as matrix
products (arXiv 2405.21060, section 6), so that the reference can train a network and be traced; tests hold it to
`recurrence`. Where something is not finite the two differ: a product multiplies by zeros what a token must not read at
all, and 0 times NaN is NaN. `exact` is the loop, slower by far, for such calls only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from famseg_kernels.spec import Backend
from famseg_kernels.ssd_scan import spec

# exp(-110) is 0 in fp32 (and 1e-48 in fp64): clamping a step's log-decay here changes nothing, but keeps one huge dt
# from swallowing the digits of its neighbours in a sum.
LOWEST_LOG_DECAY = -110.0

DEFAULT_CHUNK = 64

# (x, dt, A, B, C, initial state, resets, chunk size) → y, final state
Form = Callable[..., tuple[Tensor, Tensor]]


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
    return _by_token(x, dt, A, B, C, None, None, None)[0]


def _by_token(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
    _: int | None,
) -> tuple[Tensor, Tensor]:
    """As `_chunked`. What is not finite reaches what the recurrence gives it, and so do its gradients."""
    b, length, heads, headdim = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(b, heads, headdim, B.shape[3]) if initial is None else initial.clone()
    if resets is None:
        resets = torch.zeros(b, length, dtype=torch.bool, device=x.device)
    # What a reset does not read is replaced: in the backward, too, a product with zero would not stop a NaN.
    decay = (dt.masked_fill(resets[..., None], 0.0) * A.expand_as(dt).masked_fill(resets[..., None], 0.0)).exp()
    if not length:
        return x.new_zeros(b, 0, heads, headdim), state
    # Autograd keeps every token's state: of one stretch at a time.
    size = math.isqrt(length)
    stretches = zip(*(t.split(size, 1) for t in (decay, dt[..., None] * x, B, C, resets)), strict=True)
    outputs = []
    for stretch in stretches:
        y, state = checkpoint(_stretch, state, *stretch, use_reentrant=False)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _stretch(state: Tensor, decay: Tensor, x: Tensor, B: Tensor, C: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
    """y of some tokens, and the state after them; x times dt."""
    factors = decay[..., None, None], x[..., None], B[..., None, :], resets[..., None, None, None]
    states = []
    for decay, x, B, reset in zip(*(t.unbind(1) for t in factors), strict=True):
        state = decay * state.masked_fill(reset, 0.0) + x * B
        states.append(state)
    return torch.einsum("bthpn,bthn->bthp", torch.stack(states, 1), C), state


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    resets: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """y (b, l, h, p) and the final state (b, h, p, n) of the recurrence, in chunks.

    resets (b, l): the tokens that find a state of zero.
    """
    b, length, heads, headdim = x.shape
    groups, n = B.shape[2:]
    log_decay = (dt * A).clamp(min=LOWEST_LOG_DECAY)
    if resets is not None:
        log_decay = log_decay.masked_fill(resets[..., None], -torch.inf)
    log_decay, x, B, C = (_blocks(t, chunk_size or DEFAULT_CHUNK) for t in (log_decay, x * dt[..., None], B, C))
    log_decay = log_decay.permute(0, 1, 3, 2)  # (b, c, h, q)
    chunks, q = x.shape[1:3]
    x = x.view(b, chunks, q, groups, heads // groups, headdim)

    decay = _decay(log_decay)
    gram = torch.einsum("bcign,bcjgn->bcgij", C, B)
    mixing = gram[:, :, :, None] * decay.view(b, chunks, groups, heads // groups, q, q)
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", mixing, x)

    to_end = decay[..., -1, :].view(b, chunks, groups, heads // groups, q)
    added = torch.einsum("bcgrj,bcjgrp,bcjgn->bcgrpn", to_end, x, B).view(b, chunks, heads, headdim, n)
    if initial is None:
        initial = x.new_zeros(b, heads, headdim, n)
    total = log_decay.sum(-1)
    states = _states(total, added, initial)
    final = total[:, -1, :, None, None].exp() * states[:, -1] + added[:, -1]
    states = states.view(b, chunks, groups, heads // groups, headdim, n)
    from_start = log_decay.cumsum(-1).exp().view(b, chunks, groups, heads // groups, q)
    y = y + torch.einsum("bcign,bcgrpn,bcgri->bcigrp", C, states, from_start)
    return y.reshape(b, chunks * q, heads, headdim).narrow(1, 0, length), final


def _states(log_decay: Tensor, added: Tensor, initial: Tensor) -> Tensor:
    """The state that each chunk finds: (b, c, h), (b, c, h, p, n), (b, h, p, n) → (b, c, h, p, n).

    Without a loop, so that a graph traced from this holds for any number of chunks: all pairs of blocks, then all pairs
    of the chunks in each. All pairs of chunks would take 1 GB a head for an image of 1024 x 1024.
    """
    chunks = added.shape[1]
    log_decay, added = (_blocks(t, 16) for t in (log_decay, added))
    to_end = _decay(log_decay.permute(0, 1, 3, 2))[..., -1, :]
    initial = _pairwise(log_decay.sum(2), torch.einsum("bkhj,bkjhpn->bkhpn", to_end, added), initial)
    states = _pairwise(*(t.flatten(0, 1) for t in (log_decay, added, initial)))
    return states.unflatten(0, initial.shape[:2]).flatten(1, 2).narrow(1, 0, chunks)


def _pairwise(log_decay: Tensor, added: Tensor, initial: Tensor) -> Tensor:
    """s_0 = initial, s_{t+1} = exp(log_decay_t) s_t + added_t, as a sum over pairs of steps; shapes as in `_states`."""
    parts = torch.cat([initial[:, None], added[:, :-1]], 1)
    decay = _decay(F.pad(log_decay[:, :-1], (0, 0, 1, 0)).transpose(1, 2))
    return torch.einsum("bhij,bjhpn->bihpn", decay, parts)


def _blocks(t: Tensor, size: int) -> Tensor:
    """(b, l, ...) → (b, blocks, q, ...), padded with zeros: they keep the state and add nothing."""
    length = max(t.shape[1], 1)
    # Traced for any length, a minimum in every later shape would make the trace take minutes: blocks stay whole.
    q = min(size, length) if isinstance(length, int) else size
    blocks = (length + q - 1) // q  # not -(-length // q): exported, a division may round towards zero
    pad = blocks * q - t.shape[1]
    return F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)).view(t.shape[0], blocks, q, *t.shape[2:])


def _decay(log_decay: Tensor) -> Tensor:
    """decay[i, j] = exp(Σ_{j<t≤i} log_decay_t), 0 above the diagonal: (..., q) → (..., q, q).

    Summed term by term, never as a difference of long sums; masked before exp, so that neither the value nor the
    gradient meets an overflow.
    """
    q = log_decay.shape[-1]
    lower = torch.ones(q, q, dtype=torch.bool, device=log_decay.device).tril()
    steps = log_decay[..., None].expand(*log_decay.shape, q).masked_fill(~lower.tril(-1), 0.0)
    return steps.cumsum(-2).masked_fill(~lower, -torch.inf).exp()


def _scan(*arguments: Any, form: Form = _chunked) -> list[Tensor]:
    call = spec.ScanArguments(*arguments)
    chunk_size, softplus, low, high = spec.options_of(call)
    x, dt, A, B, C, D, z, dt_bias, initial = _wide(*call[:9])
    step = step_size(dt, dt_bias, softplus, low, high)
    y, state = form(x, step, A, B, C, initial, spec.resets(call.seq_idx), chunk_size)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z)
    results = [y.to(call.x.dtype).contiguous()]
    if call.return_final_states:
        results.append(state)
    if call.return_varlen_states:
        # Each packed sequence by itself: its own tokens, and the initial state where it starts the row.
        states = []
        for tokens, first in spec.packed(call.cu_seqlens, initial, x.shape[1]):
            px, pdt, pB, pC = (t[:, tokens] for t in (x, step, B, C))
            states.append(form(px, pdt, A, pB, pC, first, None, chunk_size)[1])
        results.append(torch.cat(states))
    return results


def _scan_2d(*arguments: Any, form: Form = _chunked) -> Tensor:
    """Scan the image as one sequence a direction and add: the directions are further heads and groups of one scan."""
    call = spec.Scan2dArguments(*arguments)
    n, h, w, heads, headdim = call.x.shape
    directions = call.dt.shape[3]
    chunk_size, softplus, low, high = spec.options_of(call)
    x, dt, A, B, C, D, dt_bias = _wide(*call[:7])
    step = step_size(dt, dt_bias, softplus, low, high)
    # All that a pixel has in one row, so that a direction is unrolled once: a trace has few nodes.
    images = [t.expand(-1, -1, -1, directions, -1, -1) for t in (x[:, :, :, None], step[..., None], B, C)]
    pixels = torch.cat([t.flatten(4) for t in images], -1)
    sequence = torch.stack([_unroll(pixels.select(3, k), k) for k in range(directions)], 2)
    parts = sequence.split([t.shape[4] * t.shape[5] for t in images], -1)
    px, pdt, pB, pC = (p.unflatten(-1, t.shape[4:]).flatten(2, 3) for p, t in zip(parts, images, strict=True))
    y, _ = form(px, pdt[..., 0], A.flatten(), pB, pC, None, None, chunk_size)
    y = y.view(n, h * w, directions, heads, headdim)
    total = torch.zeros_like(x)
    for k in range(directions):
        total = total + _roll_up(y.select(2, k), k, h, w)
    if D is not None:
        total = total + (D if D.dim() == 1 else D.sum(0))[:, None] * x
    return total.to(call.x.dtype).contiguous()


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


def _wide(x: Tensor, *tensors: Tensor | None) -> list[Any]:
    return [t if t is None else t.to(spec.wide(x)) for t in (x, *tensors)]


scan = Backend(_scan, exact=functools.partial(_scan, form=_by_token))
scan_2d = Backend(_scan_2d, exact=functools.partial(_scan_2d, form=_by_token))
