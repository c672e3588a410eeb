"""No figure without a right result: every kernel against the fp64 reference before it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import famseg_kernels as fk
from famseg_kernels import tolerance
from famseg_kernels.registry import Operation


def with_gradients(operation: Operation, args: Any, wanted: bool = True) -> tuple[list[Any], list[Tensor]]:
    """The arguments with their floating-point tensors as leaves, and these leaves."""
    flat = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_(wanted)
        if t is not None and t.is_floating_point()
        else t
        for t in operation.flatten(args)
    ]
    return operation.replace(args, flat), [t for t in flat if t is not None and t.is_floating_point()]


def cotangents(results: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to come in, the same numbers whatever the dtype and the device."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]


def outcome(operation: Operation, args: Any, backend: str, backward: bool) -> list[Tensor]:
    """Results, and with `backward` the gradients of all floating-point arguments."""
    args, leaves = with_gradients(operation, args, backward)
    results = operation.packet(*args, backend)
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    if not backward:
        return results
    found = torch.autograd.grad(results, leaves, cotangents(results), allow_unused=True)
    return [r.detach() for r in results] + [g for g in found if g is not None]


def check(operation: Operation, args: Any, backend: str, backward: bool = True) -> None:
    """Raise AssertionError, naming what is wrong, unless the call is within the tolerance of the contract."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in operation.flatten(args)]
    actual = outcome(operation, args, backend, backward)
    eager = outcome(operation, args, "reference", backward)
    truth = outcome(operation, operation.replace(args, wide), "reference", backward)
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        wrong = tolerance.violation(a, e, t)
        assert wrong is None, f"{operation.spec.name}, {backend}, output {i}: {wrong}"


def refusal(operation: Operation, backend: str, args: Any, backward: bool) -> str | None:
    """Why `backend` cannot run these arguments here, or None."""
    if (reason := fk.available_backends()[backend]) != "ok":
        return reason
    for method in ("forward", "backward") if backward else ("forward",):
        if (reason := operation.refusal(backend, args, method)) is not None:
            return reason
    return None
