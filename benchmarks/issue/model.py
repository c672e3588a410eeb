"""The time a launch takes at least, by each of the things that may bind it.

On the multiprocessor that gets most blocks: the units of its four schedulers and what they share, each as if the others
cost nothing. A block alone, one instruction of a warp after the other with the latencies between them: as many times as
blocks follow each other in one place. There, warps of a block and blocks that are resident together overlap entirely:
what they take from each other is what the units count. Of the whole chip: bytes of L2 and of memory. The prediction is
the largest of these: a kernel that overlaps all it does. What launching costs is left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from benchmarks.issue import chips
from benchmarks.issue.chips import Chip
from benchmarks.issue.machine import NOTHING, TOUCHED, Run

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


def work(run: Run, capability: int, blocks: int, sizes: dict[int, int]) -> Work:
    """`blocks` of the whole launch; `sizes` in bytes of its tensors, by base."""
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
    alone, trips = replay(
        run, capability, {base: first_share(n, sizes.get(base), blocks) for base, n in loaded.items()}
    )
    return Work(
        units, instructions, tensor, fma, loaded, stored,
        sum(a.unknown for a in run.accesses.values()) / max(1, accesses), alone, trips,
    )  # fmt: skip


def replay(run: Run, capability: int, first: dict[int, float] | None = None) -> tuple[float, int]:
    """Clocks of one warp that runs alone, in order: an instruction waits for what it reads, and for its unit.

    An access to shared memory or L1 takes as many turns as an average warp's, and gives its last result so much later.
    A load of sectors that the block has touched before finds them in L1, which is taken to hold them all, once they are
    there. A first touch goes to L2, and on to memory for the share `first` (by base of the tensor; 1 by default) that
    no other block has brought to L2: it takes what first touches take on average. Asynchronous copies and products are
    waited for where the program says so. Round trips: how often something is waited for that is on its way to L1, of
    all that was asked for by then.
    """
    prepared = [[_prepared(i, run, capability) for i in block] for block in run.program.blocks]
    ready: dict[object, float] = {}
    from_memory: dict[object, int] = {}  # register → the trip that brings it
    busy: dict[str, float] = {}
    now, end, trips = 0.0, 0.0, 0
    groups: list[float] = []  # copies that are committed
    group, products = 0.0, 0.0  # copies that are not, matrix products
    arrivals: list[float] = []  # of the loads' sectors in L1
    latencies = chips.LATENCY[capability]
    for b in run.trace:
        for instruction, reads, writes, kind, taken, delay, number in prepared[b]:
            name = instruction.name
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
            done, memory = at + delay, name == "ATOMG"
            if name in ("LDG", "LDGSTS"):
                touch = run.touches[len(arrivals)]
                if touch.tensor == TOUCHED:
                    hit = at + latencies["L2" if "BYPASS" in instruction.modifiers else "L1"] + taken - 1
                    done = max(hit, arrivals[touch.brought])
                    memory = done > hit
                elif touch.tensor != NOTHING:
                    share = (first or {}).get(touch.tensor, 1.0)
                    done = at + latencies["L2"] + share * (latencies["memory"] - latencies["L2"])
                    memory = True
                arrivals.append(done)
            if name == "LDGSTS":
                group = max(group, done)
            elif name == "HGMMA":
                products = max(products, at, busy[kind]) + latencies["tensor"]
            for register in writes:
                ready[register] = done
                if memory:
                    from_memory[register] = trips
                elif from_memory:
                    from_memory.pop(register, None)
            end = max(end, now + 1)
            if name == "BAR":
                now += latencies["barrier"]
    return end, trips


def _prepared(instruction: chips.Instruction, run: Run, capability: int) -> tuple:
    name, kind = instruction.name, chips.unit(instruction)
    delay: float = chips.latency(instruction, capability)
    taken = chips.clocks(instruction, capability)
    for access in (run.accesses.get(instruction.pc), run.accesses.get(instruction.pc + 1)):  # + 1: LDGSTS's store
        if kind == "memory" and access is not None:
            taken += (access.wavefronts + access.lines) / access.warps
    if kind == "memory":
        delay += max(0.0, taken - 1)
    number = 0
    if name == "DEPBAR":
        number = instruction.operands[1].number if len(instruction.operands) > 1 else 0
    if name == "WARPGROUP":
        delay = 1 if "DEPBAR" in instruction.modifiers else 0
    writes = () if name == "HGMMA" else chips.sass.written(instruction)
    return instruction, chips.sass.read(instruction), writes, kind, taken, delay, number


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
    return sum(n * blocks * first_share(n, sizes.get(base), blocks) for base, n in each.items())


def first_share(touched: float, size: int | None, blocks: int) -> float:
    """Of the bytes that each block touches of a tensor, the share that no other block has touched before."""
    return 1.0 if size is None else min(1.0, math.ceil(size / 32) * 32 / (touched * blocks))


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
