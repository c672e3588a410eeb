"""reassemble, carafe and feature_aware_upsample in plain PyTorch: the definitions that every kernel is held to.

All are one weighted sum over the taps of a window. With w as (N·g, k², s², H, W) and x shifted by a tap as
(N·g, C/g, 1, H, W) it is a loop of k² multiply–adds without an unfolded tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from famseg_kernels import checks
from famseg_kernels.spec import Backend


def _reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    n, _, h, w = x.shape
    weights = _wide(logits).view(n * groups, kernel_size**2, scale**2, h, w).softmax(dim=1)
    return _weighted_sum(x, weights, groups, kernel_size, scale)


def _carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    n, _, h, w = features.shape
    s = scale_factor
    weights = _wide(masks).view(n * group_size, kernel_size**2, h, s, w, s).permute(0, 1, 3, 5, 2, 4)
    return _weighted_sum(features, weights.flatten(2, 3), group_size, kernel_size, s)


def _upsample(
    x: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    scale: int,
    groups: int,
    dilation: int,
) -> Tensor:
    """The logits stay in fp32 or better where the chain of two ops would round them to x's dtype."""
    n, _, h, w = x.shape
    logits = _wide(x).new_zeros(n, weight.shape[0], h, w)
    if compressed.numel():  # conv2d refuses an image without pixels or channels
        padding = int(weight.shape[3]) // 2 * dilation  # while torch 2.6 traces, a size is a tensor
        logits = F.conv2d(_wide(compressed), _wide(weight), padding=padding, dilation=dilation)
    if bias is not None:
        logits = logits + _wide(bias)[:, None, None]
    weights = logits.reshape(n * groups, kernel_size**2, scale**2, h, w).softmax(dim=1)
    return _weighted_sum(x, weights, groups, kernel_size, scale)


def _weighted_sum(x: Tensor, weights: Tensor, g: int, k: int, s: int) -> Tensor:
    """y[n, c, s·i+dy, s·j+dx] = Σ_tap weights[n·g(c), tap, dy·dx, i, j] · x[n, c, i+ky−r, j+kx−r], zero outside."""
    n, c, h, w = x.shape
    padded = F.pad(_wide(x), [k // 2] * 4).view(n * g, c // g, 1, h + k - 1, w + k - 1)
    y = torch.zeros((n * g, c // g, s * s, h, w), dtype=padded.dtype, device=x.device)
    for tap, weight in enumerate(weights.unsqueeze(1).unbind(2)):  # unbind: its backward is one stack, not k² zeros
        ky, kx = divmod(tap, k)
        y = y + weight * padded[..., ky : ky + h, kx : kx + w]
    y = y.view(n, c, s, s, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c, s * h, s * w)
    return y.to(x.dtype).contiguous(memory_format=checks.image_format(x))


def _wide(t: Tensor) -> Tensor:
    return (t if t.dtype == torch.float64 else t.float()).contiguous()


reassemble = Backend(_reassemble)
carafe = Backend(_carafe)
feature_aware_upsample = Backend(_upsample)
