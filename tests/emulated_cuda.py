"""The CUDA backend without a GPU: its module compiled by g++ (csrc/common/cuda_on_cpu.h), taking CPU tensors.

The same kernel texts, launchers, bindings and Python as on a GPU; threads are fibers. Under AddressSanitizer:

    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0
        FAMSEG_EMULATION_FLAGS="-g1 -fsanitize=address -Wno-error" python -m pytest tests/test_cuda_text.py
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++")
SOURCES = (
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/cuda/*.c*") if path.suffix in (".cu", ".cpp")),
    "csrc/module_cuda.cpp",
    "tests/cuda_text/emulation.cpp",
)
# Every access is checked to be at a multiple of its size, by the handler in cuda_on_cpu.h.
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DFAMSEG_CUDA_ON_CPU"),
    *("-fsanitize=alignment", "-fno-sanitize-recover=alignment", '-DFAMSEG_CUDA_ARCHS=""'),
)
# Shared memory of a block and of a multiprocessor, in bytes.
H200 = (227 * 1024, 228 * 1024)


def pybind11_include() -> Path | None:
    """Where setup.py has put pybind11's headers."""
    found = sorted(ROOT.glob("build/*/pybind11-*/pybind11/pybind11.h"))
    return found[-1].parent.parent if found else None


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if COMPILER is None:
        return "no g++ on PATH"
    return None if pybind11_include() else "no pybind11 headers: the package was not built in this tree"


def compiled(sources: Sequence[str], library: Path) -> Path:
    """The library, made of these sources of the repository."""
    more = os.environ.get("FAMSEG_EMULATION_FLAGS", "").split()
    include = [ROOT / "csrc", pybind11_include(), sysconfig.get_paths()["include"]]
    # A preloaded sanitizer is for Python, not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    objects, compilations = [], []
    for source in sources:
        objects.append(str(library.parent / (source.replace("/", "_") + ".o")))
        command = [COMPILER, *FLAGS, *more, *(f"-I{path}" for path in include), "-x", "c++", "-c", str(ROOT / source)]
        compilations.append(subprocess.Popen([*command, "-o", objects[-1]], env=environment))
    assert all(process.wait() == 0 for process in compilations)
    # Without FLAGS: -fsanitize=alignment would link a library with a handler of its own.
    subprocess.run([COMPILER, "-shared", *more, *objects, "-o", str(library)], check=True, env=environment)
    return library


def build(directory: Path) -> Emulation:
    return Emulation(compiled(SOURCES, directory / "_cuda.so"))


class Launch(NamedTuple):
    """What a launcher asked for: the kernel's symbol, threads of a block, bytes of its dynamic shared memory.

    grid: blocks along x, y and z. parameters: the kernel's, as they lie in a GPU's constant memory.
    """

    kernel: str
    threads: int
    shared: int
    grid: tuple[int, int, int]
    parameters: bytes


class Emulation:
    def __init__(self, library: Path) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", library)
        assert spec is not None and spec.loader is not None
        self.module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._settings = ctypes.CDLL(str(library))  # the same library, its settings

    def configure(self, reverse: bool = False, shared: tuple[int, int] = H200, static: int = 0) -> None:
        """The order in which threads run between barriers, the GPU's shared memory and the kernels' static one."""
        self._settings.emulate(reverse, *map(ctypes.c_size_t, (*shared, static)))

    def interrupt(self, other: Callable[[], object]) -> None:
        """Call `other` once, between what the next launch sets and the launch itself, as another thread may."""
        self._other = ctypes.CFUNCTYPE(None)(other)  # kept for as long as it may be called
        self._settings.interrupt(self._other)

    def record(self) -> None:
        """Until `configure` is called, launches are recorded and not run."""
        self._settings.record()

    def recorded(self) -> list[Launch]:
        self._settings.recorded.restype = ctypes.c_size_t
        self._settings.recorded_launch.restype = ctypes.c_char_p
        self._settings.recorded_parameters.restype = ctypes.c_void_p
        threads, shared, size, grid = ctypes.c_uint(), ctypes.c_size_t(), ctypes.c_size_t(), (ctypes.c_uint * 3)()
        launches = []
        for index in range(self._settings.recorded()):
            symbol = self._settings.recorded_launch(ctypes.c_size_t(index), ctypes.byref(threads), ctypes.byref(shared))
            at = self._settings.recorded_parameters(ctypes.c_size_t(index), ctypes.byref(size), grid)
            parameters = ctypes.string_at(at, size.value)
            launches.append(Launch(symbol.decode(), threads.value, shared.value, tuple(grid), parameters))
        return launches

    def install(self, monkeypatch: Any) -> None:
        """Backends' modules find the emulation where they look for the GPU."""
        from famseg_kernels import backends

        class Stream:
            cuda_stream = 0

        native = backends.native
        monkeypatch.setattr(backends, "native", lambda name: self.module if name == "_cuda" else native(name))
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
