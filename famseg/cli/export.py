"""famseg-export: a trained network as one ONNX or PT2 file that runs without this library.

The file takes `image`, float32 (batch, 1, H, W), or (batch, 3, H, W) of a network of colour: values in [0, 1],
letterboxed to H x W, minus the mean, over the standard deviation; and gives `logits`, float32 (batch, classes, H, W).
H and W are free; in a PT2 file, multiples of 32 from 64 on. The network is at its best at the size it was trained at.
The metadata, a JSON text under "famseg", say all of this. The written file is run at two sizes and compared with the
network before the command says that it is done.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from famseg.anatomy import names_of
from famseg.cli.command import build_parser, parse, required, run
from famseg.data.augment import MEAN, STD
from famseg.files.errors import DataError
from famseg.inference import Network, load_network
from famseg.models.optimize import fold_norms
from famseg.options import CHECKPOINT_HELP, ConfigError, option
from famseg_kernels import decompositions

PROG = "famseg-export"
# A PT2 file refuses sizes at which its trace would have been another: where an upsampled map is cropped, and where the
# deepest stage, of stride 32, has one pixel.
_MULTIPLE, _SMALLEST = 32, 64
# UPerNet pools to fixed grids, which ONNX cannot at a free size; of attention in windows torch.export gets done with no
# free size in minutes.
_FIXED = ("upernet", "convnext", "swin", "twins")
# fp32 through other kernels in another order: measured 1e-6 of the largest logit, on a trained network.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Options:
    checkpoint: str | None = option(None, CHECKPOINT_HELP, path=True)
    out: str | None = option(
        None, "file to write; default: the checkpoint's name with .onnx or .pt2, beside it", path=True
    )
    format: Literal["onnx", "pt2"] = option("onnx", "onnx, or pt2 (torch.export; load with torch.export.load)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done and checked, 2 bad usage or input with one clear line, 130 interrupted."""
    parser = build_parser(PROG, __doc__, Options, positional=("checkpoint",))
    return run(PROG, lambda: _export(Options(**parse(parser, Options, arguments))))


def _export(options: Options) -> int:
    required("checkpoint", options.checkpoint, f"{PROG} runs/NAME/checkpoints/best.ckpt")
    assert options.checkpoint is not None
    if options.format == "onnx":
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"format: onnx needs {', '.join(missing)}; pip install 'famseg[onnx]'")
    network = load_network(options.checkpoint)
    if (name := network.config["model"]) in _FIXED:
        raise ConfigError(f"checkpoint: {name} cannot be exported: its grids or windows have no form at a free size")
    out = Path(options.out) if options.out else network.path.with_suffix(f".{options.format}")
    if not out.parent.is_dir():
        raise DataError(f"{out}: its folder does not exist; make it first")
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give a file name")

    metadata = describe(network, options.format)
    program = export_program(network.model, options.format, network.in_channels)
    write, load = (write_onnx, _load_onnx) if options.format == "onnx" else (_write_pt2, _load_pt2)
    # Written beside the target, checked, then renamed: nothing unchecked ever has the target's name.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        partial = Path(folder) / out.name
        write(program, metadata, partial)
        shapes = _checked_shapes(metadata["image_size"], options.format)
        error = _largest_error(network, load(partial), shapes)
        if not error <= _TOLERANCE:
            raise RuntimeError(
                f"{out} was not written: its logits differ from the network's by {error:.1e} of their size"
            )
        partial.replace(out)
    sizes = " and ".join(f"{batch} x {height} x {width}" for batch, height, width in shapes)
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, input (batch, {network.in_channels}, height, width); "
        f"checked at {sizes}: largest difference {error:.1e} of the largest logit"
    )
    return 0


def describe(network: Network, file_format: str) -> dict[str, Any]:
    """What a program must know to use the exported file."""
    size, sizes = network.image_size, "any height and width"
    values = "grey" if network.in_channels == 1 else "red, green, blue"
    if file_format == "pt2":
        size = max(math.ceil(size / _MULTIPLE) * _MULTIPLE, _SMALLEST)
        sizes = f"multiples of {_MULTIPLE} from {_SMALLEST} on"
    return {
        "classes": list(names_of(network.classes)),
        "image_size": size,
        "sizes": f"image_size x image_size is what the network knows; {sizes} run",
        "input": f"image, float32 (batch, {network.in_channels}, height, width): ({values} / 255 - mean) / std",
        "output": "logits, float32 (batch, classes, height, width); resize them, then take the largest",
        "in_channels": network.in_channels,
        "mean": MEAN,
        "std": STD,
        "letterbox": "keep the aspect ratio, centre on black; area averaging to shrink, bilinear to enlarge",
        "model": network.config["model"],
        "trained_at_image_size": network.image_size,
        "epoch": network.epoch,
        "data": network.config["data"],
        "famseg": importlib.metadata.version("famseg"),
    }


def export_program(model: nn.Module, file_format: str, in_channels: int = 1) -> ExportedProgram:
    """The network as a graph in which batch, height and width are free, batch norms folded into convolutions.

    The ops of this library are in it: in a PT2 file their references, which are their definitions, take their place, in
    an ONNX file their own translations.
    """
    # No size of the example may be 1 or equal another, or the trace would take it for a constant or for that other one.
    height, width = 9 * _MULTIPLE, 10 * _MULTIPLE
    free: dict[int, Any] = {0: Dim("batch", min=1)}
    free |= {2: _MULTIPLE * Dim("rows", min=2), 3: _MULTIPLE * Dim("columns", min=2)}
    if file_format == "onnx":  # it keeps no conditions of the trace; odd sizes, so that every crop is in the graph
        height, width = height + 13, width + 11
        free = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    example = torch.zeros(2, in_channels, height, width)
    folded = fold_norms(model)
    for relu in (m for m in folded.modules() if isinstance(m, nn.ReLU)):
        relu.inplace = False  # in place it has no form in ONNX
    with warnings.catch_warnings(), _tracing(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its pytrees
        return torch.export.export(folded, (example,), dynamic_shapes=(free,))


def _tracing() -> AbstractContextManager[Any]:
    """Without a cache to which nearly every symbolic shape is new: it doubles the time of a trace."""
    import torch._dynamo  # takes more than a second: not for --help

    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def write_onnx(program: ExportedProgram, metadata: dict[str, Any], path: Path) -> None:
    from famseg.cli.onnx_graph import onnx_program  # onnxscript is an extra

    exported = onnx_program(program)
    exported.model.metadata_props["famseg"] = json.dumps(metadata)
    exported.save(str(path))


def _load_onnx(path: Path) -> Callable[[Tensor], np.ndarray]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["logits"], {"image": x.numpy()})[0]


def _write_pt2(program: ExportedProgram, metadata: dict[str, Any], path: Path) -> None:
    with _tracing():
        program = program.run_decompositions(decompositions())
    torch.export.save(program, str(path), extra_files={"famseg": json.dumps(metadata)})


def _load_pt2(path: Path) -> Callable[[Tensor], np.ndarray]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch's own way to load
        module = torch.export.load(str(path)).module()
    return lambda x: module(x).detach().numpy()


def _checked_shapes(size: int, file_format: str) -> list[tuple[int, int, int]]:
    """(batch, height, width): the network's own, and another of everything, with a batch of one among them."""
    other = (3, size + 9, 46) if file_format == "onnx" else (3, size + _MULTIPLE, _SMALLEST)
    return [(1, size, size), other]


def _largest_error(
    network: Network, exported: Callable[[Tensor], np.ndarray], shapes: Sequence[tuple[int, int, int]]
) -> float:
    """Largest difference of the logits, over the largest logit, on noise of the network's input range."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for batch, height, width in shapes:
        x = torch.randn(batch, network.in_channels, height, width, generator=generator)
        with torch.no_grad():
            expected = network.model(x).numpy()
        found = exported(x)
        if found.shape != expected.shape:
            return math.inf
        errors.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    return max(errors)


if __name__ == "__main__":
    sys.exit(main())
