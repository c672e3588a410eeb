"""What this machine does at its best, measured in the run whose figures it judges: the roofline of every row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from benchmarks import measure


@dataclass(frozen=True)
class Rates:
    """By torch's own operations: FLOP/s of a matrix product, bytes/s of a copy; FLOP/s of a GPU's fp32 FMA units."""

    matrix: Mapping[torch.dtype, float]
    copy: float
    fma: float | None = None  # None on a CPU, where the fp32 matrix product runs on the same units

    def bound(self, flops: float, moved: float, dtype: torch.dtype) -> tuple[float, str]:
        """The roofline: milliseconds that no call of this work can beat, and what sets them.

        fp32 has no tensor cores here (TF32 would round), so its arithmetic is bound by the better of both rates.
        """
        rate, unit = self.matrix[dtype], "matrix product"
        if dtype == torch.float32 and self.fma is not None and self.fma > rate:
            rate, unit = self.fma, "FMA"
        arithmetic, traffic = 1e3 * flops / rate, 1e3 * moved / self.copy
        return (arithmetic, unit) if arithmetic > traffic else (traffic, "memory")

    def columns(self, dtype: torch.dtype) -> dict[str, float | str]:
        """As columns of a result file."""
        return {
            "matrix_gflops": round(self.matrix[dtype] / 1e9, 1),
            "copy_gb_s": round(self.copy / 1e9, 2),
            "fma_gflops": "" if self.fma is None else round(self.fma / 1e9, 1),
        }


# Rows of the matrices and floats of the copy: enough to reach the machine's rates. (0 seconds: a dry run.)
_MATRIX = {"cuda": 8192, "cpu": 1536}
_COPY = {"cuda": 1 << 28, "cpu": 1 << 25}


def machine_rates(device: str, dtypes: Iterable[torch.dtype], seconds: float) -> Rates:
    size, floats = (_MATRIX[device], _COPY[device]) if seconds else (64, 1 << 12)
    calls: dict[str, measure.Call] = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        calls[str(dtype)] = lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out)
    source = torch.randn(floats, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda _: target.copy_(source)
    multiply_adds = 0
    if device == "cuda":
        from benchmarks import fma

        multiply_adds, calls["fma"] = fma.call(torch.device(device))
    for call in calls.values():
        call(0)
    times = measure.interleaved(calls, device, seconds, buffers=1)
    matrix = {dtype: 2 * size**3 / (times[str(dtype)].low * 1e-3) for dtype in dtypes}
    fma_rate = 2 * multiply_adds / (times["fma"].low * 1e-3) if multiply_adds else None
    return Rates(matrix, 2 * source.nbytes / (times["copy"].low * 1e-3), fma_rate)
