"""The contract every operation keeps on every backend, generated from the specs: op × backend × dtype × case.

`pytest tests/test_contract.py --backend cpu` runs one backend's. A case's tags are marks: -k finds them too.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import famseg_kernels as fk
from famseg_kernels import backends
from famseg_kernels.choice import DEVICE
from famseg_kernels.testing import gate
from famseg_kernels.testing.case import Case
from famseg_kernels.testing.gate import call, cotangents, outcome, with_gradients
from famseg_kernels.torch_op import Operation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
                id=f"{operation.name}-{backend}-{str(dtype).removeprefix('torch.')}-{case.name}",
                marks=[getattr(pytest.mark, tag) for tag in case.tags.split()],
            )
            for operation in fk.OPERATIONS
            for backend in operation.implementations
            for dtype in dtypes
            for case in operation.spec.cases[:cases]
        ],
    )


@functools.lru_cache(maxsize=64)
def expected(operation: Operation, case: Case, dtype: torch.dtype):
    """`gate.expected` on the CPU, once for all backends."""
    return gate.expected(operation, case.arguments(dtype))


def arguments(operation: Operation, case: Case, dtype: torch.dtype, backend: str, backward: bool = True):
    """The case's arguments on the backend's device; skips, with the reason, where it cannot run the call."""
    if (reason := fk.available_backends()[backend]) != "ok":
        pytest.skip(reason)
    args = case.arguments(dtype, DEVICE.get(backend, "cpu"))
    if (reason := gate.refusal(operation, backend, args, backward)) is not None:
        pytest.skip(reason)
    return args


@generated()
def test_matches_the_reference(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend, backward=False)
    right = expected(operation, case, dtype)
    results = call(operation, args, backend)
    gate.compare(operation, backend, results, tuple(outputs[: len(results)] for outputs in right))
    args = arguments(operation, case, dtype, backend)
    gate.compare(operation, backend, outcome(operation, args, backend), right)


@generated(dtypes=(torch.float32, torch.bfloat16))
def test_is_bitwise_deterministic(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend)
    threads = torch.get_num_threads()
    first = outcome(operation, args, backend)
    if backend == "cpu":  # the CPU backend promises the same bits for any number of threads
        torch.set_num_threads(1 if threads > 1 else 2)
    try:
        second = outcome(operation, args, backend)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@generated(dtypes=(torch.float64,))
def test_gradcheck(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend)
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
    args = arguments(operation, case, dtype, backend, backward=False)
    args, _ = with_gradients(operation, args)
    torch.library.opcheck(operation.overload, (*args, backend))


@generated(dtypes=(torch.float32, torch.bfloat16))
def test_fake_results_have_the_real_layout(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend, backward=False)
    for variant in (args, channels_last(operation, args)):
        real = call(operation, variant, backend)
        fake = operation.spec.fake(*variant)
        fake = fake if isinstance(fake, list) else [fake]
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def channels_last(operation: Operation, args):
    return with_gradients(operation, args, wanted=False, copy=gate.channels_last)[0]


@generated(dtypes=(torch.float32, torch.bfloat16))
def test_addresses_of_tensors_and_gradients_may_be_odd(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend)
    actual = outcome(operation, args, backend, copy=gate.shifted)
    gate.compare(operation, backend, actual, expected(operation, case, dtype))


@generated(dtypes=(torch.float32,))
def test_layout_of_the_arguments_does_not_matter(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend)
    right = outcome(operation, args, backend)

    def strided(t):
        if t is None or not t.is_floating_point() or t.dim() == 0:
            return t
        padded = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype, device=t.device)
        view = padded[..., 1::2]
        return view.copy_(t)

    views = operation.replace(args, [strided(t) for t in operation.flatten(args)])
    for variant in (views, channels_last(operation, args)):
        results = call(operation, variant, backend)
        torch.testing.assert_close(results, right[: len(results)], rtol=1e-5, atol=1e-5)
    gradients = outcome(operation, channels_last(operation, args), backend)[len(results) :]
    torch.testing.assert_close(gradients, right[len(results) :], rtol=1e-4, atol=1e-4)


@generated(dtypes=(torch.float32,), cases=2)
def test_flops_are_counted(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend)
    args, _ = with_gradients(operation, args)
    flops = operation.spec.flops(*args)
    with FlopCounterMode(display=False) as counter:
        results = call(operation, args, backend)
    assert counter.get_total_flops() == flops > 0
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(results, cotangents(results))
    assert counter.get_total_flops() == 2 * flops


@generated(dtypes=(torch.float32,), cases=1)
def test_a_second_derivative_raises(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend)
    args, leaves = with_gradients(operation, args)
    result = call(operation, args, backend)[0]
    first = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(sum(g.sum() for g in first), leaves[0], allow_unused=True)


@generated(dtypes=(torch.float32,), cases=1)
def test_compiles_without_graph_break(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend)
    right = outcome(operation, args, backend)
    args, leaves = with_gradients(operation, args)
    torch._dynamo.reset()  # all cases share one code object, whose recompilations are limited

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*args):
        return [r * 2 for r in call(operation, args, backend)]

    results = compiled(*args)
    torch.autograd.backward(results, cotangents(results))
    torch.testing.assert_close([*results, *(leaf.grad for leaf in leaves)], [2 * t for t in right])


@generated(dtypes=(torch.float32,))
def test_only_wanted_gradients_are_computed(operation, backend, dtype, case):
    args = arguments(operation, case, dtype, backend)
    right = outcome(operation, args, backend)
    plain, _ = with_gradients(operation, args, wanted=False)
    flat = operation.flatten(plain)
    places = [i for i, t in enumerate(flat) if t is not None and t.is_floating_point()]
    for place, gradient in zip(places, right[len(right) - len(places) :], strict=True):
        leaf = flat[place].detach().requires_grad_()
        mine = [*flat[:place], leaf, *flat[place + 1 :]]
        results = call(operation, operation.replace(plain, mine), backend)
        torch.autograd.backward(results, cotangents(results))
        torch.testing.assert_close(leaf.grad, gradient)


def test_every_backend_name_is_known():
    assert set(fk.available_backends()) == set(backends.BACKENDS)
    assert fk.available_backends()["reference"] == "ok"
