"""ssd_scan and ssd_scan_2d on the CPU: hands tensors as addresses to the C++ kernels of csrc/ssd_scan.

They do not answer calls whose results are not all finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.spec import NotFinite
from famseg_kernels.ssd_scan import spec
from famseg_kernels.ssd_scan.problem import TENSORS, Problem, Sizes, operations

_GRADIENTS = tuple(f"{name}_gradient" for name in Problem._fields[:TENSORS])
_ARGUMENTS = (
    "dtype",
    *Sizes._fields,
    *("chunk_size", "dt_softplus", "dt_min", "dt_max", "threads"),
    *(*Problem._fields[:TENSORS], "resets"),
)


class _Call:
    """A problem as the native module takes it.

    Holds the contiguous tensors whose addresses it hands out. dt, A, D, dt_bias and states go in, and their
    gradients come out, in the dtype of the arithmetic.
    """

    def __init__(self, problem: Problem) -> None:
        x, dt, A, B, C, _, z, dt_bias, initial_states, resets, chunk_size, *step = problem
        self._x = x = x.contiguous()
        self._wide = wide = spec.wide(x)
        self._sizes = sizes = problem.sizes
        given = (
            (x, None),
            (dt, wide),
            (A, wide),
            (B, None),
            (C, None),
            (problem.skip(wide), wide),
            (z, None),
            (dt_bias, wide),
            (initial_states, wide),
            (resets, None),
        )
        # A conversion to what a tensor already is costs as much as all the rest of this line.
        self._tensors = [
            t if t is None else (t if dtype is None or t.dtype is dtype else t.to(dtype)).contiguous()
            for t, dtype in given
        ]
        numbers = (checks.dtype_name(x), *sizes, chunk_size or 0, *step, torch.get_num_threads())
        self._arguments = dict(zip(_ARGUMENTS, (*numbers, *map(backends.address, self._tensors)), strict=True))

    def forward(self, wants_states: bool) -> list[Tensor]:
        """[y] or [y, final states]."""
        y = torch.empty_like(self._x, memory_format=torch.contiguous_format)
        states = self._x.new_empty(self._sizes.states, dtype=self._wide) if wants_states else None
        if not backends.native("_cpu").ssd_scan_forward(
            **self._arguments, y=y.data_ptr(), final_states=backends.address(states)
        ):
            raise NotFinite
        return [y] if states is None else [y, states]

    def backward(self, grad: Tensor | None, states_grad: Tensor | None, needs: Sequence[bool]) -> list[Tensor | None]:
        """As `problem.operations` has it."""
        tensors = self._tensors[:TENSORS]
        found = [
            torch.empty_like(t) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)
        ]
        grad, states_grad = (None if g is None else g.contiguous() for g in (grad, states_grad))
        if not backends.native("_cpu").ssd_scan_backward(
            **self._arguments,
            y_gradient=backends.address(grad),
            final_states_gradient=backends.address(states_grad),
            **dict(zip(_GRADIENTS, map(backends.address, found), strict=True)),
        ):
            raise NotFinite
        return found


def _forward(problem: Problem, wants_states: bool) -> list[Tensor]:
    return _Call(problem).forward(wants_states)


def _final_states(problem: Problem) -> Tensor:
    return _Call(problem).forward(True)[1]


def _backward(
    problem: Problem, grad: Tensor | None, states_grad: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    return _Call(problem).backward(grad, states_grad, needs)


scan, scan_2d = operations(_forward, _final_states, _backward)
