"""How many multiplications the CPU kernels make, counted while they run.

The kernels' own sources and drivers, unchanged, are compiled once more with a scalar whose arithmetic is a call that
counts (multiplications.h says how); the results come back too and can be checked. Every multiplication of an fp64
forward counts, those with zeros beside the image included; exponentials do not. A vector holds two numbers here. On
wide vectors more is rounded up (channels to as many as a vector holds, say); that is not in the count.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from famseg_kernels.strip_conv.spec import unpacked

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++")
KERNELS = [path for path in ROOT.glob("csrc/*/cpu/*.cpp") if path.stem != "bind" and not path.stem.endswith("_amx")]
SOURCES = (*sorted(str(path.relative_to(ROOT)) for path in KERNELS), "benchmarks/multiplications.cpp")


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "counting needs GCC's __float128, here on Linux and x86-64 only"
    return None if COMPILER else "counting compiles the kernels once more: no g++ on PATH"


def build(directory: Path) -> Counted:
    """Compile for counting; 5 seconds of a core."""
    assert COMPILER is not None, missing()
    flags = ["-std=c++17", "-O0", "-fPIC", "-fopenmp", "-Wno-psabi", "-DFAMSEG_ISA=baseline", f"-I{ROOT / 'csrc'}"]
    flags += ["-include", str(ROOT / "benchmarks" / "multiplications.h")]
    objects = [directory / f"{source.replace('/', '_')}.o" for source in SOURCES]
    compilations = [
        subprocess.Popen([COMPILER, *flags, "-c", str(ROOT / source), "-o", str(target)])
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    if any([process.wait() for process in compilations]):
        raise RuntimeError("the kernels do not compile for counting; the compiler's message is above")
    library = directory / "multiplications.so"
    subprocess.run([COMPILER, "-shared", "-fopenmp", *map(str, objects), "-o", str(library)], check=True)
    return Counted(ctypes.CDLL(str(library)))


class Counted:
    """The counting kernels: each takes what the operation takes and returns (result in fp64, multiplications)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("strip_conv2d", "carafe", "ssd_scan_2d"):
            getattr(library, name).restype = ctypes.c_int64

    def strip_conv2d(
        self,
        x: Tensor,
        square_weight: Tensor | None,
        square_bias: Tensor | None,
        row_weights: list[Tensor],
        row_biases: list[Tensor],
        col_weights: list[Tensor],
        col_biases: list[Tensor],
    ) -> tuple[Tensor, int]:
        tensors = [self._wide(t) for t in (x, square_weight, square_bias, torch.empty_like(x))]
        kept, branches = [], []
        sides = (row_weights, unpacked(row_biases, row_weights), col_weights, unpacked(col_biases, col_weights))
        for row, row_bias, col, col_bias in zip(*sides, strict=True):
            kept += (branch := [self._wide(t) for t in (row, row_bias, col, col_bias)])
            a, b, c, d = _addresses(branch)
            branches += [a, b, row.shape[3], c, d, col.shape[2]]
        sizes = (*x.shape, 0 if square_weight is None else square_weight.shape[-1], len(row_weights))
        count = self._library.strip_conv2d(_list(sizes), _list(_addresses(tensors)), _list(branches))
        return self._narrow(tensors[-1], x.shape), count

    def carafe(
        self, features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
    ) -> tuple[Tensor, int]:
        n, c, h, w = features.shape
        y = torch.empty(n, c, scale_factor * h, scale_factor * w)
        tensors = [self._wide(t) for t in (features, masks, y)]
        sizes = (n, c, h, w, kernel_size, scale_factor, group_size)
        count = self._library.carafe(_list(sizes), _list(_addresses(tensors)))
        return self._narrow(tensors[-1], y.shape), count

    def ssd_scan_2d(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, int]:
        """dt is taken as it is: no bias, no softplus, no limits."""
        tensors = [self._wide(t) for t in (x, dt, A, B, C, torch.empty_like(x))]
        sizes = (*x.shape, *B.shape[4:], dt.shape[3], B.shape[3])
        count = self._library.ssd_scan_2d(_list(sizes), _list(_addresses(tensors)))
        return self._narrow(tensors[-1], x.shape), count

    def _wide(self, t: Tensor | None) -> Tensor | None:
        """The numbers as the counting kernels hold them, 16 bytes each."""
        if t is None:
            return None
        t = t.detach().double().contiguous()
        wide = torch.empty((*t.shape, 2), dtype=torch.float64)
        self._library.widen(*map(ctypes.c_void_p, _addresses([t, wide])), ctypes.c_int64(t.numel()))
        return wide

    def _narrow(self, wide: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        t = torch.empty(shape, dtype=torch.float64)
        self._library.narrow(*map(ctypes.c_void_p, _addresses([wide, t])), ctypes.c_int64(t.numel()))
        return t


def _addresses(tensors: list[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _list(integers: tuple[int, ...] | list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(integers))(*integers)
