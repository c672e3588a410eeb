"""Where the tensors of a Call lie, what runs it, and whether it is right: for tests/test_properties.py."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from famseg_kernels.testing import gate, tolerance
from tests.native import ISAS
from tests.strategies import Call

Copy = Callable[[Tensor], Tensor]

# --- where the tensors lie, and what the kernels run on -------------------------------------------------------------


class Layout(NamedTuple):
    """How one tensor lies in memory. `turn` picks the dimension."""

    kind: str
    turn: int

    def of(self, t: Tensor) -> Tensor:
        axis = self.turn % max(t.dim(), 1)
        if self.kind == "permuted":
            order = [(axis + i) % t.dim() for i in range(t.dim())]
            return t.detach().permute(order).clone(memory_format=torch.contiguous_format).permute(order_back(order))
        if self.kind == "strided":
            shape = [2 * n + 1 if i == axis else n for i, n in enumerate(t.shape)]
            part = [slice(1, None, 2) if i == axis else slice(None) for i in range(t.dim())]
            return garbage(shape, t)[tuple(part)].copy_(t.detach())
        if self.kind == "part":
            whole = garbage([n + 2 for n in t.shape], t)
            if t.dim() == 4 and self.turn % 2:
                whole = whole.contiguous(memory_format=torch.channels_last)
            return whole[(slice(1, -1),) * t.dim()].copy_(t.detach())
        if self.kind == "expanded":  # other numbers: the first slice, again and again
            first = t.detach().narrow(axis, 0, min(t.shape[axis], 1))
            return first.clone(memory_format=torch.contiguous_format).expand(t.shape)
        return {"dense": gate.copied, "offset": gate.shifted, "channels_last": gate.channels_last}[self.kind](t)


def order_back(order: Sequence[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def garbage(shape: Sequence[int], like: Tensor) -> Tensor:
    """What nobody may read."""
    return torch.full(tuple(shape), math.nan if like.is_floating_point() else 2**30, dtype=like.dtype)


KINDS = ("dense", "offset", "channels_last", "permuted", "strided", "part", "expanded")
# In the order of the flattened arguments and then of the incoming gradients; from the start again where they end.
LAYOUTS = st.lists(st.builds(Layout, st.sampled_from(KINDS), st.integers(0, 5)), min_size=1, max_size=8)


def arranged(layouts: Sequence[Layout]) -> Callable[[Tensor], Tensor]:
    """A `copy` for one call of `gate.outcome`."""
    following = itertools.cycle(layouts)
    return lambda t: next(following).of(t)


@dataclass(frozen=True)
class Machine:
    isa: str
    threads: int

    @contextmanager
    def running(self) -> Iterator[None]:
        before = os.environ.get("FAMSEG_CPU_ISA"), torch.get_num_threads()
        os.environ["FAMSEG_CPU_ISA"] = self.isa
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before[1])
            if before[0] is None:
                del os.environ["FAMSEG_CPU_ISA"]
            else:
                os.environ["FAMSEG_CPU_ISA"] = before[0]


MACHINES = st.builds(Machine, st.sampled_from(ISAS[::-1] or ["baseline"]), st.sampled_from([1, 1, 2, 3]))


# --- the rule -------------------------------------------------------------------------------------------------------


def reference(call: Call, args: Any, copy: Copy) -> list[Tensor]:
    """Results and gradients by the definition, in torch's own loops.

    oneDNN's gradient of one channel's column, longer than the image is high, writes beside its memory (torch 2.11).
    """
    with torch.backends.mkldnn.flags(enabled=False):
        return gate.outcome(call.operation, args, "reference", copy=copy)


def truth(call: Call, args: Any, copy: Copy) -> list[Tensor]:
    """The reference in fp64."""
    operation = call.operation
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in operation.flatten(args)]
    return reference(call, operation.replace(args, wide), copy)


def terms(call: Call, args: Any, copies: Callable[[], Copy]) -> list[float]:
    """The `term_scale` of each output: how far it moves when all numbers move by a part of theirs, over that part."""
    generator, part = call.random(), 1e-6
    right = truth(call, args, copies())

    def moved() -> list[Tensor]:
        copy = copies()

        def move(t: Tensor) -> Tensor:
            sign = torch.randn(t.shape, generator=generator, dtype=torch.float64).sign()
            return copy(t) * (1 + part * sign) if t.is_floating_point() else copy(t)

        return [((m - r) / part).square() for m, r in zip(truth(call, args, move), right, strict=True)]

    squares = [torch.stack(outputs).mean(0) for outputs in zip(*(moved() for _ in range(8)), strict=True)]
    return [float(t.sqrt().max()) if t.numel() else 0.0 for t in squares]


Copies = Callable[[], Copy]  # one for each call


def compare(
    call: Call,
    args: Any,
    found: Sequence[Tensor],
    eager: Sequence[Tensor],
    right: Sequence[Tensor],
    copies: Copies = lambda: gate.copied,
) -> None:
    """Raise AssertionError unless results and gradients are right by the contract's tolerance.

    A number that is what is left of large terms has these for its scale, which the rule knows as `term_scale`. To
    measure them takes a while, so only what fails without is judged with them. What is below the smallest normal
    number of the arithmetic may be taken for 0, a thousand times in a sum.
    """
    operation = call.operation
    try:
        gate.compare(operation, "cpu", found, (eager, right))
    except AssertionError:
        for i, (a, e, t, scale) in enumerate(zip(found, eager, right, terms(call, args, copies), strict=True)):
            subnormal = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32).tiny
            wrong = tolerance.violation(a, e, t, max(scale, 1000 * subnormal / tolerance.EPSILON[a.dtype]))
            assert wrong is None and a.dtype == e.dtype, f"{operation.name}, output {i}: {wrong or a.dtype}"


def judge(call: Call, args: Any, machine: Machine, copies: Copies = lambda: gate.copied) -> list[Tensor]:
    """Results and gradients of the CPU kernels, which are right."""
    with machine.running():
        found = gate.outcome(call.operation, args, "cpu", copy=copies())
    compare(call, args, found, reference(call, args, copies()), truth(call, args, copies()), copies)
    return found


def agree(found: Tensor, right: Tensor) -> None:
    """Two ways to one number, by the same rule. Terms are of order one: none is held to its share of less than 1e-4."""
    wrong = tolerance.violation(found, right, right.double(), 1e-4)
    assert wrong is None, wrong


# --- what is not finite --------------------------------------------------------------------------------------------


def spoiled(at: int, index: int, value: float) -> Copy:
    """A `copy` that puts `value` into the tensor number `at`, arguments first and then incoming gradients."""
    copied = iter(range(1000))

    def copy(t: Tensor) -> Tensor:
        mine = gate.copied(t)
        if next(copied) == at:
            mine.view(-1)[index] = value
        return mine

    return copy


def meets_zeros(call: Call, place: int) -> bool:
    """Whether the argument is multiplied by the zeros outside the image, which may be read or not."""
    if call.form.name == "strip_conv2d":
        return place > 0 and call.operation.flatten(call.arguments())[place].dim() == 4
    return (call.form.name, place) in (("carafe", 1), ("feature_aware_upsample", 2))
