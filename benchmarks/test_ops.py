"""op × backend × shape × {forward, forward+backward}, each behind the correctness gate of the contract."""

from __future__ import annotations

import pytest
import torch

import famseg_kernels as fk
from benchmarks.shapes import SHAPES
from famseg_kernels.testing import gate

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
    if (reason := gate.refusal(operation, backend, args, backward)) is not None:
        pytest.skip(reason)
    gate.check(operation, args, backend, backward)
    args, leaves = gate.with_gradients(operation, args, backward)

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
