"""A NaN or an infinity reaches what the definition gives it and nothing else, on every backend.

Each operation is written out below, one token or one tap at a time and without a product that multiplies by zeros what
is not read. Its results and gradients say where a value may be not finite; whether NaN or infinity does not matter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import famseg_kernels as fk
from famseg_kernels import backends

BACKENDS = [name for name, reason in fk.available_backends().items() if reason == "ok"]
IMPLEMENTATIONS = {operation.spec.name: operation.implementations for operation in fk.OPERATIONS}
DEVICE = {"cuda": "cuda", "triton": "cpu" if backends.TRITON_INTERPRETS else "cuda"}
# Every value and every dtype, but not each with each.
FAULTS = {
    "nan": (math.nan, torch.float32),
    "inf": (math.inf, torch.bfloat16),
    "minus_inf": (-math.inf, torch.float16),
    "nan_in_double": (math.nan, torch.float64),
}


# --- the definitions --------------------------------------------------------------------------------


def scan(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    dt_limit=(0.0, math.inf),
):  # fmt: skip
    """(y, final states), by the recurrence. A change of seq_idx replaces the state: nothing is multiplied by zero."""
    step = dt if dt_bias is None else dt + dt_bias
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    share = x.shape[2] // B.shape[2]
    rows, states = [], []
    for row in range(len(x)):
        state = x.new_zeros(*x.shape[2:], B.shape[3]) if initial_states is None else initial_states[row]
        outputs, sequence = [], 0
        for t in range(x.shape[1]):
            b, c = (m[row, t].repeat_interleave(share, 0) for m in (B, C))
            update = (step[row, t, :, None] * x[row, t])[:, :, None] * b[:, None]
            here = 0 if seq_idx is None else int(seq_idx[row, t])
            state = update if here != sequence else (step[row, t] * A).exp()[:, None, None] * state + update
            sequence = here
            outputs.append((state * c[:, None]).sum(-1))
        rows.append(torch.stack(outputs))
        states.append(state)
    y = torch.stack(rows)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    return (y if z is None else y * F.silu(z)), torch.stack(states)


def scan_2d(x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf)):
    h, w = x.shape[1:3]
    order = torch.arange(h * w).view(h, w)
    paths = (order.flatten(), order.flatten().flip(0), order.T.flatten(), order.T.flatten().flip(0))
    y = torch.zeros_like(x).flatten(1, 2)
    for k, path in enumerate(paths[: dt.shape[3]]):
        b, c = (m[:, :, :, k % m.shape[3]].flatten(1, 2)[:, path] for m in (B, C))
        tokens = x.flatten(1, 2)[:, path], dt[:, :, :, k].flatten(1, 2)[:, path]
        bias = None if dt_bias is None else dt_bias[k]
        part, _ = scan(*tokens, A[k], b, c, dt_bias=bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        y = y + torch.zeros_like(y).index_copy(1, path, part)
    return y.view_as(x) + (0 if D is None else (D if D.dim() == 1 else D.sum(0))[:, None] * x)


def taps(image: Tensor, rows: int, columns: int):
    """The image as each tap of a kernel sees it, zero outside."""
    padded = F.pad(image, (columns // 2, columns // 2, rows // 2, rows // 2))
    for i in range(rows):
        for j in range(columns):
            yield i, j, padded[..., i : i + image.shape[2], j : j + image.shape[3]]


def depthwise(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What lies outside the image is not read."""
    total = bias[:, None, None].expand_as(image)
    inside = [within for *_, within in taps(torch.ones_like(image, dtype=torch.bool), *weight.shape[2:])]
    for (i, j, seen), within in zip(taps(image, *weight.shape[2:]), inside, strict=True):
        total = total + (weight[:, 0, i, j, None, None] * seen).where(within, 0.0)
    return total


def strips(x, square, square_bias, row, row_bias, column, column_bias):
    a = depthwise(x, square, square_bias)
    return a + depthwise(depthwise(a, row, row_bias), column, column_bias)


def reassemble(x, logits, kernel_size=3, scale=2, groups=2):
    weights = logits.view(len(x), groups, kernel_size**2, scale**2, *x.shape[2:]).softmax(2)
    return gathered(x, weights, kernel_size, scale)


def carafe(features, masks, kernel_size=3, group_size=2, scale_factor=2):
    n, _, h, w = features.shape
    weights = masks.view(n, group_size, kernel_size**2, h, scale_factor, w, scale_factor)
    weights = weights.permute(0, 1, 2, 4, 6, 3, 5).flatten(3, 4)
    return gathered(features, weights, kernel_size, scale_factor)


def upsample(x, compressed, weight, bias, kernel_size=3, scale=2, groups=2):
    logits = bias[:, None, None].expand(len(x), -1, *x.shape[2:])
    for i, j, seen in taps(compressed, *weight.shape[2:]):
        logits = logits + torch.einsum("oc,nchw->nohw", weight[:, :, i, j], seen)
    return reassemble(x, logits, kernel_size, scale, groups)


def gathered(x, weights, k, s):
    """weights: (N, groups, k², s², H, W)"""
    n, c, h, w = x.shape
    groups = weights.shape[1]
    total = x.new_zeros(n, groups, c // groups, s * s, h, w)
    for i, j, seen in taps(x, k, k):
        total = total + weights[:, :, i * k + j, None] * seen.view(n, groups, c // groups, 1, h, w)
    return total.view(n, c, s, s, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c, s * h, s * w)


# --- the cases --------------------------------------------------------------------------------------


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """`places`: argument → where it shall be not finite; "y" and "final_states" are incoming gradients."""

    operation: str
    definition: Callable[..., Any]
    call: Callable[..., Any]
    arguments: dict[str, Tensor]
    places: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)


def _scan_case(ids: list[int] | None, **options: Any) -> Case:
    length, token = 37, 21
    arguments = {
        "x": rand(2, length, 4, 3),
        "dt": rand(2, length, 4) - 1 if options.get("dt_softplus") else rand(2, length, 4).abs() * 0.3,
        "A": -rand(4).abs() - 0.2,
        "B": rand(2, length, 2, 5),
        "C": rand(2, length, 2, 5, seed=1),
        "D": rand(4, 3),
        "z": rand(2, length, 4, 3, seed=1),
        "dt_bias": rand(4, seed=1),
        "initial_states": rand(2, 4, 3, 5),
    }
    places = {
        "x": (1, token, 2, 1), "dt": (1, token, 2), "A": (2,), "B": (1, token, 1, 3), "C": (1, token, 1, 3),
        "D": (2, 1), "z": (1, token, 2, 1), "dt_bias": (2,), "initial_states": (1, 2, 1, 3),
        "y": (1, token, 2, 1), "final_states": (1, 2, 1, 3),
    }  # fmt: skip
    if ids is not None:
        options["seq_idx"] = torch.tensor([ids, ids])
    return Case(
        "ssd_scan",
        lambda **kw: list(scan(**kw)),
        lambda **kw: list(fk.ssd_scan(**kw, chunk_size=16, return_final_states=True)),
        arguments,
        places,
        options,
    )


def _scan_2d_case(directions: int, shared: bool = False, headdim: int = 3, **options: Any) -> Case:
    n, h, w, heads, k = 2, 5, 8, 4, 1 if shared else directions
    arguments = {
        "x": rand(n, h, w, heads, headdim),
        "dt": rand(n, h, w, directions, heads),
        "A": -rand(directions, heads).abs() - 0.2,
        "B": rand(n, h, w, k, 2, 5),
        "C": rand(n, h, w, k, 2, 5, seed=1),
        "D": rand(heads),
        "dt_bias": rand(directions, heads, seed=1),
    }
    last = directions - 1
    places = {
        "x": (1, 3, 4, 2, 1), "dt": (1, 3, 4, last, 2), "A": (last, 2), "B": (1, 3, 4, k - 1, 1, 3),
        "C": (1, 3, 4, k - 1, 1, 3), "D": (2,), "dt_bias": (last, 2), "y": (1, 3, 4, 2, 1),
    }  # fmt: skip
    return Case(
        "ssd_scan_2d",
        lambda **kw: [scan_2d(**kw)],
        lambda **kw: [fk.ssd_scan_2d(**kw, chunk_size=16)],
        arguments,
        places,
        {"dt_softplus": True, **options},
    )


def _strips_case() -> Case:
    arguments = {
        "x": rand(2, 3, 12, 14),
        "square": rand(3, 1, 5, 5),
        "square_bias": rand(3),
        "row": rand(3, 1, 1, 7),
        "row_bias": rand(3, seed=1),
        "column": rand(3, 1, 7, 1),
        "column_bias": rand(3, seed=2),
    }

    def call(x, square, square_bias, row, row_bias, column, column_bias):
        return [fk.strip_conv2d(x, square, square_bias, [row], [row_bias], [column], [column_bias])]

    places = {
        "x": (1, 1, 2, 13), "square": (1, 0, 1, 0), "square_bias": (1,), "row": (1, 0, 0, 6), "row_bias": (1,),
        "column": (1, 0, 0, 0), "column_bias": (1,), "y": (1, 1, 2, 13),
    }  # fmt: skip
    return Case("strip_conv2d", lambda **kw: [strips(**kw)], call, arguments, places)


def _reassemble_case(name: str, definition: Callable[..., Any], weights: str) -> Case:
    arguments = {"x" if weights == "logits" else "features": rand(2, 4, 6, 5)}
    arguments[weights] = rand(2, 72, 6, 5) if weights == "logits" else rand(2, 18, 12, 10)
    function = getattr(fk, name)
    options = (3, 2, 2)
    places = {next(iter(arguments)): (1, 1, 0, 4), weights: (1, 13, 2, 3), "y": (1, 1, 5, 0)}
    return Case(
        name, lambda **kw: [definition(**kw)], lambda **kw: [function(*kw.values(), *options)], arguments, places
    )


def _upsample_case() -> Case:
    arguments = {
        "x": rand(2, 4, 6, 5),
        "compressed": rand(2, 3, 6, 5),
        "weight": rand(72, 3, 3, 3),
        "bias": rand(72),
    }
    # Of the weight and of y, what meets no zero outside the image: that may be read or not.
    places = {"x": (1, 1, 0, 4), "compressed": (1, 2, 5, 3), "weight": (13, 1, 1, 1), "bias": (13,), "y": (1, 1, 5, 4)}

    def call(**kw):
        return [fk.feature_aware_upsample(*kw.values(), 3, 2, 2)]

    return Case("feature_aware_upsample", lambda **kw: [upsample(**kw)], call, arguments, places)


KERNELS = ("square", "row", "column")
CASES = {  # the scans in chunks of 16 tokens
    "scan": _scan_case(None, dt_softplus=True, dt_limit=(0.05, 2.0)),
    "scan_of_plain_steps": _scan_case(None),
    "packed": _scan_case([0] * 11 + [1] * 18 + [2] * 7 + [3], dt_softplus=True),
    "packed_at_the_start": _scan_case([0] * 21 + [1] * 15 + [2]),
    "image": _scan_2d_case(4),
    "image_of_plain_steps": _scan_2d_case(2, dt_softplus=False),
    "image_shared": _scan_2d_case(4, shared=True),
    "image_wide": _scan_2d_case(4, headdim=32),  # in bf16 a kernel of its own
    "image_one_direction": _scan_2d_case(1, dt_limit=(0.1, 1.0)),
    "strips": _strips_case(),
    "reassemble": _reassemble_case("reassemble", reassemble, "logits"),
    "carafe": _reassemble_case("carafe", carafe, "masks"),
    "upsample": _upsample_case(),
}


def outcome(case: Case, run: Callable[..., list[Tensor]], source: str, value: float, dtype: torch.dtype, device: str):
    """Where results and gradients are not finite, by name."""
    leaves = {name: t.to(device, dtype, copy=True) for name, t in case.arguments.items()}
    if source in leaves:
        leaves[source][case.places[source]] = value
    for leaf in leaves.values():
        leaf.requires_grad_()
    options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in case.options.items()}
    results = dict(zip(("y", "final_states"), run(**leaves, **options), strict=False))
    grads = {name: torch.linspace(1, 2, r.numel()).view(r.shape).to(r) for name, r in results.items()}
    if source in grads:
        grads[source][case.places[source]] = value
    found = torch.autograd.grad(list(results.values()), list(leaves.values()), list(grads.values()))
    everything = results | {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}
    return {name: ~t.isfinite().cpu() for name, t in everything.items()}


@functools.cache
def expected(case: str, source: str, value: float) -> dict[str, Tensor]:
    return outcome(CASES[case], CASES[case].definition, source, value, torch.float64, "cpu")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("case", "source"), [(name, source) for name, case in CASES.items() for source in case.places])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reaches_what_the_definition_gives_it(backend, case, source, fault):
    if backend not in IMPLEMENTATIONS[CASES[case].operation]:
        pytest.skip(f"{backend} has no kernel for {CASES[case].operation}")
    value, dtype = FAULTS[fault]
    if dtype == torch.float64 and backend in DEVICE:
        pytest.skip(f"{backend} has no fp64")
    with fk.use_backend(backend):
        found = outcome(CASES[case], CASES[case].call, source, value, dtype, DEVICE.get(backend, "cpu"))
    for name, right in expected(case, source, value).items():
        wrong = (found[name] != right).nonzero().tolist()
        weights = name.removeprefix("gradient of ") in KERNELS
        if case == "strips" and wrong and (weights or source in KERNELS):
            # The zeros outside the image may be read or not: beside a kernel's fault they make NaN, in its own channel.
            channel = (1, 2, 3) if weights else (0, 2, 3)
            wrong = ((found[name] & ~right.any(channel, True)) | (right & ~found[name])).nonzero().tolist()
        assert not wrong, f"{name}: {found[name].sum()} places instead of {right.sum()}, {wrong[:5]} among them"


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
def test_a_state_that_overflows_is_as_the_recurrence_says(backend):
    """Finite arguments: the state is infinite from the second sequence's token on, to its end."""
    packed = CASES["packed"]
    arguments = {name: t.clone() for name, t in packed.arguments.items()}
    arguments["x"][1, 14, 2, 1] = arguments["B"][1, 14, 1, 3] = 1e30
    case = dataclasses.replace(packed, arguments=arguments)
    right = outcome(case, case.definition, "", 0.0, torch.float32, "cpu")
    with fk.use_backend(backend):
        found = outcome(case, case.call, "", 0.0, torch.float32, "cpu")
    assert right["y"][1, 14:29, 2, 1].all() and right["y"].sum() == 15
    assert all(torch.equal(found[name], right[name]) for name in right)
