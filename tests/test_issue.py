"""`benchmarks.issue` counts what the machine would: on SASS written by hand, and on kernels whose FLOPs are known."""

from __future__ import annotations

import csv
import struct
import textwrap

import numpy as np
import pytest
import torch

from benchmarks.issue import (
    arithmetic,
    chips,
    machine,
    memory,
    model,
    program,
    report,
    sass,
    table,
    targets,
)
from benchmarks.issue.sass import Refusal
from benchmarks.issue.steps import Constants
from benchmarks.shapes import GPU_SHAPES
from tests.predictions import needs_cubins, needs_tools, rows_of

TENSOR = 1 << 32  # address of the only one


def kernel(lines: str) -> sass.Kernel:
    """SASS as nvdisasm prints it, addresses added; a line that ends with a colon is a label."""
    text, place = ['\t.section\t.text.k,"ax",@progbits'], 0
    for line in textwrap.dedent(lines).strip().splitlines():
        if line.strip().endswith(":"):
            text.append(line.strip())
        else:
            text.append(f"        /*{place:04x}*/                   {line.strip()} ;")
            place += 16
    return next(sass.parse("\n".join(text)))


def run(lines: str, *parameters: int, threads: int = 32, blocks: int = 1) -> tuple[sass.Kernel, machine.Run]:
    made = kernel(lines)
    constants = Constants(80, threads, (blocks, 1, 1), struct.pack(f"<{len(parameters)}I", *parameters))
    grid = [(i, 0, 0) for i in range(blocks)]
    return made, machine.Machine(program.analysed(made), constants, [TENSOR]).run(grid, threads // 32)


def count(lines: str, name: str, *parameters: int, **options: int) -> int:
    """How many warps execute the instructions of this name."""
    made, found = run(lines, *parameters, **options)
    counts = found.counts()
    return sum(counts[i.pc] for i in made.instructions if i.name == name)


LOOP = """
    MOV R2, RZ
    .L_x_0:
    IADD3 R2, R2, 0x1, RZ
    FFMA R3, R3, R3, R3
    FFMA R4, R3, R3, R3
    ISETP.GE.AND P0, PT, R2, c[0x0][0x160], PT
    @!P0 BRA `(.L_x_0)
    EXIT
"""


@pytest.mark.parametrize("trips", [1, 2, 77])
def test_a_loop_is_counted_by_its_trips(trips: int) -> None:
    assert count(LOOP, "FFMA", trips, threads=64, blocks=3) == 2 * trips * 2 * 3
    assert count(LOOP, "EXIT", trips, threads=64, blocks=3) == 2 * 3


QUOTIENT = """
    ULDC UR4, c[0x0][0x164]
    I2F.U32.RP R4, UR4
    MUFU.RCP R4, R4
    IADD3 R6, R4, 0xffffffe, RZ
    F2I.FTZ.U32.TRUNC.NTZ R7, R6
    MOV R6, RZ
    IADD3 R8, RZ, -R7, RZ
    IMAD R8, R8, UR4, RZ
    IMAD.HI.U32 R7, R7, R8, R6
    IMAD.HI.U32 R7, R7, c[0x0][0x160], RZ
    IADD3 R9, -R7, RZ, RZ
    IMAD R9, R9, UR4, c[0x0][0x160]
    ISETP.GE.U32.AND P0, PT, R9, UR4, PT
    @P0 IADD3 R9, R9, -UR4, RZ
    @P0 IADD3 R7, R7, 0x1, RZ
    ISETP.GE.U32.AND P1, PT, R9, UR4, PT
    @P1 IADD3 R7, R7, 0x1, RZ
    ISETP.NE.U32.AND P0, PT, R7, c[0x0][0x168], PT
    @P0 EXIT
    NOP
    EXIT
"""


@pytest.mark.parametrize(
    ("dividend", "divisor"), [(7, 2), (8, 2), (1, 3), (20479, 20480), (123456789, 1011), (2**31 - 1, 7), (2**32 - 1, 3)]
)
def test_division_by_a_reciprocal_is_exact(dividend: int, divisor: int) -> None:
    assert count(QUOTIENT, "NOP", dividend, divisor, dividend // divisor) == 1
    assert count(QUOTIENT, "NOP", dividend, divisor, dividend // divisor + 1) == 0


def test_lanes_that_part_are_one_warp_again() -> None:
    """Five lanes take another way, then all go on: each way is issued once, what follows once and not twice."""
    ways = """
        S2R R0, SR_LANEID
        ISETP.GE.AND P0, PT, R0, 0x5, PT
        BSSY B0, `(.L_x_1)
        @P0 BRA `(.L_x_0)
        FADD R1, R1, R1
        BRA `(.L_x_1)
        .L_x_0:
        FMUL R1, R1, R1
        .L_x_1:
        BSYNC B0
        FFMA R1, R1, R1, R1
        EXIT
    """
    assert [count(ways, name, threads=128) for name in ("FADD", "FMUL", "FFMA")] == [4, 4, 4]


def test_a_barrier_that_waits_in_a_register_is_met_at() -> None:
    inside = """
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x10, PT
        BSSY B0, `(.L_x_2)
        BMOV.32.CLEAR R3, B0
        BSSY B0, `(.L_x_1)
        @P0 BRA `(.L_x_1)
        FADD R1, R1, R1
        .L_x_1:
        BSYNC B0
        BMOV.32 B0, R3
        @P0 BRA `(.L_x_2)
        FMUL R1, R1, R1
        .L_x_2:
        BSYNC B0
        FFMA R1, R1, R1, R1
        EXIT
    """
    assert [count(inside, name, threads=64) for name in ("FADD", "FMUL", "FFMA")] == [1, 1, 2]


def test_lanes_loop_as_long_as_the_last_of_them() -> None:
    loop = """
        S2R R0, SR_LANEID
        .L_x_0:
        IADD3 R0, R0, -0x1, RZ
        FADD R1, R1, R1
        ISETP.GT.AND P0, PT, R0, RZ, PT
        @P0 BRA `(.L_x_0)
        FFMA R1, R1, R1, R1
        EXIT
    """
    assert count(loop, "FADD") == 31
    assert count(loop, "FFMA") == 1


def test_a_guarded_call_is_a_jump() -> None:
    loop = """
        MOV R2, RZ
        .L_x_1:
        IADD3 R2, R2, 0x1, RZ
        ISETP.LT.AND P0, PT, R2, 0x9, PT
        @!P0 CALL.REL.NOINC `(.L_x_0)
        BRA `(.L_x_1)
        .L_x_0:
        EXIT
    """
    assert count(loop, "IADD3") == 9


def test_slow_paths_are_passed_by_and_other_branches_on_data_refused() -> None:
    slow = """
        MOV R4, 0x1000
        LDG.E R2, [R4.64]
        ISETP.GT.U32.AND P0, PT, R2, 0x1ffffff, PT
        @P0 BRA `(.L_x_0)
        CALL.REL.NOINC `(.L_x_1)
        BRA `(.L_x_2)
        .L_x_0:
        MUFU.RCP R3, R2
        .L_x_2:
        EXIT
        .L_x_1:
        FFMA R3, R3, R3, R3
        RET.REL.NODEC R8 `(k)
    """
    assert count(slow, "MUFU") == 1
    assert count(slow, "FFMA") == 0
    with pytest.raises(Refusal, match="depends on data"):
        run("LDG.E R2, [R4.64]\n.L_x_0:\nISETP.GT.U32.AND P0, PT, R2, 0x1, PT\n@P0 BRA `(.L_x_0)\nEXIT")


def test_an_unknown_instruction_is_refused_by_name() -> None:
    with pytest.raises(Refusal, match="QUUX"):
        run("QUUX.U32 R1, R2, R3\nEXIT")


def test_loads_that_no_lane_makes_cost_an_issue_slot_only() -> None:
    load = """
        S2R R0, SR_LANEID
        ISETP.GE.AND P0, PT, R0, c[0x0][0x160], PT
        MOV R2, 0x100
        MOV R3, 0x1
        @P0 LDG.E R4, [R2.64]
        EXIT
    """
    assert not run(load, 32)[1].accesses
    _, found = run(load, 31)
    assert [(a.warps, a.sectors, a.unknown) for a in found.accesses.values()] == [(1, 1, 0)]
    assert found.loaded == {TENSOR: 32}


def test_an_address_among_the_parameters_is_read_whole() -> None:
    """The compiler indexes the parameters where they are an array: here the second of two addresses, of 64 bits."""
    store = """
        MOV R0, c[0x0][0x160]
        LDC.64 R2, c[0x0][R0+0x160]
        STG.E [R2.64], R4
        EXIT
    """
    assert run(store, 8, 0, 64, 1)[1].stored == {TENSOR: 32}


def test_lanes_that_are_elsewhere_read_no_parameter() -> None:
    """They hold what would be far beyond the parameters; the others load from the address there."""
    store = """
        S2R R0, SR_LANEID
        ISETP.GE.AND P0, PT, R0, 0x5, PT
        IMAD.SHL.U32 R1, R0, 0x100000, RZ
        BSSY B0, `(.L_x_1)
        @P0 BRA `(.L_x_1)
        LOP3.LUT R1, R0, 0x0, RZ, 0xc0, !PT
        LDC.64 R2, c[0x0][R1+0x160]
        STG.E [R2.64], R4
        .L_x_1:
        BSYNC B0
        EXIT
    """
    assert run(store, 0, 1)[1].stored == {TENSOR: 32}


def test_nothing_taken_away_from_an_address_leaves_its_upper_half() -> None:
    """x - y of 64 bits in two words: taking away 0 borrows nothing, by IADD3 or by LEA."""
    store = """
        MOV R2, 0x100
        MOV R3, 0x1
        MOV R5, c[0x0][0x160]
        {}
        IADD3.X R3, R3, -0x1, RZ, P2, !PT
        STG.E [R2.64], R4
        EXIT
    """
    for way in ("LEA R2, P2, -R5, R2, 0x2", "IADD3 R2, P2, R2, -R5, RZ"):
        assert [run(store.format(way), y)[1].stored for y in (0, 4)] == [{TENSOR: 32}] * 2


LANES = np.arange(32, dtype=np.uint64)[None]
ALL = np.ones((1, 32), bool)


@pytest.mark.parametrize(
    ("stride", "size", "turns"),
    [
        *((4, 4, 1), (0, 4, 1), (8, 4, 2), (16, 4, 4), (128, 4, 32), (132, 4, 1), (2, 2, 1)),
        *((8, 8, 2), (16, 16, 4), (128, 16, 32), (144, 16, 4)),
    ],
)
def test_bank_conflicts(stride: int, size: int, turns: int) -> None:
    """`stride` bytes from lane to lane, `size` bytes a lane: 32 banks of 4 bytes."""
    assert memory.wavefronts(LANES * np.uint64(stride), ALL, size) == turns


@pytest.mark.parametrize(("pitch", "turns"), [(128, 32), (144, 4), (16, 4), (64, 16)])
def test_bank_conflicts_of_matrices(pitch: int, turns: int) -> None:
    """LDSM.x4 of matrices below each other, rows `pitch` bytes apart."""
    assert memory.matrix_wavefronts(LANES * np.uint64(pitch), ALL, 4) == turns


@pytest.mark.parametrize(("stride", "size", "sectors"), [(4, 4, 4), (2, 2, 2), (32, 4, 32), (16, 16, 16), (256, 8, 32)])
def test_sectors(stride: int, size: int, sectors: int) -> None:
    found = memory.Memory(1, [TENSOR])
    addresses = np.uint64(TENSOR) + LANES * np.uint64(stride)
    for _ in range(2):  # a block's second access to a sector is served by the first level
        found.globally(0, addresses, ALL, size, np.zeros((1, 1), np.uint64), store=False)
    assert found.accesses[0].sectors == 2 * sectors
    assert found.touched(store=False) == {TENSOR: 32 * sectors}


def test_integers_are_the_hardwares() -> None:
    for a in (0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1):
        signed = a - 2**32 if a >> 31 else a
        array = np.full((1, 32), a, np.uint64)
        assert arithmetic.widened(a) == signed % 2**64 == int(arithmetic.widened(array)[0, 0])
        assert arithmetic.compared("LT", a, 1, True) is (signed < 1)
        assert arithmetic.logic(0xC0, a, 12, 0) == a & 12
        assert arithmetic.logic(0x3C, a, 12, 0) == a ^ 12
        assert arithmetic.logic(0x6A, a, 12, 7) == (a & 12) ^ 7
        assert arithmetic.permuted(a, 0x3210, 0) == a
        assert arithmetic.permuted(a, 0x1054, 0xDDCCBBAA) == (a & 0xFFFF) << 16 | 0xBBAA


LOADS = """
    MOV R2, 0x0
    MOV R3, 0x1
    LDG.E R4, [R2.64]
    {}
    LDG.E R5, [R2.64+{}]
    FADD R6, R4, R5
    EXIT
"""
SLACK = 20  # clocks: the instructions beside the loads


@pytest.mark.parametrize("table", range(256))
def test_logic_of_three_is_what_its_table_says(table: int) -> None:
    """Bit 4 a + 2 b + c of the table, for words in which all eight combinations of bits occur."""
    a, b, c = 0xF0, 0xCC, 0xAA
    assert arithmetic.logic(table, a, b, c) & 0xFF == table
    lanes = [np.full((1, 32), word, np.uint64) for word in (a, b, c)]
    assert (np.asarray(arithmetic.logic(table, *lanes), np.uint64) & np.uint64(0xFF) == table).all()


def test_a_warp_alone_waits_for_what_it_reads() -> None:
    """Two loads are one round trip if both are asked for first, and two if one is used before."""
    trip = chips.LATENCY[80]["memory"]
    clocks, trips = model.replay(run(LOADS.format("NOP", 64))[1], 80)
    assert trips == 1 and trip < clocks < trip + SLACK
    clocks, trips = model.replay(run(LOADS.format("FADD R7, R4, R4", 64))[1], 80)
    assert trips == 2 and 2 * trip < clocks < 2 * trip + SLACK


def test_what_a_block_touched_before_is_in_its_cache() -> None:
    """The same sector again: L1 has it once it is there. A neighbour's share of first touches is served by L2."""
    memory_, l2, l1 = (chips.LATENCY[90][name] for name in ("memory", "L2", "L1"))
    again, twice = (run(LOADS.format(between, 4))[1] for between in ("FADD R7, R4, R4", "NOP"))
    clocks, trips = model.replay(again, 90)
    assert trips == 1 and memory_ + l1 < clocks < memory_ + l1 + SLACK
    clocks, trips = model.replay(twice, 90)  # on its way already
    assert trips == 1 and memory_ < clocks < memory_ + SLACK
    clocks, _ = model.replay(twice, 90, {TENSOR: 0.25})
    expected = 0.25 * memory_ + 0.75 * l2
    assert expected < clocks < expected + SLACK


def test_a_warp_waits_for_the_turns_of_its_accesses() -> None:
    """32 lanes in one bank take 32 turns, and the last has its word 31 clocks later."""
    load = "S2R R0, SR_LANEID\nIMAD.SHL.U32 R0, R0, {}, RZ\nLDS R1, [R0]\nFADD R2, R1, R1\nEXIT"
    straight, conflict = (model.replay(run(load.format(stride))[1], 80)[0] for stride in ("0x4", "0x80"))
    assert conflict - straight == 31


def test_measurements_are_joined_and_fitted(tmp_path) -> None:
    where = {"op": "o", "case": "c", "dtype": "bf16", "backend": "cuda", "pass": "fwd"}
    rows = [
        where | {"chip": chip, "us": us, "binds": "issue", "% of bound": 1.0, "target": "", "verdict": ""}
        for chip, us in (("A100", 10.0), ("H100", 5.0))
    ]
    path = tmp_path / "timings.csv"
    with path.open("w", newline="") as file:
        columns = ("op", "case", "dtype", "pass", "contestant", "ms", "device")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for device, ms in (("NVIDIA A100-SXM4-80GB", 0.02), ("NVIDIA H100 80GB HBM3", 0.0025), ("Tesla T4", 1)):
            writer.writerow(dict(zip(columns, ("o", "c", "bf16", "fwd", "famseg cuda", ms, device), strict=True)))
    assert report.join(rows, [path]) == {"issue": pytest.approx(1.0)}
    assert [row["residual %"] for row in rows] == [pytest.approx(100), pytest.approx(-50)]
    assert "measured" in report.markdown(rows, ["A100", "H100"])


def test_targets_are_shares_of_what_the_work_allows() -> None:
    """Strips in fp32 at 80 % of their FMAs' time meet the target, and at twice that time they do not."""
    where = ("strip_conv2d", "mscan_s_stage2_n16", "fp32")
    chip = chips.CHIPS[2]
    bounds = targets.bounds(*where, "fwd", chip)
    elements = 16 * 128 * 64 * 64
    assert bounds["FMA"] == pytest.approx(1e6 * 103 * elements / (128 * chip.processors * chip.clock), rel=0.02)
    assert bounds["copy"] == pytest.approx(1e6 * 2 * 4 * elements / (chip.memory * chips.COPY), rel=0.02)
    kernel = dict(zip(("op", "case", "dtype"), where, strict=True)) | {"backend": "cuda", "chip": chip.name}
    kernel |= {"kernel": "k", "binds": "issue", "refusal": "", "MB": 1.0}
    for factor, verdict in ((0.8, "met"), (0.4, "issue binds")):
        rows = [kernel | {"pass": "fwd", "us": bounds["FMA"] / factor}, kernel | {"pass": "bwd", "us": 1.0}]
        forward = next(row for row in table.summed(rows) if row["pass"] == "fwd")
        assert (forward["reached %"], forward["verdict"]) == (pytest.approx(100 * factor), verdict)


# --- real kernels ------------------------------------------------------------------------------------


@needs_tools
def test_products_of_the_scan_of_an_image_are_its_flops() -> None:
    """One matrix for four directions: 4 products of C and B for every pair of tokens, and one with x."""
    rows = rows_of("triton", "ssd_scan_2d", "heads8_16x16_n16", "bf16", "H100")
    tokens, heads, images, state, headdim = 16 * 16, 8, 16, 64, 64
    expected = 2 * images * heads * tokens * tokens * (4 * state + headdim) / 1e9
    found = [row["tensor GFLOP"] for row in rows if row["kernel"] == "mix_image" and row["pass"] == "fwd"]
    assert found == [pytest.approx(expected)]


@needs_tools
def test_multiply_adds_of_triton_s_strips_are_their_taps() -> None:
    """25 of an element in the square, 78 in the strips: beside them only the sum of a and the branches."""
    rows = rows_of("triton", "strip_conv2d", "mscan_s_stage4_n16", "bf16", "H100")
    found = {row["kernel"]: row["FMA GFLOP"] * 1e9 for row in rows if row["pass"] == "fwd"}
    elements = 16 * 512 * 16 * 16
    assert found["convolve_square"] == pytest.approx(2 * 25 * elements)
    assert 2 * 78 * elements <= found["convolve_strips"] < 1.01 * 2 * 78 * elements


@needs_tools
@needs_cubins
def test_multiply_adds_of_the_fp32_strips_are_their_flops() -> None:
    """The CUDA kernel on 64 × 64 planes does the convolution's FMAs, and those of halos and zero padding of taps."""
    rows = rows_of("cuda", "strip_conv2d", "mscan_s_stage2_n16", "fp32", "H200")
    forward = next(row for row in rows if row["pass"] == "fwd" and row["kernel"] == "strips")
    shape = next(c for c in GPU_SHAPES["strip_conv2d"] if c.name == "mscan_s_stage2_n16")
    flops = table.OPERATIONS["strip_conv2d"].spec.flops(*shape.arguments(torch.float32, "meta")) / 1e9
    assert flops <= forward["FMA GFLOP"] < 1.05 * flops
