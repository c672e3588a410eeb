"""A network as its ONNX file runs it: in onnxruntime and in OpenVINO, with as many threads as torch has."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers
from famseg.cli.export import export_program, write_onnx


class Exported(nn.Module):
    """(N, 1, H, W) → logits, on the CPU."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(x.numpy()))


def runtimes(model: nn.Module, say: Callable[[str], None]) -> Iterator[tuple[str, Exported]]:
    """The network in each runtime that is installed."""
    reasons = {name: peers.missing_module(name) for name in RUNTIMES}
    if missing := peers.missing_module("onnxscript"):
        reasons = dict.fromkeys(RUNTIMES, missing)
    for name, reason in reasons.items():
        if reason is not None:
            say(f"{name} left out: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        if None in reasons.values():
            write_onnx(export_program(model, "onnx"), {}, path)
        for name, load in RUNTIMES.items():
            if reasons[name] is None:
                yield name, Exported(load(path))


def in_onnxruntime(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["logits"], {"image": x})[0]


def in_openvino(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda x: next(iter(request.infer([x]).values()))


# By the name of the package: what runs an ONNX file.
RUNTIMES: dict[str, Callable[[Path], Callable[[np.ndarray], np.ndarray]]] = {
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
}
