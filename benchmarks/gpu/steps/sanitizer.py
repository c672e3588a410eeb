"""compute-sanitizer over our kernels: memcheck (accesses beyond memory, misaligned ones), racecheck, synccheck.

Each run is a process of its own, on the benchmarks' smallest shape and a few contract cases an op, with torch's caching
allocator off: an access one element beyond a tensor would otherwise fall into the next one. Only our kernels are
instrumented.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

import famseg_kernels as fk
from benchmarks import gate
from benchmarks.gpu.dry import emulate
from benchmarks.gpu.items import Item, Options, Row, Skipped
from benchmarks.shapes import SHAPES, TINY
from benchmarks.timing import DTYPES
from famseg_kernels.registry import Operation

TOOLS = ("memcheck", "racecheck", "synccheck")
CASES = 3  # of the contract, beside the benchmarks' smallest


def items(options: Options) -> Iterator[Item]:
    dtypes = ("fp32",) if options.dry else ("bf16", "fp32")
    for tool, dtype, backend in itertools.product(TOOLS[:1] if options.dry else TOOLS, dtypes, ("cuda", "triton")):
        for operation in fk.OPERATIONS:
            if backend in operation.implementations and not (options.dry and operation is not fk.OPERATIONS[0]):
                name = operation.spec.name
                run = functools.partial(_run, tool, name, backend, dtype, options)
                yield Item(f"{tool} {name} {backend} {dtype}", run, limit=150.0)


def _run(tool: str, name: str, backend: str, dtype: str, options: Options, left: float) -> Iterator[Row]:
    mode = ("--dry", str(options.out)) if options.dry else ()
    command = [sys.executable, "-m", __spec__.name, name, backend, dtype, *mode]
    if not options.dry:
        if shutil.which("compute-sanitizer") is None:
            raise Skipped("compute-sanitizer is not on PATH: it is part of the CUDA toolkit")
        filters = [part for kernel in kernels(name, backend) for part in ("--kernel-name", f"kns={kernel}")]
        checks = ["--padding", "64", "--report-api-errors", "no"] if tool == "memcheck" else []
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *checks, *filters, *command]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.stdout)
    verdict = summary[-1] if summary else "no summary" if not options.dry else "not run under it"
    row = {"tool": tool, "op": name, "backend": backend, "dtype": dtype, "verdict": verdict}
    yield row | {"exit": done.returncode}
    if done.returncode:
        first = next((line for line in done.stdout.splitlines() if line.startswith("========= ")), verdict)
        raise RuntimeError(f"exit status {done.returncode}, {verdict}: {first}")
    if not options.dry and not summary:
        raise RuntimeError(f"{tool} said nothing of what it found")


def kernels(name: str, backend: str) -> list[str]:
    """Parts of the kernels' symbols that torch's own have not."""
    if backend == "cuda":
        return ["famseg"]
    from triton.runtime import JITFunction

    room = next(op for op in fk.OPERATIONS if op.spec.name == name).implementations[backend]
    module = importlib.import_module(room.forward.__module__ if hasattr(room.forward, "__module__") else room.__name__)
    return sorted(key for key, value in vars(module).items() if isinstance(value, JITFunction))


def main() -> None:
    """What runs under the tool: forward and gradients of a few cases. Whether they are right is not asked here."""
    name, backend, dtype, *mode = sys.argv[1:]
    if mode:
        from pathlib import Path

        emulate(Options(Path(mode[1]), True, ""))
    device = "cpu" if mode else "cuda"
    operation: Operation = next(op for op in fk.OPERATIONS if op.spec.name == name)
    for case in (TINY[name],) if mode else (SHAPES[name][0], *operation.spec.cases[:CASES]):
        args = case.arguments(DTYPES[dtype], device)
        if (reason := gate.refusal(operation, backend, args, backward=True)) is not None:
            print(f"{case.name}: {reason}")
            continue
        gate.outcome(operation, args, backend, True)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{case.name}: ran")


if __name__ == "__main__":
    main()
