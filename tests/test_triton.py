"""Triton kernels without a GPU: the interpreter shows that they are right, the compiler that they fit the chips.

The contract tests run in a process of their own, because Triton reads TRITON_INTERPRET when a kernel is defined.
Compilation stands in for a GPU at `launch.run`: the backends are called with tensors that hold no data, and every
launch they ask for is compiled to a cubin, with the configuration that the chip would get.

FAMSEG_COMPILE=all compiles every benchmark shape × dtype × chip (minutes); the default takes the first two shapes of
an operation on two chips with one dtype each.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import famseg_kernels as fk
from benchmarks import gate
from benchmarks.shapes import SHAPES
from famseg_kernels import backends, launch
from famseg_kernels.registry import Case

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
INTERPRETER = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
OPERATIONS = {op.spec.name: op for op in fk.OPERATIONS if "triton" in op.implementations}
SHARED_MEMORY = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes a program may have, CUDA programming guide table "compute capabilities"
STACK = 64  # bytes a thread may keep in local memory: a few spilled registers, no arrays
ALL = os.environ.get("FAMSEG_COMPILE") == "all"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fp32 on the A100 has least room for its tiles, 16 bits on Hopper take another path (wgmma) through the compiler.
CHIPS = [(c, d) for c in SHARED_MEMORY for d in DTYPES] if ALL else [(80, torch.float32), (90, torch.bfloat16)]
# What a kernel can get wrong: torch's side of an operation (opcheck, compile, counting) is the same for every backend,
# and NumPy is deterministic by nature. The interpreter takes seconds a case, so the second dtype and the layouts take
# a few cases only.
SELECTIONS = (
    "matches and {name}-triton-float32",
    "matches and {name}-triton-float16 and not (longest or image or pixel or wider or unequal or no_ or one_ or three)",
    "layout and {name}-triton-float32 and not (longest or mscan or wider or image or no_ or famseg or three or tap)",
    "any_configuration and {name}",
    "one_by_one and {name}",
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_contract_holds_in_the_interpreter(name):
    files = ["tests/test_contract.py", "tests/test_triton.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    selection = " or ".join(f"({selection.format(name=name)})" for selection in SELECTIONS)
    run = subprocess.run([*command, "-k", selection], cwd=ROOT, env=INTERPRETER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    summary = run.stdout.splitlines()[-1]
    assert "skipped" not in summary, run.stdout[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None and int(passed[1]) > len(OPERATIONS[name].spec.cases), (
        f"too few tests selected: {summary}"
    )


def strip_over_several_frames(rand):
    """Higher than a frame and wider than a segment of either configuration below, so that halos are at work."""
    rows, cols = [rand(2, 1, 1, 5), rand(2, 1, 1, 3)], [rand(2, 1, 9, 1), rand(2, 1, 3, 1)]
    biases = [rand(2), None]
    return rand(1, 2, 70, 40), rand(2, 1, 3, 3), rand(2), rows, biases, cols, biases


def reassembly_over_several_blocks(rand):
    return rand(1, 40, 5, 19), rand(1, 36, 5, 19), 3, 2, 1


def scan_over_several_blocks(rand):
    """Several chunks, blocks of headdim and state, and heads of a group in one program and in several."""
    n, h, w, heads, headdim, state = 1, 3, 6, 10, 17, 18
    x, dt = rand(n, h, w, heads, headdim), rand(n, h, w, 2, heads).abs() * 0.3
    B, C = rand(n, h, w, 2, 1, state), rand(n, h, w, 2, 1, state)
    return x, dt, -rand(2, heads).abs(), B, C, rand(heads), None, None, False, 0.0, float("inf")


CONFIGURATIONS = {
    "ssd_scan_2d": (Case("blocks", scan_over_several_blocks), ((16, 16, 16, 16, 1),)),
    "strip_conv2d": (Case("frames", strip_over_several_frames), ((32, 1, 16, 1), (64, 3, 32, 2))),
    "reassemble": (Case("blocks", reassembly_over_several_blocks), ((64, 1, 4, 1), (128, 2, 8, 2))),
}


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_results_are_right_with_any_configuration(name, monkeypatch):
    operation, (case, configurations) = OPERATIONS[name], CONFIGURATIONS[name]
    module = sys.modules[operation.implementations["triton"].forward.__module__]
    for values in configurations:
        monkeypatch.setitem(module.CONFIGURATIONS, 0, module.Configuration(*values))
        gate.check(operation, case.arguments(torch.float32), "triton")


@pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")
@pytest.mark.parametrize("name", ["strip_conv2d"])
def test_gradients_asked_for_one_by_one_are_the_same(name):
    def make(rand):
        return rand(1, 1, 5, 6), rand(1, 1, 3, 3), rand(1), [rand(1, 1, 1, 3)], [rand(1)], [rand(1, 1, 5, 1)], [rand(1)]

    args = Case("one_branch", make).arguments(torch.float32)
    implementation = OPERATIONS[name].implementations["triton"]
    together = implementation.backward(args[0], [True] * 7, *args)
    for i in range(7):
        alone = implementation.backward(args[0], [place == i for place in range(7)], *args)
        assert [place for place, gradient in enumerate(alone) if gradient is not None] == [i]
        assert torch.equal(alone[i], together[i])


def test_tuning_goes_through_its_steps_in_the_interpreter():
    command = [sys.executable, "-m", "benchmarks.tune"]
    run = subprocess.run(command, cwd=ROOT, env=INTERPRETER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("CONFIGURATIONS[0] = Configuration(") == 3


@pytest.mark.skipif(backends.TRITON_INTERPRETS, reason="kernels of this process are interpreted")
@pytest.mark.parametrize(("capability", "dtype"), CHIPS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_launch_compiles_and_fits(name, capability, dtype, monkeypatch, tmp_path):
    launches = asked_for(OPERATIONS[name], dtype, capability, monkeypatch)
    assert launches
    for kernel, signature, constants, attributes, config in launches.values():
        what = f"{kernel.__name__} {signature} {constants} {config}"
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=config._asdict())
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], f"{compiled.metadata.shared} bytes shared: {what}"
        assert (stack := stack_bytes(compiled, tmp_path)) <= STACK, f"{stack} bytes of local memory: {what}"


def asked_for(operation, dtype: torch.dtype, capability: int, monkeypatch) -> dict[str, Any]:
    """Every different launch that forward and backward ask for on the benchmark shapes, ready to be compiled."""
    implementation = operation.implementations["triton"]
    launches: dict[str, Any] = {}

    def record(kernel, grid, config, *args, **constants):
        assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:]), grid
        described = describe(kernel, args, constants)
        launches[f"{kernel.__name__} {described} {config}"] = (kernel, *described, config)

    monkeypatch.setattr(launch, "run", record)
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    cases = SHAPES[operation.spec.name]
    for case in cases if ALL else cases[:2]:
        args = case.arguments(dtype, "meta")
        if getattr(implementation, "unsupported", lambda *_: None)(*args) is None:
            results = implementation.forward(*args)
            if hasattr(implementation, "backward"):
                needs = [t is not None and t.is_floating_point() for t in operation.flatten(args)]
                implementation.backward(results, needs, *args)
    return launches


def describe(kernel, args, constants: dict[str, Any]):
    """Signature, constants and divisibility as Triton's launcher derives them from a call's arguments."""
    signature: dict[str, Any] = {}
    found: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value, path):
        if isinstance(value, tuple):
            return tuple(kind(v, (*path, i)) for i, v in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1):
            found[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return f"*{POINTEES[value.dtype]}"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    for place, (name, value) in enumerate(itertools.zip_longest(kernel.arg_names, args)):
        if name in constants:
            found[place,] = constants[name]
            signature[name] = "constexpr"
        else:
            signature[name] = kind(value, (place,))
    return signature, found, attributes


POINTEES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def stack_bytes(compiled, folder: Path) -> int:
    """Local memory a thread of the cubin needs: spilled registers and arrays indexed at run time."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(beside) if beside.exists() else shutil.which("cuobjdump")
    assert tool, "cuobjdump: expected in Triton's wheel or on the PATH"
    usage = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[-1])
