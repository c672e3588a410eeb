"""A kernel's control flow, and which of its instructions decide on it or on an address: only those are computed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.issue import sass
from benchmarks.issue.forms import COMPARED, DATA
from benchmarks.issue.sass import Instruction, Kernel, Refusal, Register

ENDS = {"BRA", "EXIT", "RET", "CALL", "BSYNC", "BRX", "JMP"}
GLOBAL_LOADS, GLOBAL_STORES = {"LDG"}, {"STG", "RED"}
SHARED = {"LDS", "STS", "LDSM", "STSM"}
LOCAL = {"LDL", "STL"}
# Neither control flow nor registers depend on them, in this model.
PLAIN = {
    *("BAR", "NOP", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "WARPGROUP", "MEMBAR", "FENCE", "BSSY", "BREAK"),
    *("ENDCOLLECTIVE", "ERRBAR", "CGAERRBAR", "CCTL", "YIELD"),
}


def _bit(register: Register) -> int:
    return 1 << ({"R": 0, "UR": 256, "P": 320, "UP": 328}[register.bank] + register.number)


def _bits(registers: Sequence[Register]) -> int:
    total = 0
    for register in registers:
        if not register.constant:
            total |= _bit(register)
    return total


@dataclass
class Program:
    """A kernel's basic blocks, and which instructions have to be computed."""

    kernel: Kernel
    starts: list[int]  # of blocks, in places of instructions; ends with their number
    block_at: dict[int, int]  # address → block
    needed: set[int]  # places of instructions

    @functools.cached_property
    def blocks(self) -> list[tuple[Instruction, ...]]:
        return [self.kernel.instructions[a:b] for a, b in zip(self.starts, self.starts[1:], strict=False)]


def target(kernel: Kernel, instruction: Instruction) -> int:
    label = next((o for o in instruction.operands if o.kind == "label"), None)
    if label is None or label.text not in kernel.labels:
        raise Refusal(f"{instruction.text}: where to?")
    return kernel.labels[label.text]


@functools.lru_cache(64)
def analysed(kernel: Kernel) -> Program:
    code = kernel.instructions
    for instruction in code:
        if instruction.name in ("BRX", "JMX", "JMP", "BRXU"):
            raise Refusal(f"jump to a computed address: {instruction.text}")
    leaders = {0}
    for i, instruction in enumerate(code):
        if instruction.name in ENDS:
            leaders.add(i + 1)
    leaders |= {kernel.at[pc] for pc in kernel.labels.values() if pc in kernel.at}
    starts = [*sorted(i for i in leaders if i < len(code)), len(code)]
    block_at = {code[start].pc: b for b, start in enumerate(starts[:-1])}
    returns = [b + 1 for b, end in enumerate(starts[1:]) if code[end - 1].name == "CALL"]
    following: list[list[int]] = []
    for b, end in enumerate(starts[1:]):
        last = code[end - 1]
        through = [b + 1] if b + 2 < len(starts) else []
        if last.name == "BRA" and "DIV" not in last.modifiers:
            jump = [block_at[target(kernel, last)]]
            following.append(jump + (through if _conditional(last) else []))
        elif last.name == "CALL":
            following.append([block_at[target(kernel, last)], *through])
        elif last.name == "RET":
            following.append(returns)
        elif last.name == "EXIT" and last.guard is None:
            following.append([])
        else:
            following.append(through)
    # Backwards, which registers are needed where each block begins, until nothing changes.
    live, needed, changed = [0] * len(following), set(), True
    while changed:
        changed = False
        for b in range(len(following) - 1, -1, -1):
            need = 0
            for other in following[b]:
                need |= live[other]
            for i in range(starts[b + 1] - 1, starts[b] - 1, -1):
                need, computed = _needs(code[i], need)
                if computed:
                    needed.add(i)
            if need | live[b] != live[b]:
                live[b] |= need
                changed = True
    return Program(kernel, starts, block_at, needed)


def _conditional(instruction: Instruction) -> bool:
    return instruction.guard is not None or any(
        o.register is not None and o.register.bank in ("P", "UP") for o in instruction.operands
    )


@functools.lru_cache(1 << 15)
def _uses(instruction: Instruction) -> tuple[int, int, int, int]:
    """Bits of registers: always needed, needed if the result is, written, written whatever the guard says."""
    guard = _bits([instruction.guard]) if instruction.guard is not None else 0
    written, everything, name = _bits(sass.written(instruction)), _bits(sass.read(instruction)), instruction.name
    addresses = 0
    for operand in instruction.operands:
        if operand.kind == "address":
            kept = Instruction(0, None, False, name, instruction.modifiers, (operand,), "")
            addresses |= _bits([r for r in sass.read(kept)]) | _bits(_pairs(instruction, operand))
    always = 0
    if name in GLOBAL_LOADS | GLOBAL_STORES | SHARED | LOCAL | {"LDGSTS"}:
        always = addresses | guard
        always |= everything if name in ("STL", "LDGSTS") else 0
    elif name in ("BRA", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BREAK") or (
        name == "BAR" and "RED" in instruction.modifiers
    ):
        always = everything
    needed = guard if name in DATA else everything
    if name in COMPARED:
        needed = guard | _bits([r for r in sass.read(instruction) if r.bank in ("P", "UP")])
    return always, needed, written, 0 if instruction.guard is not None else written


def _pairs(instruction: Instruction, operand: sass.Operand) -> list[Register]:
    return [
        Register(r.bank, r.number + i)
        for r, suffix in operand.terms
        if not r.constant
        for i in range(2 if suffix.startswith("64") else 1)
    ]


def _needs(instruction: Instruction, need: int) -> tuple[int, bool]:
    always, if_needed, written, killed = _uses(instruction)
    if written & need:
        return (need & ~killed) | if_needed | always, True
    return need | always, False
