"""`python -m benchmarks.tune`: measure the launch configurations of the Triton kernels and print the table to paste.

The kernels never tune themselves while they run: gradients would depend on a stopwatch. Instead each room's
triton/launch.py holds one configuration for a chip, and this command says which, trying all combinations of its fields;
the tuning step of `python -m benchmarks.gpu` tries the table's configuration and those that differ from it in one
field.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import famseg_kernels as fk
from benchmarks import measure
from benchmarks.gpu.summary import best
from benchmarks.shapes import GATE_SHAPES, shapes_for
from benchmarks.timing import arguments, copied
from famseg_kernels import launch
from famseg_kernels.testing import gate
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation

# Operation → the module that holds its table, and the values to try of every field of its Configuration.
CANDIDATES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "strip_conv2d": (
        "famseg_kernels.strip_conv.triton",
        {"rows": (16, 32, 64), "gradient_rows": (1, 2, 4), "warps": (1, 2, 4)},
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
        {"channels": (8, 16, 32), "rows": (1, 2, 4), "num_warps": (2, 4)},
    ),
}


FINALISTS = 8  # that are timed against each other


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", action="append", choices=sorted(CANDIDATES), help="only this one (may be repeated)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measuring time a shape")
    options = parser.parse_args()
    if (reason := fk.available_backends()["triton"]) != "ok":
        parser.exit(1, f"nothing to tune here: {reason}\n")
    capability = launch.capability(torch.device("cuda"))
    for name in options.op or CANDIDATES:
        rows: list[dict[str, Any]] = []
        for case, small in zip(shapes_for(name, "cuda")[1:], GATE_SHAPES[name][1:], strict=True):
            rows += measured(name, case, small, candidates(name), "cuda", capability, options.seconds)
            fastest = min((row for row in rows if row["case"] == case.name), key=lambda row: row["ms"])
            print(f"{name} {case.name}: {fastest['ms']:.4f} ms with {fastest['configuration']}", flush=True)
        print(f"{CANDIDATES[name][0]}.CONFIGURATIONS[{capability}] = {best(rows)[0]}")


def candidates(name: str) -> list[Any]:
    """All configurations to try for an operation: every combination."""
    path, fields = CANDIDATES[name]
    return [importlib.import_module(path).Configuration(*values) for values in itertools.product(*fields.values())]


def neighbours(name: str, capability: int) -> list[Any]:
    """The configuration of the table, first, and those that differ from it in one field."""
    path, fields = CANDIDATES[name]
    table = importlib.import_module(path).CONFIGURATIONS
    now = table.get(capability, table[0])
    return [now, *(now._replace(**{f: v}) for f, values in fields.items() for v in values if v != getattr(now, f))]


def measured(
    name: str, case: Case, small: Case, configurations: list[Any], device: str, capability: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each configuration that the chip can run: milliseconds of forward and backward in bf16.

    All are checked against the fp64 reference on `small`, fewer images of the same shape, then timed once each; the
    fastest few then take turns for `seconds`, and their rows tell the median of that.

    Raises:
        AssertionError: after the rows of the others: a configuration gives a wrong result.
    """
    operation = _operation(name)
    module = importlib.import_module(CANDIDATES[name][0])
    checked = small.arguments(torch.bfloat16, device)
    right = gate.expected(operation, checked)
    sets = [arguments(case, torch.bfloat16, device)]
    if device != "cpu":
        moved = operation.spec.moved_bytes(*sets[0])
        sets += [copied(sets[0]) for _ in range(measure.buffers_beyond_cache(moved, device) - 1)]
    calls: dict[str, measure.Call] = {}
    wrong: list[str] = []
    for configuration in configurations:
        with configured(module, capability, configuration):
            try:
                gate.compare(operation, "triton", gate.outcome(operation, checked, "triton", True), right)
                call = _call(operation, module, capability, configuration, sets)
                call(0)
            except AssertionError as error:
                wrong.append(f"{configuration}: {error}")
                continue
            except Exception as error:
                # Triton names what does not fit only by raising.
                if type(error).__name__ != "OutOfResources":
                    raise
                print(f"skipped {configuration}: {error}")
                continue
        calls[str(configuration)] = call
    times = measure.interleaved(calls, device, 0.0, len(sets))
    finalists = sorted(times, key=lambda key: times[key].median)[:FINALISTS]
    times |= measure.interleaved({key: calls[key] for key in finalists}, device, seconds, len(sets))
    where = {"op": name, "case": case.name}
    for key, time in times.items():
        yield where | {"configuration": key, "ms": round(time.median, 4)}
    if wrong:
        raise AssertionError("; ".join(wrong))


def _call(
    operation: Operation, module: Any, capability: int, candidate: Any, sets: list[Any]
) -> Callable[[int], object]:
    implementation = operation.implementations["triton"]
    needs = [t is not None for t in operation.flatten(sets[0])]

    def run(number: int) -> object:
        with configured(module, capability, candidate):
            y = implementation.forward(*sets[number])
            return implementation.backward(y, needs, *sets[number])

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
