"""reassemble and feature_aware_upsample in ONNX nodes: a product of two small matrices a pixel.

With the taps last, softmax and product run along memory, and the window is two concatenations of k slices. A loop of k²
multiply–adds, as in the reference, has four times the nodes, and softmax over any but the last axis takes onnxruntime
more time than all the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import opset18

from famseg_kernels.onnx import ints

_END = 2**31 - 1


def reassemble(x: Any, logits: Any, kernel_size: int, scale: int, groups: int, backend: str = "auto") -> Any:
    """Arguments of `torch.ops.famseg.reassemble`, fp32; the batch and the image's sizes may be free."""
    order = _taps_last(kernel_size, scale, groups)
    return _weighted_sum(x, opset18.Gather(logits, order, axis=1), kernel_size, scale, groups)


def feature_aware_upsample(
    x: Any,
    compressed: Any,
    weight: Any,
    bias: Any,
    kernel_size: int,
    scale: int,
    groups: int,
    dilation: int,
    backend: str = "auto",
) -> Any:
    """Arguments of `torch.ops.famseg.feature_aware_upsample`, likewise; runtimes permute the weight as they load."""
    size = list(weight.shape[2:])
    order = _taps_last(kernel_size, scale, groups)
    weight, bias = (None if t is None else opset18.Gather(t, order, axis=0) for t in (weight, bias))
    pads = [k // 2 * dilation for k in size] * 2
    logits = opset18.Conv(compressed, weight, bias, kernel_shape=size, pads=pads, dilations=[dilation] * 2)
    return _weighted_sum(x, logits, kernel_size, scale, groups)


def _taps_last(k: int, s: int, groups: int) -> Any:
    """Where the channel (g, dy·s + dx, tap) stands among the logits (g, tap, dy·s + dx)."""
    channels = np.arange(groups * k * k * s * s).reshape(groups, k * k, s * s)
    return ints(*channels.transpose(0, 2, 1).flatten().tolist())


def _weighted_sum(x: Any, logits: Any, k: int, s: int, groups: int) -> Any:
    channels, r = x.shape[1], k // 2
    logits = opset18.Reshape(opset18.Transpose(logits, perm=[0, 2, 3, 1]), ints(0, -1, groups, s * s, k * k))
    weights = opset18.Softmax(logits, axis=-1)

    window = opset18.Pad(opset18.Transpose(x, perm=[0, 2, 3, 1]), ints(0, r, r, 0, 0, r, r, 0))
    for axis in (2, 1):
        bounds = [(tap, tap - k + 1 if tap < k - 1 else _END) for tap in range(k)]
        shifts = [opset18.Slice(window, ints(first), ints(end), ints(axis)) for first, end in bounds]
        window = opset18.Concat(*shifts, axis=3) if k > 1 else window
    if groups == 1:  # no runtime sees that moving an axis of size 1 moves nothing
        window = opset18.Reshape(window, ints(0, -1, 1, k * k, channels))
    else:
        window = opset18.Reshape(window, ints(0, -1, k * k, groups, channels // groups))
        window = opset18.Transpose(window, perm=[0, 1, 3, 2, 4])
    y = opset18.MatMul(weights, window)  # (N, H·W, g, s², C/g)
    y = opset18.Transpose(y, perm=[0, 2, 3, 4, 1] if groups == 1 else [0, 3, 2, 4, 1])
    sizes = opset18.Shape(x, start=2, end=4)
    y = opset18.Reshape(y, opset18.Concat(ints(0, s * s * channels), sizes, axis=0))
    return opset18.DepthToSpace(y, blocksize=s, mode="DCR")
