"""A step of sixty items that take a moment each."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.gpu.items import Item, Options, Row


def items(options: Options) -> Iterator[Item]:
    def run(_: float) -> Iterator[Row]:
        time.sleep(0.15)
        yield {"done": True}

    for number in range(60):
        yield Item(f"item {number}", run)
