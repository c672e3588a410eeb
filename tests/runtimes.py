"""What runs an ONNX file in tests; a test skips where a runtime is not installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Run = Callable[..., np.ndarray]


def onnxruntime(path: Path) -> Run:
    """A function of the inputs in the file's order that returns the first output."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]


def openvino(path: Path) -> Run:
    """Likewise, in fp32: by default it takes bf16 or fp16 where the processor has them."""
    runtime = pytest.importorskip("openvino")
    core = runtime.Core()
    model = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *inputs: model(list(inputs))[0]


RUNTIMES: dict[str, Callable[[Path], Run]] = {"onnxruntime": onnxruntime, "openvino": openvino}
