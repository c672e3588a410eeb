"""Launch configurations of the Triton kernels: the table's, and those that differ in one field; a shape an item.

`python -m benchmarks.tune` tries every combination, in an hour.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import ahead, tune
from benchmarks.gpu.items import Item, Options, Row
from benchmarks.gpu.worker import die_with_parent
from benchmarks.shapes import GATE_SHAPES, TINY, shapes_for
from benchmarks.timing import without_tf32
from famseg_kernels import launch
from famseg_kernels.testing.case import Case

SECONDS = 0.5


def items(options: Options) -> Iterator[Item]:
    without_tf32()
    for name in tune.CANDIDATES:
        for place in range(1) if options.dry else range(1, len(shapes_for(name, "cuda"))):
            case = TINY[name] if options.dry else shapes_for(name, "cuda")[place]
            yield Item(f"{name} {case.name}", functools.partial(_rows, name, place, case, options), limit=90.0)


@functools.cache
def _pool() -> Any:
    return multiprocessing.get_context("spawn").Pool(os.cpu_count(), initializer=die_with_parent)


def _rows(name: str, place: int, case: Case, options: Options, _: float) -> Iterator[Row]:
    capability = launch.capability(torch.device(options.device))
    configurations = tune.neighbours(name, capability)
    small = case if options.dry else GATE_SHAPES[name][place]
    if options.dry:
        configurations = configurations[:2]
    else:
        sources = itertools.product(configurations, ("gpu", "gate"))
        jobs = [ahead.Job(name, source, place, torch.bfloat16, capability, f) for f, source in sources]
        # Compiled on all cores, into the cache; one by one it would take longer than the measuring.
        for job, _, error in _pool().imap_unordered(ahead.run, jobs):
            if error:
                print(f"{job}: {error}", flush=True)
    seconds = 0.0 if options.dry else SECONDS
    yield from tune.measured(name, case, small, configurations, options.device, capability, seconds)
