"""reassemble on NVIDIA GPUs: hands tensors as addresses to the CUDA kernels of csrc/reassembly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def unsupported(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> str | None:
    """None when these kernels can run the call, else the reason."""
    module, reason = backends.native_module("_cuda")
    if module is None:
        return reason
    if x.device.type != "cuda":
        return f"x is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"no kernel for {x.dtype}"
    return None


def forward(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    """y (N, C, sH, sW) in x's dtype and memory format."""
    n, c, h, w = x.shape
    source, weights = x.contiguous(), logits.contiguous()
    y = torch.empty((n, c, scale * h, scale * w), dtype=x.dtype, device=x.device)
    module: Any = backends.native_module("_cuda")[0]
    # The launch goes to the current device, which need not be x's.
    with torch.cuda.device(x.device):
        module.reassemble_forward(
            _DTYPES[x.dtype],
            tuple(x.shape),
            source.data_ptr(),
            weights.data_ptr(),
            y.data_ptr(),
            kernel_size,
            scale,
            groups,
            torch.cuda.current_stream().cuda_stream,
        )
    return y.contiguous(memory_format=checks.image_format(x))
