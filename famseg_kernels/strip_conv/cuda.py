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


def faster(*_: Any) -> str:
    """The backend that automatic choice takes instead, where it can: by counting (`python -m benchmarks.issue`).

    On an H200 in bf16 Triton's kernels need 0.7 to 1.3 times the time of these for the strips' forward, a quarter to a
    third for their backward, and a ninth for the 3 × 3 of an MLP; and they read channels_last as it lies, which is
    copied here.
    """
    return "triton"


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
