"""reassemble, carafe and feature_aware_upsample: what they take and what they cost.

CARAFE (arXiv 1905.02188); FAMSeg's feature-aware attention, section 3.3 and Fig. 3. `reassemble` takes the
encoder's logits as they are; `carafe` takes finished masks with mmcv's meaning and argument names;
`feature_aware_upsample` takes what the encoder reads and the encoder's weight, and makes the logits itself.
"""

from __future__ import annotations

from torch import Tensor

from famseg_kernels import checks
from famseg_kernels.reassembly import cases
from famseg_kernels.spec import Spec

REASSEMBLE_SCHEMA = "(Tensor x, Tensor logits, int kernel_size, int scale, int groups) -> Tensor"
CARAFE_SCHEMA = "(Tensor features, Tensor masks, int kernel_size, int group_size, int scale_factor) -> Tensor"
UPSAMPLE_SCHEMA = (
    "(Tensor x, Tensor compressed, Tensor weight, Tensor? bias, "
    "int kernel_size, int scale, int groups, int dilation) -> Tensor"
)


def check_reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> None:
    checks.data("x", x, 4)
    _check_window(x, kernel_size, ("scale", scale), ("groups", groups))
    checks.companion("logits", logits, x, 4)
    n, _, h, w = x.shape
    expected = (n, groups * kernel_size**2 * scale**2, h, w)
    checks.shape("logits", logits, expected, "(N, groups·kernel_size²·scale², H, W)")


def check_carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> None:
    checks.data("features", features, 4)
    _check_window(features, kernel_size, ("scale_factor", scale_factor), ("group_size", group_size), "features")
    checks.companion("masks", masks, features, 4, x_name="features")
    n, _, h, w = features.shape
    expected = (n, group_size * kernel_size**2, h * scale_factor, w * scale_factor)
    checks.shape("masks", masks, expected, "(N, kernel_size²·group_size, H·scale_factor, W·scale_factor)")


def check_upsample(
    x: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    scale: int,
    groups: int,
    dilation: int,
) -> None:
    checks.data("x", x, 4)
    _check_window(x, kernel_size, ("scale", scale), ("groups", groups))
    checks.integer("dilation", dilation, 1)
    checks.companion("compressed", compressed, x, 4)
    n, _, h, w = x.shape
    channels = compressed.shape[1]
    checks.shape("compressed", compressed, (n, channels, h, w), "(N, C_d, H, W)")
    checks.companion("weight", weight, x, 4)
    logits, size = groups * kernel_size**2 * scale**2, weight.shape[3]
    checks.shape("weight", weight, (logits, channels, size, size), "(groups·kernel_size²·scale², C_d, k_e, k_e)")
    checks.odd("weight", size)
    if bias is not None:
        checks.companion("bias", bias, x, 1)
        checks.shape("bias", bias, (logits,), "(groups·kernel_size²·scale²,)")


def _check_window(
    x: Tensor, kernel_size: int, scale: tuple[str, int], groups: tuple[str, int], x_name: str = "x"
) -> None:
    checks.integer("kernel_size", kernel_size, 1)
    checks.odd("kernel_size", kernel_size)
    checks.integer(*scale, 1)
    checks.integer(*groups, 1)
    checks.divides(*groups, f"the channels of {x_name}", x.shape[1])


def fake_reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, c, h * scale, w * scale)).contiguous(memory_format=checks.image_format(x))


def fake_carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    return fake_reassemble(features, masks, kernel_size, scale_factor, group_size)


def fake_upsample(
    x: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    scale: int,
    groups: int,
    dilation: int,
) -> Tensor:
    return fake_reassemble(x, compressed, kernel_size, scale, groups)


def flops_reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> int:
    """Forward FLOPs: 2 · N·C·sH·sW · k² (softmax not counted)."""
    return 2 * x.numel() * scale**2 * kernel_size**2


def flops_carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> int:
    """Forward FLOPs: 2 · N·C·sH·sW · k²."""
    return flops_reassemble(features, masks, kernel_size, scale_factor, group_size)


def flops_upsample(
    x: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    scale: int,
    groups: int,
    dilation: int,
) -> int:
    """Forward FLOPs: 2 · N·H·W · elements of weight, and those of reassemble."""
    n, _, h, w = x.shape
    return 2 * n * h * w * weight.numel() + flops_reassemble(x, compressed, kernel_size, scale, groups)


def bytes_reassemble(x: Tensor, logits: Tensor, kernel_size: int, scale: int, groups: int) -> int:
    """Bytes to move: x and logits in, y (s² times x) out."""
    return x.element_size() * (x.numel() * (1 + scale**2) + logits.numel())


def bytes_carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> int:
    """Bytes to move: features and masks in, y (s² times features) out."""
    return bytes_reassemble(features, masks, kernel_size, scale_factor, group_size)


def bytes_upsample(
    x: Tensor,
    compressed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    scale: int,
    groups: int,
    dilation: int,
) -> int:
    """Bytes to move: x, compressed, weight and bias in, y (s² times x) out; no logits."""
    encoder = compressed.numel() + weight.numel() + (0 if bias is None else bias.numel())
    return x.element_size() * (x.numel() * (1 + scale**2) + encoder)


REASSEMBLE = Spec(
    "reassemble",
    REASSEMBLE_SCHEMA,
    check_reassemble,
    fake_reassemble,
    flops_reassemble,
    bytes_reassemble,
    cases.REASSEMBLE,
)
CARAFE = Spec(
    "carafe",
    CARAFE_SCHEMA,
    check_carafe,
    fake_carafe,
    flops_carafe,
    bytes_carafe,
    cases.CARAFE,
)
UPSAMPLE = Spec(
    "feature_aware_upsample",
    UPSAMPLE_SCHEMA,
    check_upsample,
    fake_upsample,
    flops_upsample,
    bytes_upsample,
    cases.UPSAMPLE,
)
