"""What may be done to an op: each row of docs/transformations.md works, or raises by name. Never a wrong number."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import famseg_kernels as fk

PAGE = Path(__file__).resolve().parent.parent / "docs" / "transformations.md"
SECOND = "has no second derivative"

# One case an op, with every kind of argument that the op has.
CASES = {
    "strip_conv2d": "image_smaller_than_kernel",
    "ssd_scan_2d": "one_row",
    "ssd_scan": "every_option",
    "reassemble": "groups",
    "carafe": "groups",
    "feature_aware_upsample": "dilated",
}
OPERATIONS = {operation.spec.name: operation for operation in fk.OPERATIONS}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "StripAttention": (lambda: fk.StripAttention(4), (2, 4, 9, 8)),
    "FeatureAwareUpsample": (lambda: fk.FeatureAwareUpsample(4, compressed_channels=8), (2, 4, 6, 5)),
    "Mamba2Scan2d": (lambda: fk.Mamba2Scan2d(8, d_state=4, headdim=4), (2, 8, 5, 4)),
}


class Call:
    """An op as a function of its floating-point tensors, in fp64, beside the same function in plain PyTorch."""

    def __init__(self, name: str) -> None:
        self.operation = OPERATIONS[name]
        case = next(case for case in self.operation.spec.cases if case.name == CASES[name])
        self.args = case.arguments(torch.float64)
        self.flat = self.operation.flatten(self.args)
        self.places = [i for i, t in enumerate(self.flat) if t is not None and t.is_floating_point()]
        self.tensors = tuple(self.flat[i] for i in self.places)
        generator = torch.Generator().manual_seed(1)
        self.tangents = tuple(torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in self.tensors)

    def _args(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        flat = list(self.flat)
        for place, tensor in zip(self.places, tensors, strict=True):
            flat[place] = tensor
        return self.operation.replace(self.args, flat)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._results(self.operation(*self._args(tensors)))

    def truth(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._results(self.operation.implementations["reference"].forward(*self._args(tensors)))

    @staticmethod
    def _results(results: Any) -> tuple[Tensor, ...]:
        return tuple(results) if isinstance(results, (list, tuple)) else (results,)

    def loss(self, *tensors: Tensor) -> Tensor:
        return torch.stack([result.sin().sum() for result in self(*tensors)]).sum()

    def true_loss(self, *tensors: Tensor) -> Tensor:
        return torch.stack([result.sin().sum() for result in self.truth(*tensors)]).sum()

    @property
    def everything(self) -> tuple[int, ...]:
        return tuple(range(len(self.tensors)))


@pytest.fixture(params=CASES)
def op(request: pytest.FixtureRequest) -> Call:
    return Call(request.param)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().eval().requires_grad_(False), torch.randn(shape)


def same(found: Any, expected: Any) -> None:
    found, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        tolerance = 1e-9 if b.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max() if b.numel() else 0))


# --- derivatives ----------------------------------------------------------------------------------------------------


def test_backward(op: Call) -> None:
    leaves = [t.clone().requires_grad_() for t in op.tensors]
    same(torch.autograd.grad(op.loss(*leaves), leaves), torch.func.grad(op.true_loss, op.everything)(*op.tensors))


def test_second_backward(op: Call) -> None:
    leaves = [t.clone().requires_grad_() for t in op.tensors]
    first = torch.autograd.grad(op.loss(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(sum(g.sum() for g in first), leaves, allow_unused=True)


def test_forward_ad_of_each_argument_alone(op: Call) -> None:
    def tangents(function: Any, which: int) -> list[Tensor | None]:
        with forward_ad.dual_level():
            mine = list(op.tensors)
            mine[which] = forward_ad.make_dual(mine[which], op.tangents[which])
            return [forward_ad.unpack_dual(result).tangent for result in function(*mine)]

    for which in op.everything:
        found, expected = tangents(op, which), tangents(op.truth, which)
        assert [t is None for t in found] == [t is None for t in expected]
        same([t for t in found if t is not None], [t for t in expected if t is not None])


def test_forward_ad_while_recording(op: Call) -> None:
    def derivative(function: Any) -> tuple[Tensor | None, ...]:
        leaves = [t.clone().requires_grad_() for t in op.tensors]
        with forward_ad.dual_level():
            result = function(forward_ad.make_dual(leaves[0], op.tangents[0]), *leaves[1:])[0]
            tangent = forward_ad.unpack_dual(result).tangent
            return torch.autograd.grad(tangent.sin().sum(), leaves, allow_unused=True, materialize_grads=True)

    same(derivative(op), derivative(op.truth))


def test_jvp(op: Call) -> None:
    same(torch.func.jvp(op, op.tensors, op.tangents), torch.func.jvp(op.truth, op.tensors, op.tangents))


def test_jvp_is_the_difference_quotient(op: Call) -> None:
    step = 1e-6
    moved = [[t + sign * step * d for t, d in zip(op.tensors, op.tangents, strict=True)] for sign in (1, -1)]
    up, down = (op.truth(*tensors) for tensors in moved)
    for tangent, high, low in zip(torch.func.jvp(op, op.tensors, op.tangents)[1], up, down, strict=True):
        torch.testing.assert_close(tangent, (high - low) / (2 * step), rtol=1e-5, atol=1e-6)


def test_linearize(op: Call) -> None:
    value, linear = torch.func.linearize(op, *op.tensors)
    same((value, linear(*op.tangents)), torch.func.jvp(op.truth, op.tensors, op.tangents))


@pytest.mark.parametrize("backend", ["cpu"])
def test_forward_mode_on_a_backend_that_was_asked_for(op: Call, backend: str) -> None:
    with fk.use_backend(backend), pytest.raises(RuntimeError, match=f"'{backend}'.*no forward-mode derivative"):
        torch.func.jvp(op, op.tensors, op.tangents)


def test_func_grad(op: Call) -> None:
    found = torch.func.grad(op.loss, op.everything)(*op.tensors)
    same(found, torch.func.grad(op.true_loss, op.everything)(*op.tensors))


def test_vjp(op: Call) -> None:
    cotangents = tuple(torch.ones_like(result).cumsum(-1) for result in op(*op.tensors))
    found, expected = (torch.func.vjp(f, *op.tensors)[1](cotangents) for f in (op, op.truth))
    same(found, expected)


def test_jacrev_and_jacfwd(op: Call) -> None:
    # Of the smallest argument: a Jacobian has a slice for each of its numbers.
    which = min(op.everything, key=lambda i: op.tensors[i].numel())
    expected = torch.func.jacfwd(lambda *a: op.truth(*a)[0].sum(0), which)(*op.tensors)
    same(torch.func.jacfwd(lambda *a: op(*a)[0].sum(0), which)(*op.tensors), expected)
    result = torch.func.jacrev(lambda *a: op(*a)[0].flatten()[:5], which)(*op.tensors)
    same(result, torch.func.jacrev(lambda *a: op.truth(*a)[0].flatten()[:5], which)(*op.tensors))


def test_grad_of_jvp(op: Call) -> None:
    def derivative(function: Any) -> Tensor:
        def directional(x: Tensor) -> Tensor:
            run = lambda *others: function(x, *others)[0].sin().sum()  # noqa: E731
            return torch.func.jvp(run, op.tensors[1:], op.tangents[1:])[1]

        return torch.func.grad(directional)(op.tensors[0])

    same(derivative(op), derivative(op.truth))


@pytest.mark.parametrize("twice", ["grad of grad", "jvp of grad", "hessian", "functional.jvp"])
def test_second_derivatives(op: Call, twice: str) -> None:
    x, others = op.tensors[0], op.tensors[1:]

    def first(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: op.loss(x, *others))(x)

    with pytest.raises(RuntimeError, match=SECOND):
        if twice == "grad of grad":
            torch.func.grad(lambda x: first(x).sum())(x)
        elif twice == "jvp of grad":
            torch.func.jvp(first, (x,), (op.tangents[0],))
        elif twice == "hessian":
            torch.func.hessian(lambda x: op.loss(x, *others))(x)
        else:  # by differentiating the backward
            torch.autograd.functional.jvp(lambda x: op(x, *others)[0], x, op.tangents[0])


# --- vmap -----------------------------------------------------------------------------------------------------------


def test_vmap_over_all_and_over_one(op: Call) -> None:
    three = tuple(torch.stack([t, 2 * t, -t.abs()]) for t in op.tensors)
    expected = [torch.stack(parts) for parts in zip(*(op(*(t[i] for t in three)) for i in range(3)), strict=True)]
    same(torch.vmap(op)(*three), expected)
    for which in op.everything:
        mine = list(op.tensors)
        mine[which] = three[which].movedim(0, -1)
        in_dims = [None] * len(mine)
        in_dims[which] = -1
        parts = [op(*(three[i][j] if i == which else t for i, t in enumerate(op.tensors))) for j in range(3)]
        expected = [torch.stack(part, 1) for part in zip(*parts, strict=True)]
        same(torch.vmap(op, tuple(in_dims), 1)(*mine), expected)


def test_vmap_over_nothing_and_within_vmap(op: Call) -> None:
    none = torch.vmap(op)(*(t.new_zeros((0, *t.shape)) for t in op.tensors))
    assert [t.shape for t in none] == [(0, *t.shape) for t in op(*op.tensors)]
    grid = tuple(torch.stack([torch.stack([t, -t.abs()]), torch.stack([2 * t, t])]) for t in op.tensors)
    found = torch.vmap(torch.vmap(op))(*grid)
    for i, j in itertools.product(range(2), range(2)):
        same([t[i, j] for t in found], op(*(t[i, j] for t in grid)))


def test_gradients_of_each_sample(op: Call) -> None:
    x = torch.stack([op.tensors[0], 2 * op.tensors[0]])
    gradients = torch.func.grad(op.loss, op.everything)
    found = torch.vmap(gradients, (0, *(None for _ in op.tensors[1:])))(x, *op.tensors[1:])
    expected = [torch.func.grad(op.true_loss, op.everything)(sample, *op.tensors[1:]) for sample in x]
    same(found, [torch.stack(parts) for parts in zip(*expected, strict=True)])


def test_batched_gradients(op: Call) -> None:
    leaves = [t.clone().requires_grad_() for t in op.tensors]
    result = op(*leaves)[0]
    with pytest.raises(RuntimeError, match=f"famseg::{op.operation.spec.name}_backward"):
        torch.autograd.grad(result, leaves, torch.randn(3, *result.shape), is_grads_batched=True, allow_unused=True)


# --- tracing and exporting ------------------------------------------------------------------------------------------


def larger(x: Tensor) -> Tensor:
    return torch.cat([x, x, x[:, :, :2]], 2)


def test_jit_trace(layer: tuple[nn.Module, Tensor]) -> None:
    module, x = layer
    traced = torch.jit.trace(module, x)
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    same(traced(x), module(x))
    same(traced(larger(x)), module(larger(x)))


def test_jit_script(layer: tuple[nn.Module, Tensor]) -> None:
    with pytest.raises(Exception, match=r"(?s).+"):  # torch.jit.frontend's, of many types: a refusal, no wrong program
        torch.jit.script(layer[0])


def test_fx(layer: tuple[nn.Module, Tensor]) -> None:
    module, x = layer
    graph = torch.fx.symbolic_trace(module)
    assert any(getattr(node.target, "__module__", "").startswith("famseg_kernels") for node in graph.graph.nodes)
    same(graph(x), module(x))
    same(graph(larger(x)), module(larger(x)))


def test_make_fx(op: Call) -> None:
    def targets(function: Any, **options: Any) -> set[str]:
        graph = make_fx(function, **options)(*op.tensors)
        same(graph(*op.tensors), function(*op.tensors))
        return {str(node.target).split(".")[0] for node in graph.graph.nodes if node.op == "call_function"}

    assert "famseg" in targets(op)
    assert "famseg" not in targets(op, decomposition_table=fk.decompositions())
    assert "famseg" in targets(torch.func.grad(op.loss, op.everything))


def test_torch_export(layer: tuple[nn.Module, Tensor]) -> None:
    module, x = layer
    program = torch.export.export(module, (x,))
    same(program.module()(x), module(x))
    assert any(str(node.target).startswith("famseg.") for node in program.graph.nodes)
    plain = program.run_decompositions(fk.decompositions())
    assert not any(str(node.target).startswith("famseg.") for node in plain.graph.nodes)
    same(plain.module()(x), module(x))


def test_exporting_free_sizes_looks_at_the_spec_only(
    layer: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op's shapes by way of its definition, one fake tensor after the other, took most of an export's minutes."""
    for operation in fk.OPERATIONS:
        monkeypatch.setitem(operation.implementations, "reference", None)
    module, x = layer
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("rows"), 3: torch.export.Dim("columns")}
    torch.export.export(module, (x,), dynamic_shapes=(free,))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx(layer: tuple[nn.Module, Tensor], dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, x = layer
    path = tmp_path / "layer.onnx"
    torch.onnx.export(module, (x,), str(path), dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    same(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), module(x))


def test_compile(layer: tuple[nn.Module, Tensor]) -> None:
    module, x = layer
    tangent = torch.randn_like(x)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: module(x).sin().sum())(x)

    def derivative(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: module(x), (x,), (tangent,))[1]

    def batched(x: Tensor) -> Tensor:
        return torch.vmap(lambda x: module(x[None]))(x)

    for function in (lambda x: module(x), gradient, derivative, batched):
        torch._dynamo.reset()
        same(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


def test_flop_counters(layer: tuple[nn.Module, Tensor]) -> None:
    """torch's counts the op's own formula; those that trace, as fvcore's and mmengine's, meet aten."""
    module, x = layer
    with FlopCounterMode(display=False) as counter:
        module(x)
    counts = counter.get_flop_counts()["Global"]
    assert sum(count for name, count in counts.items() if str(name).startswith("famseg.")) > 0
    graph, _ = torch.jit._get_trace_graph(module, x)
    kinds = [node.kind() for node in graph.nodes()]
    assert not any(kind.startswith("famseg") for kind in kinds)
    if isinstance(module, fk.StripAttention):
        assert kinds.count("aten::_convolution") == 8  # as many as SegNeXt's own module has


# --- the rest of training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(layer: tuple[nn.Module, Tensor], reentrant: bool) -> None:
    module, x = layer
    module.requires_grad_(True)
    parameters = list(module.parameters())

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        run(leaf).sin().sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in parameters)]

    expected = gradients(module)
    for found, right in zip(gradients(lambda x: checkpoint(module, x, use_reentrant=reentrant)), expected, strict=True):
        assert torch.equal(found, right)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(module)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_functional_call_and_functionalize(layer: tuple[nn.Module, Tensor]) -> None:
    module, x = layer
    parameters = {name: p.detach() * 1.5 for name, p in module.named_parameters()}
    expected = torch.func.functional_call(module, parameters, (x,))
    assert not torch.allclose(expected, module(x))
    same(torch.func.functionalize(lambda x: torch.func.functional_call(module, parameters, (x,)))(x), expected)


def test_function_modes_and_subclasses_see_the_function() -> None:
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Tagged(Tensor):
        pass

    x, logits = torch.randn(1, 2, 3, 3), torch.randn(1, 36, 3, 3)
    with Recorder():
        y = fk.reassemble(x, logits, 3)
    assert fk.reassemble in seen
    tagged = fk.reassemble(x.as_subclass(Tagged), logits, 3)
    assert type(tagged) is Tagged
    assert torch.equal(tagged.as_subclass(Tensor), y)


def test_lazily_negated_and_conjugated_tensors_are_resolved(op: Call) -> None:
    def lazy(t: Tensor) -> Tensor:  # −t that shares t's memory
        return torch.complex(t, t).conj().imag

    assert lazy(op.tensors[0]).is_neg()
    same(op(lazy(op.tensors[0]), *op.tensors[1:]), op(-op.tensors[0], *op.tensors[1:]))


# --- the page -------------------------------------------------------------------------------------------------------

WORKS, RAISES = "works", "raises"
# Row of the page → (what it says, the tests here that show it).
ROWS: dict[str, tuple[str, tuple[Callable[..., None], ...]]] = {
    "backward": (WORKS, (test_backward,)),
    "second backward, `create_graph=True`": (RAISES, (test_second_backward,)),
    "forward-mode AD, `torch.autograd.forward_ad`": (
        WORKS,
        (test_forward_ad_of_each_argument_alone, test_forward_ad_while_recording),
    ),
    "`torch.func.jvp`": (WORKS, (test_jvp, test_jvp_is_the_difference_quotient)),
    "`torch.func.linearize`": (WORKS, (test_linearize,)),
    "forward mode with a kernel asked for by `use_backend`": (
        RAISES,
        (test_forward_mode_on_a_backend_that_was_asked_for,),
    ),
    "`torch.func.grad`, `torch.func.vjp`": (WORKS, (test_func_grad, test_vjp)),
    "`torch.func.jacrev`, `torch.func.jacfwd`": (WORKS, (test_jacrev_and_jacfwd,)),
    "`grad` of `jvp`": (WORKS, (test_grad_of_jvp,)),
    "`jvp` of `grad`, `grad` of `grad`, `hessian`, `torch.autograd.functional.jvp`": (
        RAISES,
        (test_second_derivatives,),
    ),
    "`torch.vmap`": (WORKS, (test_vmap_over_all_and_over_one, test_vmap_over_nothing_and_within_vmap)),
    "gradients of each sample, `vmap(grad(f))`": (WORKS, (test_gradients_of_each_sample,)),
    "`is_grads_batched=True`": (RAISES, (test_batched_gradients,)),
    "`torch.jit.trace`": (WORKS, (test_jit_trace,)),
    "`torch.jit.script`": (RAISES, (test_jit_script,)),
    "`torch.fx.symbolic_trace`": (WORKS, (test_fx,)),
    "`make_fx`": (WORKS, (test_make_fx,)),
    "`torch.export.export`": (WORKS, (test_torch_export, test_exporting_free_sizes_looks_at_the_spec_only)),
    "`torch.onnx.export`": (WORKS, (test_onnx,)),
    "`torch.compile(fullgraph=True)`": (WORKS, (test_compile,)),
    "FLOP counters of torch, fvcore, mmengine": (WORKS, (test_flop_counters,)),
    "`torch.utils.checkpoint`, `save_on_cpu`": (WORKS, (test_checkpointing,)),
    "`functional_call`, `functionalize`": (WORKS, (test_functional_call_and_functionalize,)),
    "tensor subclasses and modes of `__torch_function__`": (
        WORKS,
        (test_function_modes_and_subclasses_see_the_function,),
    ),
}


def test_the_page_says_what_the_tests_show() -> None:
    table = re.findall(r"^\| (.+?) \| (works|raises) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(table) == {row: says for row, (says, _) in ROWS.items()}
