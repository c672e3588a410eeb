"""One reassembly as every kernel takes it, and the calls of the three operations put into its terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from famseg_kernels import checks
from famseg_kernels.spec import Backend


class Problem(NamedTuple):
    """A call of `reassemble` or `carafe`, or of `feature_aware_upsample` when its logits are there."""

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


class Encoded(NamedTuple):
    """A call of `feature_aware_upsample`."""

    x: Tensor  # (N, C, H, W)
    compressed: Tensor  # (N, C_d, H, W)
    weight: Tensor  # (groups·k²·s², C_d, k_e, k_e)
    bias: Tensor | None
    kernel_size: int
    scale: int
    groups: int
    dilation: int

    def problem(self, logits: Tensor) -> Problem:
        return Problem(True, self.x, logits, self.kernel_size, self.scale, self.groups)

    def native(self) -> dict[str, Any]:
        """The named arguments of the native upsample functions: x and compressed dense, the others contiguous."""
        return {
            **self.problem(self.compressed).native(),
            "weights": 0,
            "compressed": self.compressed.data_ptr(),
            "weight": self.weight.data_ptr(),
            "bias": 0 if self.bias is None else self.bias.data_ptr(),
            "compressed_channels": self.compressed.shape[1],
            "encoder_kernel_size": self.weight.shape[3],
            "dilation": self.dilation,
            "compressed_channels_last": not self.compressed.is_contiguous(),
        }


Forward = Callable[[Problem], Tensor]
Backward = Callable[[Problem, Tensor, Sequence[bool]], list[Tensor | None]]
Unsupported = Callable[[Problem], str | None]
Faster = Callable[[str, Problem], str | None]


def operations(
    forward: Forward, backward: Backward, unsupported: Unsupported | None = None, faster: Faster | None = None
) -> tuple[Backend, Backend]:
    """A backend's `reassemble` and `carafe`, from functions of a problem.

    forward: y in x's dtype and memory format. backward: from the gradient of y those of x and of the weights where
    they are needed, None elsewhere. unsupported: None when there is a kernel for the problem, else the reason. faster:
    as `Backend` has it.
    """

    def with_forms(problem: Callable[..., Problem]) -> Backend:
        return Backend(
            lambda *arguments: forward(problem(*arguments)),
            lambda grad, needs, *arguments: backward(problem(*arguments), grad, needs),
            None if unsupported is None else lambda *arguments: unsupported(problem(*arguments)),
            None if faster is None else lambda method, *arguments: faster(method, problem(*arguments)),
        )

    return with_forms(_of_logits), with_forms(_of_masks)


def chain(
    forward: Forward, backward: Backward, unsupported: Unsupported | None = None, faster: str | None = None
) -> Backend:
    """`feature_aware_upsample` where a backend has no kernel of its own for it: torch's convolution, then `forward`.

    The backward computes the logits again, as every backward here keeps nothing but the inputs.
    faster: the backend that automatic choice takes instead, where it can.
    """

    def problem(call: Encoded) -> Problem:
        return call.problem(encode(call))

    def run_forward(*arguments: Any) -> Tensor:
        return forward(problem(Encoded(*arguments)))

    def run_backward(grad: Tensor, needs: Sequence[bool], *arguments: Any) -> list[Tensor | None]:
        call = Encoded(*arguments)
        of_x, *of_encoder = needs
        x_gradient, logits_gradient = backward(problem(call), grad, (of_x, any(of_encoder)))
        if logits_gradient is None:
            return [x_gradient, None, None, None]
        return [x_gradient, *encode_backward(logits_gradient, call, of_encoder)]

    def refused(*arguments: Any) -> str | None:
        call = Encoded(*arguments)
        # Whether there is a kernel does not depend on the logits, which are not there yet.
        return None if unsupported is None else unsupported(call.problem(call.compressed))

    return Backend(run_forward, run_backward, refused, None if faster is None else lambda *_: faster)


def encode(call: Encoded) -> Tensor:
    """The content encoder: logits (N, groups·k²·s², H, W) of a zero-padded "same" convolution."""
    if not call.compressed.numel():  # conv2d refuses an image without pixels or channels
        n, _, h, w = call.compressed.shape
        logits = call.compressed.new_zeros(n, call.weight.shape[0], h, w)
        return logits if call.bias is None else logits + call.bias[:, None, None]
    padding = call.weight.shape[3] // 2 * call.dilation
    return F.conv2d(call.compressed, call.weight, call.bias, padding=padding, dilation=call.dilation)


def encode_backward(gradient: Tensor, call: Encoded, needs: Sequence[bool]) -> list[Tensor | None]:
    """From the gradient of the logits those of compressed, weight and bias where `needs`, None elsewhere."""
    needs = [need and t is not None for need, t in zip(needs, (call.compressed, call.weight, call.bias), strict=True)]
    if not call.compressed.numel():
        return [None, None, gradient.sum((0, 2, 3)) if needs[2] else None]
    padding, dilation = call.weight.shape[3] // 2 * call.dilation, call.dilation
    found = torch.ops.aten.convolution_backward(
        gradient, call.compressed, call.weight, [call.weight.shape[0]], [1, 1], [padding] * 2, [dilation] * 2,
        False, [0, 0], 1, needs,
    )  # fmt: skip
    return [t if need else None for t, need in zip(found, needs, strict=True)]


def _of_logits(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> Problem:
    return Problem(True, x, logits, kernel_size, scale, groups)


def _of_masks(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Problem:
    return Problem(False, features, masks, kernel_size, scale_factor, group_size)
