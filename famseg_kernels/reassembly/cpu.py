"""The three operations on the CPU: hand tensors as addresses to the C++ kernels of csrc/reassembly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.reassembly.problem import Encoded, Problem, operations
from famseg_kernels.spec import Backend


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


def _upsample_forward(*arguments: Any) -> Tensor:
    call = _dense_call(Encoded(*arguments))
    x = call.x
    y = torch.empty(call.problem(call.x).y_shape, dtype=x.dtype, memory_format=checks.image_format(x))
    backends.native("_cpu").upsample_forward(**call.native(), y=y.data_ptr(), threads=torch.get_num_threads())
    return y


def _upsample_backward(grad: Tensor, needs: Sequence[bool], *arguments: Any) -> list[Tensor | None]:
    call = _dense_call(Encoded(*arguments))
    grad = grad.contiguous(memory_format=checks.image_format(call.x))
    gradients = [
        torch.empty_like(t, memory_format=checks.image_format(t) if t.dim() == 4 else torch.contiguous_format)
        if need and t is not None
        else None
        for t, need in zip(call[:4], needs, strict=True)
    ]
    x, compressed, weight, bias = (backends.address(t) for t in gradients)
    if not call.x.shape[0] * call.x.shape[2] * call.x.shape[3]:  # sums over nothing
        return [None if t is None else t.zero_() for t in gradients]
    backends.native("_cpu").upsample_backward(
        **call.native(),
        y_gradient=grad.data_ptr(),
        x_gradient=x,
        compressed_gradient=compressed,
        weight_gradient=weight,
        bias_gradient=bias,
        threads=torch.get_num_threads(),
    )
    return gradients


def _dense_call(call: Encoded) -> Encoded:
    """With tensors as the kernels read them: images in one of two memory formats, the rest contiguous."""
    x, compressed = (t.contiguous(memory_format=checks.image_format(t)) for t in (call.x, call.compressed))
    bias = None if call.bias is None else call.bias.contiguous()
    return call._replace(x=x, compressed=compressed, weight=call.weight.contiguous(), bias=bias)


reassemble, carafe = operations(_forward, _backward)
feature_aware_upsample = Backend(_upsample_forward, _upsample_backward)
