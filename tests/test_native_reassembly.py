"""The C++ kernels of reassembly beyond the contract tests: instruction sets, threads, sizes, edges.

Runs under AddressSanitizer and UBSan as tests/native.py says.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import peak_megabytes
from famseg_kernels import backends
from famseg_kernels.reassembly import cpu, reference
from famseg_kernels.testing import tolerance
from tests.native import DTYPES, NATIVE, needs_native

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]
OPERATIONS = {
    "reassemble": (cpu.reassemble, reference.reassemble),
    "carafe": (cpu.carafe, reference.carafe),
    "feature_aware_upsample": (cpu.feature_aware_upsample, reference.feature_aware_upsample),
}

ENCODER = (11, 3, 2)  # compressed channels, kernel size, dilation
# x's shape, kernel, scale, groups
CASES = {
    "famseg": ((2, 8, 20, 24), 5, 2, 1),
    "deepest": ((2, 6, 4, 4), 5, 2, 1),
    "several_blocks": ((1, 3, 37, 65), 5, 2, 1),
    "several_chunks": ((1, 30, 30, 40), 5, 1, 1),
    "seven_channels_a_group": ((2, 14, 9, 17), 3, 2, 2),
    "no_upsampling": ((1, 5, 11, 33), 7, 1, 1),
    "threefold": ((1, 4, 10, 19), 5, 3, 2),
    "fourfold": ((1, 2, 6, 16), 3, 4, 1),
    "flat": ((2, 3, 1, 40), 5, 2, 3),
    "tall": ((2, 3, 45, 1), 5, 2, 1),
    "kernel_wider_than_a_vector": ((1, 2, 5, 70), 35, 1, 1),
    "rows_cut": ((1, 3, 9, 601), 5, 2, 1),
    "rows_cut_wide_kernel": ((1, 2, 3, 300), 35, 1, 1),
    "one_tap": ((2, 3, 5, 18), 1, 2, 1),
    "one_pixel": ((2, 5, 1, 1), 9, 2, 5),
}


@pytest.fixture(autouse=True)
def module_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", lambda _: NATIVE)


def arguments(operation: str, shape: tuple[int, ...], k: int, s: int, g: int, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    n, _, h, w = shape
    x = rand(*shape).to(dtype)
    if operation == "reassemble":
        return x, (2 * rand(n, g * k * k * s * s, h, w)).to(dtype), k, s, g
    if operation == "carafe":
        return x, (rand(n, g * k * k, s * h, s * w) / k).to(dtype), k, g, s
    channels, size, dilation = ENCODER
    logits = g * k * k * s * s
    weight = rand(logits, channels, size, size) / (channels**0.5 * size)
    return x, *(t.to(dtype) for t in (2 * rand(n, channels, h, w), weight, rand(logits))), k, s, g, dilation


def cotangent(y: Tensor) -> Tensor:
    return torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(y.dtype)


def run_native(operation: str, args: tuple[Any, ...]) -> list[Tensor]:
    native = OPERATIONS[operation][0]
    y = native.forward(*args)
    return [y, *native.backward(cotangent(y), [True] * len(tensors(args)), *args)]


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def run_reference(operation: str, args: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors(args)]
    y = OPERATIONS[operation][1].forward(*leaves, *args[len(leaves) :])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@functools.lru_cache(maxsize=128)
def truth_and_eager(operation: str, case: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The reference in fp64 and in `dtype`, once for all instruction sets."""
    args = arguments(operation, *CASES[case], dtype)
    grad = cotangent(OPERATIONS[operation][1].forward(*args))
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    return run_reference(operation, wide, grad.double()), run_reference(operation, args, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_matches_the_reference_on_every_instruction_set(
    operation: str, case: str, dtype: torch.dtype, isa: str, poisoned: None
) -> None:
    truth, eager = truth_and_eager(operation, case, dtype)
    actual = run_native(operation, arguments(operation, *CASES[case], dtype))
    for ours, theirs, true in zip(actual, eager, truth, strict=True):
        assert ours.dtype == dtype
        assert tolerance.violation(ours, theirs, true) is None, tolerance.violation(ours, theirs, true)


@pytest.mark.parametrize("operation", ["reassemble", "feature_aware_upsample"])
@pytest.mark.parametrize("width", range(1, 36))
def test_any_width(width: int, operation: str, isa: str) -> None:
    args = arguments(operation, (1, 3, 6, width), 5, 2, 1, torch.float64)
    actual = run_native(operation, args)
    for ours, true in zip(actual, run_reference(operation, args, cotangent(actual[0])), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bitwise_the_same_for_any_thread_count_and_run(operation: str, dtype: torch.dtype) -> None:
    args = arguments(operation, (2, 24, 61, 75), 5, 2, 2, dtype)
    results = []
    for count in (1, 2, 2, 3, 16):
        torch.set_num_threads(count)
        results.append(run_native(operation, args))
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_channels_last_comes_back_channels_last(operation: str) -> None:
    args = arguments(operation, (2, 6, 9, 21), 5, 2, 2, torch.float32)
    x, weights = (t.contiguous(memory_format=torch.channels_last) for t in args[:2])
    y, dx, dweights, *others = run_native(operation, (x, weights, *args[2:]))
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert dx.stride() == x.stride() and dweights.stride() == weights.stride()
    for strided, plain in zip((y, dx, dweights, *others), run_native(operation, args), strict=True):
        assert torch.equal(strided, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_memory_formats_give_the_same_bits(
    operation: str, case: str, dtype: torch.dtype, isa: str, poisoned: None
) -> None:
    args = arguments(operation, *CASES[case], dtype)
    plain = run_native(operation, args)
    for last in ((0,), (1,), (0, 1)):  # x and the weights each in their own format
        mixed = [t.contiguous(memory_format=torch.channels_last) if i in last else t for i, t in enumerate(args[:2])]
        for ours, expected in zip(run_native(operation, (*mixed, *args[2:])), plain, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_memory_beside_the_results_does_not_grow_with_the_rows(
    operation: str, memory_format: torch.memory_format
) -> None:
    x, weights, *rest = arguments(operation, (1, 4, 4, 20_000), 5, 2, 1, torch.float32)
    args = (x.contiguous(memory_format=memory_format), weights, *rest)
    native = OPERATIONS[operation][0]
    y = native.forward(*args)
    needed = peak_megabytes(lambda _: native.forward(*args), "cpu")
    if math.isnan(needed):
        pytest.skip("the system does not tell a process's peak memory")
    assert needed <= y.nbytes / 1e6 + 4
    grad, results = cotangent(y).contiguous(memory_format=memory_format), sum(t.nbytes for t in tensors(args))
    if operation == "feature_aware_upsample":  # compressed's is a sum of parts of 4 rows and 2 on each side
        results += 2 * weights.nbytes + 64 * x.shape[3]  # and a vector a pixel of a row, in AVX-512 of 64 bytes
    needs = [True] * len(tensors(args))
    assert peak_megabytes(lambda _: native.backward(grad, needs, *args), "cpu") <= results / 1e6 + 4


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_gradient_alone_is_the_same_as_all(operation: str) -> None:
    args = arguments(operation, (2, 6, 33, 40), 5, 2, 1, torch.float32)
    _, *together = run_native(operation, args)
    native = OPERATIONS[operation][0]
    grad = cotangent(native.forward(*args))
    for wanted, expected in enumerate(together):
        alone = native.backward(grad, [index == wanted for index in range(len(together))], *args)
        # Without that of x a block has no halo and more rows, which makes other sums of the encoder's gradients.
        assert torch.equal(alone[wanted], expected) or (len(together) == 4 and wanted > 0)
        torch.testing.assert_close(alone[wanted], expected, rtol=1e-4, atol=1e-4)
        assert all(gradient is None for index, gradient in enumerate(alone) if index != wanted)


def test_without_channels_the_gradient_of_the_weights_is_zero(poisoned: None) -> None:
    for operation in OPERATIONS:
        args = arguments(operation, (2, 0, 5, 6), 3, 2, 1, torch.float32)
        y, dx, *others = run_native(operation, args)
        assert y.shape == (2, 0, 10, 12) and dx.shape == args[0].shape
        for gradient, of in zip(others, tensors(args)[1:], strict=True):
            assert torch.equal(gradient, torch.zeros_like(of))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype, isa: str) -> None:
    # One tap far above the others, differences that underflow, and taps switched off by -inf.
    x, logits, *rest = arguments("reassemble", (1, 2, 5, 20), 3, 1, 1, dtype)
    logits[:, 4] += 300
    logits[:, 0] = -torch.inf
    logits[:, :, 2] *= 1e4
    expected = reference.reassemble.forward(x, logits, *rest)
    torch.testing.assert_close(cpu.reassemble.forward(x, logits, *rest), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_softmax_loses_a_few_ulps_at_most(dtype: torch.dtype, isa: str) -> None:
    # An impulse of x at each pixel's own place shows one weight at a time; k = 3 on a single row.
    logits = torch.linspace(-80, 0, 9 * 500, dtype=dtype).view(500, 9).t().reshape(1, 9, 1, 500)
    x = torch.ones((1, 1, 1, 500), dtype=dtype)
    truth = logits.double().softmax(1)[:, 3:6]
    truth[:, 0, :, 0] = truth[:, 2, :, -1] = 0
    y = cpu.reassemble.forward(x, logits, 3, 1, 1)
    torch.testing.assert_close(y, truth.sum(1, keepdim=True).to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_nan_reaches_the_pixels_whose_windows_hold_it_and_no_others(isa: str) -> None:
    args = arguments("reassemble", (1, 2, 12, 40), 5, 2, 1, torch.float32)
    args[0][0, 1, 4, 39] = float("nan")
    args[1][0, 7, 9, 0] = float("nan")
    expected = reference.reassemble.forward(*args)
    assert torch.equal(torch.isnan(cpu.reassemble.forward(*args)), torch.isnan(expected))
