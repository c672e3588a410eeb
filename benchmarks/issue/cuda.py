"""The CUDA kernels' launches and machine code, without a GPU.

Machine code is that of the installed module, where it is newer than its sources. Else nvcc compiles every launch.cu for
a chip (a minute each, kept in the cache). The launcher itself, compiled by g++ (tests/emulated_cuda.py, kept too),
records what it launches for tensors without data.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.issue import chips, sass
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

    if _module() is None and nvcc() is None:
        return "no CUDA module of these sources is installed, and no nvcc on the PATH"
    return emulated_cuda.missing()


def _sources() -> list[Path]:
    found = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h"))
    return [path for path in found if "cpu" not in str(path.relative_to(ROOT))]


def _digest(*parts: str) -> str:
    sources = hashlib.sha256(" ".join(parts).encode())
    for path in _sources():
        sources.update(path.read_bytes())
    return sources.hexdigest()[:16]


def _module() -> Path | None:
    """The installed CUDA module, unless a source has changed since."""
    newest = max(path.stat().st_mtime for path in _sources())
    found = (ROOT / "famseg_kernels").glob("_cuda*.so")
    return next((path for path in found if path.stat().st_mtime > newest), None)


def _places(capability: int) -> dict[Path, Path]:
    """Source → where its cubin is kept."""
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    digest = _digest(version, *FLAGS)
    return {
        source: cache() / f"{source.relative_to(ROOT / 'csrc').parts[0]}-{capability}-{digest}.cubin"
        for source in sorted(ROOT.glob("csrc/*/cuda/launch.cu"))
    }


def compiled(capability: int) -> bool:
    """Whether nothing has to be compiled by nvcc first."""
    return _module() is not None or (nvcc() is not None and all(path.exists() for path in _places(capability).values()))


@functools.cache
def cubins(capability: int) -> list[bytes]:
    """Of all operations."""
    module, compiler = _module(), nvcc()
    if module is not None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sass.tool("cuobjdump"), "-xelf", f"sm_{capability}", str(module)]
            subprocess.run(command, cwd=folder, capture_output=True, check=True)
            return [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    if compiler is None:
        raise Refusal(str(missing()))
    for source, path in _places(capability).items():
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch=sm_{capability}", "-cubin", str(source)]
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(path)
    return [path.read_bytes() for path in _places(capability).values()]


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
    found = {}
    for cubin in cubins(capability):
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
