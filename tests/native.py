"""The C++ module that the native tests run: the installed one, or a sanitizer build.

The kernels under AddressSanitizer and UBSan (Python itself is not built for them, hence the preload; once before:
pip install cmake ninja pybind11):

    cmake -S . -B build/sanitize -G Ninja -DFAMSEG_SANITIZE=address,undefined -DFAMSEG_PYBIND11_INCLUDE=$(python -c
        'import pybind11; print(pybind11.get_include())') && cmake --build build/sanitize
    FAMSEG_NATIVE_MODULE=build/sanitize/modules ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(gcc
        -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" python -m pytest tests -k test_native

The contract too: copy build/sanitize/modules/_cpu*.so over the one in famseg_kernels/ and, with the same ASAN_OPTIONS
and LD_PRELOAD, run python -m pytest tests/test_contract.py -k "cpu and (matches or layout or gradcheck)", once for each
FAMSEG_CPU_ISA (amx, avx512, avx2, baseline). Reinstall afterwards.

ThreadSanitizer takes Clang and its OpenMP, whose Archer tells it what barriers order (Debian: clang-16 libomp-16-dev; a
barrier left out of csrc/common/parallel.h is then a report):

    cmake -S . -B build/threads -G Ninja -DCMAKE_CXX_COMPILER=clang++-16 -DFAMSEG_SANITIZE=thread
        -DCMAKE_MODULE_LINKER_FLAGS=-shared-libsan -DFAMSEG_PYBIND11_INCLUDE=… && cmake --build build/threads
    FAMSEG_NATIVE_MODULE=build/threads/modules OMP_NUM_THREADS=4 OMP_TOOL_LIBRARIES=/usr/lib/llvm-16/lib/libarcher.so
        TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66"
        LD_PRELOAD=$(clang-16 -print-file-name=libclang_rt.tsan-x86_64.so)
        setarch -R python -m pytest tests -k test_native
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from famseg_kernels import backends


def native_module() -> Any:
    directory = os.environ.get("FAMSEG_NATIVE_MODULE")
    if directory is None:
        return backends.native_module("_cpu")[0]
    (path,) = Path(directory).glob("_cpu*.so")
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NATIVE = native_module()
needs_native = pytest.mark.skipif(NATIVE is None, reason=backends.native_module("_cpu")[1])
ISAS = NATIVE.available_isas() if NATIVE else []
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
