"""reassemble and carafe: what they take, what they cost, and the cases they are tested and timed on.

CARAFE (arXiv 1905.02188); FAMSeg's feature-aware attention, section 3.3 and Fig. 3. `reassemble` takes the
encoder's logits as they are; `carafe` takes finished masks with mmcv's meaning and argument names.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from famseg_kernels import checks
from famseg_kernels.registry import Case, Spec

REASSEMBLE_SCHEMA = "(Tensor x, Tensor logits, int kernel_size, int scale, int groups) -> Tensor"
CARAFE_SCHEMA = "(Tensor features, Tensor masks, int kernel_size, int group_size, int scale_factor) -> Tensor"


def check_reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> None:
    checks.data("x", x, 4)
    _check_window(x, kernel_size, ("scale", scale), ("groups", groups))
    checks.tensor("logits", logits, 4)
    checks.companion("logits", logits, x)
    n, _, h, w = x.shape
    expected = (n, groups * kernel_size**2 * scale**2, h, w)
    checks.shape("logits", logits, expected, "(N, groups·kernel_size²·scale², H, W)")


def check_carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> None:
    checks.data("features", features, 4)
    _check_window(features, kernel_size, ("scale_factor", scale_factor), ("group_size", group_size), "features")
    checks.tensor("masks", masks, 4)
    checks.companion("masks", masks, features, x_name="features")
    n, _, h, w = features.shape
    expected = (n, group_size * kernel_size**2, h * scale_factor, w * scale_factor)
    checks.shape("masks", masks, expected, "(N, kernel_size²·group_size, H·scale_factor, W·scale_factor)")


def _check_window(
    x: Tensor, kernel_size: int, scale: tuple[str, int], groups: tuple[str, int], x_name: str = "x"
) -> None:
    checks.integer("kernel_size", kernel_size, 1)
    checks.odd("kernel_size", kernel_size)
    checks.integer(*scale, 1)
    checks.integer(*groups, 1)
    checks.divides(*groups, f"the channels of {x_name}", x.shape[1])


def native_problem(
    softmax: bool, x: Tensor, weights: Tensor, kernel_size: int, scale: int, groups: int
) -> dict[str, Any]:
    """The named arguments that csrc/reassembly/bind.h makes a Problem of: x and weights dense, NCHW or NHWC."""
    return {
        "dtype": checks.dtype_name(x),
        "softmax": softmax,
        "shape": x.shape,
        "kernel_size": kernel_size,
        "scale": scale,
        "groups": groups,
        "x": x.data_ptr(),
        "weights": weights.data_ptr(),
        "x_channels_last": not x.is_contiguous(),
        "weights_channels_last": not weights.is_contiguous(),
    }


def fake_reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, c, h * scale, w * scale)).contiguous(memory_format=checks.image_format(x))


def fake_carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    return fake_reassemble(features, masks, kernel_size, scale_factor, group_size)


def flops_reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> int:
    """Forward FLOPs: 2 · N·C·sH·sW · k² (softmax not counted)."""
    return 2 * x.numel() * scale**2 * kernel_size**2


def flops_carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> int:
    """Forward FLOPs: 2 · N·C·sH·sW · k²."""
    return flops_reassemble(features, masks, kernel_size, scale_factor, group_size)


def bytes_reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> int:
    """Bytes to move: x and logits in, y (s² times x) out."""
    return x.element_size() * (x.numel() * (1 + scale**2) + logits.numel())


def bytes_carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> int:
    """Bytes to move: features and masks in, y (s² times features) out."""
    return bytes_reassemble(features, masks, kernel_size, scale_factor, group_size)


def operations(
    forward: Callable[..., Tensor],
    backward: Callable[..., list[Tensor | None]],
    unsupported: Callable[..., str | None] = lambda *_: None,
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A backend's `reassemble` and `carafe`, from functions of both.

    They take x, weights (logits or masks), kernel size, scale and groups, in this order; forward and backward first of
    all whether the weights are logits (that need a softmax).
    """

    def one(softmax: bool) -> SimpleNamespace:
        def ordered(x: Tensor, weights: Tensor, kernel_size: int, *rest: int) -> tuple[Any, ...]:
            return x, weights, kernel_size, *(rest if softmax else reversed(rest))

        return SimpleNamespace(
            forward=lambda *args: forward(softmax, *ordered(*args)),
            backward=lambda grad, needs, *args: backward(softmax, grad, needs, *ordered(*args)),
            unsupported=lambda *args: unsupported(*ordered(*args)),
        )

    return one(True), one(False)


_SHAPES: dict[str, tuple[tuple[int, int, int, int], int, int, int]] = {
    # name: x's shape, kernel, scale, groups
    "famseg": ((2, 8, 12, 10), 5, 2, 1),
    "groups": ((1, 12, 7, 9), 3, 2, 4),
    "no_upsampling": ((2, 6, 8, 5), 5, 1, 2),
    "threefold": ((1, 3, 6, 4), 3, 3, 1),
    "image_smaller_than_kernel": ((2, 4, 2, 3), 7, 2, 1),
    "one_tap": ((1, 5, 4, 6), 1, 2, 5),
    "one_pixel": ((3, 2, 1, 1), 5, 4, 1),
    "empty_batch": ((0, 4, 3, 3), 5, 2, 1),
    "empty_image": ((2, 4, 0, 3), 5, 2, 1),
}


def _reassemble_case(name: str, shape: tuple[int, int, int, int], k: int, s: int, g: int) -> Case:
    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        n, _, h, w = shape
        return rand(*shape), 2 * rand(n, g * k * k * s * s, h, w), k, s, g

    return Case(name, make)


def _carafe_case(name: str, shape: tuple[int, int, int, int], k: int, s: int, g: int) -> Case:
    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        n, _, h, w = shape
        masks = rand(n, g, k * k, s * h, s * w).softmax(2).flatten(1, 2)
        return rand(*shape), masks, k, g, s

    return Case(name, make)


REASSEMBLE = Spec(
    "reassemble",
    REASSEMBLE_SCHEMA,
    check_reassemble,
    fake_reassemble,
    flops_reassemble,
    bytes_reassemble,
    tuple(_reassemble_case(name, *shape) for name, shape in _SHAPES.items()),
)
CARAFE = Spec(
    "carafe",
    CARAFE_SCHEMA,
    check_carafe,
    fake_carafe,
    flops_carafe,
    bytes_carafe,
    tuple(_carafe_case(name, *shape) for name, shape in _SHAPES.items()),
)
