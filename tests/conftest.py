"""What the tests of the native kernels (test_native_*.py) have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.native import ISAS, NATIVE


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this CPU."""
    monkeypatch.setenv("FAMSEG_CPU_ISA", request.param)
    assert NATIVE.isa() == request.param
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tests that mean another number of threads set it themselves; small ones gain nothing from it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN: what a kernel forgets to write shows."""

    def poison(make: Callable[..., Tensor]) -> Any:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(math.nan)

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
