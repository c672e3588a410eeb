"""The multiplications that the running CPU kernels make, against the formulas of famseg_kernels.flops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import famseg_kernels as fk
from benchmarks import multiplications
from benchmarks.multiplications import Counted
from famseg_kernels.strip_conv.reference import forward as strip_reference

pytestmark = pytest.mark.skipif(multiplications.missing() is not None, reason=str(multiplications.missing()))

# height, width, square size or None, strips
STRIPS = {
    "mscan": (24, 20, 5, (7, 11, 21)),
    "eq1": (24, 20, 7, ()),
    "eq2": (17, 40, None, (7,)),
    "no_strips_longer_than_wide": (150, 20, 3, (9, 21)),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    return multiplications.build(tmp_path_factory.mktemp("counted"))


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def strip_arguments(channels: int, height: int, width: int, square: int | None, strips: tuple[int, ...]) -> Any:
    return (
        rand(2, channels, height, width),
        None if square is None else rand(channels, 1, square, square),
        None if square is None else rand(channels),
        [rand(channels, 1, 1, k) for k in strips],
        [rand(channels) for _ in strips],
        [rand(channels, 1, k, 1) for k in strips],
        [None for _ in strips],
    )


@pytest.mark.parametrize("case", STRIPS)
@pytest.mark.parametrize("channels", [2, 3])
def test_strips_multiply_as_often_as_the_formula_says(kernels: Counted, case: str, channels: int) -> None:
    """Exactly: zeros beside the image count in both. Channels are rounded up to a vector's, here two."""
    args = strip_arguments(channels, *STRIPS[case])
    y, count = kernels.strip_conv2d(*args)
    torch.testing.assert_close(y, strip_reference(*args), rtol=1e-12, atol=1e-12)
    assert 2 * count == fk.flops.strip_conv2d(*strip_arguments(-(-channels // 2) * 2, *STRIPS[case]))


def test_taps_that_cannot_reach_the_image_are_left_out(kernels: Counted) -> None:
    """21 taps on a plane of 4 are 7."""
    y, count = kernels.strip_conv2d(*(args := strip_arguments(2, 4, 4, None, (21,))))
    torch.testing.assert_close(y, strip_reference(*args), rtol=1e-12, atol=1e-12)
    assert 2 * count == fk.flops.strip_conv2d(*strip_arguments(2, 4, 4, None, (7,)))


def test_eq1_to_eq5_are_what_the_kernels_multiply(kernels: Counted) -> None:
    def of_a_channel(square: int | None, strips: tuple[int, ...]) -> int:
        return kernels.strip_conv2d(*strip_arguments(2, 40, 56, square, strips))[1] // 4

    assert of_a_channel(5, ()) == fk.flops.eq1(5, 40, 56)
    assert of_a_channel(None, (21,)) == fk.flops.eq2(21, 40, 56)
    assert of_a_channel(None, (7,)) == fk.flops.eq3(40, 56)
    assert of_a_channel(7, ()) == fk.flops.eq4(40, 56)
    assert 2 * of_a_channel(3, ()) == fk.flops.eq5(40, 56)


@pytest.mark.parametrize(("kernel", "scale", "groups"), [(5, 2, 1), (3, 1, 2), (3, 3, 2)])
def test_reassembly_multiplies_as_often_as_the_formula_says(
    kernels: Counted, kernel: int, scale: int, groups: int
) -> None:
    x, masks = rand(2, 6, 12, 20), rand(2, groups * kernel**2, 12 * scale, 20 * scale)
    y, count = kernels.carafe(x, masks, kernel, groups, scale)
    with fk.use_backend("reference"):
        torch.testing.assert_close(y, fk.carafe(x, masks, kernel, groups, scale), rtol=1e-12, atol=1e-12)
    assert 2 * count == fk.flops.carafe(x, masks, kernel, groups, scale)


@pytest.mark.parametrize("shared", [False, True])
def test_the_chunked_scan_multiplies_less_than_twice_as_often_as_the_recurrence(kernels: Counted, shared: bool) -> None:
    """At headdim and state 64; the formula is the recurrence's, which no kernel runs."""
    side, directions = 16, 4
    matrices = 1 if shared else directions
    x, dt = rand(1, side, side, 2, 64), rand(1, side, side, directions, 2).abs() / 10
    A, B, C = -rand(directions, 2).abs(), rand(1, side, side, matrices, 1, 64), rand(1, side, side, matrices, 1, 64)
    y, count = kernels.ssd_scan_2d(x, dt, A, B, C)
    with fk.use_backend("reference"):
        torch.testing.assert_close(y, fk.ssd_scan_2d(x, dt, A, B, C), rtol=1e-10, atol=1e-10)
    assert 1 < 2 * count / fk.flops.ssd_scan_2d(x, dt, A, B, C) < 2
