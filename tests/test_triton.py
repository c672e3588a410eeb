"""Triton kernels without a GPU: the interpreter shows that they are right, the compiler that they fit the chips.

The contract tests run in a process of their own, because Triton reads TRITON_INTERPRET when a kernel is defined.
`benchmarks.ahead` compiles what a chip would be asked to run.

FAMSEG_COMPILE=all compiles every benchmark shape × dtype × chip (a second a kernel, more than 600 of them); the default
takes the first two shapes of an operation on two chips with one dtype each.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import famseg_kernels as fk
from benchmarks import ahead, tune
from benchmarks.shapes import shapes_for
from famseg_kernels import backends
from famseg_kernels.reassembly import cases as reassembly
from famseg_kernels.ssd_scan import cases as ssd_scan
from famseg_kernels.ssd_scan.reference import recurrence, step_size
from famseg_kernels.strip_conv import cases as strip_conv
from famseg_kernels.testing import gate

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
INTERPRETER = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
ALL = os.environ.get("FAMSEG_COMPILE") == "all"
# fp32 on the A100 has least room for its tiles, 16 bits on Hopper take another path (wgmma) through the compiler.
CHIPS = [(c, d) for c in ahead.CHIPS for d in ahead.DTYPES] if ALL else [(80, torch.float32), (90, torch.bfloat16)]
# What a kernel can get wrong. The interpreter takes seconds a case: so the second dtype, the layouts (which kernels see
# as strides) and what torch asks of any operation take a few cases only: by their tags, `famseg_kernels.testing.case`.
SELECTIONS = (
    "matches and {name}-triton-float32",
    "matches and {name}-triton-float16 and (ordinary or empty_batch)",
    "matches and ssd_scan_2d and {name}-triton-bfloat16 and not two_directions",
    "layout and {name}-triton-float32 and options",
    "deterministic and {name}-triton-float32 and (options or smaller)",
    "opcheck and {name}-triton-float32 and skip_matrix",
    "compiles and (strip_conv2d or carafe) and {name}-triton-float32",
    "any_configuration and {name}",
    "one_by_one and {name}",
    "spoils and {name}-",
)


@pytest.mark.parametrize("name", ahead.OPERATIONS)
def test_the_contract_holds_in_the_interpreter(name):
    files = ["tests/test_contract.py", "tests/test_triton.py"]
    workers = str(min(os.cpu_count() or 1, 4))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", workers, "-p", "no:cacheprovider", *files]
    selection = " or ".join(f"({selection.format(name=name)})" for selection in SELECTIONS)
    run = subprocess.run([*command, "-k", selection], cwd=ROOT, env=INTERPRETER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    summary = run.stdout.splitlines()[-1]
    assert "skipped" not in summary, run.stdout[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) > len(ahead.OPERATIONS[name].spec.cases), (
        f"too few tests selected: {summary}"
    )


FP32, BF16 = torch.float32, torch.bfloat16
CONFIGURATIONS = {
    # Several chunks, blocks of headdim and state, and heads of a group in one program and in several. Only bf16 has
    # chunks of 64, and images that are one matrix (heads of 32 and more): in tiles of 32, B and C their own or shared.
    "ssd_scan_2d": {
        ssd_scan.scan_2d("blocks", (1, 5, 13), 4, 33, 18, softplus=False): (
            (FP32, 16, 16, 16, 16, 0, 1),
            (BF16, 64, 32, 64, 64, 0, 1),
            (BF16, 64, 32, 64, 64, 600, 1),
        ),
        ssd_scan.scan_2d("shared", (1, 5, 13), 4, 33, 18, softplus=False, shared=True): (
            (BF16, 64, 32, 64, 64, 600, 1),
        ),
    },
    # Higher than a frame of either configuration, so that halos are at work, wider than a segment of one.
    "strip_conv2d": {
        strip_conv.strip_conv2d("frames", (1, 2, 65, 20), 3, ((5, 9), (3, 3))): (
            (FP32, 32, 1, 16, 1),
            (FP32, 64, 3, 32, 2),
        )
    },
    "reassemble": {
        reassembly.reassemble("blocks", (1, 40, 3, 19), 3, 2): ((FP32, 64, 1, 4, 1), (FP32, 128, 2, 8, 2)),
    },
}
# What the benchmarks' two smallest shapes leave out: images that are one matrix, and every option of a sequence.
FURTHER_CASES = {
    "ssd_scan_2d": list(CONFIGURATIONS["ssd_scan_2d"]),
    "ssd_scan": [case for case in ahead.OPERATIONS["ssd_scan"].spec.cases if case.name == "every_option"],
}


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_results_are_right_with_any_configuration(name):
    module = importlib.import_module(tune.CANDIDATES[name][0])
    for case, configurations in CONFIGURATIONS[name].items():
        for dtype, *values in configurations:
            with tune.configured(module, 0, module.Configuration(*values)):
                gate.check(ahead.OPERATIONS[name], case.arguments(dtype), "triton")


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")
@pytest.mark.parametrize("name", ["strip_conv2d"])
def test_gradients_asked_for_one_by_one_are_the_same(name):
    args = strip_conv.strip_conv2d("one_branch", (1, 1, 5, 6), 3, ((3, 5),)).arguments(torch.float32)
    operation = ahead.OPERATIONS[name]
    implementation = operation.implementations["triton"]
    together = implementation.backward(args[0], [True] * 7, *args)
    for i in range(7):
        needs = [place == i for place in range(7)]
        alone = implementation.backward(args[0], needs, *args)
        # What a launch computes on the way is left out.
        (gradient,) = operation.promised_gradients(alone, [args[0]], needs, args)
        assert torch.equal(gradient, together[i])


def scan_by_definition(x, dt, A, B, C, dt_bias, starts=(0,)):
    """ssd_scan with a softplus, token by token; starts: the first token of each sequence."""
    step, ends = step_size(dt, dt_bias, True, 0.0, float("inf")), (*starts[1:], x.shape[1])
    parts = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    return torch.cat([recurrence(x[:, p], step[:, p], A, B[:, p], C[:, p]) for p in parts], 1)


def scan_2d_by_definition(x, dt, A, B, C, dt_bias):
    order = torch.arange(x.shape[1] * x.shape[2]).view(x.shape[1:3])
    y = torch.zeros_like(x).flatten(1, 2)
    for k, path in enumerate((order.flatten(), order.flatten().flip(0), order.T.flatten(), order.T.flatten().flip(0))):
        tokens = [t.flatten(1, 2)[:, path] for t in (x, dt[..., k, :], B[..., k, :, :], C[..., k, :, :])]
        y = y.index_add(1, path, scan_by_definition(*tokens[:2], A[k], *tokens[2:], dt_bias[k]))
    return y.view_as(x)


def with_nan(tensors, place, index):
    """Tensors that ask for their gradients, the one at `place` with NaN at `index`."""
    tensors = [t.clone() for t in tensors]
    tensors[place][index] = torch.nan
    return [t.requires_grad_() for t in tensors]


def where_nan(function, leaves):
    """In the result and, of a gradient without any, in those of the leaves."""
    y = function(*leaves)
    return [t.isnan() for t in (y, *torch.autograd.grad(y, leaves, torch.linspace(1, 2, y.numel()).view_as(y)))]


NAN_SOURCES = {"dt": 1, "A": 2, "dt_bias": 5}


def check_where_nan(found, expected, source, tokens):
    """In the same places of y and of every gradient, and A's in all of its head."""
    for name, ours, truth in zip(("y", "x", "dt", "A", "B", "C", "dt_bias"), found, expected, strict=True):
        if source == "A" and truth.dim() > len(tokens) + 1:
            # By the definition, a gradient may yet pass by a last token: its decay leads nowhere.
            truth = truth.any(tokens, keepdim=True).expand_as(truth)
        assert torch.equal(ours, truth), (name, ours.nonzero(), truth.nonzero())


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")
@pytest.mark.parametrize("starts", [(0,), (0, 20, 55)], ids=["one_sequence", "three_sequences"])
@pytest.mark.parametrize("source", NAN_SOURCES)
@pytest.mark.parametrize("name", ["ssd_scan"])
def test_nan_spoils_what_the_definition_says_of_a_sequence(name, source, starts):
    """Chunks of 32 tokens, in which sequences start and end; the first of two heads stays clean."""
    rand = torch.Generator().manual_seed(0)
    x, dt, A, B, C, bias = (
        torch.randn(s, generator=rand) for s in ((1, 75, 2, 3), (1, 75, 2), 2, (1, 75, 1, 4), (1, 75, 1, 4), 2)
    )
    tensors = x, dt, -A.abs(), B, C, bias
    place = NAN_SOURCES[source]
    index = (0, 40, 1) if source == "dt" else 1
    seq_idx = sum(torch.arange(75) >= start for start in starts[1:]) + torch.zeros(1, 75, dtype=torch.int64)
    expected = where_nan(lambda *t: scan_by_definition(*t, starts), with_nan(tensors, place, index))
    with fk.use_backend("triton"):
        found = where_nan(
            lambda *t: fk.ssd_scan(*t[:5], dt_bias=t[5], dt_softplus=True, seq_idx=seq_idx),
            with_nan(tensors, place, index),
        )
    check_where_nan(found, expected, source, (1,))


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["chunks", "one_matrix"])
@pytest.mark.parametrize("source", NAN_SOURCES)
@pytest.mark.parametrize("name", ["ssd_scan_2d"])
def test_nan_spoils_what_the_definition_says_of_an_image(name, source, dtype):
    """Two chunks or tiles. Direction k is spoilt in head k, the fifth head stays clean; no two heads share B and C."""
    rand = torch.Generator().manual_seed(0)
    n, h, w, k, heads, p, state = 1, 5, 8, 4, 5, 32, 4
    shapes = (
        (n, h, w, heads, p),
        (n, h, w, k, heads),
        (k, heads),
        (n, h, w, k, heads, state),
        (n, h, w, k, heads, state),
        (k, heads),
    )
    x, dt, A, B, C, bias = (torch.randn(shape, generator=rand) for shape in shapes)
    tensors = [t.to(dtype) for t in (x, dt, -A.abs(), B, C, bias)]
    place, every = NAN_SOURCES[source], torch.arange(4)
    index = (0, 2, 3, every, every) if source == "dt" else (every, every)
    expected = where_nan(scan_2d_by_definition, with_nan([t.double() for t in tensors], place, index))
    with fk.use_backend("triton"):
        found = where_nan(
            lambda *t: fk.ssd_scan_2d(*t[:5], dt_bias=t[5], dt_softplus=True), with_nan(tensors, place, index)
        )
    check_where_nan(found, expected, source, (1, 2))


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")
@pytest.mark.parametrize(("name", "dtype"), [("reassemble", torch.float32)], ids=["reassemble-float32"])
def test_nan_spoils_its_pixel_and_minus_infinity_none(name, dtype):
    args = ahead.OPERATIONS[name].spec.cases[0].arguments(dtype)
    results = []
    for backend in ("reference", "triton"):
        x, logits = (t.clone().requires_grad_() for t in args[:2])
        with torch.no_grad():
            logits[0, 41, 5, 2] = torch.nan
            logits[0, 8:, 2, 3] = -torch.inf  # but for the first two taps of each of its four results
        with fk.use_backend(backend):
            y = fk.reassemble(x, logits, *args[2:])
            gradients = torch.autograd.grad(y, (x, logits), torch.linspace(1, 2, y.numel()).view_as(y))
            results.append((y, *gradients))
    for ours, truth in zip(results[1], results[0], strict=True):
        assert 0 < truth.isnan().sum() <= 8 * 25  # channels or none, and taps
        torch.testing.assert_close(ours, truth, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(backends.TRITON_INTERPRETS, reason="kernels of this process are interpreted")
@pytest.mark.parametrize(("capability", "dtype"), CHIPS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("name", ahead.OPERATIONS)
def test_every_launch_compiles_and_fits(name, capability, dtype):
    some, many = shapes_for(name, "cpu"), shapes_for(name, "cuda")
    cases = (*some, *many[1:]) if ALL else some[:2]
    kernels = ahead.compiled(ahead.OPERATIONS[name], (*cases, *FURTHER_CASES.get(name, ())), dtype, capability)
    assert kernels
    for kernel in kernels:
        assert kernel.shared <= ahead.SHARED_MEMORY[capability], kernel
        assert kernel.stack <= ahead.STACK, kernel


@pytest.mark.skipif(backends.TRITON_INTERPRETS, reason="kernels of this process are interpreted")
@pytest.mark.parametrize("layout", ["", "odd"], ids=["aligned", "odd"])
@pytest.mark.parametrize("name", ahead.OPERATIONS)
def test_sizes_of_one_compile(name, layout):
    """No interpreter shows it: Triton makes a constant of an argument that is 1, and has no gather of a single row."""
    cases = [case for case in ahead.OPERATIONS[name].spec.cases if ALL or case.name.startswith("one_")]
    assert cases
    assert ahead.compiled(ahead.OPERATIONS[name], cases[: None if layout == "" else 1], torch.float16, 90, layout)


@pytest.mark.skipif(backends.TRITON_INTERPRETS, reason="kernels of this process are interpreted")
@pytest.mark.parametrize(("capability", "dtype"), CHIPS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("name", ahead.OPERATIONS)
def test_minima_and_maxima_keep_nan(name, capability, dtype, monkeypatch):
    """PTX's plain min and max give the other operand for a NaN. NumPy's keep it: no interpreter can show the loss."""
    monkeypatch.setattr(ahead, "_inspected", lambda kernel, result, warps: (kernel, result.asm["ptx"]))
    cases = (*shapes_for(name, "cpu")[:2], *FURTHER_CASES.get(name, ()))
    kernels = ahead.compiled(ahead.OPERATIONS[name], cases, dtype, capability)
    found = [
        (kernel, i) for kernel, ptx in kernels for i in re.findall(r"\b(?:min|max)(?:\.\w+)*\.b?f\d+(?:x2)?\b", ptx)
    ]
    assert [(kernel, instruction) for kernel, instruction in found if ".NaN" not in instruction] == []
    assert found or name in ("strip_conv2d", "carafe"), "steps are clamped and a softmax has a maximum: none was seen"


@pytest.mark.skipif("FAMSEG_TRITON" not in os.environ, reason="FAMSEG_TRITON names no folder that holds another Triton")
def test_another_triton_passes_the_same_tests(tmp_path):
    """`pip install --no-deps --target /tmp/triton triton`, then FAMSEG_TRITON=/tmp/triton: the newest one."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    folder = Path(environment.pop("FAMSEG_TRITON")).resolve()
    environment["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT)))
    where = [sys.executable, "-c", "import triton; print(triton.__file__)"]
    assert Path(subprocess.check_output(where, env=environment, text=True).strip()).is_relative_to(folder)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
