"""ssd_scan and ssd_scan_2d on the CPU: hands tensors as addresses to the C++ kernels of csrc/ssd_scan.

To the kernels a sequence is an image of one column, scanned in one direction. They do not
answer calls whose results are not all finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.spec import Backend, NotFinite
from famseg_kernels.ssd_scan import spec

# --- the image ----------------------------------------------------------------------------------------


def _forward_2d(
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
    """y (N, H, W, heads, headdim) in x's dtype."""
    total = D.sum(0) if D is not None and D.dim() == 2 else D
    problem = _Problem(x, dt, A, B, C, total, None, dt_bias, None, None)
    return problem.forward((chunk_size, dt_softplus, dt_min, dt_max), False)[0]


def _backward_2d(
    grad: Tensor,
    needs: Sequence[bool],
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
) -> list[Tensor | None]:
    """Gradients of the tensor arguments where `needs`, None elsewhere."""
    total = D.sum(0) if D is not None and D.dim() == 2 else D
    problem = _Problem(x, dt, A, B, C, total, None, dt_bias, None, None)
    needs = [*needs[:6], False, needs[6], False]
    step = (chunk_size, dt_softplus, dt_min, dt_max)
    *found, of_D, _, of_bias, _ = problem.backward(step, grad, None, needs)
    if of_D is not None and D is not None and D.dim() == 2:
        of_D = of_D.expand_as(D)
    return [*found, of_D, of_bias]


# --- the sequence -------------------------------------------------------------------------------------


def _forward(
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
    """[y, final states if asked for, states of the packed sequences if asked for]."""
    step = (chunk_size, dt_softplus, dt_min, dt_max)
    problem = _sequence(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    results = problem.forward(step, return_final_states)
    if return_varlen_states:
        parts = [
            _sequence(x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], None, None, dt_bias, first, None)
            for tokens, first in spec.packed(cu_seqlens, initial_states, x.shape[1])
        ]
        results.append(torch.cat([part.forward(step, True)[1] for part in parts]))
    return results


def _backward(
    grads: Sequence[Tensor],
    needs: Sequence[bool],
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
) -> list[Tensor | None]:
    """Gradients of the tensor arguments where `needs`, None elsewhere."""
    step = (chunk_size, dt_softplus, dt_min, dt_max)
    problem = _sequence(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    found = problem.backward(step, grads[0], grads[1] if return_final_states else None, needs[:9])
    if return_varlen_states:
        for index, (tokens, first) in enumerate(spec.packed(cu_seqlens, initial_states, x.shape[1])):
            wanted = [*needs[:5], False, False, needs[7], needs[8] and first is not None]
            part = _sequence(
                x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], None, None, dt_bias, first, None
            )
            shares = part.backward(step, None, grads[-1][index : index + 1], wanted)
            # dt_bias, A and the initial states are whole in every part; the others are a stretch of tokens.
            for place, share in enumerate(shares):
                whole = found[place]
                if share is not None and whole is not None:
                    (whole[:, tokens] if place in (0, 1, 3, 4) else whole).add_(share)
    return [*found, None, None]


def _sequence(
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
) -> _Problem:
    return _Problem(x, dt, A, B, C, D, z, dt_bias, initial_states, spec.resets(seq_idx))


# --- both ---------------------------------------------------------------------------------------------

_TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
_GRADIENTS = tuple(f"{name}_gradient" for name in _TENSORS)


class _Problem:
    """One call as the native module takes it, an image or a sequence.

    Holds the contiguous tensors whose addresses it hands out. dt, A, D, dt_bias and states go in, and their
    gradients come out, in the dtype of the arithmetic.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_states: Tensor | None,
        resets: Tensor | None,
    ) -> None:
        image = x.dim() == 5
        heads, headdim = x.shape[-2:]
        self._skip_per_head = D is not None and D.dim() == 1
        if D is not None and D.dim() == 1:
            D = D[:, None].expand(heads, headdim)
        self._x = x.contiguous()
        self._wide = spec.wide(x)
        tensors = (
            self._x,
            dt.to(self._wide),
            A.to(self._wide),
            B,
            C,
            None if D is None else D.to(self._wide),
            z,
            None if dt_bias is None else dt_bias.to(self._wide),
            None if initial_states is None else initial_states.to(self._wide),
            resets,
        )
        self._tensors = [None if t is None else t.contiguous() for t in tensors]
        size = x.shape[:3] if image else (*x.shape[:2], 1)
        directions, matrices = (dt.shape[3], B.shape[3]) if image else (1, 1)
        self._dtype = checks.dtype_name(x)
        self._shape = (*size, heads, headdim, *B.shape[-2:], directions, matrices)
        self._state_shape = (x.shape[0], heads, headdim, B.shape[-1])

    def forward(self, step: tuple[int | None, bool, float, float], wants_states: bool) -> list[Tensor]:
        """[y] or [y, final states]."""
        y = torch.empty_like(self._x, memory_format=torch.contiguous_format)
        states = self._x.new_empty(self._state_shape, dtype=self._wide) if wants_states else None
        if not backends.native("_cpu").ssd_scan_forward(
            **self._arguments(step, y=y.data_ptr(), final_states=backends.address(states))
        ):
            raise NotFinite
        return [y] if states is None else [y, states]

    def backward(
        self,
        step: tuple[int | None, bool, float, float],
        grad: Tensor | None,
        states_grad: Tensor | None,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of x, dt, A, B, C, D, z, dt_bias, initial states where `needs`; those given None are zero."""
        tensors = self._tensors[:9]
        found = [
            torch.empty_like(t) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)
        ]
        grad, states_grad = (None if g is None else g.contiguous() for g in (grad, states_grad))
        if not backends.native("_cpu").ssd_scan_backward(
            **self._arguments(
                step,
                y_gradient=backends.address(grad),
                final_states_gradient=backends.address(states_grad),
                **dict(zip(_GRADIENTS, map(backends.address, found), strict=True)),
            )
        ):
            raise NotFinite
        if (of_skip := found[5]) is not None and self._skip_per_head:
            found[5] = of_skip.sum(1)
        return found

    def _arguments(self, step: tuple[int | None, bool, float, float], **results: int) -> dict[str, Any]:
        chunk_size, dt_softplus, dt_min, dt_max = step
        batch, height, width, heads, headdim, groups, d_state, directions, matrices = self._shape
        x, dt, A, B, C, D, z, dt_bias, initial_states, resets = [
            0 if t is None else t.data_ptr() for t in self._tensors
        ]
        return {
            "dtype": self._dtype,
            "batch": batch,
            "height": height,
            "width": width,
            "heads": heads,
            "headdim": headdim,
            "groups": groups,
            "d_state": d_state,
            "directions": directions,
            "matrices": matrices,
            "chunk_size": chunk_size or 0,
            "dt_softplus": dt_softplus,
            "dt_min": dt_min,
            "dt_max": dt_max,
            "x": x,
            "dt": dt,
            "A": A,
            "B": B,
            "C": C,
            "D": D,
            "z": z,
            "dt_bias": dt_bias,
            "initial_states": initial_states,
            "resets": resets,
            "threads": torch.get_num_threads(),
            **results,
        }


scan = Backend(_forward, _backward)
scan_2d = Backend(_forward_2d, _backward_2d)
