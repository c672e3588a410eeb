"""The documents: README's code runs, speed tables are those of the result files, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import tables

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def test_the_python_of_readme_runs_as_it_stands(capsys):
    names: dict[str, object] = {}
    for block in blocks(README, "python"):  # in one session, as a reader types it
        exec(compile(block, README.name, "exec"), names)
    assert float(capsys.readouterr().out) < 1e-4
    assert isinstance(names["y"], torch.Tensor) and names["y"].shape == (1, 100, 4, 16)


def test_the_commands_of_readme_stay_in_its_folder():
    commands = blocks(README, "bash")
    assert len(commands) == 2
    for command in commands:
        assert ".venv" in command and ".." not in command and "~" not in command


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_speed_tables_are_those_of_the_result_files(page):
    text = page.read_text()
    assert tables.MARKED.search(text)
    assert text == tables.filled(text), "run python -m benchmarks.tables"


def test_each_promise_names_a_test_that_is_there():
    page = (ROOT / "docs" / "promises.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ") and "promise |" not in line and "::" in line]
    assert len(lines) > 20
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page):
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


def anchors(path: Path) -> set[str]:
    """What GitHub and the site make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text())
    for link in (one or other for one, other in found):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link
