"""The --benchmark flag: time at real shapes; without it every benchmark runs once at a small shape."""

from __future__ import annotations

import pytest

from benchmarks import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="time the benchmarks (default: run each once, small)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True
    else:
        measure.keep_freed_memory()
