"""The C++ kernels of ssd_scan and ssd_scan_2d beyond the contract tests: instruction sets, threads, sizes, edges.

Runs under AddressSanitizer and UBSan as tests/native.py says.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from famseg_kernels import backends
from famseg_kernels.ssd_scan import cpu, op, reference
from famseg_kernels.testing import tolerance
from famseg_kernels.testing.gate import cotangents
from tests.native import DTYPES, NATIVE, needs_native

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

# (N, H, W), heads, headdim, state, groups, directions, one B and C for all directions
IMAGES = {
    "four_directions": ((1, 9, 13), 3, 20, 19, 1, 4, False),
    "four_shared": ((1, 13, 9), 2, 8, 33, 2, 4, True),
    "two_directions": ((2, 11, 7), 2, 16, 16, 2, 2, False),
    "two_shared": ((1, 5, 14), 4, 5, 7, 1, 2, True),
    "one_direction": ((1, 7, 10), 2, 65, 6, 1, 1, False),
    "headdim_64": ((1, 4, 17), 1, 64, 64, 1, 4, False),
    "many_heads": ((4, 6, 7), 9, 4, 5, 1, 4, False),
    "whole_chunks": ((1, 8, 8), 2, 16, 16, 1, 4, False),
    "one_chunk": ((2, 4, 4), 2, 16, 16, 1, 4, False),
    "one_row": ((1, 1, 70), 2, 4, 4, 1, 4, False),
    "one_column": ((1, 70, 1), 2, 4, 4, 1, 4, True),
    "one_pixel": ((2, 1, 1), 2, 3, 4, 1, 4, False),
}
# (batch, length), heads, headdim, state, groups
SEQUENCES = {
    "long": ((2, 101), 4, 18, 17, 2),
    "short": ((1, 5), 2, 7, 3, 1),
    "empty": ((2, 0), 2, 3, 4, 1),
}


@pytest.fixture(autouse=True)
def module_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", lambda _: NATIVE)


def image(shape: Any, heads: int, headdim: int, state: int, groups: int, directions: int, shared: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(1)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    matrices = 1 if shared else directions
    tensors = [
        rand(*shape, heads, headdim),
        rand(*shape, directions, heads) - 1,
        -rand(directions, heads).abs() - 0.2,
        rand(*shape, matrices, groups, state) / state**0.5,
        rand(*shape, matrices, groups, state),
        rand(heads) if shared else rand(directions, heads),
        rand(directions, heads),
    ]
    return [*tensors, None, True, 0.05, 2.0]


def sequence(shape: Any, heads: int, headdim: int, state: int, groups: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    length = shape[1]
    tensors = [
        rand(*shape, heads, headdim),
        rand(*shape, heads) - 1,
        -rand(heads).abs() - 0.2,
        rand(*shape, groups, state) / state**0.5,
        rand(*shape, groups, state),
        rand(heads, headdim),
        rand(*shape, heads, headdim),
        rand(heads),
        rand(shape[0], heads, headdim, state),
        torch.arange(length).mul(4).div(max(length, 1), rounding_mode="floor").expand(shape).contiguous(),
        None,
    ]
    return [*tensors, None, True, 0.05, 2.0, True, False]


def converted(args: list[Any], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def run_reference(operation: Any, args: list[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    results = operation.forward(*leaves)
    results = results if isinstance(results, list) else [results]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    grads = [g.to(r.dtype) for g, r in zip(cotangents([r.detach() for r in results]), results, strict=True)]
    found = torch.autograd.grad(results, wanted, grads, allow_unused=True)
    gradients = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
    return [r.detach() for r in results], gradients


def run_native(operation: Any, args: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    results = operation.forward(*args)
    several = isinstance(results, list)
    results = results if several else [results]
    registered = op.SCAN_2D_OPERATION if operation is cpu.scan_2d else op.SCAN_OPERATION
    needs = [t is not None and t.is_floating_point() for t in registered.flatten(args)]
    grads = cotangents(results)
    found = operation.backward(grads if several else grads[0], needs, *args)
    return results, registered.promised_gradients(found, grads, needs, args)


def assert_as_exact_as_torch(name: str, args: list[Any]) -> None:
    """The rule of famseg_kernels.testing.tolerance, for results and gradients of one call."""
    native, torchs = getattr(cpu, name), getattr(reference, name)
    results, gradients = run_native(native, args)
    truth = run_reference(torchs, converted(args, torch.float64))
    eager = run_reference(torchs, args)
    everything = zip(results + gradients, eager[0] + eager[1], truth[0] + truth[1], strict=True)
    for index, (ours, theirs, true) in enumerate(everything):
        assert ours.dtype == theirs.dtype
        wrong = tolerance.violation(ours, theirs, true)
        assert wrong is None, f"output {index}: {wrong}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", IMAGES)
def test_an_image_matches_the_reference(case: str, dtype: torch.dtype, isa: str, poisoned: None) -> None:
    assert_as_exact_as_torch("scan_2d", converted(image(*IMAGES[case]), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", SEQUENCES)
def test_a_sequence_matches_the_reference(case: str, dtype: torch.dtype, isa: str, poisoned: None) -> None:
    if case == "empty":
        args = sequence(*SEQUENCES[case])
        results = cpu.scan.forward(*args)
        assert torch.equal(results[1], args[8])  # the initial state stays
        grads = [results[0], torch.ones_like(results[1])]
        gradients = cpu.scan.backward(grads, [t is not None for t in args[:9]] + [False] * 2, *args)
        assert torch.equal(gradients[8], grads[1])
        assert not gradients[2].any() and not gradients[5].any() and not gradients[7].any()
        return
    assert_as_exact_as_torch("scan", converted(sequence(*SEQUENCES[case]), dtype))


@pytest.mark.parametrize(("dtype", "shared"), [(torch.float32, False), (torch.bfloat16, True)])
def test_states_too_large_for_a_cache(dtype: torch.dtype, shared: bool, poisoned: None) -> None:
    """Forward divides the sequence into segments, backward the heads of the group into blocks."""
    assert_as_exact_as_torch("scan_2d", converted(image((1, 36, 61), 2, 64, 256, 1, 4, shared), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_last_block_of_fewer_heads_has_its_own_segments(dtype: torch.dtype, isa: str) -> None:
    """Two heads' states at all 64 chunks are too large for a cache, one head's are not; blocks have 2, 2, 1 heads."""
    args = image((1, 8, 8), 5, 64, 64, 1, 4, False)
    args[7] = 1  # tokens of a chunk
    assert_as_exact_as_torch("scan_2d", converted(args, dtype))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_any_length(length: int, isa: str) -> None:
    assert_as_exact_as_torch("scan", sequence((1, length), 2, 5, 3, 1))
    assert_as_exact_as_torch("scan_2d", image((1, 1, length), 2, 5, 3, 1, 2, False))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17, 31, 48, 80])
def test_any_headdim_and_state(size: int, isa: str) -> None:
    assert_as_exact_as_torch("scan_2d", image((1, 5, 7), 2, size, 4, 1, 4, False))
    assert_as_exact_as_torch("scan_2d", image((1, 5, 7), 2, 4, size, 1, 4, True))


@pytest.mark.parametrize("case", ["packed", "packed_with_an_empty_one", "packed_from_the_middle"])
def test_states_of_packed_sequences(case: str) -> None:
    bounds = {
        "packed": [0, 40, 71, 90],
        "packed_with_an_empty_one": [0, 0, 33, 33, 90],
        "packed_from_the_middle": [12, 50, 90],
    }[case]
    args = sequence((1, 90), 4, 6, 5, 2)
    args[10] = torch.tensor(bounds)
    for final in (True, False):
        assert_as_exact_as_torch("scan", [*args[:15], final, True])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shared", [False, True])
def test_bitwise_the_same_for_any_thread_count_and_run(dtype: torch.dtype, shared: bool) -> None:
    args = converted(image((2, 33, 29), 5, 24, 20, 1, 4, shared), dtype)
    results = []
    for threads in (1, 2, 2, 3, 16):
        torch.set_num_threads(threads)
        outputs, gradients = run_native(cpu.scan_2d, args)
        results.append(outputs + gradients)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_decays_may_underflow_and_the_caller_keeps_its_subnormals(dtype: torch.dtype, isa: str) -> None:
    args = converted(image((1, 9, 13), 2, 8, 8, 1, 4, False), dtype)
    args[2] = torch.full_like(args[2], -60.0)  # a chunk's decays pass through the subnormal numbers
    assert_as_exact_as_torch("scan_2d", args)
    assert float(torch.tensor(1e-30) * torch.tensor(1e-10)) > 0


def test_chunk_size_changes_nothing_but_speed() -> None:
    args = image((1, 11, 9), 2, 6, 5, 1, 4, False)
    expected = run_native(cpu.scan_2d, args)
    for chunk in (1, 9, 20, 256, 10**12):
        args[7] = chunk
        actual = run_native(cpu.scan_2d, args)
        for ours, right in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softplus", [False, True])
def test_a_spike_in_dt_does_not_spoil_its_neighbours(softplus: bool, isa: str) -> None:
    # Slow decay, so that neighbours matter; every other token is compared by its own size.
    args = image((1, 8, 12), 2, 4, 4, 1, 4, False)
    args[1] = torch.full_like(args[1], 0.3)
    args[1][0, 4, 5] = 1000.0
    args[2] = torch.full_like(args[2], -0.2)
    args[8:] = [softplus, 0.0, math.inf]
    exact = reference.scan_2d.forward(*args)
    y = cpu.scan_2d.forward(*converted(args, torch.float32)).double()
    away = torch.ones(8, 12, dtype=torch.bool)
    away[4, 5] = False
    error = (y - exact)[0, away].norm(dim=(-2, -1)) / exact[0, away].norm(dim=(-2, -1))
    assert error.max() < 1e-4  # each of them has forgotten most of its terms to cancellation at worst
    away[4:6] = False  # rows not next to the spike see nothing of it
    assert torch.linalg.vector_norm((y - exact)[0, away]) < 2e-6 * torch.linalg.vector_norm(exact[0, away])


def test_strides_do_not_matter() -> None:
    args = image((2, 6, 7), 3, 5, 6, 1, 4, False)

    def strided(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        padded = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype)
        return padded[..., 1::2].copy_(t)

    expected = run_native(cpu.scan_2d, args)
    actual = run_native(cpu.scan_2d, [strided(a) for a in args])
    transposed = list(args)
    transposed[0] = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    again = run_native(cpu.scan_2d, transposed)
    for run in (actual, again):
        for ours, right in zip(run[0] + run[1], expected[0] + expected[1], strict=True):
            assert torch.equal(ours, right)
    assert actual[0][0].is_contiguous() and again[0][0].is_contiguous()
    assert again[1][0].stride() == torch.empty_like(transposed[0]).stride()


@pytest.mark.parametrize("heads", [0, 2])
def test_without_heads_headdim_or_state_there_is_nothing_to_add(heads: int) -> None:
    for sizes in ((heads, 0, 4), (heads, 3, 0)):
        args = image((1, 3, 4), *sizes, 1, 4, False)
        args[5] = torch.ones(heads, dtype=torch.float64)
        (y,), gradients = run_native(cpu.scan_2d, args)
        assert torch.equal(y, args[0])
        assert not any(g.any() for g in gradients[1:5]) and not gradients[6].any()


def test_each_gradient_alone_is_the_same_as_among_all() -> None:
    args = sequence((1, 50), 2, 6, 5, 1)
    results = cpu.scan.forward(*args)
    grads = cotangents(results)
    present = [t is not None and t.is_floating_point() for t in args[:11]]
    everything = cpu.scan.backward(grads, present, *args)
    for wanted in range(9):
        alone = cpu.scan.backward(grads, [index == wanted for index in range(11)], *args)
        assert torch.equal(alone[wanted], everything[wanted])
        assert [t is not None for t in alone] == [index == wanted for index in range(11)]
