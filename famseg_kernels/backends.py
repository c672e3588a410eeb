"""Which backends exist on this machine, and which one the caller asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

# Fastest first: automatic choice takes the first one that supports the arguments.
BACKENDS = ("cuda", "triton", "cpu", "reference")
CHOICES = ("auto", *BACKENDS)


@functools.cache
def native_module(name: str) -> tuple[object | None, str]:
    """The native module `famseg_kernels.<name>`, or None and the reason why it cannot be used."""
    try:
        return importlib.import_module(f"famseg_kernels.{name}"), "ok"
    except ModuleNotFoundError:
        return None, f"famseg_kernels.{name} was not built; {_REMEDY[name]}"
    except ImportError as error:
        return None, f"famseg_kernels.{name} does not load: {error}; {_REMEDY[name]}"


def native(name: str) -> Any:
    """The native module `famseg_kernels.<name>`, which the choice of a backend has found to be there."""
    return native_module(name)[0]


def address(t: torch.Tensor | None) -> int:
    """Where t's elements lie, as the native modules take it; 0 for none."""
    return 0 if t is None else t.data_ptr()


_REMEDY = {
    "_cpu": "reinstall with a C++ compiler: pip install -e .",
    "_cuda": "reinstall where nvcc is: FAMSEG_CUDA=1 pip install -e .",
}


def gpu_reason() -> str:
    """ "ok" where a CUDA device can be used, else why not."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible"
    return "ok"


# Triton's interpreter runs its kernels on the CPU with numpy: how they are tested without a GPU. Triton reads the
# variable when a kernel is defined, so it holds for the life of the process.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


_OLDEST_TRITON = (3, 3)


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    found = version("triton")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton {found} is too old, the kernels need {oldest} (tl.gather): upgrade torch, which brings it along"
    return "ok" if TRITON_INTERPRETS else gpu_reason()


def _cuda_reason() -> str:
    module, reason = native_module("_cuda")
    if module is None or (reason := gpu_reason()) != "ok":
        return reason
    driver, runtime = _cuda_versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver is for CUDA {_dotted(driver)}, famseg_kernels._cuda was built with {_dotted(runtime)}: "
            "install a newer driver, or reinstall with an older CUDA toolkit: pip install -e ."
        )
    return "ok"


def _cuda_versions() -> tuple[int, int]:
    """What the driver runs and what the native module was built with, CUDA 13.0 as 13000."""
    module = native("_cuda")
    return module.driver_version()[0], module.runtime_version()


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def installed(name: str) -> str:
    """ "ok" where backend `name` is installed and there is a GPU if it needs one, whichever it is; else why not."""
    if name == "cuda":
        return _cuda_reason()
    if name == "triton":
        return _triton_reason()
    return native_module("_cpu")[1] if name == "cpu" else "ok"


def gpu_refusal(name: str, index: int | None) -> str | None:
    """None if "cuda" or "triton", which is installed, can use GPU `index`, else why not. Starts CUDA in this process.

    Both ask for compute capability 8.0: there is no older instruction for the 16-bit products of the CUDA kernels
    (mma.m16n8k16), and Triton's README names 8.0 as the oldest that it supports.
    """
    if torch.cuda._is_in_bad_fork():
        return "this process was forked from one that had started CUDA: use the start method 'spawn'"
    gpu = torch.cuda.get_device_properties(index)
    capability = 10 * gpu.major + gpu.minor
    what = f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}"
    if capability < 80:
        return f"{what}, the kernels need 8.0"
    return None if name == "triton" else _no_code(capability, what)


def _no_code(capability: int, what: str) -> str | None:
    """None if the CUDA module has code for this compute capability × 10, else a reason that starts with `what`.

    Machine code runs on later chips of its generation too; PTX, of the newest one, on all that are later, if the
    driver is no older than the compiler that made it.
    """
    names = native("_cuda").archs()
    numbers = [int(name) for name in names if name.isdigit()]  # the code of "90a" runs on that one chip only
    if str(capability) + "a" in names or any(n // 10 == capability // 10 and n <= capability for n in numbers):
        return None
    reason = f"{what}, famseg_kernels._cuda has code for {', '.join(f'{n // 10}.{n % 10}' for n in numbers)}"
    remedy = f'FAMSEG_CUDA_ARCHS="{";".join(map(str, sorted({*numbers, capability})))}" pip install -e .'
    if numbers and capability > max(numbers):
        driver, runtime = _cuda_versions()
        if driver >= runtime:
            return None
        reason += f" and newer with a driver for CUDA {_dotted(runtime)}, this one is for {_dotted(driver)}"
        remedy = f"install a newer driver, or {remedy}"
    return f"{reason}: {remedy}"


@functools.cache
def availability() -> dict[str, str]:
    """Backend → "ok" or the reason why it cannot run here, whatever operations it implements.

    One for GPUs is "ok" if it can use any of those that are visible.
    """
    reasons = {name: installed(name) for name in BACKENDS}
    for name in ("cuda", "triton"):
        if reasons[name] == "ok" and not (name == "triton" and TRITON_INTERPRETS):
            refusals = [gpu_refusal(name, index) for index in range(torch.cuda.device_count())]
            if refusals and None not in refusals:
                reasons[name] = "; ".join(dict.fromkeys(map(str, refusals)))
    return reasons


class _Requested(threading.local):
    """The backend asked for in this thread. A thread-local and not a ContextVar: torch.compile guards on it."""

    def __init__(self) -> None:
        # Not a class attribute: torch.compile would read that one, whatever the thread has set.
        self.name = os.environ.get("FAMSEG_BACKEND", "auto")


_requested = _Requested()


def requested() -> str:
    """The backend that calls in this thread shall use: a name of `CHOICES`."""
    name = _requested.name
    if name not in CHOICES:
        raise ValueError(f"FAMSEG_BACKEND: expected one of {', '.join(CHOICES)}, got {name!r}")
    return name


@contextmanager
def requesting(name: str) -> Iterator[None]:
    """Ask for backend `name` in this thread, without looking whether it can run."""
    previous = _requested.name
    _requested.name = name
    try:
        yield
    finally:
        _requested.name = previous
