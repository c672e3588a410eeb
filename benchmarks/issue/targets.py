"""What the work of a call allows, and what is wanted of our kernels: shares of such a bound."""

from __future__ import annotations

from dataclasses import dataclass

import famseg_kernels as fk
from benchmarks.ahead import without_data
from benchmarks.issue import chips
from benchmarks.issue.chips import Chip
from benchmarks.shapes import GPU_SHAPES
from benchmarks.timing import DTYPES

OPERATIONS = {operation.spec.name: operation for operation in fk.OPERATIONS}
PASSES = ("fwd", "bwd", "fwd+bwd")


@dataclass(frozen=True)
class Target:
    """`percent` of a bound that the predicted time shall reach; above 100 where tensor cores pass that of the FMAs."""

    op: str
    cases: str  # how their names begin
    dtypes: tuple[str, ...]
    passed: str
    of: str  # a bound: "FMA", "copy"
    percent: int


_ALL = tuple(DTYPES)
_HALVES = ("bf16", "fp16")
TARGETS = (
    Target("strip_conv2d", "mscan_s_", ("fp32",), "fwd", "FMA", 80),
    Target("strip_conv2d", "mscan_s_", ("fp32",), "bwd", "FMA", 60),
    Target("strip_conv2d", "mscan_s_stage1", _HALVES, "fwd", "FMA", 150),  # 128 × 128
    Target("strip_conv2d", "mscan_s_stage2", _HALVES, "fwd", "FMA", 150),  # 64 × 64
    Target("strip_conv2d", "mscan_t_mlp", _ALL, "fwd", "copy", 85),
    *(
        Target(op, "", _ALL, passed, "copy", percent)
        for op in ("reassemble", "carafe")
        for passed, percent in (("fwd", 80), ("bwd", 60))
    ),
)


def of(op: str, case: str, dtype: str, passed: str) -> Target | None:
    for target in TARGETS:
        if (target.op, target.passed) == (op, passed) and case.startswith(target.cases) and dtype in target.dtypes:
            return target
    return None


def bounds(op: str, case: str, dtype: str, passed: str, chip: Chip) -> dict[str, float]:
    """Microseconds that the work takes at least on FMA units, on tensor cores, and at a copy's bandwidth.

    Tensor cores: in 16 bits; in fp32 as three products of TF32, each at half of that rate.

    FLOPs: twice the forward's in the backward. Bytes: those that any implementation moves, of the backward as
    `benchmarks.timing` has them: arguments and the result's gradient in, gradients out.
    """
    operation = OPERATIONS[op]
    shape = next(c for c in GPU_SHAPES[op] if c.name == case)
    args = without_data(operation, shape, DTYPES[dtype])
    results = operation.spec.fake(*args)
    out = sum(t.nbytes for t in (results if isinstance(results, list) else [results]))
    forward, moved = passed in ("fwd", "fwd+bwd"), operation.spec.moved_bytes(*args)
    backward = passed in ("bwd", "fwd+bwd")
    flops = operation.spec.flops(*args) * (forward + 2 * backward)
    moved = moved * forward + (2 * (moved - out) + out) * backward
    every_clock = 2 * chip.processors * chip.clock
    found = {
        "FMA": 1e6 * flops / (chips.FMA[chip.capability] * every_clock),
        "copy": 1e6 * moved / (chip.memory * chips.COPY),
    }
    products = 6 if dtype == "fp32" else 1
    found["tensor"] = 1e6 * products * flops / (chips.TENSOR[chip.capability] * every_clock)
    return found


def least(of_work: dict[str, float]) -> tuple[float, str]:
    """The time that no call can beat, and what sets it: arithmetic on the fastest unit for the dtype, or bytes."""
    arithmetic = min(of_work["tensor"], of_work["FMA"])
    return (arithmetic, "arithmetic") if arithmetic > of_work["copy"] else (of_work["copy"], "memory")
