"""SASS as nvdisasm prints it: kernels, their instructions, and which registers an instruction reads and writes."""

from __future__ import annotations

import functools
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Refusal(Exception):
    """Something that is not understood. A number would be wrong, so there is none."""


class Register(NamedTuple):
    bank: str  # "R", "UR", "P", "UP"
    number: int

    @property
    def constant(self) -> bool:
        """RZ, URZ, PT, UPT: read as zero or true, written to nowhere."""
        return self.number == _LAST[self.bank]


_LAST = {"R": 255, "UR": 63, "P": 7, "UP": 7}


@dataclass(frozen=True)
class Operand:
    kind: str  # "register", "number", "constant" bank, "address", "label", "other"
    text: str
    register: Register | None = None
    negated: str = ""  # "-", "~", "!" or "|"
    number: int = 0
    bank: int = 0
    terms: tuple[tuple[Register, str], ...] = ()  # of an address: registers and their suffixes (X4, 64, U32)


@dataclass(frozen=True, eq=False)  # itself and no other: what is known of it is remembered
class Instruction:
    pc: int
    guard: Register | None
    guard_negated: bool
    name: str  # IMAD
    modifiers: tuple[str, ...]  # WIDE, U32
    operands: tuple[Operand, ...]
    text: str

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))


@dataclass(frozen=True, eq=False)
class Kernel:
    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # → address

    @functools.cached_property
    def at(self) -> dict[int, int]:
        """Address → place among the instructions."""
        return {instruction.pc: i for i, instruction in enumerate(self.instructions)}


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*(?:/\*.*)?$")
_REGISTER = re.compile(r"(UR|UP|R|P)(Z|T|\d+)$")


def tool(name: str) -> str:
    """nvdisasm or cuobjdump, of Triton's wheel or on the PATH."""
    try:
        import triton

        beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    except ImportError:
        beside = Path(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise Refusal(f"{name}: expected in Triton's wheel or on the PATH")
    return found


def disassemble(cubin: bytes, symbol: str) -> Kernel:
    """A kernel of a cubin."""
    return _disassembled(cubin)[symbol]


@functools.lru_cache(2)
def _disassembled(cubin: bytes) -> dict[str, Kernel]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    return {kernel.name: kernel for kernel in parse(text)}


class Usage(NamedTuple):
    """Registers and bytes of stack of a thread, static shared memory of a block."""

    registers: int
    stack: int
    shared: int


@functools.lru_cache(4)
def usage(cubin: bytes) -> dict[str, Usage]:
    """By symbol."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", run.stdout + run.stderr)
    return {name: Usage(*map(int, numbers)) for name, *numbers in found}


def literals(cubin: bytes, symbol: str) -> bytes:
    """Constant bank 2 of a kernel: numbers that the compiler put there. ELF's sections, of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    for name, *_, offset, length in sections:
        start = strings + name
        if cubin[start : cubin.index(b"\0", start)].decode() == f".nv.constant2.{symbol}":
            return cubin[offset : offset + length]
    return b""


def parse(text: str) -> Iterator[Kernel]:
    name, instructions, labels, waiting = _nothing("")
    for line in text.splitlines():
        if re.match(r"\s*\.section\s", line):
            if name:
                yield Kernel(name, tuple(instructions), labels)
            found = re.match(r"\s*\.section\s+\.text\.([^,]+),", line)
            name, instructions, labels, waiting = _nothing(found[1] if found else "")
        elif not name:
            continue
        elif found := _LINE.match(line):
            instruction = _instruction(int(found[1], 16), found[2])
            labels.update((label, instruction.pc) for label in waiting)
            waiting = []
            instructions.append(instruction)
        elif found := re.match(r"^(\S+):$", line):
            waiting.append(found[1])
    if name:
        yield Kernel(name, tuple(instructions), labels)


def _nothing(name: str) -> tuple[str, list[Instruction], dict[str, int], list[str]]:
    return name, [], {}, []


def _instruction(pc: int, text: str) -> Instruction:
    rest, guard, negated = text.strip("{} "), None, False
    if rest.startswith("@"):
        first, rest = rest.split(None, 1)
        negated = first[1] == "!"
        guard = _register(first.lstrip("@!"))
    opcode, _, operands = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    # Predicates stand before the target of a branch without a comma in some versions.
    parts = [part.strip() for part in _split(operands)] if operands.strip() else []
    return Instruction(pc, guard, negated, name, tuple(modifiers), tuple(map(_operand, parts)), text)


def _split(text: str) -> list[str]:
    return re.findall(r"(?:`\([^)]*\)|\[[^\]]*\]|[^,\[`])+", text)


def _register(text: str) -> Register | None:
    found = _REGISTER.match(text)
    if not found:
        return None
    return Register(found[1], _LAST[found[1]] if found[2] in "ZT" else int(found[2]))


def _operand(text: str) -> Operand:
    plain = text.replace(".reuse", "")
    if plain.startswith("`("):
        return Operand("label", plain[2:-1])
    negated = ""
    while plain and plain[0] in "-~!|" and not re.match(r"-(0x|\d|INF|QNAN)", plain):
        negated += plain[0] if plain[0] != "|" else "|"
        plain = plain[1:].removesuffix("|")
    if found := re.match(r"c\[0x([0-9a-f]+)\]\s*\[(.*)\]", plain):
        terms, number = _terms(found[2])
        return Operand("constant", text, negated=negated, number=number, bank=int(found[1], 16), terms=terms)
    if plain.startswith(("[", "desc[")):
        terms, number = _terms(plain[plain.rindex("[") + 1 : plain.rindex("]")])
        return Operand("address", text, number=number, terms=terms)
    if (register := _register(plain.split(".")[0])) is not None:
        return Operand("register", plain, register=register, negated=negated)
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", plain):
        return Operand("number", text, number=int(plain, 0), negated=negated)
    return Operand("other", plain)


def _terms(text: str) -> tuple[tuple[tuple[Register, str], ...], int]:
    terms, number = [], 0
    for sign, part in re.findall(r"([+-]?)\s*([^+\-\s]+)", text):
        if re.fullmatch(r"0x[0-9a-f]+|\d+", part):
            number += int(part, 0) * (-1 if sign == "-" else 1)
        else:
            first, *suffix = part.split(".")
            register = _register(first)
            if register is None:
                raise Refusal(f"address [{text}] is not understood")
            terms.append((register, ".".join(s for s in suffix if s != "reuse")))
    return tuple(terms), number


# --- what is read and written ------------------------------------------------------------------------

# Written predicates or registers before the sources; where it depends on the operands, `_destinations` looks.
_NO_DESTINATION = {
    *("STG", "STS", "STSM", "STL", "LDGSTS", "BRA", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BAR", "NOP", "DEPBAR"),
    *("LDGDEPBAR", "WARPSYNC", "WARPGROUP", "MEMBAR", "FENCE", "BREAK", "ENDCOLLECTIVE", "RED", "ERRBAR", "CCTL"),
    *("YIELD", "NANOSLEEP", "KILL", "BPT", "BRX", "R2P"),
}
_TWO_PREDICATES = {"ISETP", "FSETP", "HSETP2", "DSETP", "PLOP3", "UISETP", "UPLOP3"}


def width(instruction: Instruction) -> int:
    """Registers of 32 bits that a load or store moves a thread."""
    for modifier in instruction.modifiers:
        if modifier in ("64", "128"):
            return int(modifier) // 32
    return 1


def matrices(instruction: Instruction) -> int:
    """Matrices of 8 × 8 that an LDSM or STSM moves."""
    return int(instruction.modifiers[-1]) if instruction.modifiers[-1] in "24" else 1


def shape(instruction: Instruction) -> tuple[int, int, int]:
    """(m, n, k) of a matrix instruction."""
    first = instruction.modifiers[0]
    if instruction.name == "HGMMA":
        m, n, k = map(int, first.split("x"))
        return m, n, k
    shapes = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
    if instruction.name != "HMMA" or first not in shapes:
        raise Refusal(f"matrix instruction {instruction.opcode}")
    return shapes[first]


def _destinations(instruction: Instruction) -> int:
    """How many operands are written."""
    name, operands = instruction.name, instruction.operands
    if name in _NO_DESTINATION or not operands:
        return 0
    if name in _TWO_PREDICATES:
        return 2
    count = 1
    banks = [o.register.bank if o.kind == "register" and o.register else "" for o in operands]
    if name == "B2R":
        return 2
    if name in ("SHFL", "MATCH") and banks[0] == "P":
        return 2
    if name in ("LOP3", "ULOP3") and banks[0] in ("P", "UP"):
        return 2
    if name in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD"):
        while count < len(operands) and banks[count] in ("P", "UP"):
            count += 1
    return count


@functools.cache
def split(instruction: Instruction) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    count = _destinations(instruction)
    return instruction.operands[:count], instruction.operands[count:]


def _width_of_destination(instruction: Instruction) -> int:
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("LDG", "LDS", "LDL", "LDC", "ULDC", "LD", "ATOMG", "ATOMS"):
        return width(instruction)
    if name == "LDSM":
        return matrices(instruction)
    if name in ("IMAD", "UIMAD") and "WIDE" in modifiers:
        return 2
    if name == "CS2R":
        return 1 if "32" in modifiers else 2
    if name == "HMMA":
        return 4 if "F32" in modifiers else 2
    if name == "HGMMA":
        return shape(instruction)[1] // 2
    if name in ("DADD", "DMUL", "DFMA", "DMNMX") or (name == "F2F" and modifiers[:1] == ("F64",)):
        return 2
    if name == "I2F" and "F64" in modifiers:
        return 2
    return 2 if name == "F2I" and {"U64", "S64"} & set(modifiers) else 1


def width_of_source(instruction: Instruction, place: int) -> int:
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("STG", "STS", "STL") and place == 1:
        return width(instruction)
    if name == "STSM" and place == 1:
        return matrices(instruction)
    if name in ("LDC", "ULDC"):
        return width(instruction)
    if name in ("IMAD", "UIMAD") and ("WIDE" in modifiers or "HI" in modifiers) and place == 2:
        return 2
    if name == "HMMA":
        return (4, 2, _width_of_destination(instruction))[place] if place < 3 else 1
    if name == "HGMMA" and place < 2:
        return 4 if place == 0 else shape(instruction)[1] // 2
    if name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX") or (name == "F2F" and modifiers[:2] == ("F32", "F64")):
        return 2
    if name == "I2F" and {"U64", "S64"} & set(modifiers):
        return 2
    return 2 if name in ("RET", "BRX") else 1


def _several(register: Register, count: int) -> Iterator[Register]:
    if not register.constant:
        yield from (Register(register.bank, register.number + i) for i in range(count))


@functools.cache
def written(instruction: Instruction) -> tuple[Register, ...]:
    if instruction.name == "R2P":
        mask = instruction.operands[2].number
        return tuple(Register("P", i) for i in range(7) if mask >> i & 1)
    found: list[Register] = []
    for place, operand in enumerate(split(instruction)[0]):
        if operand.register is not None:
            wide = operand.register.bank in ("R", "UR") and (place == 0 or instruction.name == "SHFL")
            found += _several(operand.register, _width_of_destination(instruction) if wide else 1)
    return tuple(found)


@functools.cache
def read(instruction: Instruction) -> tuple[Register, ...]:
    """The guard too."""
    found: list[Register] = [] if instruction.guard is None else list(_several(instruction.guard, 1))
    if instruction.name == "P2R":
        found += (Register("P", i) for i in range(7) if instruction.operands[-1].number >> i & 1)
    for place, operand in enumerate(split(instruction)[1]):
        if operand.register is not None:
            wide = operand.register.bank in ("R", "UR")
            found += _several(operand.register, width_of_source(instruction, place) if wide else 1)
        for register, suffix in operand.terms:
            far = instruction.name in ("LDG", "STG", "RED", "LDGSTS", "ATOMG", "LD") and register.bank == "UR"
            found += _several(
                register, 2 if suffix.startswith("64") or (far and operand is not _shared(instruction)) else 1
            )
        if match := re.match(r"gdesc\[UR(\d+)\]", operand.text):
            found += _several(Register("UR", int(match[1])), 4 if operand.kind == "other" else 2)
    return tuple(found)


def forget() -> None:
    """What is remembered of instructions, of which a table meets a million."""
    for remembered in (split, written, read):
        remembered.cache_clear()


def _shared(instruction: Instruction) -> Operand | None:
    """The address in shared memory of a copy from global memory."""
    return instruction.operands[0] if instruction.name == "LDGSTS" else None
