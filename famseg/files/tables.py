"""Tables: CSV with a header line."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from famseg.files.errors import DataError
from famseg.files.writing import write_atomic


def read_table(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line; cells and column names are stripped of blanks.

    Raises:
        DataError: the file is missing, is not UTF-8 text, or lacks a required column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: expected a table with columns {', '.join(required)}, found no file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it as CSV in UTF-8") from error
    lines = csv.reader(text.splitlines(), skipinitialspace=True)
    header = [cell.strip() for cell in next(lines, [])]
    missing = [column for column in required if column not in header]
    if missing:
        raise DataError(
            f"{path}: expected the column(s) {', '.join(missing)}, found {', '.join(header) or 'none'}; add them"
        )
    rows = []
    for line in lines:
        if any(cell.strip() for cell in line):
            cells = [cell.strip() for cell in line] + [""] * (len(header) - len(line))
            rows.append(dict(zip(header, cells, strict=False)))
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of equal keys as CSV with a header: numbers to six digits, empty where there is no value."""
    text = io.StringIO()
    lines = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    lines.writeheader()
    lines.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    write_atomic(path, text.getvalue().encode())


def positive(text: str, path: Path, row: str, column: str) -> float:
    """A cell that must hold a positive, finite number; DataError naming file, row and column otherwise."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{path}: row {row}: expected a positive number of mm in '{column}', found '{text}'")
    return value
