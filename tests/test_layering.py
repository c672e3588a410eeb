"""The shape of the tree: rooms that are alike, Python and native side; imports and includes point one way.

spec → reference → kernels → op → layer, kernels → famseg, data → … → command line.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "famseg_kernels"
# What all rooms stand on; each file may import the earlier ones.
BASE = (
    *("testing.case", "testing.tolerance", "backends", "checks", "children", "launch", "onnx", "spec", "choice"),
    "torch_op",
)
ROOMS = ("strip_conv", "ssd_scan", "reassembly")
# A file of a room may import the base (`torch_op` only where it says so) and these files of its own room.
ROOM_FILES = {
    "__init__": (),
    "cases": (),
    "spec": ("cases",),
    "problem": ("spec",),
    "reference": ("spec",),
    "cpu": ("spec", "problem"),
    "triton": ("spec", "problem", "triton"),  # a file or a folder
    "cuda": ("spec", "problem"),
    "onnx": ("spec", "reference"),
    "op": ("spec", "reference", "cpu", "triton", "cuda", "torch_op"),
    "layer": ("spec", "op"),
}
# Parts of famseg, each may import the earlier ones (and famseg_kernels).
FAMSEG = (
    "memory",
    "biometrics",
    "gestation",
    "uncertainty",
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
    "study",
    "cli",
)
NATIVE = [path for suffix in ("h", "cpp", "cu", "cuh") for path in sorted((ROOT / "csrc").rglob(f"*.{suffix}"))]
LONGEST = 500  # lines of a file


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] in ("famseg", "famseg_kernels")}


def is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE)


# --- Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_the_files_of_every_room(room):
    found = {path.stem for path in (KERNELS / room).iterdir() if path.suffix == ".py" or path.name == "triton"}
    assert set(ROOM_FILES) - {"cuda"} <= found <= set(ROOM_FILES)
    assert ("cuda" in found) == (ROOT / "csrc" / room / "cuda").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_the_kernels_of_a_room_need_no_other_room(room):
    home = f"famseg_kernels.{room}"
    for path in (KERNELS / room).rglob("*.py"):
        own = ROOM_FILES[path.relative_to(KERNELS / room).parts[0].removesuffix(".py")]
        base = {f"famseg_kernels.{name}" for name in BASE if name not in ("choice", "torch_op") or name in own}
        allowed = [*base, *(f"{home}.{name}" for name in own)]
        if path.stem == "layer":  # layers may be made of those of an earlier room
            allowed += [f"famseg_kernels.{other}.layer" for other in ROOMS[: ROOMS.index(room)]]
        packages = {"famseg_kernels", home, "famseg_kernels.testing"}
        for name in imports(path) - packages:
            assert any(is_in(name, module) for module in allowed), f"{path.relative_to(ROOT)} imports {name}"


def test_the_base_knows_no_operation_and_points_one_way():
    for place, name in enumerate(BASE):
        earlier = [f"famseg_kernels.{other}" for other in BASE[:place]]
        path = KERNELS / (name.replace(".", "/") + ".py")
        for other in imports(path) - {"famseg_kernels", "famseg_kernels.testing"}:
            assert any(is_in(other, module) for module in earlier), f"{path.relative_to(ROOT)} imports {other}"


def test_the_layers_need_torch_and_numpy_alone():
    """And what these bring along: the installation without dependencies is promised to whoever wants no more."""
    code = "import torch, sys; before = {*sys.modules}; import famseg_kernels; print(*sys.modules.keys() - before)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    new = {name.partition(".")[0] for name in found.stdout.split()} - sys.stdlib_module_names
    ours = {"famseg_kernels", "torch", "numpy", "triton"}
    assert {name for name in new if not name.startswith("_sysconfigdata")} <= ours


def test_kernels_know_neither_famseg_nor_benchmarks():
    for path in KERNELS.rglob("*.py"):
        assert not any(is_in(name, "famseg") for name in imports(path)), path
        assert "import benchmarks" not in path.read_text() and "from benchmarks" not in path.read_text(), path


def test_one_file_knows_torch_from_inside():
    for path in KERNELS.rglob("*.py"):
        inside = re.search(r"torch\._(C|decomp|functorch)\b|torch\.library\.|autograd\.Function\)", path.read_text())
        assert path.name == "torch_op.py" or not inside, f"{path.relative_to(ROOT)}: {inside}"


def test_famseg_imports_point_from_data_to_command_line():
    for path in (ROOT / "famseg").rglob("*.py"):
        part = path.relative_to(ROOT / "famseg").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in imports(path):
            other = name.split(".")[1] if name.startswith("famseg.") else None
            if other in FAMSEG:
                assert FAMSEG.index(other) <= FAMSEG.index(part), f"{path.relative_to(ROOT)} imports {name}"


# --- C++ and CUDA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_a_native_room_has_the_files_of_every_room(room):
    folder = ROOT / "csrc" / room
    found = {path.name for path in folder.iterdir()}
    assert {"problem.h", "cpu"} <= found <= {"problem.h", "bind.h", "cpu", "cuda"}
    cpu = {path.name for path in (folder / "cpu").iterdir()}
    assert {"kernels.h", "driver.cpp", "bind.cpp", "forward.cpp", "backward.cpp"} <= cpu
    if "cuda" in found:
        assert {"launch.h", "launch.cu", "bind.cpp"} <= {path.name for path in (folder / "cuda").iterdir()}


def test_native_files_include_their_own_room_and_what_is_common():
    assert NATIVE
    for path in NATIVE:
        place = path.relative_to(ROOT / "csrc").parts[:-1]
        allowed = ["common/"]
        if place and place[0] != "common":
            allowed += [f"{place[0]}/problem.h", f"{place[0]}/bind.h", f"{'/'.join(place)}/"]
        for name in includes(path):
            assert (ROOT / "csrc" / name).exists(), f"{path.relative_to(ROOT)} includes {name}, which is not in csrc"
            assert name.startswith(tuple(allowed)), f"{path.relative_to(ROOT)} includes {name}"


def test_a_problem_stands_for_cpu_and_cuda():
    for room in ROOMS:
        for name in includes(ROOT / "csrc" / room / "problem.h"):
            assert name.startswith("common/"), f"csrc/{room}/problem.h includes {name}"


def test_native_code_includes_no_torch():
    for path in NATIVE:
        text = path.read_text()
        assert "torch/" not in text and "ATen/" not in text and "c10/" not in text, path


# --- both ---------------------------------------------------------------------------------------------


def test_no_file_is_too_long_to_be_read_at_a_sitting():
    python = [
        path for part in ("famseg_kernels", "famseg", "benchmarks", "tests") for path in (ROOT / part).rglob("*.py")
    ]
    native = [path for path in (ROOT / "benchmarks").iterdir() if path.suffix in (".cpp", ".cu", ".h")]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in (*python, *native, *NATIVE)}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
