"""What the chips can do, every number with its source, and on which units an instruction runs for how long.

Sources
    CG   CUDA C++ Programming Guide, "Arithmetic instructions" (results a clock and multiprocessor) and "Technical
         specifications per compute capability".
    A    NVIDIA A100 Tensor Core GPU Architecture (white paper, 2020); datasheets of the 40 GB and 80 GB SXM.
    H    NVIDIA H100 Tensor Core GPU Architecture (white paper, 2022); datasheets of H100 SXM and H200 SXM.
    L    Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking (2024).
    S    Sun et al., Dissecting Tensor Cores via Microbenchmarks (2022).
    ?    an assumption: nothing was found, or what was found differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.issue import sass
from benchmarks.issue.sass import Instruction, Refusal


@dataclass(frozen=True)
class Chip:
    name: str
    capability: int
    processors: int  # A, H
    clock: float  # Hz: boost, A; H100, H200: at which the datasheet's 989 TFLOP/s of bf16 are reached, H
    memory: float  # bytes/s, datasheet
    cache: float  # bytes/s of L2: ? about two thirds of 5120 bytes a clock (A), which are not reached
    registers: int = 65536  # CG
    warps: int = 64  # CG
    blocks: int = 32  # CG


COPY = 0.92  # of the datasheet's memory bandwidth that a copy reaches: ?, 0.9 to 0.94 are common

CHIPS = (
    Chip("A100", 80, 108, 1.41e9, 2.039e12, 4.7e12),
    Chip("H100", 90, 132, 1.83e9, 3.35e12, 5.7e12),
    Chip("H200", 90, 132, 1.83e9, 4.8e12, 5.7e12),
)

# Bytes of shared memory, CG: of a multiprocessor; the driver's own of every block; what a block can have.
SHARED = {80: 164 * 1024, 90: 228 * 1024}
RESERVED = 1024
SHARED_OF_BLOCK = {capability: size - RESERVED for capability, size in SHARED.items()}

# Multiply–adds a clock and multiprocessor. A: 312 TFLOP/s of bf16, 19.5 of fp32. H: 989 and 67.
FMA = {80: 64, 90: 128}
TENSOR = {80: 1024, 90: 2048}
# Of which mma.sync (HMMA) reaches on Hopper; only wgmma (HGMMA) reaches all. L: 0.62.
SYNCHRONOUS = {80: 1.0, 90: 0.63}
# Clocks from issue to use. L: shared memory 29, L1 38 and 41, L2 262 and 263, memory 466 and 479. S: HMMA 25 (k 16) on
# A100; 33 on H100, L.
_ALIKE = {"shared": 29, "xu": 20, "fp64": 8, "other": 4, "shuffle": 23, "constant": 30, "barrier": 20}
LATENCY = {
    80: _ALIKE | {"L1": 38, "L2": 262, "memory": 466, "tensor": 25},
    90: _ALIKE | {"L1": 41, "L2": 263, "memory": 479, "tensor": 33},
}

# Clocks that a scheduler's share of a unit is taken by a warp's instruction: 32 lanes over a quarter of the lanes that
# CG gives for a multiprocessor. Two units for "fp32": 64 lanes a multiprocessor on sm_80, 128 on sm_90, of which IMAD
# may use 64.
_LANES = {"alu": 64, "imad": 64, "xu": 16, "uniform": 64, "fp16": 128}
FP64 = {80: 32, 90: 64}

_ALU = {
    *("IADD3", "VIADD", "LEA", "LOP3", "SHF", "PRMT", "SEL", "ISETP", "IMNMX", "VIMNMX", "VIADDMNMX", "IABS", "SGXT"),
    *("BMSK", "FSEL", "FSETP", "FMNMX", "FSET", "FCHK", "PLOP3", "P2R", "R2P", "MOV", "HSETP2", "HSET2", "HMNMX2"),
    *("F2FP", "I2FP", "CS2R", "VOTE", "R2UR"),
}
_FP32 = {"FFMA", "FADD", "FMUL", "FSWZADD"}
_FP16 = {"HFMA2", "HADD2", "HMUL2"}
_XU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "S2R"}
_FP64 = {"DADD", "DMUL", "DFMA", "DSETP"}
_MATRIX = {"HMMA", "HGMMA"}
# The unit of loads and stores: what it takes depends on the addresses, and is counted there.
MEMORY = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL", "RED", "ATOMG", "ATOMS"}
# An issue slot and nothing else.
_ISSUE = {
    *("BRA", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BREAK", "BMOV", "BAR", "NOP", "DEPBAR", "LDGDEPBAR"),
    *("WARPSYNC", "WARPGROUP", "MEMBAR", "FENCE", "LDC", "B2R", "ENDCOLLECTIVE", "YIELD", "ERRBAR", "CGAERRBAR"),
    "CCTL",
}


_UNITS = {
    name: unit
    for unit, names in (
        ("alu", _ALU), ("fp32", _FP32), ("fp16", _FP16), ("xu", _XU), ("fp64", _FP64), ("tensor", _MATRIX),
        ("memory", MEMORY), ("issue", _ISSUE), ("imad", {"IMAD"}), ("shuffle", {"SHFL"}),
    )
    for name in names
}  # fmt: skip


def unit(instruction: Instruction) -> str:
    name = instruction.name
    if name in _UNITS:
        return _UNITS[name]
    if name.startswith("U") or name in ("S2UR", "VOTEU"):
        return "uniform"
    raise Refusal(f"no unit is known for {instruction.text}")


def clocks(instruction: Instruction, capability: int) -> float:
    """That a warp's instruction takes its unit of one scheduler; 0 for what is counted by addresses."""
    kind = unit(instruction)
    if kind == "fp32":
        return 128 / FMA[capability]
    if kind == "fp64":
        return 128 / FP64[capability]
    if kind == "tensor":
        m, n, k = sass.shape(instruction)
        rate = TENSOR[capability] / 4 / (2 if "TF32" in instruction.modifiers else 1)
        if instruction.name == "HGMMA":
            return m * n * k / 4 / rate  # four warps share one
        return m * n * k / rate / SYNCHRONOUS[capability]
    return 128 / _LANES[kind] if kind in _LANES else 0.0


def matrix_bytes(instruction: Instruction) -> int:
    """Bytes of shared memory that a warp's share of an HGMMA reads: B, and A where it is no register."""
    if instruction.name != "HGMMA":
        return 0
    m, n, k = sass.shape(instruction)
    size = 4 if "TF32" in instruction.modifiers else 2
    a_in_registers = instruction.operands[1].register is not None
    return (n * k + (0 if a_in_registers else m * k)) * size // 4


def latency(instruction: Instruction, capability: int) -> int:
    """Clocks from issue until the result can be used; of global loads `model.replay` knows more."""
    kind, table = unit(instruction), LATENCY[capability]
    if instruction.name in ("LDG", "LDGSTS"):
        return table["other"]
    if kind == "memory":
        return table["memory" if instruction.name == "ATOMG" else "shared"]
    if instruction.name in ("LDC", "ULDC", "S2UR"):
        return table["constant"]
    if instruction.name == "HGMMA":
        return math.ceil(4 * clocks(instruction, capability)) + table["tensor"]
    return table.get(kind, table["other"])


def resident(chip: Chip, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once. Registers are given to warps in pieces of 256, from a scheduler's
    quarter of them."""
    warps = threads // 32
    of_registers = chip.registers // 4 // (-(-registers * 32 // 256) * 256) * 4 // warps
    found = min(of_registers, SHARED[chip.capability] // (shared + RESERVED), chip.warps // warps, chip.blocks)
    if found < 1:
        raise Refusal(
            f"a block of {threads} threads, {registers} registers and {shared} bytes does not fit {chip.name}"
        )
    return found
