"""`python -m benchmarks.ahead`: compile the Triton kernels before they are needed, on any machine.

Triton compiles a launch when it is first asked for, and `python -m benchmarks.gpu` asks for a thousand. Here the
backends are called with tensors that hold no data, and every launch goes to Triton's own compiler as a GPU's would, for
the chip that was named, in as many processes as there are cores. What comes out lies in Triton's cache
(TRITON_CACHE_DIR) under the keys that a launch looks for, so that time on a GPU goes to measuring; no GPU is needed to
fill it. A cache is of use to the same Python, the same wheel of Triton and at the same path only; a file beside it
remembers them, and `complaint` says what differs. The tests look at the same cubins: what they need of shared memory
and of a thread's stack.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import famseg_kernels as fk
from benchmarks import tune
from benchmarks.issue import sass
from benchmarks.issue.chips import SHARED_OF_BLOCK
from benchmarks.shapes import GATE_SHAPES, TINY, network_shapes, shapes_for
from famseg_kernels import launch
from famseg_kernels.testing import gate
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation

CHIPS = (80, 90)
STACK = 64  # bytes a thread may keep in local memory: a few spilled registers, no arrays
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
ODD_CASES = 3  # of the contract that run at odd addresses
REASSEMBLY = ("reassemble", "carafe", "feature_aware_upsample")
OPERATIONS = {op.spec.name: op for op in fk.OPERATIONS if "triton" in op.implementations}


class Compiled(NamedTuple):
    """A kernel as the compiler left it; registers and stack bytes of a thread, shared memory of a program."""

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int


class Chip:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels of different chips are kept apart by it

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(
    operation: Operation,
    cases: Sequence[Case],
    dtype: torch.dtype,
    capability: int,
    layout: str = "",
    launchers: bool = False,
) -> list[Compiled]:
    """Every different kernel that forward and backward of these cases launch on a chip.

    `launchers`: also what Triton compiles in C to launch each, half a second apiece; that needs the driver's library.
    """
    from triton.runtime import driver

    found: dict[int, Any] = {}

    def warm_up(kernel: Any, grid: tuple[int, ...], config: launch.Config, **arguments: Any) -> None:
        assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:]), grid
        result = kernel.warmup(grid=grid, **arguments, **config._asdict())
        if launchers and id(result) not in found:
            _build_launcher(result)
        found[id(result)] = (kernel.__name__, result, config.num_warps)

    driver.set_active(Chip(capability))
    with mock.patch.object(launch, "run", warm_up), mock.patch.object(launch, "capability", lambda _: capability):
        for case in cases:
            _call(operation, case, dtype, LAYOUTS[layout])
    return [_inspected(name, result, warps) for name, result, warps in found.values()]


def _build_launcher(result: Any) -> None:
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(result.src, result.metadata)
    except Exception as error:  # Triton's own affair: a version that does it otherwise does it at the first launch
        print(f"no launcher ahead of the launch: {type(error).__name__}: {error}", flush=True)


def _call(operation: Operation, case: Case, dtype: torch.dtype, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Forward and backward on tensors without data."""
    args = without_data(operation, case, dtype, move)
    implementation = operation.implementations["triton"]
    assert implementation.unsupported and implementation.forward and implementation.backward
    if implementation.unsupported(*args) is None:
        results = implementation.forward(*args)
        grads = [move(r) for r in results] if isinstance(results, list) else move(results)
        implementation.backward(
            grads, [t is not None and t.is_floating_point() for t in operation.flatten(args)], *args
        )


def without_data(
    operation: Operation,
    case: Case,
    dtype: torch.dtype,
    move: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
) -> Sequence[Any]:
    """A case's arguments, floating-point tensors without data; integers (ends of sequences) are read."""
    made = operation.flatten(case.make(_nothing))
    args: Sequence[Any] = dataclasses.replace(case, make=lambda _: case.make(_nothing)).arguments(dtype, "meta")
    flat = [
        move(t) if t is not None and t.is_floating_point() else m
        for m, t in zip(made, operation.flatten(args), strict=True)
    ]
    return operation.replace(args, flat)


def _nothing(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64, device="meta")


def _inspected(name: str, result: Any, warps: int) -> Compiled:
    usage = sass.usage(result.asm["cubin"])[result.metadata.name]
    return Compiled(name, usage.registers, usage.stack, result.metadata.shared, warps)


# How the arguments lie in memory; Triton compiles a kernel anew for addresses and strides that are no multiples of 16.
LAYOUTS = {"": lambda t: t, "odd": gate.shifted, "channels_last": gate.channels_last}


@functools.cache
def cases_of(source: str, operation: str) -> tuple[Case, ...]:
    """The cases of an operation from one of the places that have some."""
    if source == "contract":
        return OPERATIONS[operation].spec.cases
    if source.startswith("network"):
        _, batch, size = source.split()
        return network_shapes("famseg_tiny", int(batch), int(size)).get(operation, ())
    if source in ("gpu", "cpu"):
        return shapes_for(operation, "cuda" if source == "gpu" else "cpu")
    return {"gate": GATE_SHAPES[operation], "tiny": (TINY[operation],)}[source]


class Job(NamedTuple):
    """A case by its place: a case itself, made of closures, does not travel to another process."""

    operation: str
    source: str
    place: int
    dtype: torch.dtype
    capability: int
    configuration: Any = None  # to be tried by `benchmarks.tune`; None: the one of the table
    layout: str = ""

    @property
    def case(self) -> Case:
        return cases_of(self.source, self.operation)[self.place]

    def __str__(self) -> str:
        what = f"{self.operation} {self.case.name} {str(self.dtype).removeprefix('torch.')} sm_{self.capability}"
        what += f" {self.layout}" if self.layout else ""
        return what if self.configuration is None else f"{what} {self.configuration}"


def jobs(operations: Sequence[str], chips: Sequence[int], dtypes: Sequence[torch.dtype]) -> Iterator[Job]:
    """All that `python -m benchmarks.gpu` launches but for its tuning, each once."""
    return iter({str(job): job for job in _jobs(operations, chips, dtypes)}.values())


def _jobs(operations: Sequence[str], chips: Sequence[int], dtypes: Sequence[torch.dtype]) -> Iterator[Job]:
    for dtype, chip, name in itertools.product(dtypes, chips, operations):
        sources = ["contract", "gpu", "gate", "network 2 256"]
        sources += ["network 16 512", "cpu"] if dtype != torch.float16 else []
        for source in sources:
            for place in range(len(cases_of(source, name))):
                yield Job(name, source, place, dtype, chip)
                # The scans' kernels see no channels_last. The strips' take seconds to compile: only what is timed.
                if source == "gpu" if name == "strip_conv2d" else name in REASSEMBLY and source != "cpu":
                    yield Job(name, source, place, dtype, chip, layout="channels_last")
        for place in range(min(ODD_CASES, len(cases_of("contract", name)))):
            yield Job(name, "contract", place, dtype, chip, layout="odd")


def tuning_jobs(operations: Sequence[str], chips: Sequence[int]) -> Iterator[Job]:
    for name in operations:
        for candidate in tune.candidates(name) if name in tune.CANDIDATES else ():
            for chip, source, place in itertools.product(chips, ("gpu", "gate"), range(1, len(cases_of("gpu", name)))):
                yield Job(name, source, place, torch.bfloat16, chip, candidate)


def run(job: Job, launchers: bool = False) -> tuple[Job, list[Compiled], str]:
    """What was compiled, and the error that ended it; `launchers` as `compiled` has it."""
    try:
        operation = OPERATIONS[job.operation]
        what = (operation, [job.case], job.dtype, job.capability, job.layout, launchers)
        if job.configuration is None:
            return job, compiled(*what), ""
        module = importlib.import_module(tune.CANDIDATES[job.operation][0])
        with tune.configured(module, job.capability, job.configuration):
            return job, compiled(*what), ""
    except Exception as error:  # the others are compiled all the same
        return job, [], f"{type(error).__name__}: {error}"


# --- a cache that was made elsewhere ------------------------------------------------------------------

STAMP = "famseg-ahead.json"


def cache_folder() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def identity(capability: int) -> dict[str, str]:
    """What Triton's keys and entries depend on: all of it the same, or every launch is compiled anew."""
    from triton.runtime import cache

    kernels = hashlib.sha256()
    for path in sorted(Path(fk.__file__).parent.rglob("*.py")):
        kernels.update(path.read_bytes())
    return {
        "chip": f"sm_{capability}",
        "Python": f"{sys.implementation.cache_tag} {platform.machine()}",
        "wheel of Triton": hashlib.sha256(cache.triton_key().encode()).hexdigest()[:16],  # hashes its compiler
        "path of the cache": str(cache_folder().resolve()),  # entries name their files by it
        "kernels": kernels.hexdigest()[:16],
    }


def stamp(chips: Sequence[int]) -> None:
    """Remember for whom the cache was made."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).write_text(json.dumps([identity(chip) for chip in chips], indent=1))


def complaint(capability: int) -> str | None:
    """Why the cache that lies here is of no use, None if it is, "" if none was made beforehand."""
    path = cache_folder() / STAMP
    if not path.exists():
        return ""
    made, mine = json.loads(path.read_text()), identity(capability)
    if mine in made:
        return None
    closest = max(made, key=lambda other: sum(other[key] == mine[key] for key in mine))
    differ = [f"{key} {closest[key]}, here {mine[key]}" for key in mine if closest[key] != mine[key]]
    return f"made for another {'; another '.join(differ)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--capability", type=int, action="append", choices=CHIPS, help="90: H100, H200; 80: A100 (default both)")
    add("--op", action="append", choices=sorted(OPERATIONS), help="only this operation (may be repeated)")
    add("--dtype", action="append", choices=[str(d).removeprefix("torch.") for d in DTYPES], help="default all")
    add("--tune", action="store_true", help="also every configuration that benchmarks.tune tries")
    add("--jobs", type=int, default=os.cpu_count(), help="processes (default one a core)")
    options = parser.parse_args()
    if "TRITON_INTERPRET" in os.environ:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    operations, chips = options.op or list(OPERATIONS), options.capability or CHIPS
    dtypes = [getattr(torch, name) for name in options.dtype] if options.dtype else DTYPES
    todo = [*jobs(operations, chips, dtypes), *(tuning_jobs(operations, chips) if options.tune else ())]
    kernels = failures = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for job, results, error in pool.imap_unordered(run, todo):
            kernels += len(results)
            large = [r for r in results if r.shared > SHARED_OF_BLOCK[job.capability]]
            # A configuration that does not fit is no failure: tune passes over it.
            failures += job.configuration is None and bool(error or large)
            for what, lines in (("does not fit", large), ("spills", [r for r in results if r.stack > STACK])):
                for line in lines:
                    print(f"{job}: {what}: {line}", flush=True)
            if error:
                print(f"{job}: {error}", flush=True)
    if not options.op and not options.dtype:  # a part is nothing that a launch could count on
        stamp(chips)
    print(f"{kernels} kernels of {len(todo)} cases compiled, {failures} cases failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
