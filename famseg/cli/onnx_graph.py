"""An exported program as an ONNX graph of few nodes, in seconds."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import onnx_ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import opset18
from torch.export import ExportedProgram

import famseg_kernels as fk
from famseg_kernels.onnx import floats, ints


def onnx_program(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    """The program with the input `image` and the output `logits`; our ops by their own translations."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    options: dict[str, Any] = {"custom_translation_table": fk.onnx_translations() | _aten()}
    # Not optimised: that takes longer than all the rest, and runtimes fold and fuse as they load a file.
    options |= {"dynamo": True, "verbose": False, "optimize": False}
    options |= {"input_names": ["image"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx and onnxscript, about each other's versions
        try:
            exported = torch.onnx.export(_as_it_is(program), **options)
        except torch.onnx.OnnxExporterError:  # an operation without a form in ONNX, in a network of others
            exported = torch.onnx.export(program, **options)
    assert exported is not None
    graph = exported.model.graph
    for value in (*graph.inputs, *graph.outputs):
        shape: Any = value.shape
        value.shape = onnx_ir.Shape(["batch", shape[1], "height", "width"])
    for node in graph:  # stack traces, four times the size of the weights
        node.metadata_props.clear()
    for simplify in (
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        simplify(exported.model)
    return exported


def _as_it_is(program: ExportedProgram) -> ExportedProgram:
    """The program as torch.onnx.export is to translate it.

    It would trace the program once more, to decompose what has no form in ONNX, which takes as long as the first trace.
    """
    program = copy.copy(program)
    program.graph.eliminate_dead_code()  # arithmetic on dtypes
    program.run_decompositions = lambda *_: program
    return program


def _aten() -> dict[Any, Callable[..., Any]]:
    """Operations of a trace that torch would have decomposed, or of which its own translations make many nodes."""
    aten = torch.ops.aten
    return {
        aten.to.dtype: _to,
        aten.mT.default: _mT,
        aten.split_with_sizes.default: _split,
        aten.batch_norm.default: _batch_norm,
        aten.rms_norm.default: _rms_norm,
    }


def _to(x: Any, dtype: Any) -> Any:
    return opset18.Identity(x) if x.dtype == dtype else opset18.Cast(x, to=dtype)


def _mT(x: Any) -> Any:
    *batch, row, column = range(len(x.shape))
    return opset18.Transpose(x, perm=[*batch, column, row])


def _split(x: Any, sizes: list[int], dim: int = 0) -> list[Any]:
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return [opset18.Slice(x, ints(start), ints(end), ints(dim)) for start, end in bounds]


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *options: Any) -> Any:
    return opset18.BatchNormalization(x, weight, bias, mean, var, epsilon=options[1])


def _rms_norm(x: Any, shape: list[int], weight: Any, epsilon: float) -> Any:
    axes = ints(*range(-len(shape), 0))
    mean = opset18.ReduceMean(opset18.Mul(x, x), axes)
    return opset18.Mul(opset18.Div(x, opset18.Sqrt(opset18.Add(mean, floats(epsilon)))), weight)
