"""The C++ kernels of strip_conv2d against the same convolutions in fp64, on every instruction set here.

Runs under AddressSanitizer and UBSan as tests/native.py says.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from famseg_kernels import backends
from famseg_kernels.strip_conv import cpu
from famseg_kernels.testing import tolerance
from tests.native import DTYPES, NATIVE, needs_native

pytestmark = needs_native

# (N, C, H, W), square size or None, [(row size, column size)], biases
CASES = {
    "mscan": ((2, 3, 24, 20), 5, [(7, 7), (11, 11), (21, 21)], True),
    "one_pixel": ((2, 3, 1, 1), 5, [(7, 7), (21, 21)], True),
    "flat": ((1, 2, 3, 40), 5, [(7, 11)], True),
    "tall": ((1, 2, 41, 2), 3, [(11, 7), (3, 3)], True),
    "lower_than_the_kernel": ((2, 2, 9, 35), 7, [(21, 31)], True),
    "no_branch": ((1, 3, 7, 9), 5, [], True),
    "no_square": ((2, 2, 13, 17), None, [(5, 9), (9, 5)], True),
    "nothing": ((2, 2, 5, 6), None, [], False),
    "no_bias": ((1, 2, 10, 33), 3, [(7, 7)], False),
    "pointwise": ((1, 2, 6, 19), 1, [(1, 1), (1, 5), (3, 1)], True),
    "longest": ((1, 2, 70, 66), 63, [(63, 63)], True),
    "five_branches": ((1, 1, 18, 50), 3, [(3, 5), (9, 9), (21, 7), (9, 3), (1, 21)], True),
    "wide": ((1, 1, 6, 150), 5, [(7, 7), (11, 11), (21, 21)], True),
    # More channels than lanes, more rows than a band, more columns than a block.
    "groups_and_bands": ((1, 18, 70, 40), 5, [(7, 7), (11, 11), (21, 21)], True),
    "blocks_of_columns": ((1, 2, 9, 530), 5, [(7, 7), (11, 11), (21, 21)], True),
    "empty_batch": ((0, 3, 8, 8), 5, [(7, 7)], True),
}


@pytest.fixture(autouse=True)
def module_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", lambda _: NATIVE)


def arguments(
    shape: tuple[int, ...], square: int | None, strips: list[tuple[int, int]], biases: bool
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    c = shape[1]
    # Missing biases in a pattern, so that a mix occurs.
    row_biases = [rand(c) if biases and i != 1 else None for i in range(len(strips))]
    col_biases = [rand(c) if biases and i != 2 else None for i in range(len(strips))]
    return (
        rand(*shape),
        None if square is None else rand(c, 1, square, square) / square,
        rand(c) if biases and square is not None else None,
        [rand(c, 1, 1, k) / k**0.5 for k, _ in strips],
        row_biases,
        [rand(c, 1, k, 1) / k**0.5 for _, k in strips],
        col_biases,
    )


def compose(x, square, square_bias, rows, row_biases, cols, col_biases):
    """The definition: a chain of depthwise convolutions."""

    def conv(image, weight, bias):
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        return F.conv2d(image, weight, bias, padding=padding, groups=image.shape[1])

    a = x if square is None else conv(x, square, square_bias)
    y = a
    for row, row_bias, col, col_bias in zip(rows, row_biases, cols, col_biases, strict=True):
        y = y + conv(conv(a, row, row_bias), col, col_bias)
    return y


def flatten(args: tuple[Any, ...]) -> list[Tensor | None]:
    return [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]


def converted(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(
        [None if t is None else t.to(dtype) for t in arg]
        if isinstance(arg, list)
        else None
        if arg is None
        else arg.to(dtype)
        for arg in args
    )


def run(function: Any, args: tuple[Any, ...], grad: Tensor) -> list[Tensor | None]:
    """The result and all gradients of `compose`."""
    leaves = tuple(
        [None if t is None else t.detach().requires_grad_() for t in arg]
        if isinstance(arg, list)
        else None
        if arg is None
        else arg.detach().requires_grad_()
        for arg in args
    )
    y = function(*leaves)
    tensors = [t for t in flatten(leaves) if t is not None]
    found = iter(torch.autograd.grad(y, tensors, grad))
    return [y.detach(), *(None if t is None else next(found) for t in flatten(leaves))]


def run_native(args: tuple[Any, ...], grad: Tensor) -> list[Tensor | None]:
    needs = [t is not None for t in flatten(args)]
    return [cpu.forward(*args), *cpu.backward(grad, needs, *args)]


def assert_as_exact_as_torch(ours: list, theirs: list, truth: list, scales: list[float], dtype: torch.dtype):
    """err(ours) <= 2 err(torch in the same dtype) + epsilon * scale, by norm and by maximum."""
    for index, (our, their, true, scale) in enumerate(zip(ours, theirs, truth, scales, strict=True)):
        if true is None:
            assert our is None
            continue
        assert our.dtype == dtype and our.shape == true.shape
        if true.numel() == 0:
            continue
        assert torch.isfinite(our).all(), f"output {index}"
        for norm in (2, float("inf")):
            size = max(torch.linalg.vector_norm(true, norm).item(), scale)
            our_error = torch.linalg.vector_norm(our.double() - true, norm).item()
            their_error = torch.linalg.vector_norm(their.double() - true, norm).item()
            assert our_error <= 2 * their_error + tolerance.EPSILON[dtype] * size, f"output {index}, norm {norm}"


def gradient_scales(args: tuple[Any, ...], grad: Tensor) -> list[float]:
    """Weight gradients sum about N*H*W terms of dy's size: the root of their squares counts."""
    size = grad.double().norm().item()
    return [0.0, 0.0, *(size for _ in flatten(args)[1:])]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own flags() context asks for it
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_matches_the_composition_in_fp64(case: str, dtype: torch.dtype, isa: str) -> None:
    args, grad, theirs, truth, scales = composition(case, dtype)
    assert_as_exact_as_torch(run_native(args, grad), theirs, truth, scales, dtype)


@functools.cache
def composition(case: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments, gradient, torch's results in `dtype` and in fp64, and scales: the same for all instruction sets."""
    args = converted(arguments(*CASES[case]), dtype)
    grad = torch.randn(args[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = converted(args, torch.float64)
    # oneDNN would generate code for each 16-bit kernel size, for minutes where it is 63x63.
    with torch.backends.mkldnn.flags(enabled=dtype.itemsize > 2):
        theirs = run(compose, args, grad)
    return args, grad, theirs, run(compose, exact, grad.double()), gradient_scales(exact, grad)


@pytest.mark.parametrize("shape", [(2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_without_channels_rows_or_columns_there_is_nothing_to_add(shape: tuple[int, ...]) -> None:
    # Torch's own convolutions refuse these.
    args = arguments(shape, 5, [(7, 7)], True)
    y, *gradients = run_native(args, args[0])
    assert y.shape == shape
    for tensor, gradient in zip(flatten(args), gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("width", range(1, 36))
def test_any_width(width: int, isa: str) -> None:
    args = arguments((1, 1, 5, width), 3, [(7, 5)], True)
    grad = torch.ones_like(args[0])
    truth = run(compose, args, grad)
    for ours, true in zip(run_native(args, grad), truth, strict=True):
        if true is not None:
            torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("height", range(1, 14))
def test_any_height(height: int, isa: str) -> None:
    args = arguments((1, 1, height, 9), 5, [(3, 11)], True)
    grad = torch.ones_like(args[0])
    truth = run(compose, args, grad)
    for ours, true in zip(run_native(args, grad), truth, strict=True):
        if true is not None:
            torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_bitwise_the_same_for_any_thread_count_and_run(dtype: torch.dtype, one_thread: None) -> None:
    args = converted(arguments((3, 5, 37, 41), 5, [(7, 7), (11, 11), (21, 21)], True), dtype)
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for count in (1, 2, 2, 3, 16):
        torch.set_num_threads(count)
        results.append(run_native(args, grad))
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert first is None or torch.equal(first, again)


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (1, 18, 20, 24), (1, 2, 9, 530)])
def test_channels_last_comes_back_channels_last(shape: tuple[int, ...], isa: str) -> None:
    args = arguments(shape, 3, [(7, 7)], True)
    x, *rest = args
    strided = x.contiguous(memory_format=torch.channels_last)
    needs = [True] + [False] * (len(flatten(args)) - 1)
    y, (dx, *_) = cpu.forward(strided, *rest), cpu.backward(strided, needs, strided, *rest)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert torch.equal(y, cpu.forward(*args)) and torch.equal(dx, cpu.backward(x, needs, *args)[0])


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(2, 32, 9, 11), (1, 16, 1, 1), (1, 48, 2, 5), (2, 16, 40, 3), (1, 17, 5, 6)])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9])
def test_a_square_kernel_alone_reads_channels_last_as_it_lies(
    size: int, shape: tuple[int, ...], dtype: torch.dtype, isa: str
) -> None:
    args = converted(arguments(shape, size, [], True), dtype)
    x, *rest = args
    y = cpu.forward(x.contiguous(memory_format=torch.channels_last), *rest)
    assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.backends.mkldnn.flags(enabled=dtype.itemsize > 2):
        eager = compose(*args)
    assert tolerance.violation(y, eager, compose(*converted(args, torch.float64))) is None


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(2, 32, 9, 11), (1, 16, 1, 1), (1, 48, 2, 5), (2, 16, 40, 3), (3, 16, 40, 31)])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9])
def test_gradients_of_a_square_kernel_alone_read_channels_last_as_it_lies(
    size: int, shape: tuple[int, ...], dtype: torch.dtype, isa: str, one_thread: None
) -> None:
    args = converted(arguments(shape, size, [], True), dtype)
    x, *rest = args
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (grad, x)]
    found = cpu.backward(last[0], [True, True, True], last[1], *rest)
    with torch.backends.mkldnn.flags(enabled=dtype.itemsize > 2):
        eager = run(compose, args, grad)
    for ours, theirs, true in zip(
        found, eager[1:], run(compose, converted(args, torch.float64), grad.double())[1:], strict=True
    ):
        assert tolerance.violation(ours, theirs, true) is None
    # Each alone, and with other numbers of threads.
    for index in range(3):
        torch.set_num_threads(1 + index)
        alone = cpu.backward(last[0], [i == index for i in range(3)], last[1], *rest)
        assert torch.equal(alone[index], found[index]) and [t is not None for t in alone].count(True) == 1


def test_a_square_kernel_alone_of_very_many_channels() -> None:
    # Their weights are more than the loop for channels-last images takes.
    x, *rest = converted(arguments((1, 5248, 2, 2), 7, [], True), torch.float32)
    y = cpu.forward(x.contiguous(memory_format=torch.channels_last), *rest)
    torch.testing.assert_close(y, cpu.forward(x, *rest))


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 5, 7, 8, 9, 10])  # 6: a bias that this case has not
def test_each_gradient_alone_is_the_same_as_among_all(wanted: int) -> None:
    args = arguments((2, 3, 12, 17), 5, [(7, 7), (3, 9)], True)
    grad = torch.ones_like(args[0])
    present = [t is not None for t in flatten(args)]
    everything = cpu.backward(grad, present, *args)
    alone = cpu.backward(grad, [index == wanted for index in range(len(present))], *args)
    assert torch.equal(alone[wanted], everything[wanted])
    assert [t is not None for t in alone] == [index == wanted for index in range(len(present))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_spreads_as_far_as_the_kernels_and_no_farther(
    value: float, dtype: torch.dtype, isa: str
) -> None:
    args = converted(arguments((1, 1, 40, 40), 5, [(7, 7)], True), dtype)
    args[0][0, 0, 39, 39] = value
    expected = torch.isfinite(compose(*converted(args, torch.float64)))
    assert torch.equal(torch.isfinite(cpu.forward(*args)), expected)


def all_16_bit_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_goes_through_unchanged(dtype: torch.dtype, isa: str) -> None:
    x = all_16_bit_patterns(dtype).reshape(1, 1, 256, 256)
    y = cpu.forward(x, None, None, [], [], [], [])
    nan = torch.isnan(x)
    assert torch.equal(torch.isnan(y), nan)
    # -0 becomes +0: the kernel adds to zero.
    assert torch.equal(y[~nan], x[~nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_the_nearest_even_16_bit_number(dtype: torch.dtype, isa: str) -> None:
    # The square kernel scales by a constant: the product is exact in fp32 and rounded once.
    x = all_16_bit_patterns(dtype).reshape(1, 1, 256, 256)
    x = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
    for factor in (0.3335, 1.0 + 2**-6, 3.0, 2**-9 * 1.01):
        weight = torch.full((1, 1, 1, 1), factor).to(dtype)
        expected = (x.float() * weight.float()).to(dtype)
        assert torch.equal(cpu.forward(x, weight, None, [], [], [], []), expected)


def test_an_instruction_set_this_cpu_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAMSEG_CPU_ISA", "avx10")
    with pytest.raises(ValueError, match=r"FAMSEG_CPU_ISA=avx10 is not available on this CPU; available: baseline"):
        NATIVE.isa()
