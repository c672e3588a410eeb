"""The time a launch takes at least, by each of the things that may bind it.

On the multiprocessor that gets most blocks: the units of its four schedulers and what they share, each as if the others
cost nothing. A block alone, one instruction after the other with the latencies between them: as many times as blocks
follow each other in one place. Of the whole chip: bytes of L2 and of memory. The prediction is the largest of these: a
kernel that overlaps all it does. What launching costs is left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from benchmarks.issue import chips
from benchmarks.issue.chips import Chip
from benchmarks.issue.machine import Run

_LINE_BYTES = 128


@dataclass
class Work:
    """Of an average block of a kernel."""

    units: dict[str, float]  # clocks of a multiprocessor
    instructions: float  # of its warps
    tensor_flops: float
    fma_flops: float
    loaded: dict[int, float]  # bytes by base of the tensor
    stored: dict[int, float]
    unknown: float  # share of the accesses to memory whose addresses are data
    alone: float  # clocks of a block that has the multiprocessor to itself, by latencies
    trips: int  # round trips to memory of a warp, one after the other


def work(run: Run, capability: int) -> Work:
    counts = run.counts()
    per_scheduler: dict[str, float] = defaultdict(float)
    instructions = tensor = fma = shared = wide = 0.0
    for instruction in run.program.kernel.instructions:
        n = counts[instruction.pc] / run.blocks
        if not n:
            chips.unit(instruction)  # refuses what it does not know
            continue
        instructions += n
        kind = chips.unit(instruction)
        per_scheduler[kind] += n * chips.clocks(instruction, capability)
        if kind == "shuffle":
            wide += n
        if kind == "tensor":
            m, nn, k = chips.sass.shape(instruction)
            tensor += n * 2 * m * nn * k / (4 if instruction.name == "HGMMA" else 1)
            shared += n * chips.matrix_bytes(instruction) / _LINE_BYTES
        if instruction.name in ("FFMA", "FADD", "FMUL"):
            fma += n * 32 * (2 if instruction.name == "FFMA" else 1)
        if instruction.name in ("LDL", "STL"):
            shared += n * chips.sass.width(instruction)
    shared += sum(a.wavefronts for a in run.accesses.values()) / run.blocks
    lines = sum(a.lines for a in run.accesses.values()) / run.blocks
    units = {"issue": instructions / 4}
    for kind in ("alu", "xu", "fp64", "uniform", "fp16", "tensor"):
        units[kind] = per_scheduler.get(kind, 0.0) / 4
    both = per_scheduler.get("fp32", 0.0), per_scheduler.get("imad", 0.0)
    # IMAD takes one of the two units of fp32 of sm_90 (and the only one of sm_80).
    units["fma"] = (sum(both) if capability == 80 else max(both[1], both[0] + both[1] / 2)) / 4
    units["shared memory"] = shared + wide + lines
    loaded = {base: n / run.blocks for base, n in run.loaded.items()}
    stored = {base: n / run.blocks for base, n in run.stored.items()}
    units["L2 port"] = (sum(loaded.values()) + sum(stored.values())) / 64  # bytes a clock and multiprocessor: A
    accesses = sum(a.warps for a in run.accesses.values())
    alone, trips = replay(run, capability)
    return Work(
        units, instructions, tensor, fma, loaded, stored,
        sum(a.unknown for a in run.accesses.values()) / max(1, accesses), alone, trips,
    )  # fmt: skip


def replay(run: Run, capability: int) -> tuple[float, int]:
    """Clocks of one warp that runs alone, in order: an instruction waits for what it reads, and for its unit.

    Asynchronous copies and products are waited for where the program says so. Round trips: how often something is
    waited for that comes from memory, of all that was asked for by then.
    """
    prepared = [[_prepared(i, capability) for i in block] for block in run.program.blocks]
    ready: dict[object, float] = {}
    from_memory: dict[object, int] = {}  # register → the trip that brings it
    busy: dict[str, float] = {}
    now, end, trips = 0.0, 0.0, 0
    group, groups, products = 0.0, [], 0.0  # copies not yet committed, committed ones, matrix products
    for b in run.trace:
        for name, reads, writes, kind, taken, delay, memory, number in prepared[b]:
            at = max(now + 1, busy.get(kind, 0.0))
            for register in reads:
                when = ready.get(register, 0.0)
                if when > at:
                    at = when
                if from_memory.get(register, -1) == trips:
                    trips += 1
            if name == "DEPBAR":
                late = groups[: max(0, len(groups) - number)]
                if late:
                    at, groups = max(at, *late), groups[len(late) :]
                    trips += 1
            elif name == "LDGDEPBAR":
                groups, group = [*groups, group], 0.0
            elif name == "WARPGROUP" and delay:
                at = max(at, products)
            if taken:
                busy[kind] = at + taken
            now = at
            done = at + delay
            if name == "LDGSTS":
                group = max(group, done)
            elif name == "HGMMA":
                products = max(products, at, busy[kind]) + chips.LATENCY[capability]["tensor"]
            for register in writes:
                ready[register] = done
                if memory:
                    from_memory[register] = trips
                elif from_memory:
                    from_memory.pop(register, None)
            end = max(end, now + 1)
            if name == "BAR":
                now += chips.LATENCY[capability]["barrier"]
    return end, trips


def _prepared(instruction: chips.Instruction, capability: int) -> tuple:
    name = instruction.name
    kind = chips.unit(instruction)
    writes = chips.sass.written(instruction)
    delay = chips.latency(instruction, capability)
    if name == "HGMMA":
        writes = ()
    number = 0
    if name == "DEPBAR":
        number = instruction.operands[1].number if len(instruction.operands) > 1 else 0
    if name == "WARPGROUP":
        delay = 1 if "DEPBAR" in instruction.modifiers else 0
    return (
        name, chips.sass.read(instruction), writes, kind, chips.clocks(instruction, capability), delay,
        name in ("LDG", "ATOMG"), number,
    )  # fmt: skip


@dataclass
class Prediction:
    seconds: float
    binds: str
    bounds: dict[str, float] = field(default_factory=dict)  # seconds
    resident: int = 0
    memory_bytes: float = 0.0


def moved(each: dict[int, float], sizes: dict[int, int], blocks: int) -> float:
    """Bytes from or to memory: what all blocks touch of a tensor, but no more than there is of it.

    So what several blocks touch comes from memory once, and then from L2.
    """
    return sum(min(n * blocks, math.ceil(sizes.get(base, n * blocks) / 32) * 32) for base, n in each.items())


def predict(
    chip: Chip, each: Work, grid: tuple[int, int, int], sizes: dict[int, int], threads: int, registers: int, shared: int
) -> Prediction:
    blocks = math.prod(grid)
    most = math.ceil(blocks / chip.processors)
    together = chips.resident(chip, threads, registers, shared)
    bounds = {name: clocks * most / chip.clock for name, clocks in each.units.items()}
    bounds["latency"] = each.alone * math.ceil(blocks / (chip.processors * together)) / chip.clock
    total = (sum(each.loaded.values()) + sum(each.stored.values())) * blocks
    bounds["L2"] = total / chip.cache
    memory = moved(each.loaded, sizes, blocks) + moved(each.stored, sizes, blocks)
    bounds["memory"] = memory / (chip.memory * chips.COPY)
    binds = max(bounds, key=lambda name: bounds[name])
    return Prediction(bounds[binds], binds, bounds, together, memory)
