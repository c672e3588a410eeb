"""The CUDA kernels' launches and machine code, without a GPU.

nvcc compiles every launch.cu for a chip (a minute each, kept in the cache). The launcher itself, compiled by g++
(tests/emulated_cuda.py, kept too), records what it launches for tensors without data.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.issue import chips
from benchmarks.issue.launches import Addresses, Launch, called
from benchmarks.issue.sass import Refusal
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")  # as CMakeLists.txt has them for a release


def cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "famseg-issue"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def nvcc() -> str | None:
    beside = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(beside) if beside.exists() else None)


def missing() -> str | None:
    """Why CUDA kernels cannot be counted here, or None."""
    from tests import emulated_cuda

    if nvcc() is None:
        return "no nvcc on the PATH"
    return emulated_cuda.missing()


def _digest(*parts: str) -> str:
    sources = hashlib.sha256(" ".join(parts).encode())
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h") and "cpu" not in str(path.relative_to(ROOT)):
            sources.update(path.read_bytes())
    return sources.hexdigest()[:16]


def _places(capability: int) -> dict[Path, Path]:
    """Source → where its cubin is kept."""
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    digest = _digest(version, *FLAGS)
    return {
        source: cache() / f"{source.relative_to(ROOT / 'csrc').parts[0]}-{capability}-{digest}.cubin"
        for source in sorted(ROOT.glob("csrc/*/cuda/launch.cu"))
    }


def compiled() -> bool:
    """Whether nothing has to be compiled first."""
    return nvcc() is not None and all(path.exists() for c in chips.SHARED for path in _places(c).values())


@functools.cache
def cubins(capability: int) -> dict[str, bytes]:
    """By source, those of all operations."""
    compiler = nvcc()
    if compiler is None:
        raise Refusal(str(missing()))
    found = {}
    for source, path in _places(capability).items():
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch=sm_{capability}", "-cubin", str(source)]
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(path)
        found[source.parent.parent.name] = path.read_bytes()
    return found


@functools.cache
def emulation() -> Any:
    from tests import emulated_cuda

    sources = [*(ROOT / "tests/cuda_text").glob("emulation.cpp"), ROOT / "csrc/common/cuda_on_cpu.h"]
    digest = _digest(*(path.read_text() for path in sources))
    folder = cache() / f"emulation-{digest}"
    library = folder / "_cuda.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        return emulated_cuda.build(folder)
    return emulated_cuda.Emulation(library)


def template(mangled: str) -> str:
    """A kernel's name with its template arguments, the same of g++ and of nvcc."""
    run = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    name = run.stdout.strip().removeprefix("void ").split("(")[0]
    name = name.replace("famseg::baseline::Bfloat16", "__nv_bfloat16").replace("famseg::baseline::Float16", "__half")
    return name.replace("> >", ">>")


@functools.cache
def symbols(capability: int) -> dict[str, tuple[str, bytes]]:
    """Template → (symbol, cubin)."""
    from benchmarks.issue import sass

    found = {}
    for cubin in cubins(capability).values():
        for symbol in sass.usage(cubin):
            found[template(symbol)] = (symbol, cubin)
    return found


@contextlib.contextmanager
def _installed(addresses: Addresses) -> Iterator[None]:
    """The emulation in the place of the CUDA module, and addresses of tensors that have none."""
    import pytest

    module, patch = emulation(), pytest.MonkeyPatch()
    with contextlib.ExitStack() as stack:
        stack.callback(patch.undo)
        module.install(patch)
        stack.enter_context(mock.patch.object(torch.Tensor, "data_ptr", lambda tensor: addresses.of(tensor)))
        yield


def cuda_launches(
    operation: Operation, case: Case, dtype: torch.dtype, capability: int
) -> tuple[list[Launch], list[Launch]]:
    """Of forward and of backward."""
    addresses = Addresses()
    module = emulation()

    def recorded() -> list[Launch]:
        found = []
        for launch in module.recorded():
            name = template(launch.kernel)
            if name not in symbols(capability):
                raise Refusal(f"no machine code of {name}")
            symbol, cubin = symbols(capability)[name]
            short = name.split("<")[0].split("::")[-1]
            found.append(Launch("cuda", short, symbol, cubin, launch.grid, launch.threads, launch.shared,
                                launch.parameters, addresses.size))  # fmt: skip
        module.record()
        return found

    # Shared memory decides how planes are cut.
    module.configure(shared=(chips.SHARED_OF_BLOCK[capability], chips.SHARED[capability]))
    module.record()
    try:
        with _installed(addresses):
            return called(operation, case, dtype, "cuda", recorded)
    finally:
        module.configure()
