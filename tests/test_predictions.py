"""benchmarks/results/predicted has every launch of every operation, and no kernel is slower now than it says there."""

from __future__ import annotations

import csv
import functools
import itertools
import math
from typing import Any

import pytest

from benchmarks.issue import chips, launches, report, table, targets
from benchmarks.shapes import GPU_SHAPES
from benchmarks.timing import DTYPES
from famseg_kernels import launch
from famseg_kernels.testing.case import Case
from tests.predictions import needs_cubins, needs_tools, rows_of


@functools.cache
def committed(name: str) -> list[dict[str, str]]:
    with (report.COMMITTED / name).open(newline="") as file:
        return list(csv.DictReader(file))


CALLS = [
    (op, case, dtype, backend)
    for op, operation in table.OPERATIONS.items()
    for case in GPU_SHAPES[op][1:]
    for dtype in table.DTYPES_OF_TABLE
    for backend in table.BACKENDS
    if backend in operation.implementations
]


def test_every_call_has_a_prediction_or_a_reason() -> None:
    """Of every operation, shape, dtype, backend, pass and chip."""
    found = {
        tuple(row[k] for k in ("op", "case", "dtype", "backend", "pass", "chip")): row["us"] or row["refusal"]
        for row in committed("operations.csv")
    }
    for op, case, dtype, backend in CALLS:
        for passed, chip in itertools.product(targets.PASSES, chips.CHIPS):
            assert found.get((op, case.name, dtype, backend, passed, chip.name)), (op, case.name, dtype, backend, chip)


def test_no_prediction_beats_what_the_work_needs() -> None:
    """Compulsory bytes at a copy's bandwidth, FLOPs on the fastest unit: a shorter time is one that was miscounted."""
    for row in committed("operations.csv"):
        assert not row["us"] or float(row["% of bound"]) <= 100.5, row


@pytest.mark.parametrize("op", table.OPERATIONS)
def test_every_launch_is_in_the_table(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's backend launches now, in its order, without compiling it."""
    pytest.importorskip("triton")
    for chip in chips.CHIPS:
        monkeypatch.setattr(launch, "capability", lambda _, chip=chip: chip.capability)
        for case, dtype in ((case, dtype) for name, case, dtype, b in CALLS if name == op and b == "triton"):
            where = {"op": op, "case": case.name, "dtype": dtype, "backend": "triton", "chip": chip.name}
            for passed, names in zip(("fwd", "bwd"), launched(op, case, dtype, monkeypatch), strict=True):
                rows = [r for r in committed("kernels.csv") if r.items() >= (where | {"pass": passed}).items()]
                assert [row["kernel"] for row in rows] == names, where
                assert all(row["us"] or row["refusal"] for row in rows)


def launched(op: str, case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the kernels of forward and backward."""
    found: list[Any] = []
    monkeypatch.setattr(launch, "run", lambda kernel, *_, **__: found.append(kernel.__name__))

    def taken() -> list[Any]:
        mine = found.copy()
        found.clear()
        return mine

    passes = launches.called(table.OPERATIONS[op], case, DTYPES[dtype], "triton", taken)
    return [[getattr(each, "kernel", each) for each in made] for made in passes]


# Each kernel of Triton in 16 bits, the fp32 ones that take least to count, and one of fp16, which the table has not.
QUICK = (
    *(("strip_conv2d", "mscan_s_stage4_n16", "bf16"), ("strip_conv2d", "mscan_t_mlp_stage3_n16", "bf16")),
    *(("strip_conv2d", "mscan_t_mlp_stage3_n16", "fp32"), ("ssd_scan_2d", "heads8_16x16_n16", "bf16")),
    *(("ssd_scan_2d", "vmamba_56x56_n16", "bf16"), ("ssd_scan", "mamba2_2048_n8", "bf16")),
    *(("reassemble", "famseg_32x32_n16", "bf16"), ("reassemble", "famseg_32x32_n16", "fp32")),
    *(("carafe", "carafe_64x64_n16", "bf16"), ("carafe", "carafe_64x64_n16", "fp16")),
)


@needs_tools
@pytest.mark.parametrize(("op", "case", "dtype"), QUICK)
def test_no_kernel_is_slower_than_the_table_says(op: str, case: str, dtype: str) -> None:
    """Predicted for an H100 from what the kernels compile to now. Nothing is refused."""
    compare("triton", op, case, dtype)


@needs_tools
@needs_cubins
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_no_cuda_kernel_is_slower_than_the_table_says(dtype: str) -> None:
    compare("cuda", "reassemble", "famseg_32x32_n16", dtype)


def compare(backend: str, op: str, case: str, dtype: str) -> None:
    rows = rows_of(backend, op, case, dtype, "H100")
    where = {"op": op, "case": case, "dtype": dtype, "backend": backend, "chip": "H100"}
    before = {row["pass"]: float(row["us"]) for row in committed("operations.csv") if row.items() >= where.items()}
    assert before or dtype not in table.DTYPES_OF_TABLE
    for row in table.summed(rows):
        assert row["us"] <= 1.05 * before.get(row["pass"], math.inf), (
            f"{row['pass']} {row['us']:.1f} us, {row['binds']} binds; the table has {before[row['pass']]}. "
            "If that is meant: python -m benchmarks.issue --out benchmarks/results/predicted"
        )
