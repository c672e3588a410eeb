"""`python -m benchmarks.network --rivals`: FAMSeg beside the networks that one would take instead, in every runtime.

Each network and runtime is a process of its own, which does nothing else: its memory is its own, and so are its
threads. The runtimes of a network take turns. Their outputs are compared before they are timed.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import exported, measure, peers
from famseg.cli.export import export_program, write_onnx
from famseg.memory import keep_freed_memory
from famseg.models import create_model, optimize_for_inference
from famseg.options import cpu_has_bf16

MODELS = ("famseg_nano", "famseg_tiny", "famseg_small", "unet", "unet_mobilenetv2", "segnext")
EAGER, OPTIMISED, COMPILED = "torch", "optimised", "torch.compile"
# Name → the largest relative error of its logits.
RUNTIMES = {
    **{EAGER: 0.0, OPTIMISED: 1e-3, f"{OPTIMISED}, bf16": 0.1, COMPILED: 1e-3},
    **dict.fromkeys(exported.RUNTIMES, 1e-3),
}
CLASSES, LEAST_ROUNDS = 3, 3

Run = Callable[[np.ndarray], np.ndarray]  # (N, 1, H, W) → logits


def fresh_network(name: str) -> nn.Module:
    """In evaluation, with the same weights at every call and in every process.

    A fresh network scales its strip blocks by 0.01: 10 % of error in them would not show in its output. By 1, the
    products in them would leave fp32 after a few blocks.
    """
    torch.manual_seed(0)
    model = create_model(name, CLASSES).eval()
    for parameter_name, parameter in model.named_parameters():
        if "layer_scale" in parameter_name:
            parameter.data.fill_(0.02)
    return model


def _loaded(model: str, runtime: str, file: Path) -> Run:
    if runtime in exported.RUNTIMES:
        return exported.RUNTIMES[runtime](file)
    network = fresh_network(model)
    dtype = torch.bfloat16 if runtime.endswith("bf16") else torch.float32
    if runtime.startswith(OPTIMISED):
        network = optimize_for_inference(network).to(dtype)
    if runtime == COMPILED:
        network = torch.compile(network)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(x).to(dtype)).float().numpy()

    return run


def _contestant(pipe: Connection, model: str, runtime: str, file: Path, x: np.ndarray) -> None:
    """Send the logits of `x`, or why there are none; then a time in ms for each None that comes; at last MB."""
    try:
        keep_freed_memory()
        # Imported before memory is counted: what the network is run by, or made by.
        peers.missing_module(runtime if runtime in exported.RUNTIMES else "segmentation_models_pytorch")
        before = measure.resident()
        run = _loaded(model, runtime, file)
        pipe.send(run(x))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    measure.reset_peak()  # loading and compiling needed more
    while pipe.recv() is None:
        started = time.perf_counter()
        run(x)
        pipe.send(1e3 * (time.perf_counter() - started))
    pipe.send((measure.peak_resident() - before) / 1e6)


def rows(
    models: Sequence[str], batch: int, size: int, seconds: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row a network and runtime; `seconds` of measuring a network."""
    x = np.random.default_rng(0).standard_normal((batch, 1, size, size), dtype=np.float32)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            running: dict[str, tuple[BaseProcess, Connection]] = {}
            try:
                file = _exported(model, Path(folder), say)
                truth = None
                for runtime, tolerance in RUNTIMES.items():
                    if reason := _left_out(runtime, batch, file):
                        say(f"{model} in {runtime} left out: {reason}")
                        continue
                    pipe, theirs = spawn.Pipe()
                    process = spawn.Process(target=_contestant, args=(theirs, model, runtime, file, x), daemon=True)
                    process.start()
                    theirs.close()
                    answer = _answer(pipe)
                    if truth is None and isinstance(answer, np.ndarray):
                        truth = answer
                    if truth is not None and isinstance(answer, np.ndarray):
                        wrong = float(np.linalg.norm(answer - truth) / np.linalg.norm(truth))
                        answer = f"its logits are wrong by {wrong:.1e}" if not wrong <= tolerance else answer
                    if isinstance(answer, str):
                        say(f"out: {model} in {runtime}: {answer}")
                        process.terminate()
                    else:
                        running[runtime] = process, pipe
                for row in _measured(running, batch, seconds):
                    yield {"model": model, "batch": batch, "size": size} | row
            finally:
                for process, _ in running.values():
                    process.terminate()


def _left_out(runtime: str, batch: int, file: Path | None) -> str | None:
    if runtime == COMPILED and batch > 1:
        return "it compiles for minutes; see one image"
    if runtime.endswith("bf16"):
        return None if cpu_has_bf16() else "this CPU has no bf16 units"
    if runtime in exported.RUNTIMES:
        return "there is no ONNX file" if file is None else peers.missing_module(runtime)
    return None


def _exported(model: str, folder: Path, say: Callable[[str], None]) -> Path | None:
    """Its ONNX file."""
    if missing := peers.missing_module("onnxscript"):
        say(missing)
        return None
    path = folder / f"{model}.onnx"
    try:
        write_onnx(export_program(fresh_network(model), "onnx"), {}, path)
    except Exception as error:
        say(f"{model}: no ONNX file: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    return path


def _answer(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return "its process ended"


def _measured(
    running: dict[str, tuple[BaseProcess, Connection]], batch: int, seconds: float
) -> Iterator[dict[str, Any]]:
    times: dict[str, list[float]] = {runtime: [] for runtime in running}
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < (LEAST_ROUNDS if seconds else 1) or time.perf_counter() < until:
        for runtime, (_, pipe) in running.items():
            pipe.send(None)
            times[runtime].append(pipe.recv())
        rounds += 1
    for runtime, (_, pipe) in running.items():
        pipe.send("memory")
        ms = float(np.median(times[runtime]))
        yield {
            "dtype": "bf16" if runtime.endswith("bf16") else "fp32",
            "kind": "inference",
            "build": runtime,
            "ms": round(ms, 2),
            "images_s": round(1e3 * batch / ms, 2),
            "peak_mb": round(pipe.recv(), 1),
        }
