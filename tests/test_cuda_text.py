"""CUDA kernels without a GPU: run by fibers on the CPU, and looked at in the compiled module."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import famseg_kernels as fk
from benchmarks.shapes import shapes_for
from famseg_kernels.strip_conv.cases import strip_conv2d as strip_case
from famseg_kernels.strip_conv.op import OPERATION as STRIP_CONV
from famseg_kernels.testing import gate
from famseg_kernels.testing.gate import channels_last, cotangents, shifted
from famseg_kernels.torch_op import Operation
from tests import emulated_cuda
from tests.test_contract import expected

ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
OPERATIONS = [operation for operation in fk.OPERATIONS if "cuda" in operation.implementations]
CASES = pytest.mark.parametrize(
    ("operation", "case"),
    [
        pytest.param(operation, case, id=f"{operation.spec.name}-{case.name}")
        for operation in OPERATIONS
        for case in operation.spec.cases
    ],
)
needs_emulation = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> emulated_cuda.Emulation:
    return emulated_cuda.build(tmp_path_factory.mktemp("cuda_text"))


@pytest.fixture
def emulation(built, monkeypatch: pytest.MonkeyPatch):
    built.install(monkeypatch)
    yield built
    built.configure()


def as_it_is(t: torch.Tensor) -> torch.Tensor:
    return t


def assert_right(
    operation: Operation, case, dtype: torch.dtype, laid_out: Callable[[torch.Tensor], torch.Tensor] = as_it_is
) -> None:
    """Forward and all gradients of the emulated backend obey the contract's tolerance, whatever comes in `laid_out`."""
    args = case.arguments(dtype)
    args = operation.replace(args, [t if t is None else laid_out(t) for t in operation.flatten(args)])
    backend = operation.implementations["cuda"]
    y = backend.forward(*args)
    assert y.stride() == operation.spec.fake(*args).stride()
    grads, needs = [laid_out(grad) for grad in cotangents([y])], [t is not None for t in operation.flatten(args)]
    gradients = operation.promised_gradients(backend.backward(grads[0], needs, *args), grads, needs, args)
    gate.compare(operation, "cuda", [y, *gradients], expected(operation, case, dtype))


# float16 and bfloat16 are one text: one of them in both orders.
RUNS = [
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
    (torch.float16, False),
]


@needs_emulation
@pytest.mark.parametrize(
    ("dtype", "reverse"), RUNS, ids=[f"{dtype}-{'reverse' if reverse else 'forward'}" for dtype, reverse in RUNS]
)
@CASES
def test_text_obeys_the_contract(emulation, operation, case, dtype, reverse: bool) -> None:
    emulation.configure(reverse)
    assert_right(operation, case, dtype)


@needs_emulation
@CASES
def test_text_takes_channels_last(emulation, operation, case) -> None:
    assert_right(operation, case, torch.float32, channels_last)


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@CASES
def test_text_takes_tensors_at_odd_offsets(emulation, operation, case, dtype) -> None:
    """The emulation checks every access: where a kernel takes two or four numbers at once, it must look first."""
    assert_right(operation, case, dtype, shifted)


BANDS = [
    strip_case("tall", (2, 1, 150, 21)),
    strip_case("wide", (1, 2, 20, 170)),
    strip_case("both", (1, 1, 70, 77)),
    strip_case("other_sizes", (1, 1, 90, 37), square=3, strips=((9, 15), (1, 5))),
    strip_case("no_square", (1, 1, 70, 70), square=None, strips=((9, 15), (3, 5))),
]


@needs_emulation
@ORDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kilobytes", [100, 40])
@pytest.mark.parametrize("case", BANDS, ids=lambda case: case.name)
def test_planes_that_do_not_fit_are_cut_into_tiles(emulation, case, kilobytes: int, dtype, reverse: bool) -> None:
    emulation.configure(reverse, (kilobytes * 1024, (kilobytes + 1) * 1024))
    assert_right(STRIP_CONV, case, dtype)


# feature_aware_upsample is torch's convolution, then the kernels of reassemble.
NOT_FINITE = [
    *((STRIP_CONV, case) for case in BANDS),
    *(
        (o, case)
        for o in OPERATIONS
        if o.spec.name in ("reassemble", "carafe")
        for case in o.spec.cases
        if "empty" not in case.name
    ),
]


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("operation", "case"), NOT_FINITE, ids=[f"{o.spec.name}-{case.name}" for o, case in NOT_FINITE]
)
def test_what_is_not_finite_reaches_what_the_definition_says(emulation, operation, case, dtype) -> None:
    """Forward and backward, of an image in tiles too; and what is left has the right values."""
    emulation.configure(shared=(40 * 1024, 41 * 1024) if operation is STRIP_CONV else emulated_cuda.H200)
    plain = case.arguments(dtype)
    needs = [t is not None for t in operation.flatten(plain)]
    seed = torch.Generator().manual_seed(0)
    for source in ("x", "y") if operation is STRIP_CONV else ("x", "weights", "y"):
        for corner, value in ((0, float("nan")), (-1, float("inf"))):
            args = operation.replace(plain, [None if t is None else t.clone() for t in operation.flatten(plain)])
            grad = torch.randn(operation.spec.fake(*args).shape, generator=seed).to(dtype)
            {"x": args[0], "weights": args[1], "y": grad}[source][-1, -1, corner, corner // 2] = value
            backend = operation.implementations["cuda"]
            found = [backend.forward(*args), *backend.backward(grad, needs, *args)]
            wide = [None if t is None else t.double().requires_grad_() for t in operation.flatten(args)]
            y = operation.implementations["reference"].forward(*operation.replace(args, wide))
            truth = torch.autograd.grad(y, [t for t in wide if t is not None], grad.double())
            # Weights' gradients are sums over a plane: what is not finite in it spoils those of its channel.
            places = 2 if operation is STRIP_CONV else 3
            for ours, right in zip(found[:places], (y.detach(), *truth), strict=False):
                assert torch.equal(ours.isfinite(), right.isfinite()), (source, value)
                error = torch.where(right.isfinite(), ours.double() - right, 0.0).abs().max()
                assert error <= 0.05 * right[right.isfinite()].abs().max()
            others = [t[:-1] for t in found[places:] if t is not None]
            assert all(t.isfinite().all() for t in others)


@needs_emulation
def test_an_error_names_the_operation_the_shapes_and_the_cause(emulation) -> None:
    emulation.configure(shared=(4096, 8192))
    args = STRIP_CONV.spec.cases[0].arguments(torch.float32)
    with pytest.raises(RuntimeError, match=r"strip_conv2d on CUDA: .*shared memory.*x \(2, 4, 24, 20\), square 5"):
        STRIP_CONV.implementations["cuda"].forward(*args)


@needs_emulation
@pytest.mark.parametrize("static", [0, 1024])
def test_a_launch_keeps_its_shared_memory_whatever_another_thread_launches(emulation, static: int) -> None:
    """What a kernel may have holds for all threads: a smaller launch comes between setting it and the launch."""

    def forward(size: int) -> None:
        args = strip_case("square", (1, 1, size, size)).arguments(torch.float32)
        STRIP_CONV.implementations["cuda"].forward(*args)

    emulation.configure(static=static)
    emulation.record()
    emulation.interrupt(lambda: forward(72))
    forward(128)
    small, large = emulation.recorded()
    assert small.kernel == large.kernel
    assert STATIC_SHARED < small.shared < large.shared  # both must ask


@needs_emulation
def test_reassembly_text_survives_logits_of_minus_infinity(emulation) -> None:
    x = torch.randn((1, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    for k, s in ((3, 1), (5, 2)):
        logits = torch.full((1, k * k * s * s, 3, 3), float("-inf"))
        logits[:, 4 * s * s :] = 1.0
        operation = next(o for o in OPERATIONS if o.spec.name == "reassemble")
        y = operation.implementations["cuda"].forward(x, logits, k, s, 1)
        torch.testing.assert_close(y, operation.implementations["reference"].forward(x, logits, k, s, 1))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Kernels of the emulation itself, with and without a fault."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    return ctypes.CDLL(str(emulated_cuda.compiled(["tests/cuda_text/faults.cpp"], library)))


@needs_emulation
@pytest.mark.parametrize("barrier", [True, False])
@ORDERS
def test_a_missing_barrier_shows(faults: ctypes.CDLL, barrier: bool, reverse: bool) -> None:
    values = torch.arange(256, dtype=torch.float32)
    out = torch.empty_like(values)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, out)]
    faults.reverse_blocks(*pointers, 4, barrier, reverse)
    assert torch.equal(out, values.view(4, 64).flip(1).flatten()) == barrier
    faults.divergent_barriers_run.restype = ctypes.c_bool
    assert not faults.divergent_barriers_run()


@needs_emulation
@pytest.mark.parametrize(("read_at", "written_at"), [(1, 0), (0, 2)])
def test_a_misaligned_address_shows_and_the_next_launch_runs(
    faults: ctypes.CDLL, read_at: int, written_at: int
) -> None:
    """Of threads that read and write four numbers at once."""
    values, out = torch.arange(272, dtype=torch.float32), torch.zeros(272)
    faults.copy_four_by_four.restype = ctypes.c_char_p

    def thrown_by_a_copy(read_at: int, written_at: int) -> str:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values[read_at:], out[written_at:])]
        return faults.copy_four_by_four(*pointers, 64).decode()

    said = r"misaligned address 0x\w+ of '.*Four', which must be at a multiple of 16: .*faults\.cpp:\d+"
    said += r", thread \(\d+, 0, 0\) of block \(0, 0, 0\)"
    assert re.fullmatch(said, thrown_by_a_copy(read_at, written_at))
    assert not out.any()
    assert thrown_by_a_copy(4, 8) == ""
    assert torch.equal(out[8:264], values[4:260])


@needs_emulation
@pytest.mark.skipif("FAMSEG_EMULATION_FLAGS" in os.environ, reason="this is the run under AddressSanitizer")
def test_no_access_goes_beyond_its_memory() -> None:
    """Each operation's first case, and a plane in tiles, in a process with AddressSanitizer."""
    libraries = [
        subprocess.run([emulated_cuda.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(library) for library in libraries):
        pytest.skip("no libasan")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(library.strip() for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FAMSEG_EMULATION_FLAGS": "-g1 -fsanitize=address -Wno-error",
    }
    chosen = "(obeys and (mscan or famseg) or (tiles and both and 40)) and forward and (float32 or bfloat16)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=emulated_cuda.ROOT)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout


# --- the compiled module ------------------------------------------------------------------------------

# Blocks that a multiprocessor shall hold, by what registers allow, and their threads: (threads, blocks). The launch
# bounds in the kernels ask for them; a spill or a stack frame would be the price.
OCCUPANCY = {
    "strips_toeplitz": (256, 2),
    "strips": (256, 1),
    "weight_gradients": (256, 1),
    "sum_partials": (256, 2),
    "forward_tuned": (128, 3),
    "gradient_weights_tuned": (128, 3),
    "gradient_x_tuned": (128, 3),
    "forward_any": (256, 2),
    "gradient_weights_any": (256, 2),
    "gradient_x_any": (256, 2),
}
REGISTERS = 65536  # of a multiprocessor, on sm_80 and sm_90
STATIC_SHARED = 48 * 1024  # of a block, without asking for more


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


@pytest.fixture(scope="module")
def inspect():
    """Runs cuobjdump on the installed CUDA module."""
    modules = list((emulated_cuda.ROOT / "famseg_kernels").glob("_cuda*.so"))
    if not modules:
        pytest.skip("the CUDA module was not built")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, neither on PATH nor in triton")

    @functools.cache  # a listing takes seconds
    def run(*options: str) -> str:
        return subprocess.run([tool, *options, str(modules[0])], capture_output=True, text=True, check=True).stdout

    return run


# Name, element type, and which of its flags are set: of the symbols of nvcc, and of g++ in the emulation.
KERNEL = re.compile(r"\d([a-z][a-z_]*)I(?:NS_8baseline)?\d*(f|Bfloat16|Float16|__nv_bfloat16|__half)E?((?:Lb[01]E)*)")


def kernel_of(symbol: str) -> tuple[str, str, str]:
    found = KERNEL.search(symbol)
    assert found is not None, symbol
    return found[1], found[2].strip("_").removeprefix("nv_").lower(), found[3]


def resources(inspect, arch: int) -> dict[tuple[str, str, str], dict[str, int]]:
    """REG, STACK, SHARED and LOCAL of each kernel: registers of a thread, static shared memory of a block."""
    usage = inspect("--dump-resource-usage", f"--gpu-architecture=sm_{arch}")
    return {
        kernel_of(symbol): {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", numbers)}
        for symbol, numbers in re.findall(r"Function (\S+):\s*(REG:.*)", usage)
    }


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_neither_spill_nor_miss_their_occupancy(inspect, arch: int) -> None:
    usage = resources(inspect, arch)
    for kernel, used in usage.items():
        threads, blocks = OCCUPANCY[kernel[0]]
        each = -(-used["REG"] // 8) * 8  # registers are handed out in eights
        assert (used["STACK"], used["LOCAL"]) == (0, 0), f"{kernel}: {used}"
        assert each * threads * blocks <= REGISTERS, f"{kernel}: {used}"
        assert used["SHARED"] <= STATIC_SHARED
    assert {name for name, *_ in usage} == set(OCCUPANCY)


# What a multiprocessor shall hold of each kernel at once, (blocks, warps), whatever is timed in the benchmarks.
RESIDENT = {
    # Two blocks, so that one loads while the other computes; a warp for each of the four schedulers, which can issue an
    # FMA in every clock: a thread's 64 sums do not wait for each other.
    "strips": (2, 4),
    "weight_gradients": (2, 4),
    # Two warps a scheduler: a warp's products on tensor cores wait for each other in its sums.
    "strips_toeplitz": (2, 8),
    # Nothing but loads, which take half of the 64 warps to have enough of them under way.
    "sum_partials": (2, 32),
    # 25 weights of an output in registers leave room for three warps a scheduler, the launch bounds ask for them.
    "forward_tuned": (3, 12),
    "gradient_weights_tuned": (3, 12),
    "gradient_x_tuned": (3, 12),
}
# On an A100 two blocks hold tiles of 128 x 16, with one warp each and 96 FMAs an element for 73 in tiles of 128 x 64.
ALONE = ("weight_gradients", 80, "mscan_s_stage1_n16")
# Of a block and of a multiprocessor.
SHARED = {80: (163 * 1024, 164 * 1024), 90: emulated_cuda.H200}
# The driver keeps 1 KB of each block's; what cuobjdump says of sm_90 holds it already.
RESERVED = {80: 1024, 90: 0}


def resident(arch: int, threads: int, registers: int, shared: int) -> tuple[int, int]:
    """Blocks of a kernel that a multiprocessor holds, and their warps."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256  # units of 256, from a quarter of the registers
    by_registers = REGISTERS // 4 // of_warp * 4 // warps
    by_shared = SHARED[arch][1] // (-(-(shared + RESERVED[arch]) // 128) * 128)
    blocks = min(by_registers, by_shared, 64 // warps, 32)
    return blocks, blocks * warps


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_multiprocessors_hold_enough_blocks_of_every_benchmark(inspect, emulation, arch: int, dtype) -> None:
    """By registers, by static and dynamic shared memory and by threads, of what the launchers ask for."""
    usage, launched = resources(inspect, arch), set()
    emulation.configure(shared=SHARED[arch])
    for operation in OPERATIONS:
        for case in shapes_for(operation.spec.name, "cuda"):
            emulation.record()
            args = case.make(lambda *shape: torch.empty(shape, dtype=dtype))
            backend = operation.implementations["cuda"]
            backend.backward(backend.forward(*args), [t is not None for t in operation.flatten(args)], *args)
            for launch in emulation.recorded():
                kernel = kernel_of(launch.kernel)
                used = usage[kernel]
                blocks, warps = resident(arch, launch.threads, used["REG"], used["SHARED"] + launch.shared)
                least, least_warps = RESIDENT[kernel[0]]
                if (kernel[0], arch, case.name) == ALONE:
                    least = 1
                assert blocks >= least, f"{case.name}: {kernel} {launch}, {used}"
                assert warps >= least_warps, f"{case.name}: {kernel} {launch}, {used}"
                launched.add(kernel[0])
    # In 16 bits the sizes that are not tuned, those of a 3 x 3 depthwise convolution, are left to `strips`.
    assert launched == set(RESIDENT) - (set() if dtype == torch.bfloat16 else {"strips_toeplitz"})


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("element", ["bfloat16", "half"])
def test_sixteen_bit_strips_are_tensor_core_instructions(inspect, element: str, arch: int) -> None:
    listing = inspect("--dump-sass", f"--gpu-architecture=sm_{arch}")
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    chosen = [text for text in functions if "strips_toeplitz" in text.split("\n")[0] and element in text.split("\n")[0]]
    assert len(chosen) == 2  # forward, gradient of x
    for text in chosen:
        # A step of a warp: 10 products of the square's rows, 10 of the first stage, 10 of the second.
        assert len(re.findall(r"HMMA\.16816\.F32", text)) >= 30
        assert "LDSM.16.MT88.4" in text
    strips = [text for text in functions if re.search(r"6stripsI", text.split("\n")[0])]
    assert strips and not any("HMMA" in text for text in strips)


def test_no_minimum_or_maximum_drops_a_nan(inspect) -> None:
    """PTX's min and max of floats give the other operand for a NaN, unless they say .NaN."""
    found = set(re.findall(r"\b(?:min|max)\.\S+", inspect("--dump-ptx")))
    assert found  # of integers
    assert not [name for name in found if re.search(r"\.b?f\d", name) and ".NaN" not in name]
