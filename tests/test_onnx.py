"""Each op's own translation to ONNX against its reference, in onnxruntime and in OpenVINO: one file, many sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import famseg_kernels as fk
from tests.runtimes import RUNTIMES

pytest.importorskip("onnxscript")


@dataclass(frozen=True)
class Case:
    """A module and its inputs, of the features given, behind N, H, W (or N and before H, W: `channels_first`)."""

    module: nn.Module
    features: Sequence[tuple[int, ...]]
    channels_first: bool = True
    sizes: Sequence[tuple[int, int, int]] = ((1, 1, 1), (3, 2, 9), (1, 8, 8))

    def inputs(self, n: int, h: int, w: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(n * h + w)
        shapes = [(n, *f, h, w) if self.channels_first else (n, h, w, *f) for f in self.features]
        return [torch.randn(shape, generator=generator) for shape in shapes]


class Call(nn.Module):
    """An op with some of its arguments constant."""

    def __init__(self, function: Callable[..., Tensor], **constants: Tensor | None) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)
        self.names = tuple(constants)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, **{name: getattr(self, name) for name in self.names})


def scan(
    directions: int,
    heads: int,
    groups: int = 1,
    shared: bool = False,
    skip: tuple[int, ...] | None = None,
    bias: bool = False,
    softplus: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
) -> Case:
    def call(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        dt = torch.where(dt > 3.0, 1000.0, dt)  # a step that must not spoil its neighbours
        return fk.ssd_scan_2d(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=softplus, dt_limit=limit)

    module = Call(
        call,
        A=-torch.rand(directions, heads) - 0.1,
        D=None if skip is None else torch.randn(skip),
        dt_bias=torch.randn(directions, heads) if bias else None,
    )
    bc = (1 if shared else directions, groups, 6)
    # A token; fewer than a chunk of 32, exactly one, one more; a block of 16 chunks, one chunk more, three blocks.
    sizes = ((1, 1, 1), (3, 5, 6), (2, 4, 8), (1, 3, 11), (1, 16, 32), (2, 17, 32), (1, 40, 37))
    return Case(module, ((heads, 5), (directions, heads), bc, bc), channels_first=False, sizes=sizes)


def reassemble(kernel: int, scale: int, groups: int) -> Case:
    module = Call(lambda x, logits: fk.reassemble(x, 30 * logits, kernel, scale, groups))
    return Case(module, ((4,), (groups * kernel**2 * scale**2,)))


def upsample(encoder: int, groups: int, dilation: int, bias: bool) -> Case:
    def call(x: Tensor, compressed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return fk.feature_aware_upsample(x, compressed, weight, bias, 5, 2, groups, dilation)

    weight = torch.randn(groups * 100, 3, encoder, encoder)
    return Case(Call(call, weight=weight, bias=weight[:, 0, 0, 0].clone() if bias else None), ((4,), (3,)))


def strips(square: int | None, sizes: tuple[int, ...], bias: bool) -> Case:
    module = fk.StripConv2d(4, square, sizes, bias)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return Case(module, ((4,),))


CASES: dict[str, Callable[[], Case]] = {
    "scan as in the network": lambda: scan(4, heads=3, skip=(3,), bias=True),
    "scan, shared B and C": lambda: scan(4, heads=2, shared=True, limit=(0.0, 0.5)),
    "scan, groups of heads": lambda: scan(4, heads=4, groups=2, skip=(4, 4), bias=True, limit=(0.05, 0.5)),
    "scan, two directions, a group a head": lambda: scan(2, heads=3, groups=3, softplus=False),
    "scan, one direction": lambda: scan(1, heads=2, skip=(2,), softplus=False, limit=(0.05, 0.5)),
    "reassemble as in the network": lambda: reassemble(5, scale=2, groups=1),
    "reassemble, groups": lambda: reassemble(3, scale=2, groups=2),
    "reassemble, one tap": lambda: reassemble(1, scale=1, groups=1),
    "reassemble, threefold": lambda: reassemble(3, scale=3, groups=1),
    "upsample as in the network": lambda: upsample(3, groups=1, dilation=1, bias=True),
    "upsample, groups, dilation, no bias": lambda: upsample(3, groups=2, dilation=2, bias=False),
    "strips as in the network": lambda: strips(5, (7, 11, 21), bias=True),
    "a square alone": lambda: strips(3, (), bias=True),
    "strips alone, no bias": lambda: strips(None, (3,), bias=False),
    "nothing": lambda: strips(None, (), bias=False),
}


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Case, Any]]:
    torch.manual_seed(0)
    case = CASES[request.param]()
    case.module.requires_grad_(False)
    path = tmp_path_factory.mktemp("onnx") / "op.onnx"
    axes = (0, 2, 3) if case.channels_first else (0, 1, 2)
    free = {axis: Dim(name) for axis, name in zip(axes, "nhw", strict=True)}
    inputs = tuple(case.inputs(2, 9, 10))
    dynamic_shapes = (tuple(free for _ in inputs),) if isinstance(case.module, Call) else (free,)
    torch.onnx.export(
        case.module,
        inputs,
        str(path),
        dynamo=True,
        verbose=False,
        optimize=False,
        dynamic_shapes=dynamic_shapes,
        custom_translation_table=fk.onnx_translations(),
    )
    yield case, path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_translation_is_right_at_every_size(runtime: str, written: tuple[Case, Any]) -> None:
    case, path = written
    run = RUNTIMES[runtime](path)
    for size in case.sizes:
        inputs = case.inputs(*size)
        with fk.use_backend("reference"):
            expected = case.module(*inputs).numpy()
        found = run(*(t.numpy() for t in inputs))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
