"""`python -m famseg_kernels`: what is installed, what this machine offers, which backend runs what and why not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import famseg_kernels as fk
from famseg_kernels import backends


def main() -> None:
    print(f"famseg_kernels {fk.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for package in ("triton", "mamba-ssm", "causal-conv1d"):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} is not installed")
    native, reason = backends.native_module("_cpu")
    threads = torch.get_num_threads()
    if native is None:
        print(f"CPU: {platform.machine()}, {threads} threads; {reason}")
    else:
        usable = ", ".join(native.available_isas())  # type: ignore[attr-defined]
        print(f"CPU: {platform.machine()}, {threads} threads; instruction sets {usable}; using {native.isa()}")  # type: ignore[attr-defined]
    if backends.gpu_reason() == "ok":
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            print(f"GPU {index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    else:
        print(f"GPU: {backends.gpu_reason()}")
    print("Backends, the fastest first:")
    for name, reason in fk.available_backends().items():
        operations = [op.spec.name for op in fk.OPERATIONS if name in op.implementations]
        print(f"  {name:10} {reason}" + (f"  ({', '.join(operations)})" if operations else ""))


if __name__ == "__main__":
    main()
