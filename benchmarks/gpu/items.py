"""What a step consists of: items, each measured once, on its own time limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Skipped(Exception):
    """This item cannot be had here; the message says why. No failure."""


class Later(Exception):
    """Too little time is left for this item: it counts as not reached."""


@dataclass(frozen=True)
class Options:
    """What every step may ask for."""

    out: Path
    dry: bool  # no GPU: interpreter and emulation, smallest cases
    data: str  # of the training step, as famseg-train takes it

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Item:
    """One thing to measure or to check.

    run: takes the seconds that are left for the step, gives rows; raises Skipped, or anything else when it fails.
        Rows that came before are kept.
    limit: seconds after which its process is ended and the item counts as failed.
    """

    key: str
    run: Callable[[float], Iterable[Row]]
    limit: float = 60.0
