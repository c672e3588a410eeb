"""op × backend × shape × {forward, forward+backward}, each behind the correctness gate of the contract."""

from __future__ import annotations

import pytest
import torch

import famseg_kernels as fk
from benchmarks.shapes import SHAPES
from famseg_kernels import tolerance

ROWS = [
    pytest.param(op, backend, case, backward, id=f"{op.spec.name}-{backend}-{case.name}-{('fwd', 'fwd_bwd')[backward]}")
    for op in fk.OPERATIONS
    for case in SHAPES[op.spec.name]
    for backend in op.implementations
    for backward in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("operation", "backend", "case", "backward"), ROWS)
def test_speed(operation, backend, case, backward, benchmark, request):
    if not request.config.getoption("--benchmark") and case.name != "small":
        pytest.skip("timed with --benchmark")
    if (reason := fk.available_backends()[backend]) != "ok":
        pytest.skip(reason)
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    args = case.arguments(torch.float32, device)
    for method in ("forward", "backward") if backward else ("forward",):
        if (reason := operation.refusal(backend, args, method)) is not None:
            pytest.skip(reason)
    flat = [
        t.requires_grad_(backward) if t is not None and t.is_floating_point() else t for t in operation.flatten(args)
    ]
    args = operation.replace(args, flat)
    gate(operation, backend, args)
    leaves = [t for t in flat if t is not None and t.requires_grad]

    def run():
        result = operation.packet(*args, backend)
        result = result[0] if isinstance(result, (list, tuple)) else result
        if backward:
            torch.autograd.grad(result, leaves, torch.ones_like(result), allow_unused=True)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["GFLOP"] = operation.spec.flops(*args) * (3 if backward else 1) / 1e9
    benchmark.extra_info["GB"] = operation.spec.moved_bytes(*args) / 1e9
    benchmark(run)


@torch.no_grad()
def gate(operation, backend, args):
    """No figure without a right result: the forward against the fp64 reference."""
    wide = operation.replace(
        args, [t.double() if t is not None and t.is_floating_point() else t for t in operation.flatten(args)]
    )
    outputs = [operation.packet(*a, b) for a, b in ((args, backend), (args, "reference"), (wide, "reference"))]
    actual, eager, truth = (list(o) if isinstance(o, (list, tuple)) else [o] for o in outputs)
    for a, e, t in zip(actual, eager, truth, strict=True):
        assert tolerance.violation(a, e, t) is None
