"""The runs of a study, one after another, each in a process of its own.

A run's folder is locked by the study that is at work on it. Its `result.json` is written last, so a run without one is
to be done, or to be continued from its own checkpoint; a study can be killed at any moment. Studies on several machines
may share the folder.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from famseg.files.errors import DataError, one_line
from famseg.files.lock import Busy, locked
from famseg.files.writing import write_atomic
from famseg.options import ConfigError
from famseg.study.plan import Run, Study
from famseg.training.config import Diverged, TrainConfig
from famseg.training.run import train

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch._dynamo", "famseg.training.run"])  # seconds of imports, once and not a run

DONE, DIVERGED, FAILED, OPEN, WAITING = "done", "diverged", "failed", "open", "waiting"


def folder_of(run: Run, out: Path) -> Path:
    return out / "cells" / run.folder


def checkpoint_of(run: Run, out: Path) -> Path:
    return folder_of(run, out) / "run" / "checkpoints" / "best.ckpt"


def result(run: Run, out: Path) -> dict[str, Any]:
    """The run's "state" (above), its "reason" in a line, and metrics.json's content if any."""
    folder = folder_of(run, out)
    try:
        outcome = json.loads((folder / "result.json").read_text())
        metrics = json.loads((folder / "run" / "metrics.json").read_text()) if outcome["state"] == DONE else {}
    except FileNotFoundError:
        return {"state": OPEN, "reason": ""}
    return {**outcome, **metrics}


def results(study: Study, out: Path) -> list[tuple[Run, dict[str, Any]]]:
    """Every run with its `result`; a searched option is as the search has chosen, if it has."""
    return [_settled(study, run, out) for run in study.runs]


def _settled(study: Study, run: Run, out: Path) -> tuple[Run, dict[str, Any]]:
    """The run with the value that its cell's searching runs have found the best, and its result as far as it is."""
    tries = [other for other in study.runs if other.cell == run.cell and other.searches]
    if run.searches or not tries:
        return run, result(run, out)
    assert study.search is not None
    outcomes = [result(other, out) for other in tries]
    scores = [outcome["miou"] if outcome["state"] == DONE else -1.0 for outcome in outcomes]
    if any(outcome["state"] in (OPEN, FAILED) for outcome in outcomes):
        return run, {"state": WAITING, "reason": f"waits for the search of its cell's {study.search}"}
    if max(scores) < 0:
        return run, {"state": DIVERGED, "reason": f"its cell diverged with every {study.search} of the search"}
    value = getattr(tries[scores.index(max(scores))].config, study.search)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, **{study.search: value}))
    return run, result(run, out)


def check_folder(study: Study, out: Path) -> None:
    """Raises DataError where `out` holds other things than a study, or a run with other settings than it has now."""
    if out.exists() and not (out / "cells").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"out: expected a new or empty folder or that of a study, got {out}; choose another --out")
    defaults = dataclasses.asdict(TrainConfig())
    for run, _ in results(study, out):
        written = folder_of(run, out) / "run" / "config.yaml"
        if not written.exists():
            continue
        stored = {**defaults, **yaml.safe_load(written.read_text())}
        for name, value in dataclasses.asdict(run.config).items():
            if name not in ("out", "resume") and stored[name] != value:
                raise DataError(
                    f"cell '{run.cell}', {run.repeat}: was begun with {name} {stored[name]!r}, has {value!r} now; "
                    f"put it back, remove {written.parent.parent}, or choose another --out"
                )


def part_of(study: Study, shard: tuple[int, int]) -> Sequence[Run]:
    """What shard (i, n) does: every n-th run from the i-th on; with a search every n-th cell, as runs wait for it."""
    if study.search is None:
        return study.runs[shard[0] - 1 :: shard[1]]
    cells = study.cells[shard[0] - 1 :: shard[1]]
    return [run for run in study.runs if run.cell in cells]


def run_all(study: Study, out: Path, shard: tuple[int, int]) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Do what is left of this shard's runs; each as it ends, with its `result`.

    A run that failed is tried again; one that diverged would do so again. One that another process is at work on is
    left to it, as OPEN.

    Args:
        shard: (i, n): this is one of n studies that share `out`, and does its `part_of` the runs.
    """
    for run in part_of(study, shard):
        folder = folder_of(run, out)
        try:
            with locked(folder, fresh=False):
                run, outcome = _settled(study, run, out)
                if outcome["state"] in (OPEN, FAILED):
                    _run(run, folder)
                    outcome = result(run, out)
        except Busy:
            outcome = {"state": OPEN, "reason": "another process is at work on it"}
        yield run, outcome


def _run(run: Run, folder: Path) -> None:
    """Train in a new process; afterwards there is a result.json, unless that process was interrupted."""
    (folder / "result.json").unlink(missing_ok=True)
    if not (folder / "run" / "config.yaml").exists():
        shutil.rmtree(folder / "run", ignore_errors=True)  # killed before it wrote its settings
    config = dataclasses.replace(run.config, out=str(folder / "run"), resume="auto")
    process = _CONTEXT.Process(target=_train, args=(config, folder))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()  # where the signal was for this process alone
        process.join()
        raise
    if process.exitcode not in (0, 130) and not (folder / "result.json").exists():
        _write(folder, FAILED, f"its process ended with code {process.exitcode} (below 0: by that signal)")


def _train(config: TrainConfig, folder: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (folder / "log.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        train(config)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ConfigError, DataError, Diverged) as error:  # one line says it all
        print(error, flush=True)
        _write(folder, DIVERGED if isinstance(error, Diverged) else FAILED, str(error))
    except Exception as error:
        traceback.print_exc()
        _write(folder, FAILED, f"{type(error).__name__}: {error}")
    else:
        _write(folder, DONE, "")


def _end_with_parent() -> None:
    """A study that was killed leaves no training behind, which would be in its own continuation's way."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _write(folder: Path, state: str, reason: str) -> None:
    content = {"state": state, "reason": one_line(reason.strip())}
    write_atomic(folder / "result.json", (json.dumps(content, indent=2) + "\n").encode())
