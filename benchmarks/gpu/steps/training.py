"""famseg-train for the minutes that are left: does the loss fall, and how long does an epoch take on this GPU."""

from __future__ import annotations

import csv
import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.items import Item, Later, Options, Row, Skipped
from benchmarks.gpu.steps.environment import WANTED
from benchmarks.gpu.worker import program
from benchmarks.peers import missing_module

PROBE_EPOCHS = 2  # one to warm up, one to measure
SPARE = 25.0  # seconds for what training does beside epochs: start, last checkpoint, overlays
LEAST = 60.0


def items(options: Options) -> Iterator[Item]:
    name = f"famseg-train {options.data}"
    if not options.dry:
        yield Item(f"{name} --cuda-graph", functools.partial(_train_recorded, options), limit=600.0)
    yield Item(name, functools.partial(_train, options), limit=3600.0)


def _train(options: Options, left: float) -> Iterator[Row]:
    _require_packages()
    if options.dry:
        small = ("--data", "phantom:12", "--model", "famseg_nano", "--image-size", "32", "--batch-size", "4")
        small += ("--phases", "adamw:1")
        yield from _run(options, "dry", 1, small)
        return
    _require_time(left)
    ends = time.monotonic() + left
    (probe,) = _run(options, "probe", PROBE_EPOCHS, _setting(options))
    yield probe
    epochs = int((ends - time.monotonic() - SPARE) / max(probe["seconds_an_epoch"], 0.1))
    if epochs > PROBE_EPOCHS:
        yield from _run(options, "run", epochs, _setting(options))


def _train_recorded(options: Options, left: float) -> Iterator[Row]:
    """What the probe is, as a CUDA graph: the same losses, in less time."""
    _require_packages()
    _require_time(left)
    yield from _run(options, "recorded", PROBE_EPOCHS, (*_setting(options), "--cuda-graph", "true"))


def _setting(options: Options) -> tuple[str, ...]:
    network = ("--data", options.data, "--model", "famseg_tiny", "--image-size", "256", "--batch-size", "16")
    return (*network, "--device", "cuda", "--precision", "bf16")


def _require_packages() -> None:
    lacking = [name for name in WANTED["training"] if missing_module(name) is not None]
    if lacking:
        raise Skipped(f"training needs {', '.join(lacking)}: not installed")


def _require_time(left: float) -> None:
    if left < LEAST:
        raise Later(f"{left:.0f} s are left, training takes {LEAST:.0f} at least")


def _run(options: Options, name: str, epochs: int, setting: tuple[str, ...]) -> Iterator[Row]:
    out = options.out / f"training-{name}"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off: the folder would not be taken again
    command = [sys.executable, "-m", "famseg.cli.train", *setting, "--epochs", str(epochs), "--out", str(out)]
    began = time.monotonic()
    status, printed = program(command)
    seconds = time.monotonic() - began
    if status:
        raise RuntimeError(f"famseg-train ended with {status}: {printed.strip().splitlines()[-1:]}")
    table = _table(out / "metrics.csv")
    figures = json.loads((out / "metrics.json").read_text())
    yield {
        "run": name,
        "setting": " ".join(setting),
        "epochs": figures["epochs"],
        "seconds": round(seconds, 1),
        "seconds_an_epoch": round(figures["train_seconds"] / figures["epochs"], 2),
        "train_loss_first": table[0]["train_loss"],
        "train_loss_last": table[-1]["train_loss"],
        "val_miou": round(figures["miou"], 4),
        "best_epoch": figures["best_epoch"],
    }


def _table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
