"""Constants of ONNX graphs, for the rooms' translations of their ops (`famseg_kernels.onnx_translations`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from onnxscript import opset18


def ints(*values: int) -> Any:
    """A vector of int64: a shape, axes, bounds."""
    return _constant(np.array(values, np.int64))


def floats(values: Any) -> Any:
    """A tensor of float32."""
    return _constant(np.asarray(values, np.float32))


def _constant(values: np.ndarray) -> Any:
    tensor: Any = onnx_ir.tensor(values)  # annotated in onnxscript as protobuf's
    return opset18.Constant(value=tensor)
