"""A dry run's stand-in for the CUDA backend: its module compiled by g++ (tests/emulated_cuda.py)."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from benchmarks.gpu.items import Options


def build_emulation(out: Path) -> Path:
    """The library in the result folder; half a minute of two cores where it is not there yet."""
    from tests import emulated_cuda

    folder = out / "emulation"
    folder.mkdir(exist_ok=True)
    library = folder / "_cuda.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = folder / "partial"  # whoever is killed here leaves no half library
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            emulated_cuda.build(partial)
            (partial / library.name).rename(library)
            shutil.rmtree(partial)
    return library


def emulate(options: Options) -> None:
    """From now on, in a dry run, this process's CUDA backend is the emulation; on a GPU nothing happens."""
    if not options.dry:
        return
    import pytest

    from famseg_kernels import backends, choice
    from tests import emulated_cuda

    if emulated_cuda.missing() is not None:
        return  # the backend then says itself why it is not there
    found, installed = dict(backends.availability()), backends.installed
    emulated_cuda.Emulation(build_emulation(options.out)).install(pytest.MonkeyPatch())  # for good: nothing undoes it
    backends.availability = lambda: found | {"cuda": "ok"}
    backends.installed = lambda name: "ok" if name == "cuda" else installed(name)
    choice.DEVICE["cuda"] = "cpu"
