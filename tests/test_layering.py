"""Imports point one way: spec → reference → kernels → op → layer, kernels → famseg, data → … → command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = (
    "famseg_kernels.checks",
    "famseg_kernels.backends",
    "famseg_kernels.finite",
    "famseg_kernels.launch",
    "famseg_kernels.registry",
    "famseg_kernels.tolerance",
)
ROOMS = ("strip_conv", "ssd_scan", "reassembly")
# A file of a room may import the base and these files of its own room.
ROOM_FILES = {
    "__init__": (),
    "spec": (),
    "reference": ("spec",),
    "cpu": ("spec",),
    "triton": ("spec",),
    "cuda": ("spec",),
    "op": ("spec", "reference", "cpu", "triton", "cuda"),
    "layer": ("spec", "op"),
}
# Parts of famseg, each may import the earlier ones (and famseg_kernels).
FAMSEG = (
    "biometrics",
    "anatomy",
    "files",
    "data",
    "metrics",
    "models",
    "options",
    "reporting",
    "inference",
    "evaluation",
    "results",
    "training",
    "cli",
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] in ("famseg", "famseg_kernels")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_needs_no_other_room(room):
    for path in (ROOT / "famseg_kernels" / room).glob("*.py"):
        allowed = [f"famseg_kernels.{room}.{name}" for name in ROOM_FILES[path.stem]]
        allowed += [f"famseg_kernels.{room}", *BASE]
        for name in imports(path) - {"famseg_kernels"}:
            assert any(name == a or (name.startswith(a + ".") and a != f"famseg_kernels.{room}") for a in allowed), (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_the_base_knows_no_operation_and_kernels_know_no_famseg():
    for name in BASE:
        path = ROOT / (name.replace(".", "/") + ".py")
        assert not any(room in other for other in imports(path) for room in ROOMS)
    for path in (ROOT / "famseg_kernels").rglob("*.py"):
        assert not any(other.split(".")[0] == "famseg" for other in imports(path)), path


def test_famseg_imports_point_from_data_to_command_line():
    for path in (ROOT / "famseg").rglob("*.py"):
        part = path.relative_to(ROOT / "famseg").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in imports(path):
            other = name.split(".")[1] if name.startswith("famseg.") else None
            if other in FAMSEG:
                assert FAMSEG.index(other) <= FAMSEG.index(part), f"{path.relative_to(ROOT)} imports {name}"


def test_native_code_includes_no_torch():
    sources = [path for suffix in ("h", "cpp", "cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    assert sources
    for path in sources:
        text = path.read_text()
        assert "torch/" not in text and "ATen/" not in text and "c10/" not in text, path


def test_every_room_has_the_same_files():
    for room in ROOMS:
        files = {path.stem for path in (ROOT / "famseg_kernels" / room).glob("*.py")}
        assert {"spec", "reference", "op", "layer"} <= files <= set(ROOM_FILES), room
