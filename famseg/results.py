"""The files that a run or an evaluation leaves: metrics.json, and the history beside a checkpoint."""

from __future__ import annotations

import csv
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from famseg.evaluation import Evaluation
from famseg.files.writing import write_atomic


def write_metrics(folder: Path, evaluation: Evaluation, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write metrics.json: `Evaluation.summary`, then `facts` on what was scored, then the versions; its content."""
    versions = {name: importlib.metadata.version(name) for name in ("famseg", "torch")}
    content = {**evaluation.summary(), **facts, "versions": versions}
    write_atomic(folder / "metrics.json", (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    return content


def read_history(checkpoint: Path) -> list[dict[str, str]]:
    """The epochs in the run's metrics.csv, where it lies beside the checkpoint or one folder up; or none."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        path = folder / "metrics.csv"
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            if rows and {"epoch", "train_loss"} <= rows[0].keys():
                return rows
    return []
