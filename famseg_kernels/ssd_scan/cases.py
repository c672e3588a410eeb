"""What ssd_scan and ssd_scan_2d are tested and timed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from famseg_kernels.testing.case import Case


def _negative(t: Tensor) -> Tensor:
    return -t.abs() - 0.2


def scan(
    name: str,
    shape: tuple[int, int, int, int],
    state: int,
    groups: int = 1,
    *,
    chunk_size: int | None = None,
    options: str = "",
    dt_limit: tuple[float, float] = (0.0, math.inf),
    spike: bool = False,
    keep_fp32: tuple[int, ...] = (),
    tags: str = "",
) -> Case:
    """x's shape (batch, length, heads, headdim); `options` of: softplus D D2 z bias initial seq_idx varlen final."""
    b, length, heads, headdim = shape
    wants = options.split()

    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        softplus = "softplus" in wants
        dt = rand(b, length, heads) if softplus else rand(b, length, heads).abs() * 0.3
        if spike:
            dt[:, length // 3] = 1000.0
        thirds = torch.arange(length).mul(3).div(max(length, 1), rounding_mode="floor").expand(b, length)
        bounds = torch.tensor([0, length // 3, length // 3, length], dtype=torch.int32)
        return (
            rand(*shape) * (0.05 if spike else 1.0),  # so that fp16 can hold the gradients
            dt,
            _negative(rand(heads)),
            rand(b, length, groups, state),
            rand(b, length, groups, state),
            rand(heads, headdim) if "D2" in wants else rand(heads) if "D" in wants else None,
            rand(*shape) if "z" in wants else None,
            rand(heads) if "bias" in wants else None,
            rand(b, heads, headdim, state) if "initial" in wants else None,
            thirds.to(torch.int32).contiguous() if "seq_idx" in wants else None,
            bounds if "varlen" in wants else None,
            chunk_size,
            softplus,
            *dt_limit,
            "final" in wants,
            "varlen" in wants,
        )

    return Case(name, make, keep_fp32, tags)


SCAN = (
    scan("plain", (2, 37, 4, 8), 16, tags="ordinary"),
    scan(
        "every_option",
        (2, 70, 4, 6),
        5,
        2,
        chunk_size=16,
        options="softplus D z bias initial seq_idx final",
        tags="ordinary options",
    ),
    scan("skip_matrix", (1, 33, 2, 3), 4, options="D2 softplus final", keep_fp32=(1, 2, 5), tags="ordinary options"),
    scan("limits", (1, 20, 3, 4), 8, 3, options="softplus bias", dt_limit=(0.4, 1.2), tags="ordinary"),
    scan("spike", (1, 64, 2, 4), 4, chunk_size=32, spike=True, tags="ordinary"),
    scan("one_token", (2, 1, 2, 5), 3, options="D initial final"),
    scan("chunk_of_one", (1, 9, 1, 2), 2, chunk_size=1, tags="ordinary"),
    scan("chunk_above_length", (1, 9, 2, 2), 2, chunk_size=1000, options="final", tags="ordinary"),
    scan("packed", (1, 45, 2, 4), 6, chunk_size=8, options="softplus varlen final initial", tags="ordinary"),
    scan("empty_batch", (0, 12, 2, 4), 4, options="D final"),
    scan("no_token", (2, 0, 2, 4), 4, options="D initial final"),
)


def scan_2d(
    name: str,
    image: tuple[int, int, int],
    heads: int,
    headdim: int,
    state: int,
    groups: int = 1,
    directions: int = 4,
    *,
    shared: bool = False,
    skip: str = "heads",
    chunk_size: int | None = None,
    softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    spike: bool = False,
    keep_fp32: tuple[int, ...] = (),
    tags: str = "",
) -> Case:
    """An image (N, H, W); `shared`: one B and C for all directions; `skip`: D for "heads", "directions" or "none"."""

    def make(rand: Callable[..., Tensor]) -> tuple[Any, ...]:
        n, h, w = image
        dt = rand(n, h, w, directions, heads)
        if not softplus:
            dt = dt.abs() * 0.3
        if spike:
            dt[:, h // 2, w // 2] = 1000.0
        k = 1 if shared else directions
        return (
            rand(n, h, w, heads, headdim) * (0.05 if spike else 1.0),  # so that fp16 can hold the gradients
            dt,
            _negative(rand(directions, heads)),
            rand(n, h, w, k, groups, state),
            rand(n, h, w, k, groups, state),
            {"heads": rand(heads), "directions": rand(directions, heads), "none": None}[skip],
            rand(directions, heads) if softplus else None,
            chunk_size,
            softplus,
            *dt_limit,
        )

    return Case(name, make, keep_fp32, tags)


SCAN_2D = (
    scan_2d("four_directions", (2, 6, 7), 4, 8, 8, tags="ordinary"),
    scan_2d("shared", (1, 8, 5), 2, 4, 16, shared=True, keep_fp32=(1, 2, 5, 6), tags="ordinary options"),
    scan_2d("two_directions", (2, 5, 9), 2, 3, 4, 2, directions=2, skip="directions", tags="ordinary options"),
    scan_2d("one_direction", (1, 4, 11), 3, 5, 6, 3, directions=1, skip="none"),
    scan_2d("ragged_chunks", (1, 13, 11), 2, 4, 4, chunk_size=32, dt_limit=(0.1, 1.5), tags="ordinary"),
    scan_2d("many_chunks", (1, 10, 15), 1, 2, 3, directions=2, chunk_size=1, tags="ordinary"),
    scan_2d("spike", (1, 9, 9), 2, 4, 4, softplus=False, spike=True, tags="ordinary"),
    scan_2d("one_pixel", (2, 1, 1), 2, 4, 3),
    scan_2d("one_row", (1, 1, 17), 1, 2, 3, chunk_size=5),
    scan_2d("empty_batch", (0, 4, 4), 2, 4, 4),
    scan_2d("empty_image", (2, 0, 4), 2, 4, 4),
)
