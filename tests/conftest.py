"""--backend, --cases, --kills, and what the tests of the native kernels (test_native_*.py) have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from famseg_kernels.backends import BACKENDS
from tests.native import ISAS, NATIVE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, help="of tests with a backend, run only this one's")
    parser.addoption("--cases", type=int, default=40, help="how many hypothesis draws for each test (default: 40)")
    parser.addoption("--kills", type=int, default=10, help="how often test_resume kills a training (default: 10)")


def pytest_configure(config: pytest.Config) -> None:
    # The same cases each time, but for a run that asks for others by --hypothesis-seed.
    hypothesis.settings.register_profile(
        "famseg",
        max_examples=config.getoption("--cases"),
        derandomize=config.getoption("--hypothesis-seed") is None,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("famseg")
    for tag in ("ordinary", "options"):
        config.addinivalue_line("markers", f"{tag}: a tag of famseg_kernels.testing.case.Case")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (backend := config.getoption("--backend")) is None:
        return

    def is_another(item: pytest.Item) -> bool:
        return getattr(item, "callspec", None) is not None and item.callspec.params.get("backend", backend) != backend

    config.hook.pytest_deselected(items=[item for item in items if is_another(item)])
    items[:] = [item for item in items if not is_another(item)]


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
