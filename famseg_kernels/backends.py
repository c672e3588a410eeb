"""Which backends exist on this machine, and which one the caller asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    """The native module `famseg_kernels.<name>`, of which the registry has found out that it is there."""
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


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return "ok" if TRITON_INTERPRETS else gpu_reason()


def _cuda_reason() -> str:
    module, reason = native_module("_cuda")
    return gpu_reason() if module is not None else reason


@functools.cache
def availability() -> dict[str, str]:
    """Backend → "ok" or the reason why it cannot run here, whatever operations it implements."""
    return {
        "cuda": _cuda_reason(),
        "triton": _triton_reason(),
        "cpu": native_module("_cpu")[1],
        "reference": "ok",
    }


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
