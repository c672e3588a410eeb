"""CUDA kernels without a GPU: their text compiled by g++ and run by fibers, and compiled by nvcc."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++")
NVCC = shutil.which("nvcc")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ on PATH")
ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """Compiles tests/cuda_text/<name>.cpp and loads it."""
    directory = tmp_path_factory.mktemp("cuda_text")

    def build(name: str) -> ctypes.CDLL:
        library = directory / f"{name}.so"
        if not library.exists():
            source = ROOT / "tests" / "cuda_text" / f"{name}.cpp"
            flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
            command = [COMPILER, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))

    return build


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@needs_compiler
@ORDERS
@pytest.mark.parametrize("barrier", [True, False])
def test_a_missing_barrier_shows(load, barrier: bool, reverse: bool) -> None:
    values = torch.arange(256, dtype=torch.float32)
    out = torch.empty_like(values)
    load("barrier").reverse_blocks(address(values), address(out), 4, barrier, reverse)
    assert torch.equal(out, values.view(4, 64).flip(1).flatten()) == barrier


def reassemble(x: Tensor, logits: Tensor, k: int, s: int, groups: int) -> Tensor:
    """The definition, with every intermediate in memory."""
    n, c, h, w = x.shape
    weights = logits.view(n, groups, k * k, s, s, h, w).softmax(dim=2)
    patches = F.unfold(x, k, padding=k // 2).view(n, groups, c // groups, k * k, h, w)
    return torch.einsum("ngtyxij,ngctij->ngciyjx", weights, patches).reshape(n, c, s * h, s * w)


def assert_close(fp32: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(fp32.double(), truth, rtol=1e-5, atol=2e-6)


# (N, C, H, W), kernel size, scale, groups
CASES = [
    ((1, 16, 5, 6), 5, 2, 1),
    ((2, 12, 4, 3), 3, 2, 4),
    ((1, 18, 3, 5), 7, 1, 2),
    ((2, 3, 4, 4), 1, 3, 3),
    ((1, 20, 1, 1), 5, 2, 1),
    ((1, 8, 1, 1), 7, 3, 8),
    ((3, 9, 7, 2), 3, 3, 1),
]


@needs_compiler
@ORDERS
@pytest.mark.parametrize(("shape", "k", "s", "groups"), CASES)
def test_reassembly_text_matches_the_definition(load, shape, k, s, groups, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    n, c, h, w = shape
    x = torch.randn(shape, generator=generator)
    logits = 3 * torch.randn((n, groups * k * k * s * s, h, w), generator=generator)
    y = torch.full((n, c, s * h, s * w), float("nan"))
    # Fewer threads than pixels: the kernel strides over the rest.
    load("reassembly").reassemble_forward(
        *map(address, (x, logits, y)), *map(ctypes.c_longlong, shape), k, s, groups, 3, 32, reverse
    )
    assert_close(y, reassemble(x.double(), logits.double(), k, s, groups))


@needs_compiler
def test_reassembly_text_takes_an_empty_batch(load) -> None:
    nothing = torch.empty(0)
    shape = map(ctypes.c_longlong, (0, 4, 3, 3))
    load("reassembly").reassemble_forward(*[address(nothing)] * 3, *shape, 5, 2, 1, 1, 32, False)


@needs_compiler
def test_reassembly_text_survives_logits_of_minus_infinity(load) -> None:
    x = torch.randn((1, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    logits = torch.full((1, 9, 3, 3), float("-inf"))
    logits[:, 4:] = 1.0
    y = torch.empty_like(x)
    shape = map(ctypes.c_longlong, x.shape)
    load("reassembly").reassemble_forward(*map(address, (x, logits, y)), *shape, 3, 1, 1, 1, 32, False)
    assert_close(y, reassemble(x.double(), logits.double(), 3, 1, 1))


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_compiles_reassembly_without_spills(arch: int, tmp_path: Path) -> None:
    source = ROOT / "csrc" / "reassembly" / "cuda.cu"
    flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run(
        [NVCC, *flags, "-c", str(source), "-o", str(tmp_path / "cuda.o")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(spills) == 3  # float, half, bfloat16
    assert all(pair == ("0", "0") for pair in spills), result.stderr
