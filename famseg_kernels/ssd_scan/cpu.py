"""ssd_scan and ssd_scan_2d on the CPU: hands tensors as addresses to the C++ kernels of csrc/ssd_scan.

They do not answer calls whose results are not all finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.registry import NotFinite
from famseg_kernels.ssd_scan import spec
from famseg_kernels.ssd_scan.problem import Problem, operations


class _Call:
    """A problem as the native module takes it.

    Holds the contiguous tensors whose addresses it hands out. dt, A, D, dt_bias and states go in, and their
    gradients come out, in the dtype of the arithmetic.
    """

    def __init__(self, problem: Problem) -> None:
        self._x = problem.x.contiguous()
        self._wide = spec.wide(problem.x)
        tensors = (
            self._x,
            problem.dt.to(self._wide),
            problem.A.to(self._wide),
            problem.B,
            problem.C,
            self._widened(problem.skip()),
            problem.z,
            self._widened(problem.dt_bias),
            self._widened(problem.initial_states),
            problem.resets,
        )
        self._tensors = [None if t is None else t.contiguous() for t in tensors]
        self._dtype = checks.dtype_name(problem.x)
        self._shape = problem.sizes
        self._rule = (problem.dt_softplus, problem.dt_min, problem.dt_max)
        self._chunk = problem.chunk_size or 0

    def forward(self, wants_states: bool) -> list[Tensor]:
        """[y] or [y, final states]."""
        y = torch.empty_like(self._x, memory_format=torch.contiguous_format)
        states = self._x.new_empty(self._shape.states, dtype=self._wide) if wants_states else None
        if not backends.native("_cpu").ssd_scan_forward(
            *self._arguments(), y.data_ptr(), backends.address(states), torch.get_num_threads()
        ):
            raise NotFinite
        return [y] if states is None else [y, states]

    def backward(self, grad: Tensor | None, states_grad: Tensor | None, needs: Sequence[bool]) -> list[Tensor | None]:
        """As `problem.operations` has it."""
        tensors = self._tensors[:9]
        found = [
            torch.empty_like(t) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)
        ]
        grad, states_grad = (None if g is None else g.contiguous() for g in (grad, states_grad))
        if not backends.native("_cpu").ssd_scan_backward(
            *self._arguments(),
            backends.address(grad),
            backends.address(states_grad),
            tuple(backends.address(g) for g in found),
            torch.get_num_threads(),
        ):
            raise NotFinite
        return found

    def _widened(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(self._wide)

    def _arguments(self) -> tuple[Any, ...]:
        return self._dtype, self._shape, self._rule, self._chunk, tuple(backends.address(t) for t in self._tensors)


def _forward(problem: Problem, wants_states: bool) -> list[Tensor]:
    return _Call(problem).forward(wants_states)


def _final_states(problem: Problem) -> Tensor:
    return _Call(problem).forward(True)[1]


def _backward(
    problem: Problem, grad: Tensor | None, states_grad: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    return _Call(problem).backward(grad, states_grad, needs)


scan, scan_2d = operations(_forward, _final_states, _backward)
