"""What is here: GPU, driver, versions, backends, and what is missing for the steps to come."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

import torch

import famseg_kernels as fk
from benchmarks import measure, peers
from benchmarks.gpu.items import Item, Options, Row
from famseg_kernels.backends import native_module

# What a step needs beside torch, Triton and NumPy.
WANTED = {
    "peers": (peers.MAMBA, peers.MMCV),
    "network": ("segmentation_models_pytorch",),
    "training": ("albumentations", "jsonargparse", "cv2", "scipy", "matplotlib", "PIL", "rich", "yaml"),
}
GIGABYTE = 1e9


def items(options: Options) -> Iterator[Item]:
    yield Item("versions", lambda _: [_named("versions", measure.provenance(options.device) | _tools())])
    yield Item("gpu", lambda _: _gpu(options))
    for backend in ("cuda", "triton"):
        yield Item(f"backend {backend}", functools.partial(_backend, backend, options))
    for step, modules in WANTED.items():
        for module in modules:
            yield Item(f"{module} for {step}", functools.partial(_module, module))


def _named(what: str, values: dict[str, object]) -> Row:
    return {"what": what, "value": ", ".join(f"{key} {value}" for key, value in values.items() if value != "")}


def _tools() -> dict[str, str]:
    found = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    for tool, pattern in (("nvcc", r"release ([\d.]+)"), ("compute-sanitizer", r"Version ([\d.]+)")):
        path = shutil.which(tool)
        text = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout if path else ""
        match = re.search(pattern, text)
        found[tool] = match[1] if match else "not on PATH"
    return found | {name: measure.installed_version(name) or "not installed" for name in ("numpy", "pytest")}


def _gpu(options: Options) -> Iterator[Row]:
    module, reason = native_module("_cuda")
    if module is not None:
        facts = {
            "machine code for": " ".join(f"sm_{arch}" for arch in module.archs()),  # type: ignore[attr-defined]
            "CUDA runtime": module.runtime_version(),  # type: ignore[attr-defined]
            "driver runs up to": module.driver_version()[0],  # type: ignore[attr-defined]
        }
        yield _named("CUDA module", facts)
    else:
        yield {"what": "CUDA module", "value": reason}
    for index in range(0 if options.dry else torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GB": round(properties.total_memory / GIGABYTE, 1),
        }
        yield _named(f"GPU {index}", facts)


def _backend(name: str, options: Options, _: float) -> Iterator[Row]:
    reason = fk.available_backends()[name]
    yield {"what": f"backend {name}", "value": reason}
    if reason != "ok" and not options.dry:
        raise RuntimeError(reason)


def _module(name: str, _: float) -> Iterator[Row]:
    yield {"what": name, "value": peers.missing_module(name) or version_of(name)}


def version_of(module: str) -> str:
    found = getattr(importlib.import_module(module.split(".")[0]), "__version__", None)
    return str(found) if found else "installed"
