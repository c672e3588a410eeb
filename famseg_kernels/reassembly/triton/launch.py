"""What is launched for a call of reassemble or carafe, and how it is cut into programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from famseg_kernels import backends, checks, launch
from famseg_kernels.reassembly.problem import Problem, chain, operations
from famseg_kernels.reassembly.triton.kernels import (
    Blocks,
    Image,
    Sizes,
    reassemble_forward,
    source_gradient,
    weight_gradient,
)


class Configuration(NamedTuple):
    """What `python -m benchmarks.tune` tunes. Shapes of the kernels' tiles follow from it in `_Plan`."""

    channels: int  # of a program, at most
    rows: int  # of the image, one after the other
    num_warps: int
    num_stages: int


# By compute capability × 10; 0 stands for every other chip and for the interpreter.
CONFIGURATIONS = {
    80: Configuration(channels=128, rows=4, num_warps=4, num_stages=2),
    90: Configuration(channels=128, rows=4, num_warps=4, num_stages=2),
    0: Configuration(channels=128, rows=4, num_warps=4, num_stages=2),
}
BLOCK = 16  # source pixels of a block: the narrowest that tensor cores take wastes least of a band
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Plan:
    """How one call is cut into programs, for forward and backward."""

    def __init__(self, problem: Problem) -> None:
        softmax, x, _, kernel_size, scale, groups = problem
        n, c, height, width = x.shape
        self.sizes = Sizes(c // groups, groups, height, width)
        tuned = CONFIGURATIONS.get(launch.capability(x.device), CONFIGURATIONS[0])
        self.config = launch.Config(tuned.num_warps, tuned.num_stages)
        # fp32 factors take twice the registers, and their parts as much again.
        most = tuned.channels // (4 if x.dtype == torch.float32 else 1)
        self.c_block = max(16, min(most, triton.next_power_of_2(self.sizes.channels)))
        self.rows = max(1, min(tuned.rows, height))
        self.blocks = Blocks(
            triton.cdiv(self.sizes.channels, self.c_block), triton.cdiv(width, BLOCK), triton.cdiv(height, self.rows)
        )
        self.dx = triton.next_power_of_2(scale)
        self.dy = self.dx if self.dx <= 2 else 1
        self.images = n * groups
        self.programs = self.images * math.prod(self.blocks)
        # NumPy has no bf16 arithmetic: the interpreter multiplies in fp32.
        dot = torch.float32 if backends.TRITON_INTERPRETS and x.dtype == torch.bfloat16 else x.dtype
        self.constants = {
            "K": kernel_size,
            # Of one or two taps tl.gather does not compile (Triton 3.6 fails an assertion).
            "K_PADDED": max(4, triton.next_power_of_2(kernel_size)),
            "S": scale,
            "SOFTMAX": softmax,
            "C_BLOCK": self.c_block,
            "B": BLOCK,
            "WINDOW": triton.next_power_of_2(BLOCK + kernel_size - 1),
            "E": self.dx,
            "DOT": _TL[dot],
        }


# --- the backend -------------------------------------------------------------------------------------------------


def _unsupported(problem: Problem) -> str | None:
    if problem.x.dtype == torch.float64:
        return "its kernels compute in fp32, x is float64"
    kernel_size, scale = problem.kernel_size, problem.scale
    # Every tap's weight of a block's results is held in registers at once.
    held = kernel_size * triton.next_power_of_2(kernel_size) * BLOCK * max(4, triton.next_power_of_2(scale))
    return None if held <= 2**14 else f"kernels of size {kernel_size} at scale {scale} do not fit in registers"


def _forward(problem: Problem) -> Tensor:
    x = problem.x
    y = torch.empty(problem.y_shape, dtype=x.dtype, device=x.device, memory_format=checks.image_format(x))
    if not y.numel():
        return y
    plan = _Plan(problem)
    with launch.on(x.device):
        launch.run(
            reassemble_forward,
            (plan.programs, triton.cdiv(problem.scale, plan.dy)),
            plan.config,
            x=Image(x, *x.stride()),
            weights=problem.weights.contiguous(),
            y=Image(y, *y.stride()),
            sizes=plan.sizes,
            blocks=plan.blocks,
            D=plan.dy,
            ROWS=plan.rows,
            **plan.constants,
        )
    return y


def _backward(problem: Problem, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    softmax, x, weights, _, scale, groups = problem
    dense = weights.contiguous()
    dx, dw = (torch.empty_like(t) if need else None for t, need in zip((x, dense), needs, strict=True))
    if not x.numel():  # weights may have elements although there are no channels to sum over
        return [dx, None if dw is None else dw.zero_()]
    n, _, h, w = x.shape
    plan = _Plan(problem)
    stats = torch.empty((n, groups, 2, scale**2, h, w), dtype=torch.float32, device=x.device) if softmax else dense
    # The weights' gradient sums over channels, 64 at a time: more would not share anything more.
    channels = min(plan.c_block, 64)
    with launch.on(x.device):
        if softmax or dw is not None:
            launch.run(
                weight_gradient,
                (plan.images * h * plan.blocks.columns, triton.cdiv(scale, plan.dy)),
                plan.config,
                dy_tensor=Image(grad, *grad.stride()),
                x=Image(x, *x.stride()),
                weights=dense,
                softmax=stats,
                dw=dw,
                sizes=plan.sizes,
                column_blocks=plan.blocks.columns,
                CHANNEL_BLOCKS=triton.cdiv(plan.sizes.channels, channels),
                D=plan.dy,
                **{**plan.constants, "C_BLOCK": channels},
            )
        if dx is not None:
            launch.run(
                source_gradient,
                (plan.programs,),
                plan.config,
                dy_tensor=Image(grad, *grad.stride()),
                weights=dense,
                softmax=stats,
                dx_tensor=Image(dx, *dx.stride()),
                sizes=plan.sizes,
                blocks=plan.blocks,
                ROWS=plan.rows,
                **plan.constants,
            )
    return [dx, dw]


reassemble, carafe = operations(_forward, _backward, _unsupported)
feature_aware_upsample = chain(_forward, _backward, _unsupported)
