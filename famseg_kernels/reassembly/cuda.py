"""reassemble on NVIDIA GPUs: hands tensors as addresses to the CUDA kernels of csrc/reassembly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from famseg_kernels import backends, checks


def unsupported(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> str | None:
    """None when these kernels can run the call, else the reason."""
    return "there is no kernel for float64" if x.dtype == torch.float64 else None


def forward(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    """y (N, C, sH, sW) in x's dtype and memory format."""
    n, c, h, w = x.shape
    source, weights = x.contiguous(), logits.contiguous()
    y = torch.empty((n, c, scale * h, scale * w), dtype=x.dtype, device=x.device)
    module: Any = backends.native_module("_cuda")[0]
    # The launch goes to the current device, which need not be x's.
    with torch.cuda.device(x.device):
        module.reassemble_forward(
            checks.dtype_name(x),
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
