"""One reassembly as every kernel takes it, and the calls of reassemble and carafe put into its terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from famseg_kernels import checks
from famseg_kernels.spec import Backend


class Problem(NamedTuple):
    """A call of either operation."""

    softmax: bool  # weights are reassemble's logits; else carafe's masks
    x: Tensor  # (N, C, H, W)
    weights: Tensor  # as the operation was given them
    kernel_size: int
    scale: int
    groups: int

    @property
    def y_shape(self) -> tuple[int, ...]:
        n, c, h, w = self.x.shape
        return n, c, self.scale * h, self.scale * w

    def native(self) -> dict[str, Any]:
        """The named arguments that csrc/reassembly/bind.h makes a Problem of: x and weights dense, NCHW or NHWC."""
        return {
            "dtype": checks.dtype_name(self.x),
            "softmax": self.softmax,
            "shape": self.x.shape,
            "kernel_size": self.kernel_size,
            "scale": self.scale,
            "groups": self.groups,
            "x": self.x.data_ptr(),
            "weights": self.weights.data_ptr(),
            "x_channels_last": not self.x.is_contiguous(),
            "weights_channels_last": not self.weights.is_contiguous(),
        }


def operations(
    forward: Callable[[Problem], Tensor],
    backward: Callable[[Problem, Tensor, Sequence[bool]], list[Tensor | None]],
    unsupported: Callable[[Problem], str | None] | None = None,
) -> tuple[Backend, Backend]:
    """A backend's `reassemble` and `carafe`, from functions of a problem.

    forward: y in x's dtype and memory format. backward: from the gradient of y those of x and of the weights where
    they are needed, None elsewhere. unsupported: None when there is a kernel for the problem, else the reason.
    """

    def with_forms(problem: Callable[..., Problem]) -> Backend:
        return Backend(
            lambda *arguments: forward(problem(*arguments)),
            lambda grad, needs, *arguments: backward(problem(*arguments), grad, needs),
            None if unsupported is None else lambda *arguments: unsupported(problem(*arguments)),
        )

    return with_forms(_of_logits), with_forms(_of_masks)


def _of_logits(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> Problem:
    return Problem(True, x, logits, kernel_size, scale, groups)


def _of_masks(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Problem:
    return Problem(False, features, masks, kernel_size, scale_factor, group_size)
