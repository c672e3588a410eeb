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

from benchmarks import ahead, tune
from benchmarks.issue.chips import SHARED_OF_BLOCK
from benchmarks.shapes import shapes_for
from famseg_kernels import backends
from famseg_kernels.reassembly import cases as reassembly
from famseg_kernels.ssd_scan import cases as ssd_scan
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
    # A square of 63 × 63 takes minutes of the interpreter, whose time goes by operations; 9 × 9 runs below.
    "matches and {name}-triton-float32 and not longest_kernels",
    "matches and {name}-triton-float16 and (ordinary or empty_batch)",
    "matches and ssd_scan_2d and {name}-triton-bfloat16 and not two_directions",
    "layout and {name}-triton-float32 and options",
    "deterministic and {name}-triton-float32 and (options or smaller)",
    "opcheck and {name}-triton-float32 and skip_matrix",
    "compiles and (strip_conv2d or carafe) and {name}-triton-float32",
    "any_configuration and {name}",
    "one_by_one and {name}",
    "share_the_channels and {name}",
)
# Of tests/test_not_finite.py: each way by which a kernel keeps what is not finite in its place. An image takes 20 s.
NOT_FINITE = {
    "strip_conv2d": ("strips-x-nan", "strips-y-inf"),
    "ssd_scan_2d": ("image_of_plain_steps-dt_bias-inf", "image_wide-A-inf", "image-dt-nan"),
    "ssd_scan": (
        *("scan_of_plain_steps-A-nan", "scan-initial_states-inf", "packed-dt-nan", "packed-x-minus_inf"),
        *("packed_at_the_start-A-nan", "packed_at_the_start-final_states-inf"),
    ),
    "reassemble": ("reassemble-x-nan", "reassemble-logits-minus_inf"),
    "carafe": ("carafe-masks-inf", "carafe-y-nan"),
    "feature_aware_upsample": ("upsample-compressed-nan", "upsample-x-inf", "upsample-y-nan"),
}


@pytest.mark.parametrize("name", ahead.OPERATIONS)
def test_the_contract_holds_in_the_interpreter(name):
    files = ["tests/test_contract.py", "tests/test_triton.py", "tests/test_not_finite.py"]
    workers = str(min(os.cpu_count() or 1, 4))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", workers, "-p", "no:cacheprovider", *files]
    selections = [selection.format(name=name) for selection in SELECTIONS]
    selections += [f"triton-{case} and not double" for case in NOT_FINITE[name]]
    selection = " or ".join(f"({selection})" for selection in selections)
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
    # Higher than a program of either configuration, wider than its lanes; more lanes than there are planes.
    "strip_conv2d": {
        strip_conv.strip_conv2d("programs", (1, 2, 9, 16), 3, ((5, 9), (3, 3))): ((FP32, 4, 1, 1), (FP32, 8, 2, 2)),
        strip_conv.strip_conv2d("wide", (1, 1, 5, 144), 3, ()): ((FP32, 4, 1, 1),),
        strip_conv.strip_conv2d("square_beyond_registers", (1, 2, 6, 7), 9, ((11, 3),)): ((FP32, 32, 2, 4),),
    },
    "reassemble": {
        reassembly.reassemble("blocks", (1, 40, 3, 19), 3, 2): ((FP32, 8, 1, 2), (FP32, 16, 4, 4)),
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


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")
@pytest.mark.parametrize("programs", [1, 256])
@pytest.mark.parametrize("name", ["feature_aware_upsample"])
def test_programs_may_share_the_channels(name, programs, monkeypatch):
    """Of three tiles, of which the last has gaps: one program takes all, or two do."""
    module = importlib.import_module("famseg_kernels.reassembly.triton.launch")
    monkeypatch.setattr(module, "PROGRAMS", programs)
    args = reassembly.feature_aware_upsample("tiles", (1, 37, 3, 5), 3, compressed=33).arguments(torch.float32)
    expected = ahead.OPERATIONS[name].implementations["reference"].forward(*args)
    found = ahead.OPERATIONS[name].implementations["triton"].forward(*args)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(backends.TRITON_INTERPRETS, reason="kernels of this process are interpreted")
@pytest.mark.parametrize(("capability", "dtype"), CHIPS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("name", ahead.OPERATIONS)
def test_every_launch_compiles_and_fits(name, capability, dtype):
    some, many = shapes_for(name, "cpu"), shapes_for(name, "cuda")
    cases = (*some, *many[1:]) if ALL else some[:2]
    kernels = ahead.compiled(ahead.OPERATIONS[name], (*cases, *FURTHER_CASES.get(name, ())), dtype, capability)
    assert kernels
    for kernel in kernels:
        assert kernel.shared <= SHARED_OF_BLOCK[capability], kernel
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
