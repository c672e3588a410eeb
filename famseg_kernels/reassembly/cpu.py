"""reassemble and carafe on the CPU: hand tensors as addresses to the C++ kernels of csrc/reassembly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.reassembly.problem import Problem, chain, operations


def _forward(problem: Problem) -> Tensor:
    problem = _dense(problem)
    x = problem.x
    y = torch.empty(problem.y_shape, dtype=x.dtype, memory_format=checks.image_format(x))
    backends.native("_cpu").reassembly_forward(**problem.native(), y=y.data_ptr(), threads=torch.get_num_threads())
    return y


def _backward(problem: Problem, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    problem = _dense(problem)
    grad = grad.contiguous(memory_format=checks.image_format(problem.x))
    gradients = [
        torch.empty_like(t, memory_format=checks.image_format(t)) if need else None
        for t, need in zip((problem.x, problem.weights), needs, strict=True)
    ]
    backends.native("_cpu").reassembly_backward(
        **problem.native(),
        y_gradient=grad.data_ptr(),
        x_gradient=backends.address(gradients[0]),
        weights_gradient=backends.address(gradients[1]),
        threads=torch.get_num_threads(),
    )
    return gradients


def _dense(problem: Problem) -> Problem:
    """With tensors in one of the two memory formats that the kernels read."""
    softmax, x, weights, *sizes = problem
    x, weights = (t.contiguous(memory_format=checks.image_format(t)) for t in (x, weights))
    return Problem(softmax, x, weights, *sizes)


reassemble, carafe = operations(_forward, _backward)
feature_aware_upsample = chain(_forward, _backward)
