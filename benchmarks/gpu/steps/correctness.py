"""Every GPU kernel against the fp64 reference under the contract's tolerance, forward and all gradients.

The contract's cases first; then the benchmarks' shapes with a few images, because only they reach tiles, halos and
several images a block. Each case is also run twice (the same bits), with every tensor and the incoming gradient at an
odd address, and channels_last.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import famseg_kernels as fk
from benchmarks.ahead import ODD_CASES
from benchmarks.gpu.dry import emulate
from benchmarks.gpu.items import Item, Options, Row, Skipped
from benchmarks.shapes import GATE_SHAPES, TINY, network_shapes
from benchmarks.timing import DTYPES, name_of, without_tf32
from famseg_kernels.testing import gate
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation

BACKENDS = ("cuda", "triton")


def items(options: Options) -> Iterator[Item]:
    emulate(options)
    without_tf32()
    for (name, dtype), operation, backend in itertools.product(DTYPES.items(), fk.OPERATIONS, BACKENDS):
        if backend not in operation.implementations:
            continue
        if options.dry:
            if name == "fp32":
                yield _item(operation, backend, "contract", TINY[operation.spec.name], dtype, options, True)
            continue
        for number, case in enumerate(operation.spec.cases):
            odd = backend != "triton" or number < ODD_CASES
            yield _item(operation, backend, "contract", case, dtype, options, odd)
    if options.dry:
        return
    network = network_shapes("famseg_tiny", 2, 256)
    for dtype, operation, backend in itertools.product(DTYPES.values(), fk.OPERATIONS, BACKENDS):
        if backend in operation.implementations:
            for case in (*GATE_SHAPES[operation.spec.name][1:], *network.get(operation.spec.name, ())):
                yield _item(operation, backend, "benchmark shape", case, dtype, options, False)


def _item(
    operation: Operation, backend: str, kind: str, case: Case, dtype: torch.dtype, options: Options, odd: bool
) -> Item:
    run = functools.partial(check, operation, backend, kind, case, dtype, options.device, odd)
    return Item(f"{operation.spec.name} {backend} {name_of(dtype)} {kind} {case.name}", run)


def check(
    operation: Operation, backend: str, kind: str, case: Case, dtype: torch.dtype, device: str, odd: bool, _: float
) -> Iterator[Row]:
    """A row for each property; AssertionError at the end if one of them does not hold."""
    args = case.arguments(dtype, device)
    if (reason := gate.refusal(operation, backend, args, backward=True)) is not None:
        raise Skipped(f"{operation.spec.name} on {backend}: {reason}")
    right = gate.expected(operation, args)
    first: list[Tensor] = []

    def matches() -> None:
        first.extend(gate.outcome(operation, args, backend, True))
        gate.compare(operation, backend, first, right)

    def is_deterministic() -> None:
        for number, (a, b) in enumerate(zip(first, gate.outcome(operation, args, backend, True), strict=True)):
            assert torch.equal(a, b), f"output {number} differs between two runs"

    def copied_by(copy: Callable[[Tensor], Tensor]) -> None:
        gate.compare(operation, backend, gate.outcome(operation, args, backend, True, copy), right)

    properties: dict[str, Callable[[], Any]] = {"matches": matches, "is deterministic": is_deterministic}
    if any(t is not None and t.dim() == 4 for t in operation.flatten(args)):
        properties["channels_last"] = functools.partial(copied_by, gate.channels_last)
    if odd:  # last: where an address is misaligned, the CUDA context ends
        properties["odd addresses"] = functools.partial(copied_by, gate.shifted)
    broken = []
    for name, test in properties.items():
        result = "passed"
        try:
            test()
        except Exception as error:  # the next property may hold: what fails with which is what one wants to know
            result = f"{type(error).__name__}: {error}"
            broken.append(f"{name}: {result}")
        yield {
            "op": operation.spec.name,
            "backend": backend,
            "dtype": name_of(dtype),
            "kind": kind,
            "case": case.name,
            "property": name,
            "result": result,
        }
    if broken:
        raise AssertionError("; ".join(broken))
