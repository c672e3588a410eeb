"""Compile every Triton kernel that the later steps launch, on all cores, so that they do nothing but run.

What a cache made by `python -m benchmarks.ahead` holds takes no time; where that cache is of no use here, it says why.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator

import torch

from benchmarks import ahead
from benchmarks.gpu.dry import build_emulation
from benchmarks.gpu.items import Item, Options, Row, Skipped
from benchmarks.issue.chips import SHARED_OF_BLOCK
from famseg_kernels import launch


def items(options: Options) -> Iterator[Item]:
    capability = 90 if options.dry else _capability()
    yield Item("cache", functools.partial(_cache, capability))
    if options.dry:
        yield Item("emulation of CUDA", functools.partial(_emulation, options), limit=300.0)
        jobs = [ahead.Job(name, "tiny", 0, torch.bfloat16, capability) for name in ahead.OPERATIONS]
    else:
        jobs = list(ahead.jobs(list(ahead.OPERATIONS), [capability], ahead.DTYPES))
    for job in jobs:
        yield Item(str(job), functools.partial(_compile, job, not options.dry), limit=180.0)


def _capability() -> int:
    """Of the GPU, asked of the driver's tool if that is sure to mean it: a CUDA context a process would take memory."""
    if shutil.which("nvidia-smi") is None or "CUDA_VISIBLE_DEVICES" in os.environ:
        return launch.capability(torch.device("cuda"))
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    major, minor = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0].split(".")
    return 10 * int(major) + int(minor)


def _cache(capability: int, _: float) -> Iterator[Row]:
    complaint = ahead.complaint(capability)
    text = {None: "made for this machine", "": "none was made beforehand"}.get(complaint, f"of no use: {complaint}")
    yield {"what": "cache", "value": text}


def _emulation(options: Options, _: float) -> Iterator[Row]:
    from tests import emulated_cuda  # a GPU does not need it, and has perhaps a `tests` of another package

    if (reason := emulated_cuda.missing()) is not None:
        raise Skipped(reason)
    yield {"what": "emulation of CUDA", "value": str(build_emulation(options.out))}


def _compile(job: ahead.Job, launchers: bool, _: float) -> Iterator[Row]:
    _, kernels, error = ahead.run(job, launchers)
    for kernel in kernels:
        yield {"what": str(job)} | kernel._asdict()
    if error:
        raise RuntimeError(error)
    for kernel in kernels:
        limit = SHARED_OF_BLOCK.get(job.capability)
        if limit is not None and kernel.shared > limit:
            raise RuntimeError(f"{kernel.kernel} needs {kernel.shared} bytes of shared memory, the chip has {limit}")
