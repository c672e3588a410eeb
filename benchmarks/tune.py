"""`python -m benchmarks.tune`: measure the launch configurations of the Triton kernels and print the table to paste.

The kernels never tune themselves while they run: gradients would depend on a stopwatch. Instead each room's triton.py
holds one configuration for a chip, and this command says which. Every candidate passes the correctness gate, then all
take turns on the benchmark shapes in bf16, forward and backward; the best is the one with the smallest geometric mean
of time over the shape's fastest. Where the interpreter stands in for a GPU (TRITON_INTERPRET=1) it goes through the
same steps once, on the smallest shape: a dry run.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import famseg_kernels as fk
from benchmarks import gate, measure
from benchmarks.shapes import shapes_for
from famseg_kernels import backends, launch
from famseg_kernels.registry import Case, Operation

# Operation → the module that holds its table, and the values to try of every field of its Configuration.
CANDIDATES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "strip_conv2d": (
        "famseg_kernels.strip_conv.triton",
        {"frame": (64, 128), "steps": (4, 8), "rows_per_warp": (8, 16, 32), "num_stages": (1, 2, 3)},
    ),
    "ssd_scan_2d": (
        "famseg_kernels.ssd_scan.triton",
        {
            "chunk": (32, 64),
            "tile": (32, 64),
            "backward_chunk": (32, 64),
            "backward_tile": (32, 64),
            "image": (0, 600),
            "num_stages": (1, 2, 3),
        },
    ),
    "reassemble": (
        "famseg_kernels.reassembly.triton",
        {"channels": (64, 128, 256), "rows": (1, 4, 8), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", action="append", choices=sorted(CANDIDATES), help="only this one (may be repeated)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measuring time a shape")
    options = parser.parse_args()
    if (reason := fk.available_backends()["triton"]) != "ok":
        parser.exit(1, f"nothing to tune here: {reason}\n")
    device = "cpu" if backends.TRITON_INTERPRETS else "cuda"
    capability = launch.capability(torch.device(device))
    for name in options.op or CANDIDATES:
        path = CANDIDATES[name][0]
        module = importlib.import_module(path)
        best = tune(_operation(name), module, candidates(name), device, capability, options.seconds)
        print(f"{path}.CONFIGURATIONS[{capability}] = {best}")


def candidates(name: str) -> list[Any]:
    """The configurations to try for an operation."""
    path, fields = CANDIDATES[name]
    return [importlib.import_module(path).Configuration(*values) for values in itertools.product(*fields.values())]


def tune(operation: Operation, module: Any, candidates: list[Any], device: str, capability: int, seconds: float) -> Any:
    """The candidate with the smallest geometric mean of slowdowns over the shapes' fastest candidates."""
    dry = device == "cpu"
    candidates = candidates[:1] if dry else candidates
    slowdown = dict.fromkeys(candidates, 0.0)
    cases = shapes_for(operation.spec.name, device)
    for case in cases[:1] if dry else cases[1:]:
        times = _times(operation, module, candidates, case, device, capability, seconds)
        fastest = min(times.values())
        for candidate in candidates:
            slowdown[candidate] += math.log(times.get(candidate, math.inf) / fastest)
        print(f"{operation.spec.name} {case.name}: {fastest:.4f} ms with {min(times, key=times.__getitem__)}")
    return min(slowdown, key=slowdown.__getitem__)


def _times(
    operation: Operation, module: Any, candidates: list[Any], case: Case, device: str, capability: int, seconds: float
) -> dict[Any, float]:
    """Median milliseconds of forward and backward of each candidate that the chip can run."""
    sets = measure.buffers_beyond_cache(operation.spec.moved_bytes(*case.arguments(torch.bfloat16)), device)
    arguments = [case.arguments(torch.bfloat16, device) for _ in range(1 if device == "cpu" else sets)]
    calls: dict[str, measure.Call] = {}
    for candidate in candidates:
        with configured(module, capability, candidate):
            try:
                gate.check(operation, arguments[0], "triton")
            except Exception as error:
                # Triton names what does not fit only by raising; a wrong result must stop the run.
                if type(error).__name__ != "OutOfResources":
                    raise
                print(f"skipped {candidate}: {error}")
                continue
        calls[str(candidate)] = _call(operation, module, capability, candidate, arguments)
    if device == "cpu":
        for call in calls.values():
            call(0)
        return dict.fromkeys(candidates, 1.0)  # the interpreter's time says nothing
    times = measure.interleaved(calls, device, seconds, len(arguments))
    return {candidate: times[str(candidate)].median for candidate in candidates if str(candidate) in times}


def _call(
    operation: Operation, module: Any, capability: int, candidate: Any, arguments: list[Any]
) -> Callable[[int], object]:
    implementation = operation.implementations["triton"]
    needs = [t is not None for t in operation.flatten(arguments[0])]

    def run(number: int) -> object:
        with configured(module, capability, candidate):
            y = implementation.forward(*arguments[number])
            return implementation.backward(y, needs, *arguments[number])

    return run


@contextmanager
def configured(module: Any, capability: int, candidate: Any) -> Iterator[None]:
    """Let the module's table hold `candidate` for this chip."""
    before = dict(module.CONFIGURATIONS)
    module.CONFIGURATIONS[capability] = candidate
    try:
        yield
    finally:
        module.CONFIGURATIONS.clear()
        module.CONFIGURATIONS.update(before)


def _operation(name: str) -> Operation:
    return next(operation for operation in fk.OPERATIONS if operation.spec.name == name)


if __name__ == "__main__":
    main()
