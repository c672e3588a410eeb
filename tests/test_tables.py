"""A row of a table is read as it was meant, or refused by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from famseg.files.errors import DataError
from famseg.files.tables import read_table, write_table

HEADER = "filename,pixel_size_mm,femur_length_mm"


def sizes(path: Path) -> dict[str, float | None]:
    return {name: row.millimetres("pixel_size_mm") for name, row in read_table(path, ("pixel_size_mm",)).items()}


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    (folder / "sizes.csv").write_bytes(text.encode(encoding))
    return folder / "sizes.csv"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png,0,2,33,5", "line 2: expected 3 cells"),  # decimal commas
        ("a.png,0.2,33,5,250,1", "line 2: expected 3 cells"),
        ("b.png,0.2,33\na.png,0.2", "line 3: expected 3 cells .*, found 2"),
        ("a.png", "line 2: expected 3 cells .*, found 1"),
        ("a.png;0.2;33", "line 2: expected 3 cells"),
        ('a.png,"0,2",', "line 2: expected a positive number of mm in 'pixel_size_mm', found '0,2'"),
        ("a.png,0.2mm,", "found '0.2mm'"),
        ("a.png,0,", "found '0'"),
        ("a.png,-0.2,", "found '-0.2'"),
        ("a.png,nan,", "found 'nan'"),
        ("a.png,inf,", "found 'inf'"),
        ("a.png,1e999,", "found '1e999'"),
        ("a.png,1e-999,", "found '1e-999'"),
        ("a.png,0_2,", "found '0_2'"),
        ("a.png,٠.٢,", "found '٠.٢'"),
        ("a.png,unknown,", "found 'unknown'"),
        ("a.png,0x1p-2,", "found '0x1p-2'"),
        ("a.png,0.2,\nb.png,0.3,\na.png,0.4,", "line 4: 'a.png' has a row already .*line 2"),
        ("a.png,0.2,\na.png,0.2,", "line 3: 'a.png' has a row already"),
        (",0.2,", "line 2: expected a file name"),
        ('"a.png,0.2,\nb.png,0.3,', "line 3: cannot be read as CSV"),
        ('"a.png"x,0.2,', "line 2: cannot be read as CSV"),
    ],
)
def test_a_row_that_cannot_be_meant_so_is_refused_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = table(tmp_path, f"{HEADER}\n{text}\n")
    with pytest.raises(DataError, match=words) as error:
        sizes(path)
    assert str(error.value).startswith(f"{path}: line ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the column"),
        ("a.png,0.2\n", "expected the column"),
        ("filename;pixel_size_mm\na.png;0.2\n", "separate columns by commas"),
        ("filename\tpixel_size_mm\na.png\t0.2\n", "separate columns by commas"),
        ("filename,pixel_size_mm,pixel_size_mm\na.png,0.2,0.3\n", "'pixel_size_mm' is there twice"),
        ("Filename,pixel_size_mm\na.png,0.2\n", "expected the column"),
    ],
)
def test_a_header_that_is_not_understood_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        sizes(table(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        sizes(table(tmp_path, "filename,pixel_size_mm\nä.png,0.2\n", encoding))


@pytest.mark.parametrize(
    "text",
    [
        "filename,pixel_size_mm\na.png,0.2\nb.png,\n",
        "\ufefffilename,pixel_size_mm\r\na.png,.2\r\nb.png,\r\n",
        "filename,pixel_size_mm\ra.png,2e-1\rb.png,",
        "filename, pixel_size_mm,,\n\n a.png , 0.20 ,,\n ,,\nb.png,,,\n",  # cells that a spreadsheet only touched
        '"filename","pixel_size_mm"\n"a.png","+0.2"\n"b.png",""\n',
    ],
)
def test_usual_ways_of_writing_a_table_are_understood(tmp_path: Path, text: str) -> None:
    assert sizes(table(tmp_path, text)) == {"a.png": 0.2, "b.png": None}


def test_another_separator_and_name_of_the_column_of_files(tmp_path: Path) -> None:
    path = table(tmp_path, "Image_name;Plane;Train \na;Fetal brain, upper;1 \n")
    (row,) = read_table(path, ("Plane", "Train"), filename="Image_name", separator=";").values()
    assert row.cells == {"Image_name": "a", "Plane": "Fetal brain, upper", "Train": "1"}
    with pytest.raises(DataError, match=r"column\(s\) filename, Plane, found Image_name;Plane;Train; .* by commas"):
        read_table(path, ("Plane",))
    path = table(tmp_path, "Image_name,Plane\na,b\n")
    with pytest.raises(DataError, match=r"found Image_name,Plane; .* by semicolons"):
        read_table(path, ("Plane",), filename="Image_name", separator=";")


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-4", -4), ("+.5", 0.5), ("331.0", 331), ("1e-2", 0.01)])
def test_a_number_may_have_either_sign(tmp_path: Path, text: str, value: float) -> None:
    assert read_table(table(tmp_path, f"filename,x\na,{text}\n"), ("x",))["a"].number("x") == value


@pytest.mark.parametrize("text", ["", "nan", "-inf", "1e999", "1_0", "--1", "5 px", "٣"])
def test_what_is_no_number_is_refused(tmp_path: Path, text: str) -> None:
    row = read_table(table(tmp_path, f"filename,x\na,{text}\n"), ("x",))["a"]
    with pytest.raises(DataError, match=rf"line 2: expected a number in 'x', found '{text}'"):
        row.number("x")


def test_a_file_is_found_by_its_name_with_or_without_an_image_suffix(tmp_path: Path) -> None:
    rows = read_table(table(tmp_path, "filename,x\na,1\nb.png,2\n1.2.840,3\nMu\u0308ller.png,4\nc,5\nc.png,6\n"), ())

    def cell(name: str) -> str | None:
        return None if (row := rows.row(Path(name))) is None else row.cells["x"]

    assert (cell("a.png"), cell("a.dcm"), cell("b.png"), cell("b.jpg"), cell("b")) == ("1", "1", "2", None, None)
    assert (cell("1.2.840"), cell("1.2.840.10"), cell("1.2.840.png")) == ("3", None, "3")
    assert cell("M\u00fcller.png") == "4"
    with pytest.raises(DataError, match=r"line 6: c\.png has a row already .*line 7"):
        cell("c.png")


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    write_table(tmp_path / "x.csv", [{"file": b"a\xff.png".decode("utf-8", "surrogateescape"), "mm": 1.5}])
    assert (tmp_path / "x.csv").read_text(encoding="utf-8") == "file,mm\na\\xff.png,1.5\n"
