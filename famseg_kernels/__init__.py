"""Fast layers for PyTorch: strip depthwise convolution, 2D Mamba-2 scan, content-aware reassembly.

Every operation has a plain PyTorch reference that defines what is right and runs on any device, and kernels with
forward and backward where `available_backends` says "ok". `import famseg_kernels as fk`; `python -m famseg_kernels`
tells what this machine can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from famseg_kernels import backends as _backends
from famseg_kernels import flops
from famseg_kernels.accelerate import accelerate
from famseg_kernels.reassembly.layer import FeatureAwareUpsample
from famseg_kernels.reassembly.op import (
    CARAFE_OPERATION,
    REASSEMBLE_OPERATION,
    UPSAMPLE_OPERATION,
    carafe,
    feature_aware_upsample,
    reassemble,
)
from famseg_kernels.ssd_scan.layer import Mamba2Scan2d
from famseg_kernels.ssd_scan.op import SCAN_2D_OPERATION, SCAN_OPERATION, ssd_scan, ssd_scan_2d
from famseg_kernels.strip_conv.layer import DepthwiseConv2d, StripAttention, StripConv2d
from famseg_kernels.strip_conv.op import OPERATION as _STRIP_OPERATION
from famseg_kernels.strip_conv.op import strip_conv2d

__version__ = "0.1.0"

OPERATIONS = (
    _STRIP_OPERATION,
    SCAN_2D_OPERATION,
    SCAN_OPERATION,
    REASSEMBLE_OPERATION,
    CARAFE_OPERATION,
    UPSAMPLE_OPERATION,
)

__all__ = [
    "OPERATIONS",
    "DepthwiseConv2d",
    "FeatureAwareUpsample",
    "Mamba2Scan2d",
    "StripAttention",
    "StripConv2d",
    "accelerate",
    "available_backends",
    "carafe",
    "decompositions",
    "feature_aware_upsample",
    "flops",
    "reassemble",
    "ssd_scan",
    "ssd_scan_2d",
    "strip_conv2d",
    "use_backend",
]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What each op is in aten, by its reference: for `torch.export`'s `run_decompositions` and for `make_fx`.

    A program without this library's ops runs without this library; it is slower than the kernels.
    `torch.onnx.export(dynamo=True)` finds them by itself.
    """
    return {operation.overload: operation.decomposed for operation in OPERATIONS}


def available_backends() -> dict[str, str]:
    """Backend name → "ok", or the reason why it cannot be used here; the fastest first."""
    reasons = dict(_backends.availability())
    for name in reasons:
        if not any(name in operation.implementations for operation in OPERATIONS):
            reasons[name] = "this version has no kernel for it"
    return reasons


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations called in this thread inside the `with` block on backend `name`.

    "auto" takes the fastest backend that supports a call's arguments; the environment variable FAMSEG_BACKEND sets
    what holds outside of any such block. A backward runs on the backend of its forward.

    Raises:
        ValueError: no such backend.
        RuntimeError: on entry when the backend is not available here; at a call when it cannot take its arguments.
    """
    if name not in _backends.CHOICES:
        raise ValueError(f"use_backend: expected one of {', '.join(_backends.CHOICES)}, got {name!r}")
    if name != "auto" and (reason := available_backends()[name]) != "ok":
        raise RuntimeError(f"use_backend: {name!r} is not available: {reason}")
    with _backends.requesting(name):
        yield
