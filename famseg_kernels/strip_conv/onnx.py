"""strip_conv2d in ONNX nodes: its convolutions one by one."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18

from famseg_kernels.strip_conv import spec


def strip_conv2d(
    x: Any,
    square_weight: Any,
    square_bias: Any,
    row_weights: list[Any],
    row_biases: list[Any],
    col_weights: list[Any],
    col_biases: list[Any],
    backend: str = "auto",
) -> Any:
    """Arguments of `torch.ops.famseg.strip_conv2d`, fp32; the batch and the image's sizes may be free."""
    y = a = x if square_weight is None else _depthwise(x, square_weight, square_bias)
    row_sides = zip(row_weights, spec.unpacked(row_biases, row_weights), strict=True)
    col_sides = zip(col_weights, spec.unpacked(col_biases, col_weights), strict=True)
    for (row, row_bias), (col, col_bias) in zip(row_sides, col_sides, strict=True):
        y = opset18.Add(y, _depthwise(_depthwise(a, row, row_bias), col, col_bias))
    return opset18.Identity(y) if y is x else y


def _depthwise(x: Any, weight: Any, bias: Any) -> Any:
    channels, _, *size = weight.shape
    return opset18.Conv(x, weight, bias, group=channels, kernel_shape=size, pads=[k // 2 for k in size] * 2)
