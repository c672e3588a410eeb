"""The contract every operation keeps on every backend, generated from the specs: op × backend × dtype × case."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import famseg_kernels as fk
from benchmarks import gate
from benchmarks.gate import cotangents, with_gradients
from famseg_kernels import backends, tolerance
from famseg_kernels.registry import Case, Operation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = {
    "reference": "cpu",
    "cpu": "cpu",
    "triton": "cpu" if backends.TRITON_INTERPRETS else "cuda",
    "cuda": "cuda",
}


def generated(dtypes=DTYPES, cases=None):
    """Parametrize over operations, their backends, dtypes and cases; `cases` picks the first few only."""
    return pytest.mark.parametrize(
        ("operation", "backend", "dtype", "case"),
        [
            pytest.param(
                operation,
                backend,
                dtype,
                case,
                id=f"{operation.spec.name}-{backend}-{str(dtype).removeprefix('torch.')}-{case.name}",
            )
            for operation in fk.OPERATIONS
            for backend in operation.implementations
            for dtype in dtypes
            for case in operation.spec.cases[:cases]
        ],
    )


def call(operation: Operation, args, backend: str):
    """Results as a list; through the op itself, below the public function's defaults."""
    result = operation.packet(*args, backend)
    return list(result) if isinstance(result, (list, tuple)) else [result]


@functools.lru_cache(maxsize=64)
def truth_and_eager(operation: Operation, case: Case, dtype: torch.dtype):
    """Results and gradients of the reference in fp64 and in `dtype`, from arguments rounded to `dtype`."""
    args = case.arguments(dtype)
    wide = operation.replace(
        args, [t.double() if t is not None and t.is_floating_point() else t for t in operation.flatten(args)]
    )
    return [results_and_gradients(operation, a, "reference") for a in (wide, args)]


def results_and_gradients(operation: Operation, args, backend: str):
    args, leaves = with_gradients(operation, args)
    results = call(operation, args, backend)
    torch.autograd.backward(results, cotangents(results))
    return [r.detach() for r in results], [leaf.grad for leaf in leaves]


def arguments(case: Case, dtype: torch.dtype, backend: str):
    """The case's arguments on the backend's device (on the CPU where there is none: `require` then skips)."""
    return case.arguments(dtype, DEVICES[backend] if fk.available_backends()[backend] == "ok" else "cpu")


def require(operation: Operation, backend: str, args, method: str = "forward") -> None:
    """Skip, with the reason, where this machine or this backend cannot run the call."""
    if (reason := fk.available_backends()[backend]) != "ok":
        pytest.skip(reason)
    if (reason := operation.refusal(backend, args, method)) is not None:
        pytest.skip(reason)


@generated()
def test_matches_the_reference(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    truth, eager = truth_and_eager(operation, case, dtype)
    results = call(operation, args, backend)
    for actual, mine, right in zip(results, eager[0], truth[0], strict=True):
        assert tolerance.violation(actual, mine, right) is None, tolerance.violation(actual, mine, right)
    require(operation, backend, args, "backward")
    results, gradients = results_and_gradients(operation, args, backend)
    for i, (actual, mine, right) in enumerate(zip(gradients, eager[1], truth[1], strict=True)):
        assert actual.dtype == mine.dtype
        wrong = tolerance.violation(actual, mine, right)
        assert wrong is None, f"gradient {i}: {wrong}"


@generated(dtypes=(torch.float32, torch.bfloat16))
def test_is_bitwise_deterministic(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    require(operation, backend, args, "backward")
    threads = torch.get_num_threads()
    first = results_and_gradients(operation, args, backend)
    if backend == "cpu":  # the CPU backend promises the same bits for any number of threads
        torch.set_num_threads(1 if threads > 1 else 2)
    try:
        second = results_and_gradients(operation, args, backend)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@generated(dtypes=(torch.float64,))
def test_gradcheck(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    require(operation, backend, args, "backward")
    args, leaves = with_gradients(operation, args)
    if any(leaf.numel() == 0 for leaf in leaves):
        return  # nothing to perturb; test_matches_the_reference covers the gradients of an empty batch
    flat = operation.flatten(args)
    places = [i for i, t in enumerate(flat) if t is not None and t.is_floating_point()]

    def run(*leaves):
        mine = list(flat)
        for place, leaf in zip(places, leaves, strict=True):
            mine[place] = leaf
        return tuple(call(operation, operation.replace(args, mine), backend))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, eps=1e-6, atol=1e-5)


@generated(dtypes=(torch.float32,), cases=3)
def test_opcheck(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    args, _ = with_gradients(operation, args)
    torch.library.opcheck(operation.overload, (*args, backend))


@generated(dtypes=(torch.float32, torch.bfloat16))
def test_fake_results_have_the_real_layout(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    for variant in (args, channels_last(operation, args)):
        real = call(operation, variant, backend)
        fake = operation.spec.fake(*variant)
        fake = fake if isinstance(fake, list) else [fake]
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def channels_last(operation: Operation, args):
    return operation.replace(args, [t if t is None else gate.channels_last(t) for t in operation.flatten(args)])


@generated(dtypes=(torch.float32, torch.bfloat16))
def test_addresses_of_tensors_and_gradients_may_be_odd(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    require(operation, backend, args, "backward")
    truth, eager = truth_and_eager(operation, case, dtype)
    actual = gate.outcome(operation, args, backend, backward=True, copy=gate.shifted)
    gate.compare(operation, backend, actual, ([*eager[0], *eager[1]], [*truth[0], *truth[1]]))


@generated(dtypes=(torch.float32,))
def test_layout_of_the_arguments_does_not_matter(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    require(operation, backend, args, "backward")
    expected = results_and_gradients(operation, args, backend)

    def strided(t):
        if t is None or not t.is_floating_point() or t.dim() == 0:
            return t
        padded = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype, device=t.device)
        view = padded[..., 1::2]
        return view.copy_(t)

    views = operation.replace(args, [strided(t) for t in operation.flatten(args)])
    results = call(operation, views, backend)
    for variant in (views, channels_last(operation, args)):
        results = call(operation, variant, backend)
        for actual, right in zip(results, expected[0], strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)
    _, gradients = results_and_gradients(operation, channels_last(operation, args), backend)
    for actual, right in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-4)


@generated(dtypes=(torch.float32,), cases=2)
def test_flops_are_counted(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    require(operation, backend, args, "backward")
    args, _ = with_gradients(operation, args)
    expected = operation.spec.flops(*args)
    with FlopCounterMode(display=False) as counter:
        results = call(operation, args, backend)
    assert counter.get_total_flops() == expected > 0
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(results, cotangents(results))
    assert counter.get_total_flops() == 2 * expected


@generated(dtypes=(torch.float32,), cases=1)
def test_a_second_derivative_raises(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    require(operation, backend, args, "backward")
    args, leaves = with_gradients(operation, args)
    result = call(operation, args, backend)[0]
    first = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(sum(g.sum() for g in first), leaves[0], allow_unused=True)


@generated(dtypes=(torch.float32,), cases=1)
def test_compiles_without_graph_break(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    require(operation, backend, args, "backward")
    expected = results_and_gradients(operation, args, backend)
    args, leaves = with_gradients(operation, args)
    torch._dynamo.reset()  # all cases share one code object, whose recompilations are limited

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*args):
        return [r * 2 for r in call(operation, args, backend)]

    results = compiled(*args)
    torch.autograd.backward(results, cotangents(results))
    for actual, right in zip(results, expected[0], strict=True):
        torch.testing.assert_close(actual, 2 * right)
    for leaf, right in zip(leaves, expected[1], strict=True):
        torch.testing.assert_close(leaf.grad, 2 * right)


@generated(dtypes=(torch.float32,), cases=2)
def test_only_wanted_gradients_are_computed(operation, backend, dtype, case):
    args = arguments(case, dtype, backend)
    require(operation, backend, args)
    require(operation, backend, args, "backward")
    _, expected = results_and_gradients(operation, args, backend)
    plain, _ = with_gradients(operation, args, wanted=False)
    flat = operation.flatten(plain)
    places = [i for i, t in enumerate(flat) if t is not None and t.is_floating_point()]
    for place, right in zip(places, expected, strict=True):
        leaf = flat[place].detach().requires_grad_()
        mine = [*flat[:place], leaf, *flat[place + 1 :]]
        results = call(operation, operation.replace(plain, mine), backend)
        torch.autograd.backward(results, cotangents(results))
        torch.testing.assert_close(leaf.grad, right)


def test_every_backend_name_is_known():
    assert set(fk.available_backends()) == set(backends.BACKENDS)
    assert fk.available_backends()["reference"] == "ok"
