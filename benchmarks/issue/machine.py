"""Runs the SASS of a kernel for some of its blocks: which instructions each warp executes, and what memory they touch.

Integers, predicates and addresses are computed exactly, for all 32 lanes of all warps that are at the same instruction.
Data, which is all that comes from memory or from floating point, is unknown. Only those instructions are computed on
which control flow or an address depends; the others are counted with their basic block.

Lanes of a warp that part meet again as the hardware lets them: at the BSYNC of their BSSY, or else where the lane that
is furthest behind catches up. Warps of a block run independently: what they exchange is data.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.issue import arithmetic as do
from benchmarks.issue import sass
from benchmarks.issue.forms import DATA
from benchmarks.issue.memory import SECTOR, Access, Memory
from benchmarks.issue.program import (
    ENDS,
    GLOBAL_LOADS,
    GLOBAL_STORES,
    LOCAL,
    PLAIN,
    SHARED,
    Program,
    target,
)
from benchmarks.issue.sass import Instruction, Refusal
from benchmarks.issue.steps import Constants, State, Step, Steps, fresh

MOST_BLOCKS = 5_000_000  # basic blocks, after which a loop is taken for endless


class Touch(NamedTuple):
    """What a global load asks for."""

    tensor: int  # base of that of which the block has not touched a sector yet; or one of the following
    brought: int = -1  # TOUCHED: the place among the touches of the last load that asked for the sectors


TOUCHED, NOTHING, UNKNOWN = 0, -1, -2  # all touched before; no lane loads; the address is data


@dataclass
class Run:
    """What the blocks that were run did, added up."""

    program: Program
    blocks: int
    warps: int  # of a block
    executed: np.ndarray  # warps that executed each basic block
    accesses: dict[int, Access]  # by address of the instruction
    loaded: dict[int, int]  # bytes of sectors by base of the tensor
    stored: dict[int, int]
    trace: list[int]  # basic blocks of one warp, in order
    touches: list[Touch]  # that warp's global loads, in order

    def counts(self) -> dict[int, int]:
        """Warps that executed each instruction, by its address."""
        return {
            instruction.pc: int(n)
            for block, n in zip(self.program.blocks, self.executed, strict=True)
            for instruction in block
        }


Branch = Callable[[State], Any]


class Machine:
    def __init__(self, program: Program, constants: Constants, bases: Sequence[int]) -> None:
        self.program, self.bases = program, bases
        self._steps = Steps(constants)
        self._compiled: list[list[Step]] = []
        self._branches: list[Branch | None] = []
        self._returns: dict[int, Callable[[State], Any]] = {}
        self._memory = Memory(0)
        self._row: int | None = None  # of the followed warp in what is executed
        code = program.kernel.instructions
        for start, end in zip(program.starts, program.starts[1:], strict=False):
            steps: list[Step] = []
            for i in range(start, end):
                steps += self._compile(code[i], i in program.needed)
            self._compiled.append(steps)
            last = code[end - 1]
            self._branches.append(self._condition(last) if last.name in ("BRA", "EXIT", "CALL") else None)
            if last.name == "RET":
                operand = last.operands[0]
                if last.guard is not None:
                    raise Refusal(f"a return that may not be: {last.text}")
                self._returns[len(self._compiled) - 1] = self._steps.source(operand)

    # --- instructions -------------------------------------------------------------------------------

    def _compile(self, instruction: Instruction, needed: bool) -> list[Step]:
        name = instruction.name
        steps: list[Step] = []
        if name == "BSSY":
            return [self._bssy(instruction)]
        if name == "BREAK":
            return [self._break(instruction)]
        if name == "BMOV":
            return [self._moved_barrier(instruction)]
        if name == "BAR" and "RED" in instruction.modifiers:
            return [self._reduction(instruction)]
        if name == "STL":
            steps.append(self._steps.spill(instruction))
        if name in GLOBAL_LOADS | GLOBAL_STORES:
            operand = next(o for o in instruction.operands if o.kind == "address")
            steps.append(self._global(instruction, operand, name in GLOBAL_STORES))
        elif name in SHARED:
            operand = next(o for o in instruction.operands if o.kind == "address")
            matrices = sass.matrices(instruction) if name in ("LDSM", "STSM") else 0
            steps.append(self._shared(instruction, operand, matrices))
        elif name == "LDGSTS":
            steps.append(self._shared(instruction, instruction.operands[0], 0))
            steps.append(self._global(instruction, instruction.operands[1], False))
        elif name not in DATA | PLAIN | ENDS | LOCAL:
            # Not needed, but what is not known is not passed over: an unknown instruction is an error here.
            step = self._steps.step(instruction)
            return [step] if needed else []
        if needed:
            steps.append(self._steps.step(instruction))
        return steps

    def _active(self, state: State, guard: Any) -> np.ndarray:
        shape = (len(state.warp), 32)
        on: Any = True if guard is None else guard
        if state.mask is not None:
            on = state.mask & on
        return np.broadcast_to(np.asarray(on, bool), shape)

    def _global(self, instruction: Instruction, operand: sass.Operand, store: bool) -> Step:
        guard, address = self._steps.guard(instruction), self._steps.address(operand, 2)
        size = _size(instruction)
        reads = [
            self._steps.predicate(o)
            for o in instruction.operands[2:]
            if o.register is not None and o.register.bank == "P"
        ]
        if instruction.name != "LDGSTS":
            reads = []

        def run(state: State) -> None:
            active = self._active(state, guard(state))
            for read in reads:
                p = read(state)
                active = active & (True if p is None else p)
            found = None
            if active.any():
                found = self._memory.globally(instruction.pc, address(state), active, size, state.block_number, store)
            if not store and self._row is not None:
                loads = bool(active[self._row].any())
                self._touches.append(self._touched(state, found) if loads else Touch(NOTHING))

        return run

    def _touched(self, state: State, found: tuple[np.ndarray, np.ndarray] | None) -> Touch:
        """By the followed warp. What warps of its block touch that are elsewhere does not count."""
        if found is None:
            return Touch(UNKNOWN)
        sectors, warps = found
        mine = sectors[warps == self._row].tolist()
        new = next((s for s in mine if s not in self._seen), None)
        touch = Touch(TOUCHED, max(self._seen[s] for s in mine)) if new is None else Touch(self._base(new))
        block = state.block_number[:, 0]
        for sector in sectors[(block == block[self._row])[warps]].tolist():
            self._seen.setdefault(sector, len(self._touches))
        return touch

    def _base(self, sector: int) -> int:
        return self.bases[max(0, bisect.bisect(self.bases, sector * SECTOR + SECTOR - 1) - 1)]

    def _shared(self, instruction: Instruction, operand: sass.Operand, matrices: int) -> Step:
        guard, address, size = self._steps.guard(instruction), self._steps.address(operand), _size(instruction)
        pc = instruction.pc + (1 if instruction.name == "LDGSTS" else 0)

        def run(state: State) -> None:
            active = self._active(state, guard(state))
            if active.any():
                self._memory.shared(pc, address(state), active, size, matrices)

        return run

    def _bssy(self, instruction: Instruction) -> Step:
        name = instruction.operands[0].text

        def run(state: State) -> None:
            old = state.barriers.get(name)
            if state.mask is None:
                state.barriers[name] = np.ones((len(state.warp), 32), bool)
            elif old is None:
                state.barriers[name] = state.mask.copy()
            else:
                rows = state.mask.any(1, keepdims=True)
                state.barriers[name] = np.where(rows, state.mask, old)

        return run

    def _reduction(self, instruction: Instruction) -> Step:
        """__syncthreads_or: whether it holds for any thread of the block.

        Of data it is false: kernels ask so whether there is anything that is not finite.
        """
        operand = instruction.operands[-1]
        if "OR" not in instruction.modifiers or operand.register is None or operand.register.bank != "P":
            raise Refusal(instruction.text)
        get = self._steps.predicate(operand)

        def run(state: State) -> None:
            p = get(state)
            if isinstance(p, np.ndarray):
                rows = np.broadcast_to(p, (len(state.warp), p.shape[1])).any(1)
                p = np.isin(state.block_number[:, 0], state.block_number[rows, 0])[:, None]
            state.reduced = False if p is None else p

        return run

    def _break(self, instruction: Instruction) -> Step:
        name, guard = instruction.operands[0].text, self._steps.guard(instruction)
        if not name.startswith("B"):
            name = instruction.operands[-1].text

        def run(state: State) -> None:
            if name in state.barriers:
                state.barriers[name] = state.barriers[name] & ~self._active(state, guard(state))

        return run

    def _moved_barrier(self, instruction: Instruction) -> Step:
        """A barrier kept in a register where there are not enough of them, or back: by the name of where it lies."""
        to, source = (operand.text for operand in instruction.operands)
        cleared = "CLEAR" in instruction.modifiers
        if instruction.guard is not None or "32" not in instruction.modifiers:
            raise Refusal(instruction.text)

        def run(state: State) -> None:
            lanes = state.barriers.pop(source, None) if cleared else state.barriers.get(source)
            state.barriers.pop(to, None)
            if lanes is not None:
                state.barriers[to] = lanes

        return run

    def _condition(self, instruction: Instruction) -> Branch:
        """Which lanes take a branch: its guard, and a predicate among its operands."""
        getters = [self._steps.guard(instruction)]
        if "DIV" in instruction.modifiers:  # taken where lanes have parted, to bring them together
            return lambda state: False
        getters += [
            self._steps.predicate(o)
            for o in instruction.operands
            if o.register is not None and o.register.bank in ("P", "UP")
        ]

        def run(state: State) -> Any:
            found: Any = True
            for get in getters:
                value = get(state)
                if value is False:
                    return False
                found = None if value is None or found is None else found & value
            if found is None:
                return self._ordinary(instruction)
            return do.boolean(found)

        return run

    def _ordinary(self, instruction: Instruction) -> bool:
        """A branch on data: what jumps over a call jumps, because ordinary numbers need no slow path.

        A slow path is that of a quotient or a root whose argument is denormal, infinite or NaN. Any other branch on
        data is refused.
        """
        if instruction.name != "BRA":
            raise Refusal(f"what is run depends on data: {instruction.text}")
        kernel = self.program.kernel
        here, there = kernel.at[instruction.pc], kernel.at[target(kernel, instruction)]
        if any(i.name == "CALL" and i.guard is None for i in kernel.instructions[here + 1 : there]):
            return True
        raise Refusal(f"what is run depends on data: {instruction.text}")

    # --- control flow -------------------------------------------------------------------------------

    def run(self, blocks: Sequence[tuple[int, int, int]], warps: int) -> Run:
        count = len(blocks)
        self._memory = Memory(count, self.bases)
        self.executed = np.zeros(len(self._compiled), np.int64)
        block = np.repeat(np.array(blocks, np.uint64).reshape(-1, 3), warps, axis=0)
        state = fresh(block, np.tile(np.arange(warps, dtype=np.uint64), count))
        state.block_number = np.repeat(np.arange(count, dtype=np.uint64), warps)[:, None]
        followed = (count // 2) * warps
        state.followed = np.arange(count * warps) == followed
        state.barriers = {}
        self.trace: list[int] = []
        self._touches: list[Touch] = []
        self._seen: dict[int, int] = {}  # sectors that the followed warp's block has touched → place of the first touch
        waiting: list[tuple[State, int]] = [(state, 0)]
        self._spent = 0
        while waiting:
            self._follow(*waiting.pop(), waiting)
        memory = self._memory
        return Run(
            self.program, count, warps, self.executed, dict(memory.accesses), memory.touched(False),
            memory.touched(True), self.trace, self._touches,
        )  # fmt: skip

    def _execute(self, state: State, b: int) -> None:
        self._spent += 1
        if self._spent > MOST_BLOCKS:
            raise Refusal(f"{self.program.kernel.name}: does not end")
        rows = None if state.mask is None else state.mask.any(1)
        self.executed[b] += len(state.warp) if rows is None else int(rows.sum())
        followed = np.flatnonzero(state.followed if rows is None else state.followed & rows)
        self._row = int(followed[0]) if len(followed) else None
        if self._row is not None:
            self.trace.append(b)
        for step in self._compiled[b]:
            step(state)

    def _next(self, state: State, b: int, block: tuple[Instruction, ...]) -> tuple[Any, int, int]:
        """(lanes that jump, block they jump to, -1 where they end; block of the others)."""
        last = block[-1]
        if last.name in ("BRA", "CALL"):  # a call with a guard is a jump: loops end so on sm_80
            branch = self._branches[b]
            assert branch is not None
            jumps = branch(state)
            there = self.program.block_at[target(self.program.kernel, last)] if "DIV" not in last.modifiers else b + 1
            return jumps, there, b + 1
        if last.name == "EXIT":
            branch = self._branches[b]
            assert branch is not None
            return branch(state), -1, b + 1
        return False, b + 1, b + 1

    def _return(self, state: State, b: int) -> int:
        to = self._returns[b](state)
        if to is None:
            raise Refusal("a return to an unknown address")
        if isinstance(to, np.ndarray):
            values = np.unique(np.broadcast_to(to, (len(state.warp), 32))[self._active(state, True)])
            if len(values) != 1:
                raise Refusal("a return to several addresses")
            to = int(values[0])
        return self.program.block_at[to]

    def _follow(self, state: State, b: int, waiting: list[tuple[State, int]]) -> None:
        """Run warps that are all at the beginning of block `b` until they end; those that go elsewhere wait."""
        blocks = self.program.blocks
        while True:
            self._execute(state, b)
            block = blocks[b]
            if block[-1].name == "RET":
                b = self._return(state, b)
                continue
            jumps, there, here = self._next(state, b, block)
            if jumps is False or jumps is True:
                b = there if jumps else here
                if b < 0:
                    return
                continue
            alive = self._active(state, True)
            taken = self._active(state, jumps)
            some, all_ = taken.any(1), (taken == alive).all(1)
            if all_.all() or not some.any():
                b = there if all_.all() else here
                if b < 0:
                    return
                continue
            mixed = some & ~all_
            parts = [(all_, there), (~some, here)]
            for rows, to in parts:
                if rows.any() and to >= 0:
                    waiting.append((_part(state, rows), to))
            if not mixed.any():
                return
            part = _part(state, mixed)
            taken, alive = taken[mixed], alive[mixed]
            if there < 0:  # some lanes end, the others go on together
                part.mask = alive & ~taken
                state, b = part, here
                continue
            reached = self._parted(part, np.where(taken, there, here), alive)
            if reached < 0:
                return
            state, b = part, reached

    def _parted(self, state: State, place: np.ndarray, alive: np.ndarray) -> int:
        """Run lanes that are at different blocks until they are at one again; -1: they have all ended."""
        blocks, none = self.program.blocks, np.iinfo(np.int64).max
        place = np.where(alive, place, none).astype(np.int64)
        held = np.zeros(place.shape, bool)  # at a BSYNC
        barrier = np.full(place.shape, "", dtype="U4")
        while True:
            free = np.where(held, none, place)
            b = int(free.min())
            if b == none:
                if not alive.any():
                    return -1
                raise Refusal("lanes wait for each other at different places")
            state.mask = free == b
            self._execute(state, b)
            mask, last = state.mask, blocks[b][-1]
            if last.name == "BSYNC":
                name = last.operands[0].text
                place = np.where(mask, b + 1, place)
                held, barrier = held | mask, np.where(mask, name, barrier)
            elif last.name == "RET":
                place = np.where(mask, self._return(state, b), place)
            else:
                jumps, there, here = self._next(state, b, blocks[b])
                taken = mask & jumps
                place = np.where(taken, there if there >= 0 else none, np.where(mask, here, place))
                if there < 0:
                    alive = alive & ~taken
            for name in np.unique(barrier[held]):
                expected = state.barriers.get(str(name), alive) & alive
                here_now = held & (barrier == name)
                complete = ~(expected & ~here_now).any(1, keepdims=True)
                held = held & ~(here_now & complete)
            if not held.any() and alive.any():
                where = np.unique(place[alive])
                if len(where) == 1:
                    state.mask = None if alive.all() else alive
                    return int(where[0])
            elif not alive.any():
                return -1


def _part(state: State, rows: np.ndarray) -> State:
    part = state.rows(rows)
    if state.mask is not None:
        mask = state.mask[rows]
        part.mask = None if mask.all() else mask
    part.block_number, part.followed = state.block_number[rows], state.followed[rows]
    part.reduced = state.reduced[rows] if isinstance(state.reduced, np.ndarray) else state.reduced
    part.barriers = {name: value[rows] for name, value in state.barriers.items()}
    return part


def _size(instruction: Instruction) -> int:
    """Bytes a lane."""
    for modifier, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if modifier in instruction.modifiers:
            return size
    return 4 * sass.width(instruction)
