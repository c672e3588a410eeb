"""compute-sanitizer over our kernels: memcheck (accesses beyond memory, misaligned ones), racecheck, synccheck.

Each run is a process of its own, on the benchmarks' smallest shape and a few contract cases an op, with torch's caching
allocator off: an access one element beyond a tensor would otherwise fall into the next one. Only our kernels are
instrumented.
"""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import famseg_kernels as fk
from benchmarks.gpu.dry import emulate
from benchmarks.gpu.items import Item, Options, Row, Skipped
from benchmarks.gpu.worker import program
from benchmarks.shapes import SHAPES, TINY
from benchmarks.timing import DTYPES
from famseg_kernels.testing import gate

TOOLS = ("memcheck", "racecheck", "synccheck")
CASES = 3  # of the contract, beside the benchmarks' smallest


def items(options: Options) -> Iterator[Item]:
    dtypes = ("fp32",) if options.dry else ("bf16", "fp32")
    for tool, dtype, backend in itertools.product(TOOLS[:1] if options.dry else TOOLS, dtypes, ("cuda", "triton")):
        yield Item(f"{tool} {backend} {dtype}", functools.partial(_run, tool, backend, dtype, options), limit=240.0)


def _run(tool: str, backend: str, dtype: str, options: Options, _: float) -> Iterator[Row]:
    mode = ("--dry", str(options.out)) if options.dry else ()
    command = [sys.executable, "-m", __name__, backend, dtype, *mode]
    if not options.dry:
        if shutil.which("compute-sanitizer") is None:
            raise Skipped("compute-sanitizer is not on PATH: it is part of the CUDA toolkit")
        filters = [part for kernel in kernels(backend) for part in ("--kernel-name", kernel)]
        checks = ["--padding", "64", "--report-api-errors", "no"] if tool == "memcheck" else []
        # A port of its own for each that runs at the same time.
        port = str(49152 + 32 * ("fp32", "bf16").index(dtype) + 64 * ("cuda", "triton").index(backend))
        general = ["--error-exitcode", "9", "--target-processes", "application-only", "--port", port]
        command = ["compute-sanitizer", "--tool", tool, *general, *checks, *filters, *command]
    status, printed = program(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    verdict = "not run under it" if options.dry else verdict_of(printed)
    ran = len(re.findall(r"^ran ", printed, re.MULTILINE))
    yield {"tool": tool, "backend": backend, "dtype": dtype, "cases": ran, "verdict": verdict, "exit": status}
    # Warnings of races count, whatever the exit status says of them.
    if status or not ran or not (options.dry or verdict.startswith("0 ")):
        raise RuntimeError(f"exit status {status}, {ran} cases ran, {verdict}: {first_finding(printed)}")


def verdict_of(printed: str) -> str:
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", printed)
    return found[-1] if found else "no summary"


def first_finding(printed: str) -> str:
    """The first line of the tool's own, its banner aside."""
    lines = re.findall(r"^=+ +(\S.*)", printed, re.MULTILINE)
    return next((line for line in lines if "COMPUTE-SANITIZER" not in line), "nothing more")


def kernels(backend: str) -> list[str]:
    """Filters of the tool: our kernels' symbols, or what is in all of them and in none of torch's."""
    if backend == "cuda":
        return ["kns=famseg"]
    from triton.runtime import JITFunction

    for operation in fk.OPERATIONS:
        operation.implementations["triton"].forward  # noqa: B018 - imports the room's module, if nobody has
    modules = [m for name, m in sys.modules.items() if name.startswith("famseg_kernels.") and ".triton." in name]
    return sorted({f"kne={name}" for m in modules for name, value in vars(m).items() if isinstance(value, JITFunction)})


def main() -> None:
    """What runs under the tool: forward and gradients of a few cases. Whether they are right is not asked here."""
    backend, dtype, *mode = sys.argv[1:]
    if mode:
        emulate(Options(Path(mode[1]), True, ""))
    device = "cpu" if mode else "cuda"
    for operation in fk.OPERATIONS:
        name = operation.spec.name
        if backend not in operation.implementations:
            continue
        for case in (TINY[name],) if mode else (SHAPES[name][0], *operation.spec.cases[:CASES]):
            args = case.arguments(DTYPES[dtype], device)
            if (reason := gate.refusal(operation, backend, args, backward=True)) is not None:
                print(f"skipped {name} {case.name}: {reason}", flush=True)
                continue
            gate.outcome(operation, args, backend, True)
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"ran {name} {case.name}", flush=True)


if __name__ == "__main__":
    main()
