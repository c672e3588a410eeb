"""strip_conv2d on NVIDIA GPUs: hands tensors as addresses to the CUDA kernels of csrc/strip_conv.

Channels-last tensors are copied to contiguous ones and back: one (n, c) plane to a block is what the kernels live on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks
from famseg_kernels.spec import Backend
from famseg_kernels.strip_conv.problem import Native, Problem


def unsupported(*arguments: Any) -> str | None:
    """None when these kernels can run the call, else the reason."""
    problem = Problem(*arguments)
    if problem.x.dtype == torch.float64:
        return "there is no kernel for float64"
    branches = len(problem.row_weights)
    most = backends.native("_cuda").strip_conv2d_max_branches()
    return f"{branches} branches, at most {most} have a kernel" if branches > most else None


# The sizes of the square and of the strips that have kernels on tensor cores: csrc/strip_conv/cuda/tiling.h.
TUNED = (5, [(7, 7), (11, 11), (21, 21)])


def faster(method: str, *arguments: Any) -> str | None:
    """The backend that automatic choice takes instead, where it can: by model, not by measurement.

    The model is in docs/design/gpu-model.md. In 16 bits Triton sums the weights' gradients on tensor cores, these
    kernels on FMA units. Other sizes than the tuned ones go through FMA units here as a whole: a 3 × 3 square alone is
    130 instructions of a thread an element, and 20 in Triton.
    """
    problem = Problem(*arguments)
    if problem.x.dtype not in (torch.bfloat16, torch.float16):
        return None
    square = 0 if problem.square_weight is None else problem.square_weight.shape[3]
    sides = zip(problem.row_weights, problem.col_weights, strict=True)
    strips = [(row.shape[3], col.shape[2]) for row, col in sides]
    return "triton" if method == "backward" or (square, strips) != TUNED else None


def forward(x: Tensor, *weights: Any) -> Tensor:
    """y (N, C, H, W) in x's dtype and memory format."""
    layout = checks.image_format(x)
    x = x.contiguous()
    call = Native(Problem(x, *weights))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    # The launch goes to the current device, which need not be x's.
    with torch.cuda.device(x.device):
        backends.native("_cuda").strip_conv2d_forward(
            **call.arguments, channels_last=False, y=y.data_ptr(), stream=torch.cuda.current_stream().cuda_stream
        )
    return y.contiguous(memory_format=layout)


def backward(grad: Tensor, needs: Sequence[bool], x: Tensor, *weights: Any) -> list[Tensor | None]:
    """Gradients of the flattened tensor arguments where `needs`, None elsewhere."""
    call = Native(Problem(x.contiguous(), *weights))
    gradients = call.gradients(needs)
    if not x.numel():  # sums over nothing
        return [None if t is None else t.zero_() for t in gradients]
    grad = grad.contiguous()
    of_weights = any(needs[1:])
    x_gradient = gradients[0]
    if x_gradient is None and of_weights and weights[0] is not None:
        x_gradient = torch.empty_like(grad)  # the weights' gradients need what it is made from
    native = backends.native("_cuda")
    with torch.cuda.device(x.device):
        sizes = native.strip_conv2d_workspace(**call.arguments, channels_last=False, weights=of_weights)
        workspace = {
            name: torch.empty(size, dtype=torch.float32, device=x.device) if size else None
            for name, size in sizes.items()
        }
        native.strip_conv2d_backward(
            **call.arguments,
            channels_last=False,
            y_gradient=grad.data_ptr(),
            **call.native_gradients([x_gradient, *gradients[1:]]),
            **{name: backends.address(room) for name, room in workspace.items()},
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return gradients


strip_conv2d = Backend(forward, backward, unsupported, faster)
