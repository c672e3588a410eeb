"""Triton kernels without a GPU: the interpreter shows that they are right, the compiler that they fit the chips.

The contract tests run in a process of their own, because Triton reads TRITON_INTERPRET when a kernel is defined.
`benchmarks.ahead` compiles what a chip would be asked to run.

FAMSEG_COMPILE=all compiles every benchmark shape × dtype × chip (a second a kernel, more than 600 of them); the default
takes the first two shapes of an operation on two chips with one dtype each.
"""

from __future__ import annotations

import csv
import functools
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ahead, gate, tune
from benchmarks.shapes import shapes_for
from famseg_kernels import backends
from famseg_kernels.registry import Case

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
INTERPRETER = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
ALL = os.environ.get("FAMSEG_COMPILE") == "all"
# fp32 on the A100 has least room for its tiles, 16 bits on Hopper take another path (wgmma) through the compiler.
CHIPS = [(c, d) for c in ahead.CHIPS for d in ahead.DTYPES] if ALL else [(80, torch.float32), (90, torch.bfloat16)]
# What a kernel can get wrong. The interpreter takes seconds a case: so the second dtype, the layouts (which kernels see
# as strides) and what torch asks of any operation take a few cases only, those that reach every branch of the glue.
SELECTIONS = (
    "matches and {name}-triton-float32",
    "matches and {name}-triton-float16 and not (longest or image or pixel or wider or unequal or no_ or one_ or three)",
    "matches and ssd_scan_2d and {name}-triton-bfloat16 and not two_directions",
    "layout and {name}-triton-float32 and (shared or two_directions or every_option or groups or unequal)",
    "deterministic and {name}-triton-float32 and (two_directions or skip_matrix or smaller)",
    "opcheck and {name}-triton-float32 and skip_matrix",
    "compiles and (strip_conv2d or carafe) and {name}-triton-float32",
    "any_configuration and {name}",
    "one_by_one and {name}",
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


def strip_over_several_frames(rand):
    """Higher than a frame of either configuration below, so that halos are at work, wider than a segment of one."""
    rows, cols = [rand(2, 1, 1, 5), rand(2, 1, 1, 3)], [rand(2, 1, 9, 1), rand(2, 1, 3, 1)]
    biases = [rand(2), None]
    return rand(1, 2, 65, 20), rand(2, 1, 3, 3), rand(2), rows, biases, cols, biases


def reassembly_over_several_blocks(rand):
    return rand(1, 40, 3, 19), rand(1, 36, 3, 19), 3, 2, 1


def scan_over_several_blocks(shared, rand):
    """Several chunks, blocks of headdim and state, and heads of a group in one program and in several."""
    n, h, w, heads, headdim, state = 1, 5, 13, 4, 17, 18
    x, dt = rand(n, h, w, heads, headdim), rand(n, h, w, 4, heads).abs() * 0.3
    B, C = (rand(n, h, w, 1 if shared else 4, 1, state) for _ in "BC")
    return x, dt, -rand(4, heads).abs(), B, C, rand(heads), None, None, False, 0.0, float("inf")


FP32, BF16 = torch.float32, torch.bfloat16
CONFIGURATIONS = {
    # Only bf16 has chunks of 64, and images that are one matrix.
    "ssd_scan_2d": {
        Case("blocks", functools.partial(scan_over_several_blocks, False)): (
            (FP32, 16, 16, 16, 16, 0, 1),
            (BF16, 64, 32, 64, 64, 0, 1),
        ),
        Case("shared", functools.partial(scan_over_several_blocks, True)): ((BF16, 64, 32, 64, 64, 600, 1),),
    },
    "strip_conv2d": {Case("frames", strip_over_several_frames): ((FP32, 32, 1, 16, 1), (FP32, 64, 3, 32, 2))},
    "reassemble": {Case("blocks", reassembly_over_several_blocks): ((FP32, 64, 1, 4, 1), (FP32, 128, 2, 8, 2))},
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
    def make(rand):
        return rand(1, 1, 5, 6), rand(1, 1, 3, 3), rand(1), [rand(1, 1, 1, 3)], [rand(1)], [rand(1, 1, 5, 1)], [rand(1)]

    args = Case("one_branch", make).arguments(torch.float32)
    operation = ahead.OPERATIONS[name]
    implementation = operation.implementations["triton"]
    together = implementation.backward(args[0], [True] * 7, *args)
    for i in range(7):
        needs = [place == i for place in range(7)]
        alone = implementation.backward(args[0], needs, *args)
        # What a launch computes on the way, the registry leaves out.
        (gradient,) = operation.promised_gradients(alone, [args[0]], needs, args)
        assert torch.equal(gradient, together[i])


def test_the_gpu_command_goes_through_its_steps_in_the_interpreter(tmp_path):
    result = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--dtype", "fp32", "--csv", str(result)]
    run = subprocess.run(command, cwd=ROOT, env=INTERPRETER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    with result.open() as file:
        rows = [row for row in csv.DictReader(file) if row["contestant"] == "famseg triton"]
    assert [(row["op"], row["pass"]) for row in rows] == list(itertools.product(ahead.OPERATIONS, ("fwd", "fwd+bwd")))


def test_tuning_goes_through_its_steps_in_the_interpreter():
    command = [sys.executable, "-m", "benchmarks.tune"]
    run = subprocess.run(command, cwd=ROOT, env=INTERPRETER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("CONFIGURATIONS[0] = Configuration(") == 3


@pytest.mark.skipif(backends.TRITON_INTERPRETS, reason="kernels of this process are interpreted")
@pytest.mark.parametrize(("capability", "dtype"), CHIPS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("name", ahead.OPERATIONS)
def test_every_launch_compiles_and_fits(name, capability, dtype):
    some, many = shapes_for(name, "cpu"), shapes_for(name, "cuda")
    cases = (*some, *many[1:]) if ALL else some[:2]
    kernels = ahead.compiled(ahead.OPERATIONS[name], cases, dtype, capability)
    assert kernels
    for kernel in kernels:
        assert kernel.shared <= ahead.SHARED_MEMORY[capability], kernel
        assert kernel.stack <= ahead.STACK, kernel


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
