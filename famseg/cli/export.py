"""famseg-export: a trained network as one ONNX or PT2 file that runs without this library.

The file takes `image`, float32 (batch, 1, S, S): grey values in [0, 1], letterboxed to S x S, minus the mean, over the
standard deviation; and gives `logits`, float32 (batch, classes, S, S). The batch is free, S is fixed (--image-size):
the scan's chunks are unrolled. Its metadata, a JSON text under "famseg", say all of this. The written file is run and
compared with the network before the command says that it is done.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from famseg.cli.command import build_parser, parse, required, run
from famseg.data.augment import MEAN, STD
from famseg.data.errors import DataError
from famseg.data.sample import CLASSES
from famseg.inference import Network, load_network
from famseg.training.config import ConfigError, option
from famseg_kernels.reassembly.op import REASSEMBLE_OPERATION
from famseg_kernels.registry import Operation
from famseg_kernels.ssd_scan.op import SCAN_2D_OPERATION
from famseg_kernels.strip_conv.op import OPERATION as STRIP_OPERATION

PROG = "famseg-export"
_BATCHES = (1, 3)  # checked: a batch of one is where a fixed batch would hide
# fp32 through other kernels in another order: measured 1e-6 of the largest logit, on a trained network.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = option(None, "a run's checkpoints/best.ckpt")
    out: str | None = option(None, "file to write; default: the checkpoint's name with .onnx or .pt2, beside it")
    format: Literal["onnx", "pt2"] = option("onnx", "onnx, or pt2 (torch.export; load with torch.export.load)")
    image_size: int | None = option(None, "side of the square input, px; default: the network's own")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done and checked, 2 bad usage or input with one clear line, 130 interrupted."""
    parser = build_parser(PROG, __doc__, Options, positional=("checkpoint",))
    return run(PROG, lambda: _export(Options(**parse(parser, arguments))))


def _export(options: Options) -> int:
    required("checkpoint", options.checkpoint, f"{PROG} runs/NAME/checkpoints/best.ckpt")
    assert options.checkpoint is not None
    if options.image_size is not None and options.image_size < 16:
        raise ConfigError(f"image_size: expected at least 16, got {options.image_size}")
    if options.format == "onnx":
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"format: onnx needs {', '.join(missing)}; pip install 'famseg[onnx]'")
    network = load_network(options.checkpoint)
    size = options.image_size or network.image_size
    out = Path(options.out) if options.out else network.path.with_suffix(f".{options.format}")
    if not out.parent.is_dir():
        raise DataError(f"{out}: its folder does not exist; make it first")
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give a file name")

    metadata = describe(network, size)
    program = export_program(network, size)
    write, load = (_write_onnx, _load_onnx) if options.format == "onnx" else (_write_pt2, _load_pt2)
    # Written beside the target, checked, then renamed: nothing unchecked ever has the target's name.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        partial = Path(folder) / out.name
        write(program, metadata, partial)
        error = _largest_error(network, load(partial), size)
        if not error <= _TOLERANCE:
            raise RuntimeError(
                f"{out} was not written: its logits differ from the network's by {error:.1e} of their size"
            )
        partial.replace(out)
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, input (batch, 1, {size}, {size}); checked at batch "
        f"{' and '.join(map(str, _BATCHES))}: largest difference {error:.1e} of the largest logit"
    )
    return 0


def describe(network: Network, size: int) -> dict[str, Any]:
    """What a program must know to use the exported file."""
    return {
        "classes": list(CLASSES),
        "image_size": size,
        "input": "image, float32 (batch, 1, image_size, image_size): (grey / 255 - mean) / std",
        "output": "logits, float32 (batch, classes, image_size, image_size); resize them, then take the largest",
        "mean": MEAN,
        "std": STD,
        "letterbox": "keep the aspect ratio, centre on black; area averaging to shrink, bilinear to enlarge",
        "model": network.config["model"],
        "trained_at_image_size": network.image_size,
        "epoch": network.epoch,
        "data": network.config["data"],
        "famseg": importlib.metadata.version("famseg"),
    }


def export_program(network: Network, size: int) -> ExportedProgram:
    """The network with its custom ops replaced by their references: aten only, batch free, size fixed.

    The same network, traced once: the references are the ops' definitions, so nothing is rewritten by hand.
    """
    example = torch.zeros(2, 1, size, size)  # a batch of one would be taken for a constant
    table = {operation.overload: _definition(operation) for operation in (STRIP_OPERATION, REASSEMBLE_OPERATION)}
    table[SCAN_2D_OPERATION.overload] = _scan_definition
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its pytrees
        program = torch.export.export(network.model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
        return program.run_decompositions(table)


def _definition(operation: Operation) -> Callable[..., Any]:
    forward = operation.implementations["reference"].forward
    return lambda *args: forward(*args[:-1])  # the last one is the backend's name


def _scan_definition(*args: Any) -> Tensor:
    """The scan's reference with chunks of √(tokens): fewest unrolled steps for the memory, at any image size."""
    *given, chunk_size, softplus, low, high, _ = args
    _, height, width, _, _ = given[0].shape
    chunk_size = chunk_size or max(64, math.isqrt(height * width))
    return SCAN_2D_OPERATION.implementations["reference"].forward(*given, chunk_size, softplus, low, high)


def _write_onnx(program: ExportedProgram, metadata: dict[str, Any], path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx and onnxscript, about each other's versions
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"]
        )
    assert exported is not None
    exported.model.metadata_props["famseg"] = json.dumps(metadata)
    exported.save(str(path))


def _load_onnx(path: Path) -> Callable[[Tensor], np.ndarray]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["logits"], {"image": x.numpy()})[0]


def _write_pt2(program: ExportedProgram, metadata: dict[str, Any], path: Path) -> None:
    torch.export.save(program, str(path), extra_files={"famseg": json.dumps(metadata)})


def _load_pt2(path: Path) -> Callable[[Tensor], np.ndarray]:
    module = torch.export.load(str(path)).module()
    return lambda x: module(x).detach().numpy()


def _largest_error(network: Network, exported: Callable[[Tensor], np.ndarray], size: int) -> float:
    """Largest difference of the logits, over the largest logit, on noise of the network's input range."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for batch in _BATCHES:
        x = torch.randn(batch, 1, size, size, generator=generator)
        with torch.no_grad():
            expected = network.model(x).numpy()
        found = exported(x)
        if found.shape != expected.shape:
            return math.inf
        errors.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    return max(errors)


if __name__ == "__main__":
    sys.exit(main())
