"""Drives CMake and decides whether the CUDA module is built.

    FAMSEG_CUDA=auto|0|1       auto (the default) builds it when nvcc is found and works
    FAMSEG_CUDA_ARCHS="80;90"  compute capabilities to compile for; PTX is added for the newest

Sources and compiler flags are in CMakeLists.txt, metadata in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_cxx() -> str:
    """Path of the C++ compiler CMake will use: $CXX, else the usual names."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    # SystemExit and not an exception: its message is all the user sees, without a traceback.
    raise SystemExit("famseg needs a C++17 compiler: install g++ (Debian: apt install g++) or set CXX to one.")


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{cuda_home}/bin") if cuda_home else None)


def nvcc_complaint(nvcc: str, archs: list[str]) -> str | None:
    """None when nvcc compiles for all archs, else its first error (a host compiler mismatch, say)."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cu")
        source.write_text("__global__ void probe() {}\n")
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        command = [nvcc, *targets, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = (result.stderr + result.stdout).splitlines()
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()] or lines
    return errors[0].strip() if errors else f"exit status {result.returncode}"


def choose_nvcc(archs: list[str]) -> str | None:
    """The nvcc to build the CUDA module with, or None to leave the module out."""
    wish = os.environ.get("FAMSEG_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"FAMSEG_CUDA must be auto, 0 or 1, got {wish!r}.")
    if wish == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if wish == "1":
            raise SystemExit(
                "FAMSEG_CUDA=1 needs nvcc: install the CUDA toolkit and put nvcc on PATH or set CUDA_HOME."
            )
        return None
    if complaint := nvcc_complaint(nvcc, archs):
        if wish == "1":
            raise SystemExit(f"FAMSEG_CUDA=1, but {nvcc} fails on an empty kernel: {complaint}")
        print(f"warning: CUDA module left out, {nvcc} fails on an empty kernel: {complaint}", file=sys.stderr)
        return None
    return nvcc


def stable_pybind11_include(build: Path) -> Path:
    """Copies pybind11's headers into the build directory.

    An isolated build installs pybind11 under a new temporary path each time; compiling against that
    path would change every command line and so rebuild everything on every `pip install`.
    """
    target = build / f"pybind11-{pybind11.__version__}"
    if not target.exists():
        partial = build / "pybind11-partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(target)
    return target


class CMakeBuild(build_ext):
    """Builds all native modules by CMake, in one directory that persists between installs."""

    def run(self) -> None:
        cxx = find_cxx()
        archs = os.environ.get("FAMSEG_CUDA_ARCHS", "80;90").replace(",", ";").split(";")
        nvcc = choose_nvcc(archs)
        build = ROOT / "build" / str(sys.implementation.cache_tag)
        build.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": cxx,
            "Python_EXECUTABLE": sys.executable,
            "FAMSEG_PYBIND11_INCLUDE": stable_pybind11_include(build),
            "FAMSEG_CUDA": "ON" if nvcc else "OFF",
        }
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            options["FAMSEG_CUDA_ARCHS"] = ";".join(archs)
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        self.cmake("-S", str(ROOT), "-B", str(build), "-G", "Ninja", *definitions)
        self.cmake("--build", str(build))
        for extension in self.extensions:
            self.place(extension, build / "modules")

    def cmake(self, *arguments: str) -> None:
        if subprocess.run(["cmake", *arguments]).returncode:
            raise SystemExit("famseg: CMake failed, its first error above says why.")

    def place(self, extension: Extension, modules: Path) -> None:
        """Puts a built module where setuptools wants it; removes a stale one that was not built now."""
        # Editable installs load modules from the source tree, wheels from build_lib.
        in_place = self.inplace or getattr(self, "editable_mode", False)
        filename = self.get_ext_filename(extension.name)
        target = (ROOT if in_place else Path(self.build_lib)) / filename
        built = modules / Path(filename).name
        if not built.exists():
            target.unlink(missing_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process keeps the file it has mapped.
        partial = target.with_suffix(".partial")
        shutil.copy2(built, partial)
        os.replace(partial, target)


# `optional` because which of them exist is known only after CMake has run.
setup(
    ext_modules=[
        Extension("famseg_kernels._cpu", sources=[]),
        Extension("famseg_kernels._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
