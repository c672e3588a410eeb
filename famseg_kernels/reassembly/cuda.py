"""reassemble and carafe on NVIDIA GPUs: hand tensors as addresses to the CUDA kernels of csrc/reassembly.

Channels-last tensors are copied to contiguous ones and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.reassembly.problem import Problem, chain, operations


def _unsupported(problem: Problem) -> str | None:
    return "there is no kernel for float64" if problem.x.dtype == torch.float64 else None


def _faster(method: str, problem: Problem) -> str | None:
    """The backend that automatic choice takes instead, where it can: by counting (`python -m benchmarks.issue`).

    On an H200 Triton's gradients need half the time of these, its forward 0.8 to 1.4 times as much; and it reads
    channels_last as it lies, which is copied here.
    """
    return "triton" if method == "backward" or not problem.x.is_contiguous() else None


def _forward(problem: Problem) -> Tensor:
    x = problem.x
    y = torch.empty(problem.y_shape, dtype=x.dtype, device=x.device)
    problem = _contiguous(problem)
    # The launch goes to the current device, which need not be x's.
    with torch.cuda.device(x.device):
        backends.native("_cuda").reassembly_forward(
            **problem.native(), y=y.data_ptr(), stream=torch.cuda.current_stream().cuda_stream
        )
    return y.contiguous(memory_format=checks.image_format(x))


def _backward(problem: Problem, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    problem, grad = _contiguous(problem), grad.contiguous()
    # The kernels read dy two elements at once. A gradient that is a part of a larger tensor may begin between two; for
    # a GPU that is a fault that no later call survives. What is allocated begins at a multiple of 256 bytes.
    if grad.data_ptr() % (2 * grad.element_size()) != 0:
        grad = grad.clone()
    x = problem.x
    gradients = [torch.empty_like(t) if need else None for t, need in zip((x, problem.weights), needs, strict=True)]
    n, _, h, w = x.shape
    softmaxes = n * problem.groups * problem.scale**2 * h * w if problem.softmax else 0
    log_sums = torch.empty(softmaxes, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        backends.native("_cuda").reassembly_backward(
            **problem.native(),
            y_gradient=grad.data_ptr(),
            x_gradient=backends.address(gradients[0]),
            weights_gradient=backends.address(gradients[1]),
            log_sums=log_sums.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return gradients


def _contiguous(problem: Problem) -> Problem:
    return problem._replace(x=problem.x.contiguous(), weights=problem.weights.contiguous())


reassemble, carafe = operations(_forward, _backward, _unsupported, _faster)
feature_aware_upsample = chain(_forward, _backward, _unsupported, faster="triton")
