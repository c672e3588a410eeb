"""A study's numbers: a row a run with every score, and tables in the papers' shape."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from famseg.files.tables import write_table
from famseg.files.writing import write_atomic
from famseg.study.plan import Run, Study, flattened
from famseg.study.run import DONE, WAITING

INTERVAL = (
    "Differences are means over pairs of runs with the same seed or fold, in brackets their 95 % interval (Student's t "
    "over these pairs). Runs of folds share training images, which makes the interval too narrow."
)
_NONE = "–"


class Difference(NamedTuple):
    """Of a cell from the reference: mean over pairs of runs and its 95 % interval (None: a single pair has none)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Table:
    """Head and lines of texts; `best` are the (line, column) that stand out."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Score:
    """How the values of a key of metrics.json are shown."""

    column: str
    key: str

    @property
    def scale(self) -> float:
        """Parts of 1 are shown in %."""
        return 100.0 if self._is_part and not self._is_count else 1.0

    @property
    def best(self) -> Callable[[Sequence[float]], float] | None:
        """None where neither more nor less is better."""
        if self.key.endswith("mean_error"):
            return lambda values: min(values, key=abs)
        if self._is_count or self.key.endswith((".sd", ".sd_error", ".low", ".high")):
            return min if self.key.endswith((".missed", ".invented")) else None
        if self._is_part:
            return max
        return min if re.search(r"_(mm|px)\b|jaggedness\b", self.key) else None

    @property
    def _is_part(self) -> bool:
        return re.search(r"(^|\.)(m?iou|m?dice|(class|pixel)_accuracy)(\.|$)", self.key) is not None

    @property
    def _is_count(self) -> bool:
        counts = "images|subjects|count|found|missed|invented|absent|measured|truth_from_mask"
        return re.search(rf"(^|\.)({counts})$", self.key) is not None


def rows_of(study: Study, results: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of runs.csv, one a run, in the order of the study; scores as in metrics.json, not in %."""
    rows = []
    for run, outcome in results:
        row = {"cell": run.cell, "repeat": run.repeat, "state": outcome["state"], "reason": outcome["reason"]}
        row |= {"model": run.config.model, **study.sizes[run.cell]._asdict()}
        if study.search is not None and outcome["state"] != WAITING:
            row[study.search] = getattr(run.config, study.search)
        rows.append(row | flattened({key: value for key, value in outcome.items() if key not in row}))
    return rows


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation where there are two values or more."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def difference(ours: Mapping[Any, float], reference: Mapping[Any, float]) -> Difference | None:
    """Ours minus the reference's, paired by their keys; None where no pair is there."""
    pairs = [value - reference[repeat] for repeat, value in ours.items() if repeat in reference]
    if not pairs:
        return None
    mean, sd = mean_and_sd(pairs)
    if sd is None:
        return Difference(mean, None, None)
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * sd / math.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half)


def write_numbers(study: Study, rows: Sequence[Mapping[str, Any]], out: Path) -> list[Table]:
    """Write runs.csv, table.csv, table.md and table.tex; returns the tables."""
    write_table(out / "runs.csv", rows, list(dict.fromkeys(column for row in rows for column in row)))
    counted = [row for run, row in zip(study.runs, rows, strict=True) if not run.searches]
    numbers, notes = _numbers(study, counted), notes_of(study, rows)
    write_table(out / "table.csv", numbers)
    tables = _tables(study, numbers)
    markdown = [f"# {study.title}", *(f"> {note}" for note in notes), *map(as_markdown, tables), INTERVAL]
    write_atomic(out / "table.md", ("\n\n".join(markdown) + "\n").encode())
    latex = [f"% {study.title}", *(f"% {note}" for note in notes), *map(as_latex, tables), f"% {INTERVAL}"]
    write_atomic(out / "table.tex", ("\n".join(latex) + "\n").encode())
    return tables


def notes_of(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the reader must know before the numbers."""
    notes = []
    if study.smoke:
        notes.append("One step of every cell, to show that all of it runs: the figures mean nothing.")
    if any(part.strip().startswith("phantom") for part in study.runs[0].config.data.split(",")):
        notes.append(
            "Synthetic images: they compare networks and say nothing of a clinic, or of the published figures."
        )
    if study.search is not None:
        notes.append(
            f"Every cell has the {study.search} that gave the best mIoU in one run each with "
            f"{', '.join(dict.fromkeys(run.repeat.removeprefix('search ') for run in study.runs if run.searches))}, "
            f"on {'fold 0' if study.runs[0].config.folds else 'images of its own'}."
        )
    for row in rows:
        if row["state"] != DONE:
            notes.append(f"{row['cell']}, {row['repeat']}: {row['reason'] or row['state']}")
    counted = [row for run, row in zip(study.runs, rows, strict=True) if not run.searches and row["state"] == DONE]
    for repeat in dict.fromkeys(row["repeat"] for row in counted):
        if len({row.get("val_digest") for row in counted if row["repeat"] == repeat}) > 1:
            notes.append(
                f"{repeat}: the data changed between its runs; only those of the same held-out images are pairs."
            )
    for cell in study.cells:
        done = [row for row in counted if row["cell"] == cell]
        for column, key in study.scores.items():
            if len(there := _values(done, cell, key)) < len(done):
                notes.append(f"{cell}, {column}: of {len(there)} of its {len(done)} runs; the others have no value.")
    return notes


def _values(rows: Sequence[Mapping[str, Any]], cell: str, key: str) -> dict[tuple[str, str | None], float]:
    """The cell's values by repeat and held-out images, of the runs that have one."""
    mine = [row for row in rows if row["cell"] == cell and row.get(key) is not None]
    return {(row["repeat"], row.get("val_digest")): row[key] for row in mine}


def _numbers(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of table.csv: scores as they are shown, in % or mm."""
    lines = []
    for cell in study.cells:
        line: dict[str, Any] = {"cell": cell, "runs": sum(row["state"] == DONE for row in rows if row["cell"] == cell)}
        for score in (Score(column, key) for column, key in study.scores.items()):
            ours = {k: v * score.scale for k, v in _values(rows, cell, score.key).items()}
            reference = {k: v * score.scale for k, v in _values(rows, study.references[cell], score.key).items()}
            mean, sd = mean_and_sd(list(ours.values())) if ours else (None, None)
            mean_difference, low, high = difference(ours, reference) or (None, None, None)
            cells = (study.published[cell].get(score.column), mean, sd, mean_difference, low, high)
            names = ("published", "mean", "sd", "difference", "difference_low", "difference_high")
            line |= {f"{score.column} {name}": value for name, value in zip(names, cells, strict=True)}
        seconds = list(_values(rows, cell, "train_seconds").values())
        line |= study.sizes[cell]._asdict()
        if study.search is not None:
            line[study.search] = next((row.get(study.search) for row in rows if row["cell"] == cell), None)
        line["train_seconds"] = mean_and_sd(seconds)[0] if seconds else None
        lines.append(line)
    return lines


def _tables(study: Study, numbers: Sequence[Mapping[str, Any]]) -> list[Table]:
    head, columns, best = ["cell"], [[line["cell"] for line in numbers]], set()
    for score in (Score(column, key) for column, key in study.scores.items()):
        known = any(score.column in figures for figures in study.published.values())
        for name in ("published", "mean") if known else ("mean",):
            values = [line[f"{score.column} {name}"] for line in numbers]
            there = [value for value in values if value is not None]
            texts = [_spread(line[f"{score.column} sd"]) if name == "mean" else "" for line in numbers]
            columns.append([_fixed(value) + text for value, text in zip(values, texts, strict=True)])
            if there and score.best is not None:
                best |= {(i, len(head)) for i, value in enumerate(values) if value == score.best(there)}
            head.append(score.column + (f" {'here' if name == 'mean' else name}" if known else ""))
    if any(line["trained"] != line["parameters"] for line in numbers):
        head.append("trained, M")
        columns.append([_fixed(line["trained"] / 1e6, 3) for line in numbers])
    if study.search is not None:
        head.append(study.search.replace("_", " "))
        columns.append([_NONE if line[study.search] is None else str(line[study.search]) for line in numbers])
    head += ["parameters, M", "GMAC at 256²", "min a run", f"runs of {study.repeats}"]
    columns += [
        [_fixed(line["parameters"] / 1e6, 3) for line in numbers],
        [_fixed(line["macs_256"] / 1e9, 3) for line in numbers],
        [_fixed(None if line["train_seconds"] is None else line["train_seconds"] / 60, 1) for line in numbers],
        [str(line["runs"]) for line in numbers],
    ]
    scores = Table("Scores", head, list(zip(*columns, strict=True)), frozenset(best))
    others = [(line, study.references[line["cell"]]) for line in numbers]
    lines = [
        [line["cell"], other, *(_interval(line, column) for column in study.scores)]
        for line, other in others
        if other != line["cell"]
    ]
    return [scores, Table("Differences", ["cell", "minus", *study.scores], lines)]


def _fixed(value: float | None, digits: int = 2) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _spread(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.2f}"


def _interval(line: Mapping[str, Any], column: str) -> str:
    mean, low, high = (line[f"{column} {name}"] for name in ("difference", "difference_low", "difference_high"))
    if mean is None:
        return _NONE
    text = f"{mean:+.2f}" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")
    return text.replace("-", "−")


def as_markdown(table: Table) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in _marked(table, "**{}**")]
    head = "| " + " | ".join(table.head) + " |\n|---|" + "---:|" * (len(table.head) - 1)
    return f"## {table.title}\n\n{head}\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_latex(table: Table) -> str:
    """A tabular of the booktabs package."""
    signs = {**{sign: f"\\{sign}" for sign in "%&#_${}"}, "\\": "\\textbackslash{}", "~": "\\textasciitilde{}"}
    signs |= {"^": "\\textasciicircum{}", "±": "$\\pm$", "−": "$-$", "²": "$^2$", "–": "--"}
    plain = Table(
        table.title,
        [_replaced(cell, signs) for cell in table.head],
        [[_replaced(cell, signs) for cell in line] for line in table.lines],
        table.best,
    )
    lines = [" & ".join(line) + " \\\\" for line in _marked(plain, "\\textbf{{{}}}")]
    rows = [" & ".join(plain.head) + " \\\\", "\\midrule", *lines]
    body = "\n".join(["\\toprule", *rows, "\\bottomrule"])
    return f"% {table.title}\n\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}\n{body}\n\\end{{tabular}}"


def as_html(table: Table) -> str:
    plain = Table(table.title, table.head, [[html.escape(c) for c in line] for line in table.lines], table.best)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    lines = ("".join(f"<td>{cell}</td>" for cell in line) for line in _marked(plain, "<b>{}</b>"))
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'


def _marked(table: Table, form: str) -> list[list[str]]:
    return [
        [form.format(cell) if (i, j) in table.best else cell for j, cell in enumerate(line)]
        for i, line in enumerate(table.lines)
    ]


def _replaced(text: str, signs: Mapping[str, str]) -> str:
    return "".join(signs.get(sign, sign) for sign in text)
