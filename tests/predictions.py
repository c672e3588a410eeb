"""What tests of `benchmarks.issue` on real kernels need."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.issue import chips, cuda, sass, table
from benchmarks.issue.sass import Refusal
from benchmarks.shapes import GPU_SHAPES
from benchmarks.timing import DTYPES


def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "no Triton"
    try:
        sass.tool("nvdisasm"), sass.tool("cuobjdump")
    except Refusal as refusal:
        return str(refusal)
    return ""


needs_tools = pytest.mark.skipif(bool(_missing()), reason=_missing())
needs_cubins = pytest.mark.skipif(
    cuda.missing() is not None or not cuda.compiled(90), reason="CUDA's cubins take minutes: python -m benchmarks.issue"
)


def rows_of(backend: str, op: str, case: str, dtype: str, chip: str) -> list[table.Row]:
    """Of each launch; none is refused."""
    shape = next(c for c in GPU_SHAPES[op] if c.name == case)
    some = [c for c in chips.CHIPS if c.name == chip]
    rows = list(table.rows_of(backend, table.OPERATIONS[op], shape, DTYPES[dtype], some))
    assert not [row["refusal"] for row in rows if row["refusal"]]
    return rows
