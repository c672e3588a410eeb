"""What is timed: the shapes of MSCAN, VMamba, CARAFE and FAMSeg that the targets name, and a small one each.

A GPU gets batches of 16: at batch 2 most of it would stand idle, and a launch would cost as much as the work.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from famseg.models import create_model
from famseg_kernels.reassembly.cases import carafe, feature_aware_upsample, reassemble
from famseg_kernels.ssd_scan import cases as ssd_scan
from famseg_kernels.ssd_scan.cases import scan_2d
from famseg_kernels.strip_conv.cases import strip_conv2d
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation


def depthwise(name: str, n: int, c: int, h: int, w: int) -> Case:
    """The 3×3 of SegNeXt's MLP: on 4 or 8 times the stage's channels, the largest tensors of a network."""
    return strip_conv2d(name, (n, c, h, w), 3, ())


def scan(name: str, b: int, length: int, heads: int, headdim: int, state: int) -> Case:
    return ssd_scan.scan(name, (b, length, heads, headdim), state, options="softplus D")


# The first case of each operation is the smoke test.
SHAPES: dict[str, tuple[Case, ...]] = {
    "strip_conv2d": (
        strip_conv2d("small", (1, 4, 16, 16)),
        strip_conv2d("mscan_s_stage1", (2, 64, 128, 128)),
        strip_conv2d("mscan_s_stage2", (2, 128, 64, 64)),
        strip_conv2d("mscan_s_stage3", (2, 320, 32, 32)),
        strip_conv2d("mscan_s_stage4", (2, 512, 16, 16)),
        depthwise("mscan_t_mlp_stage1", 2, 256, 128, 128),
        depthwise("mscan_t_mlp_stage3", 2, 640, 32, 32),
    ),
    "ssd_scan_2d": (
        scan_2d("small", (1, 8, 8), 2, 8, 8),
        scan_2d("heads5_32x32", (2, 32, 32), 5, 64, 64),
        scan_2d("heads5_32x32_shared", (2, 32, 32), 5, 64, 64, shared=True),
        scan_2d("vmamba_56x56", (1, 56, 56), 6, 16, 64),
    ),
    "ssd_scan": (scan("small", 1, 32, 2, 8, 8), scan("mamba2_1024", 2, 1024, 8, 64, 64)),
    "reassemble": (
        reassemble("small", (1, 8, 8, 8)),
        reassemble("carafe_64x64", (1, 64, 64, 64)),
        reassemble("famseg_32x32", (2, 128, 32, 32)),
    ),
    "carafe": (carafe("small", (1, 8, 8, 8)), carafe("carafe_64x64", (1, 64, 64, 64))),
    "feature_aware_upsample": (
        feature_aware_upsample("small", (1, 8, 8, 8)),
        feature_aware_upsample("carafe_64x64", (1, 64, 64, 64), compressed=64),
        feature_aware_upsample("famseg_nano_64x64", (2, 8, 64, 64), compressed=8),
    ),
}


def gpu_shapes(n: int) -> dict[str, tuple[Case, ...]]:
    """At batch `n`: 16 to be timed, a few for the gate, which holds results to the fp64 reference."""
    return {
        "strip_conv2d": (
            SHAPES["strip_conv2d"][0],
            strip_conv2d(f"mscan_s_stage1_n{n}", (n, 64, 128, 128)),
            strip_conv2d(f"mscan_s_stage2_n{n}", (n, 128, 64, 64)),
            strip_conv2d(f"mscan_s_stage3_n{n}", (n, 320, 32, 32)),
            strip_conv2d(f"mscan_s_stage4_n{n}", (n, 512, 16, 16)),
            depthwise(f"mscan_t_mlp_stage1_n{n}", n, 256, 128, 128),
            depthwise(f"mscan_t_mlp_stage3_n{n}", n, 640, 32, 32),
        ),
        "ssd_scan_2d": (
            SHAPES["ssd_scan_2d"][0],
            scan_2d(f"heads5_32x32_n{n}", (n, 32, 32), 5, 64, 64),
            scan_2d(f"heads5_32x32_shared_n{n}", (n, 32, 32), 5, 64, 64, shared=True),
            scan_2d(f"vmamba_56x56_n{n}", (n, 56, 56), 6, 16, 64),
            scan_2d(f"heads8_16x16_n{n}", (n, 16, 16), 8, 64, 64),
        ),
        "ssd_scan": (SHAPES["ssd_scan"][0], scan(f"mamba2_2048_n{-(-n // 2)}", -(-n // 2), 2048, 24, 64, 128)),
        "reassemble": (
            SHAPES["reassemble"][0],
            reassemble(f"carafe_64x64_n{n}", (n, 64, 64, 64)),
            reassemble(f"famseg_32x32_n{n}", (n, 128, 32, 32)),
        ),
        "carafe": (SHAPES["carafe"][0], carafe(f"carafe_64x64_n{n}", (n, 64, 64, 64))),
        "feature_aware_upsample": (
            SHAPES["feature_aware_upsample"][0],
            feature_aware_upsample(f"carafe_64x64_n{n}", (n, 64, 64, 64), compressed=64),
            feature_aware_upsample(f"famseg_tiny_128x128_n{n}", (n, 32, 128, 128), compressed=32),
        ),
    }


GPU_SHAPES = gpu_shapes(16)
# Images of the gate at these shapes: several blocks of them on a GPU, and one that is left over in each.
GATE_IMAGES = 5
# The scans' are small enough to be checked as they are timed: how their backward is split depends on the batch.
GATE_SHAPES = gpu_shapes(GATE_IMAGES) | {name: GPU_SHAPES[name] for name in ("ssd_scan_2d", "ssd_scan")}


# Of every operation, for a dry run in Triton's interpreter, which takes seconds for the smoke test's.
TINY: dict[str, Case] = {
    "strip_conv2d": depthwise("tiny", 1, 1, 3, 4),
    "ssd_scan_2d": scan_2d("tiny", (1, 2, 2), 1, 4, 4),
    "ssd_scan": scan("tiny", 1, 5, 1, 4, 4),
    "reassemble": reassemble("tiny", (1, 2, 2, 3)),
    "carafe": carafe("tiny", (1, 2, 2, 3)),
    "feature_aware_upsample": feature_aware_upsample("tiny", (1, 2, 2, 3), compressed=2),
}


def network_shapes(model: str, n: int, side: int) -> dict[str, tuple[Case, ...]]:
    """What FAMSeg asks of each operation for `n` images of `side` pixels, each shape once; no data is touched."""
    found: dict[str, dict[str, Case]] = {}

    def record(operation: Operation, *args: Any) -> Any:
        case = _like(operation.spec.name, args)
        found.setdefault(operation.spec.name, {})[case.name] = case
        return operation.spec.fake(*args)

    network = create_model(model)
    # Without gradients: a layer may call another operation to train on a CPU, where the network is here.
    fake, recorded = FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(Operation, "__call__", record)
    with torch.no_grad(), fake, recorded:
        network(torch.empty(n, 1, side, side))
    return {name: tuple(cases.values()) for name, cases in found.items()}


def _like(name: str, args: tuple[Any, ...]) -> Case:
    """A case of the shapes of a call that the network makes."""
    n, *shape = args[0].shape
    label = f"network_n{n}_{'x'.join(map(str, shape))}"
    if name == "strip_conv2d":
        return strip_conv2d(label, (n, *shape)) if args[3] else depthwise(label, n, *shape)
    if name == "feature_aware_upsample":
        return feature_aware_upsample(label, (n, *shape), *args[4:7], compressed=args[1].shape[1])
    if name == "ssd_scan_2d":
        side, _, heads, headdim = shape
        shared = args[3].shape[3] == 1
        # Under autocast the parameters A, D and dt_bias stay fp32.
        return scan_2d(label, (n, side, side), heads, headdim, args[3].shape[-1], shared=shared, keep_fp32=(2, 5, 6))
    raise ValueError(f"{name}: no case is made from the network's calls of it")


def shapes_for(name: str, device: str) -> tuple[Case, ...]:
    """The cases of an operation on "cpu" or "cuda"."""
    return (GPU_SHAPES if device == "cuda" else SHAPES)[name]
