"""The result folder: a journal that only grows, and what is made from it (a CSV a step, a log a step, summary.md).

One line of the journal is one item of a step with its outcome and its rows, written at once: whoever is killed loses
the item at hand and nothing else, and a second call finds out from it what is still missing.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# What a figure depends on, the compiled modules included: other options of the build make others.
SOURCES = (
    "famseg_kernels/**/*.py",
    "famseg_kernels/*.so",
    "csrc/**/*",
    "benchmarks/**/*.py",
    "famseg/**/*.py",
    "CMakeLists.txt",
    "setup.py",
)
JOURNAL = "journal.jsonl"


class FolderError(Exception):
    """--out cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """How an item ended: its rows (also those before a failure) and, if it did not pass, why."""

    step: str
    key: str
    status: str  # passed, failed or skipped
    message: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def tree_hash() -> str:
    """Of the sources: the same tree, the same hash, with or without git."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        if path.suffix != ".pyc":
            digest.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


class Folder:
    """An open result folder; holds a lock, so that two runs never write into one."""

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        """Open `path` to go on with it, or start anew where there is nothing or another tree's results.

        Args:
            path: the folder; made if it is missing.
            identity: what results depend on: sources, versions, device. Of a folder with another one the files are
                moved aside; `self.news` says so.

        Raises:
            FolderError: it cannot be written, is in use, or holds files that no run of this command has made.
        """
        self.path, self.identity, self.news = path, identity, ""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._journal = self._locked()
        except OSError as error:
            raise FolderError(f"--out {path}: cannot be written ({error.strerror}); name another folder") from None
        before = self._read()
        if before is None:
            strangers = sorted(p.name for p in path.iterdir() if p.name != JOURNAL)
            if strangers:
                (path / JOURNAL).unlink()
                raise FolderError(
                    f"--out {path}: holds {strangers[0]}, which is no result of this command; name another"
                )
        elif before != identity:
            other = ", ".join(sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k)))
            aside = path.with_name(f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}-before")
            os.close(self._journal)
            path.rename(aside)
            path.mkdir()
            self._journal = self._locked()
            self.news = f"{path} held results of another run ({other}): they are now in {aside}, this one starts anew"
        self.outcomes: list[Outcome] = []
        self.plans: dict[str, list[str]] = {}  # step → the keys of its items
        if before == identity:
            for line in self._lines()[1:]:
                if "items" in line:
                    self.plans[line["step"]] = line["items"]
                else:
                    self.outcomes.append(Outcome(**line))
            self.news = f"going on with {path}: {len(self.outcomes)} items are done" if self.outcomes else ""
        else:
            self._append(identity)
        self._written: dict[str, float] = {}

    def _locked(self) -> int:
        journal = os.open(self.path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(journal)
            raise FolderError(f"--out {self.path}: another run is writing there; wait for it or name another") from None
        return journal

    def _lines(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in (self.path / JOURNAL).read_text().splitlines()]
        except ValueError:
            raise FolderError(f"--out {self.path}: {JOURNAL} is damaged; name another folder") from None

    def _read(self) -> dict[str, str] | None:
        """The identity that the journal begins with; what a killed run left of its last line is cut off."""
        text = (self.path / JOURNAL).read_bytes()
        os.ftruncate(self._journal, text.rfind(b"\n") + 1)
        lines = self._lines()
        return lines[0] if lines else None

    def _append(self, line: dict[str, Any]) -> None:
        text = (json.dumps(line, allow_nan=True) + "\n").encode()
        while text:  # one write but for a disk that is nearly full
            text = text[os.write(self._journal, text) :]

    def add(self, outcome: Outcome) -> None:
        self._append(asdict(outcome))
        self.outcomes.append(outcome)
        now = time.monotonic()
        if now - self._written.get(outcome.step, 0.0) > 2.0:  # not at every one of a thousand items
            self.write_csv(outcome.step)

    def plan(self, step: str, items: list[str]) -> None:
        """What there is to do in a step: what it does not reach can then be told."""
        if self.plans.get(step) != items:
            self._append({"step": step, "items": items})
            self.plans[step] = items

    def of(self, step: str) -> dict[str, Outcome]:
        """The items of a step that are done, by key."""
        return {outcome.key: outcome for outcome in self.outcomes if outcome.step == step}

    def missing(self, step: str) -> list[str]:
        """The items of a step that are still to be done; what was skipped may be had by now."""
        done = self.of(step)
        return [key for key in self.plans.get(step, ()) if key not in done or done[key].status == "skipped"]

    def rows(self, step: str) -> Iterator[dict[str, Any]]:
        for outcome in self.of(step).values():
            yield from outcome.rows

    def write_csv(self, step: str) -> None:
        """STEP.csv: all rows of the step so far; columns in the order in which they first come."""
        rows = list(self.rows(step))
        self._written[step] = time.monotonic()
        if not rows:
            return
        columns = list(dict.fromkeys(column for row in rows for column in row))
        partial = self.path / f"{step}.csv.partial"
        with partial.open("w", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        partial.replace(self.path / f"{step}.csv")

    def write(self, name: str, text: str) -> None:
        partial = self.path / f"{name}.partial"
        partial.write_text(text)
        partial.replace(self.path / name)

    def log(self, step: str) -> Path:
        return self.path / f"{step}.log"
