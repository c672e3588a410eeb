"""Where Triton kernels are launched: one door for all rooms.

Every launch goes through `run`, with its configuration decided by plain code from shapes, dtype and `capability`.
So a test can stand at the door, call a backend with tensors that hold no data, and compile exactly what would be
launched on a GPU that is not there.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """How many warps run a program, how deep its loads are pipelined, that a * b + c is one instruction, and how many
    registers a thread may have.

    The third is said because Triton 3.10 changes its default, which would halve what FMA units do.
    """

    num_warps: int
    num_stages: int = 2
    enable_fp_fusion: bool = True
    maxnreg: int | None = None


def run(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Launch `kernel` on the current device, all of its `arguments` by name: of so many, two are soon swapped."""
    kernel[grid](**arguments, **config._asdict())


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one: Triton launches there, and it need not be the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability × 10 (80 for A100, 90 for H100 and H200); 0 where there is no GPU: the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
