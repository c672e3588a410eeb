"""Tables: CSV with a header line and one row a file. A row is read as it was meant, or refused by its line."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from famseg.files.errors import DataError
from famseg.files.listing import same_name, stem
from famseg.files.writing import write_atomic

FILENAME = "filename"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # float() also takes 1_0
_SEPARATORS = {",": "commas", ";": "semicolons"}


@dataclass(frozen=True)
class Row:
    """The cells of one line by column."""

    where: str  # file and line
    cells: Mapping[str, str]

    def millimetres(self, column: str) -> float | None:
        """A length; None where the cell is empty or there is no such column. Raises DataError for anything else."""
        text = self.cells.get(column, "")
        if not text:
            return None
        value = parse_positive(text)
        if value is None:
            raise DataError(f"{self.where}: expected a positive number of mm in '{column}', found '{text}'; correct it")
        return value

    def number(self, column: str) -> float:
        """A finite number of either sign. Raises DataError for anything else, an empty cell too."""
        text = self.cells[column]
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not math.isfinite(value):
            raise DataError(f"{self.where}: expected a number in '{column}', found '{text}'; correct it")
        return value


class FileTable(dict[str, Row]):
    """Rows by the name of their file."""

    def row(self, path: Path) -> Row | None:
        """The row of a file, which may be given with or without its suffix. Raises DataError where both are there."""
        names = dict.fromkeys((same_name(path.name), same_name(stem(path))))
        found = [self[name] for name in names if name in self]
        if len(found) > 1:
            raise DataError(f"{found[1].where}: {path.name} has a row already ({found[0].where}); remove one of them")
        return found[0] if found else None


def parse_positive(text: str) -> float | None:
    """A positive, finite number written with a decimal point and nothing else; None for any other text."""
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    return value if 0 < value < math.inf else None


def read_table(path: Path, required: Sequence[str], *, filename: str = FILENAME, separator: str = ",") -> FileTable:
    """A CSV file with a header line and a row a file; cells and column names are stripped of blanks.

    Args:
        required: columns that must be there, beside `filename`, the one that names the file.
        separator: between cells, a comma or a semicolon.

    Raises:
        DataError: the file is missing, is not UTF-8 text, or lacks a required column; a column is there twice; a row
            has not one cell for every column, names no file, or a file that an earlier row named.
    """
    required = (filename, *required)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: expected a table with columns {', '.join(required)}, found no file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it as CSV in UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: cannot be read as CSV ({error}); correct it") from error
    lines = [(number, line) for number, line in lines if any(line)]
    header = lines[0][1] if lines else []
    while header and not header[-1]:  # spreadsheets write cells that were only touched
        header.pop()
    missing = [column for column in required if column not in header]
    if missing:
        found = ", ".join(header)[:200] or "none"
        joined = len(header) == 1 and re.search("[,;\t]", header[0])
        hint = f"; separate columns by {_SEPARATORS[separator]}" if joined else ""
        raise DataError(f"{path}: expected the column(s) {', '.join(missing)}, found {found}; add them{hint}")
    if len(set(header)) < len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise DataError(f"{path}: the column '{twice}' is there twice; remove or rename one")
    table = FileTable()
    for number, line in lines[1:]:
        where = f"{path}: line {number}"
        surplus = [cell for cell in line[len(header) :] if cell]
        if len(line) < len(header) or surplus:
            raise DataError(
                f"{where}: expected {len(header)} cells ({', '.join(header)}), found {len(line)}: "
                f"{','.join(line)[:80]}; write decimal points, not commas, and leave an unknown cell empty"
            )
        row = Row(where, dict(zip(header, line, strict=False)))
        name = same_name(row.cells[filename])
        if not name:
            raise DataError(f"{where}: expected a file name in '{filename}', found none; add it or remove the row")
        if name in table:
            raise DataError(f"{where}: '{name}' has a row already ({table[name].where}); remove one of them")
        table[name] = row
    return table


def write_table(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    """Write rows of equal keys as CSV with a header: numbers to six digits, empty where there is no value.

    The columns are the keys of the first row, unless `columns` names them.

    UTF-8, where the bytes of a file name that is none are escaped.
    """
    text = io.StringIO()
    lines = csv.DictWriter(text, columns or rows[0].keys(), lineterminator="\n")
    lines.writeheader()
    lines.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    content = text.getvalue().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    write_atomic(path, content.encode())
