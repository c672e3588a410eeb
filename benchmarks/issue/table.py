"""One row a kernel, and their sums: an operation, its forward and its forward with backward."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.issue import chips, cuda, machine, model, program, sass, targets
from benchmarks.issue.chips import Chip
from benchmarks.issue.launches import FIRST, Launch, triton_launches
from benchmarks.issue.model import Work
from benchmarks.issue.sass import Refusal
from benchmarks.issue.steps import Constants
from benchmarks.issue.targets import Target
from benchmarks.timing import DTYPES
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation

Row = dict[str, Any]
OPERATIONS = targets.OPERATIONS
BACKENDS = ("triton", "cuda")
UNITS = (
    *("issue", "fma", "alu", "tensor", "xu", "shared memory", "fp64", "fp16", "uniform", "L2 port"),
    *("latency", "L2", "memory"),
)
DTYPES_OF_TABLE = ("bf16", "fp32")
SAMPLE = 5  # blocks of a launch that are run


def sample(grid: tuple[int, int, int], most: int = SAMPLE) -> list[tuple[int, int, int]]:
    """The first and the last block, and others spread over the grid so that no period of tiles is favoured."""
    total, golden = math.prod(grid), 0.6180339887498949
    inner = (int(total * (i * golden % 1)) for i in range(1, most - 1))
    places = sorted({0, total - 1, *inner})
    return [(i % grid[0], i // grid[0] % grid[1], i // grid[0] // grid[1]) for i in places]


def counted(launch: Launch, capability: int) -> tuple[Work, sass.Usage]:
    """What an average block of the launch does. Kept in the cache: it takes seconds.

    Raises:
        Refusal: an instruction or an access is not understood.
    """
    text = json.dumps(
        [_version(), launch.symbol, capability, launch.grid, launch.threads, SAMPLE, sorted(launch.tensors.items())]
    )
    key = hashlib.sha256(text.encode() + launch.parameters + launch.cubin).hexdigest()[:32]
    path = cuda.cache() / f"{key}.json"
    if path.exists():
        found = json.loads(path.read_text())
        if "refusal" in found:
            raise Refusal(found["refusal"])
        work = Work(**found["work"])
        work.loaded, work.stored = ({int(k): v for k, v in d.items()} for d in (work.loaded, work.stored))
        return work, sass.Usage(*found["usage"])
    try:
        work, usage = _counted(launch, capability)
    except Refusal as refusal:
        path.write_text(json.dumps({"refusal": str(refusal)}))
        raise
    path.write_text(json.dumps({"work": dataclasses.asdict(work), "usage": list(usage)}))
    return work, usage


@functools.cache
def _version() -> str:
    sources = hashlib.sha256()
    for name in ("arithmetic", "chips", "forms", "machine", "memory", "model", "program", "sass", "steps"):
        sources.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return sources.hexdigest()


def _counted(launch: Launch, capability: int) -> tuple[Work, sass.Usage]:
    kernel = sass.disassemble(launch.cubin, launch.symbol)
    literals = sass.literals(launch.cubin, launch.symbol)
    constants = Constants(capability, launch.threads, launch.grid, launch.parameters, literals)
    bases = sorted(launch.tensors)
    run = machine.Machine(program.analysed(kernel), constants, bases).run(sample(launch.grid), launch.threads // 32)
    work = model.work(run, capability, math.prod(launch.grid), launch.tensors)
    sass.forget()
    for base in {*work.loaded, *work.stored}:
        if base < FIRST:
            raise Refusal("an access outside all tensors")
    if work.unknown > 0.01:
        raise Refusal(f"{work.unknown:.0%} of the accesses have addresses that depend on data")
    return work, sass.usage(launch.cubin)[launch.symbol]


def launches(
    backend: str, operation: Operation, case: Case, dtype: torch.dtype, capability: int
) -> tuple[list[Launch], list[Launch]]:
    made = {"triton": triton_launches, "cuda": cuda.cuda_launches}[backend]
    return made(operation, case, dtype, capability)


def rows_of(
    backend: str, operation: Operation, case: Case, dtype: torch.dtype, some: Sequence[Chip] = chips.CHIPS
) -> Iterator[Row]:
    """Of every kernel that forward and backward launch, on every chip; where a call is refused, a row that says why."""
    call = {"op": operation.spec.name, "case": case.name, "dtype": name_of(dtype), "backend": backend}
    for capability, alike in itertools.groupby(some, key=lambda chip: chip.capability):
        same = list(alike)
        try:
            passes = launches(backend, operation, case, dtype, capability)
        except Refusal as refusal:
            for name, chip in itertools.product(("fwd", "bwd"), same):
                none = {"us": math.nan, "binds": "refused", "refusal": str(refusal)}
                yield call | {"pass": name, "launch": 0, "kernel": "-", "chip": chip.name} | none
            continue
        for name, made in zip(("fwd", "bwd"), passes, strict=True):
            for place, launch in enumerate(made):
                known = counted_or_refused(launch, capability)
                where = call | {"pass": name, "launch": place, "kernel": launch.kernel}
                for chip in same:
                    yield where | {"chip": chip.name} | predicted(launch, known, chip)


Counted = tuple[Work, sass.Usage]


def counted_or_refused(launch: Launch, capability: int) -> Counted | Refusal | None:
    if launch.torch_bytes:
        return None
    try:
        return counted(launch, capability)
    except Refusal as refusal:
        return refusal


def predicted(launch: Launch, known: Counted | Refusal | None, chip: Chip) -> Row:
    if known is None:  # torch's: at the bandwidth of a copy and all of a unit's rate, which a good kernel reaches
        unit, rate = ("tensor", chips.TENSOR) if launch.torch_tensor_cores else ("fma", chips.FMA)
        bounds = {
            "memory": 1e6 * launch.torch_bytes / (chip.memory * chips.COPY),
            unit: 1e6 * launch.torch_flops / (2 * rate[chip.capability] * chip.processors * chip.clock),
        }
        binds = max(bounds, key=lambda name: bounds[name])
        moved = {"MB": launch.torch_bytes / 1e6, "refusal": ""}
        return {"us": bounds[binds], "binds": binds, **{f"{name} us": us for name, us in bounds.items()}, **moved}
    row: Row = {"blocks": math.prod(launch.grid), "threads": launch.threads, "refusal": ""}
    try:
        if isinstance(known, Refusal):
            raise known
        work, usage = known
        shared = launch.shared
        if launch.backend == "cuda" and usage.shared:  # static; on sm_90 the compiler counts the driver's with it
            shared += usage.shared - (chips.RESERVED if chip.capability == 90 else 0)
        row |= {"registers": usage.registers, "shared": shared}
        found = model.predict(chip, work, launch.grid, launch.tensors, launch.threads, usage.registers, shared)
    except Refusal as refusal:
        return row | {"us": math.nan, "binds": "refused", "refusal": str(refusal)}
    blocks = row["blocks"]
    return row | {
        "us": found.seconds * 1e6,
        "binds": found.binds,
        **{f"{unit} us": found.bounds[unit] * 1e6 for unit in UNITS},
        "blocks a multiprocessor": found.resident,
        "MB": found.memory_bytes / 1e6,
        "instructions": work.instructions * blocks,
        "tensor GFLOP": work.tensor_flops * blocks / 1e9,
        "FMA GFLOP": work.fma_flops * blocks / 1e9,
        "trips to memory": work.trips,
    }


def summed(rows: Sequence[Row]) -> list[Row]:
    """One row for forward, for backward and for both: the sum of their launches, one after the other."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[k] for k in ("op", "case", "dtype", "backend", "chip"))].append(row)
    found = []
    for (op, case, dtype, backend, chip), members in groups.items():
        for passed in targets.PASSES:
            some = [row for row in members if row["pass"] in passed.split("+")]
            where = {"op": op, "case": case, "dtype": dtype, "backend": backend, "chip": chip, "pass": passed}
            of_work = targets.bounds(op, case, dtype, passed, _chip(chip))
            found.append(where | _summed(some, of_work, targets.of(op, case, dtype, passed)))
    return found


def _summed(some: Sequence[Row], of_work: dict[str, float], target: Target | None) -> Row:
    shares: dict[str, float] = defaultdict(float)
    for row in some:
        shares[row["binds"]] += row["us"]
    us = sum(row["us"] for row in some)
    refused = list(dict.fromkeys(f"{row['kernel']}: {row['refusal']}" for row in some if row["refusal"]))
    binds = "refused" if refused else max(shares, key=lambda what: shares[what])
    bound, unit = targets.least(of_work)
    reached = math.nan if target is None else 100 * of_work[target.of] / us
    return {
        "launches": len(some),
        "us": us,
        "binds": binds,
        "share of it %": math.nan if refused else 100 * max(shares.values()) / us,
        "MB": sum(row.get("MB", math.nan) for row in some),
        "bound us": bound,
        "bound by": unit,
        "% of bound": 100 * bound / us,
        "target": "" if target is None else f"{target.percent} % of {target.of}",
        "reached %": reached,
        "verdict": "" if target is None or refused else "met" if reached >= target.percent else f"{binds} binds",
        "refusal": "; ".join(refused),
    }


def _chip(name: str) -> Chip:
    return next(chip for chip in chips.CHIPS if chip.name == name)


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
