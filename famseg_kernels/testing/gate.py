"""Is a backend right on these arguments: results and all gradients against the fp64 reference.

The contract tests ask, and so do the benchmarks before they time anything. `check` is the whole of it:

    operation, *_ = fk.OPERATIONS
    for case in operation.spec.cases:
        gate.check(operation, case.arguments(torch.bfloat16), "cpu")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import famseg_kernels as fk
from famseg_kernels.testing import tolerance
from famseg_kernels.torch_op import Operation


def copied(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format)


def shifted(t: Tensor) -> Tensor:
    """A copy with the same strides that begins one element into its memory: at no address of a wider access.

    So lies a contiguous view at an odd offset: a parameter in a flat buffer, the gradient of a part of a `cat`.
    """
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    memory = torch.zeros(1 + reach, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, t.stride(), 1).copy_(t.detach())


def channels_last(t: Tensor) -> Tensor:
    """A copy, an image's in channels-last memory order."""
    return t.detach().clone(memory_format=torch.channels_last if t.dim() == 4 else torch.preserve_format)


def with_gradients(
    operation: Operation, args: Any, wanted: bool = True, copy: Callable[[Tensor], Tensor] = copied
) -> tuple[list[Any], list[Tensor]]:
    """The arguments, copied, with their floating-point tensors as leaves, and these leaves."""
    flat = [t if t is None else copy(t) for t in operation.flatten(args)]
    leaves = [t.requires_grad_(wanted) for t in flat if t is not None and t.is_floating_point()]
    return operation.replace(args, flat), leaves


def cotangents(results: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to come in, the same numbers whatever the dtype and the device."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]


def call(operation: Operation, args: Any, backend: str) -> list[Tensor]:
    """The results as a list; through the op itself, below the public function's defaults and checks."""
    results = operation.packet(*args, backend)
    return list(results) if isinstance(results, (list, tuple)) else [results]


def outcome(
    operation: Operation,
    args: Any,
    backend: str,
    backward: bool = True,
    copy: Callable[[Tensor], Tensor] = copied,
) -> list[Tensor]:
    """Results, and with `backward` the gradients of all floating-point arguments."""
    args, leaves = with_gradients(operation, args, backward, copy)
    results = call(operation, args, backend)
    if not backward:
        return results
    grads = [copy(grad) for grad in cotangents(results)]
    found = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    return [r.detach() for r in results] + [g for g in found if g is not None]


def expected(operation: Operation, args: Any, backward: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """What `check` compares with: the reference in the arguments' own dtype, and in fp64."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in operation.flatten(args)]
    eager = outcome(operation, args, "reference", backward)
    return eager, outcome(operation, operation.replace(args, wide), "reference", backward)


def compare(
    operation: Operation, backend: str, actual: Sequence[Tensor], right: tuple[Sequence[Tensor], Sequence[Tensor]]
) -> None:
    """Raise AssertionError, naming what is wrong, unless `actual` is within the tolerance of the contract."""
    for i, (a, e, t) in enumerate(zip(actual, *right, strict=True)):
        wrong = tolerance.violation(a, e, t)
        if wrong is None and a.dtype != e.dtype:
            wrong = f"{a.dtype}, expected {e.dtype}"
        if wrong is not None:
            raise AssertionError(f"{operation.name}, {backend}, output {i}: {wrong}")


def check(
    operation: Operation, args: Any, backend: str, backward: bool = True, copy: Callable[[Tensor], Tensor] = copied
) -> None:
    """Raise AssertionError unless the call, forward and backward, is within the tolerance of the contract."""
    actual = outcome(operation, args, backend, backward, copy)
    compare(operation, backend, actual, expected(operation, args, backward))


def refusal(operation: Operation, backend: str, args: Any, backward: bool = True) -> str | None:
    """Why `backend` cannot run these arguments here, or None."""
    reason: str | None = fk.available_backends()[backend]
    if reason != "ok":
        return reason
    for method in ("forward", "backward") if backward else ("forward",):
        if (reason := operation.refusal(backend, args, method)) is not None:
            return reason
    return None
