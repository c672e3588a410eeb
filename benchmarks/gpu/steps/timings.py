"""Our kernels alone: every op × backend × layout × shape × dtype × pass, and the GPU's own rates beside them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import torch

import famseg_kernels as fk
from benchmarks import measure
from benchmarks.gpu.dry import emulate
from benchmarks.gpu.items import Item, Options, Row
from benchmarks.rates import Rates, machine_rates
from benchmarks.shapes import TINY, shapes_for
from benchmarks.timing import DTYPES, PASSES, Settings, measure_case, name_of, without_tf32
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation

SECONDS = 0.25  # of measuring a case; ten to a thousand replays


def items(options: Options) -> Iterator[Item]:
    emulate(options)
    without_tf32()
    # bf16 and fp32 first: fp16 runs the same kernels as bf16.
    for dtype in (DTYPES["bf16"], DTYPES["fp32"], DTYPES["fp16"]):
        for operation in fk.OPERATIONS:
            cases = shapes_for(operation.spec.name, "cuda")[1:]
            if options.dry:
                cases = (TINY[operation.spec.name],) if dtype == torch.float32 else ()
            for case in cases:
                yield from timed(operation, case, dtype, options, "none", SECONDS)


def timed(
    operation: Operation,
    case: Case,
    dtype: torch.dtype,
    options: Options,
    peers: Literal["none", "eager"],
    seconds: float,
) -> Iterator[Item]:
    """Two items: forward, forward and backward (a dry run takes the second only: the first is a part of it)."""
    for name, backward in list(PASSES.items())[1 if options.dry else 0 :]:
        run = functools.partial(_rows, operation, case, dtype, backward, options, peers, seconds)
        yield Item(f"{operation.spec.name} {case.name} {name_of(dtype)} {name}", run)


def _rows(
    operation: Operation,
    case: Case,
    dtype: torch.dtype,
    backward: bool,
    options: Options,
    peers: Literal["none", "eager"],
    seconds: float,
    _: float,
) -> Iterator[Row]:
    settings = Settings(options.device, 0.0 if options.dry else seconds, peers)
    rates = {None: _rates(options.device, options.dry), 1: _rates(options.device, options.dry)}
    where = _where(options.device)
    for row in measure_case(operation, case, dtype, backward, settings, rates):
        yield row | where
    if options.device == "cuda":
        torch.cuda.empty_cache()  # graphs of the last case hold memory of their own


@functools.cache
def _rates(device: str, dry: bool) -> Rates:
    return machine_rates(device, DTYPES.values(), 0.0 if dry else 1.0)


@functools.cache
def _where(device: str) -> dict[str, str]:
    return measure.provenance(device)
