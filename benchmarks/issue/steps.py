"""An instruction of which the control flow or an address depends, as a Python function of the state of some warps."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.issue import arithmetic as do
from benchmarks.issue import sass
from benchmarks.issue.arithmetic import M32, M64, Value
from benchmarks.issue.sass import Instruction, Operand, Refusal, Register

NOWHERE = 0xBAD0000
LANES = np.arange(32, dtype=np.uint64)[None, :]


class State:
    """Registers of warps that are at the same instruction."""

    def __init__(self, block: np.ndarray, warp: np.ndarray, registers: dict[str, list[Value]]) -> None:
        # Of every warp: its block's coordinates (warps, 3) and its number in the block (warps,).
        self.block, self.warp = block, warp
        self.registers = registers
        self.mask: np.ndarray | None = None  # (warps, 32) of the lanes that execute; None: all
        self.local: dict[int, Value] = {}  # spilled registers
        self.block_number: Any = None  # (warps, 1), among those that are run
        self.followed: Any = None  # (warps,): the one whose trace is kept
        self.reduced: Value = None  # what BAR.RED found for the block
        self.barriers: dict[str, Any] = {}  # of BSSY: lanes (warps, 32) that meet there

    def rows(self, keep: np.ndarray) -> State:
        def some(value: Value) -> Value:
            return value[keep] if isinstance(value, np.ndarray) and value.shape[0] == len(keep) and len(keep) > 1 else value

        registers = {bank: [some(v) for v in values] for bank, values in self.registers.items()}
        part = State(self.block[keep], self.warp[keep], registers)
        part.local = {address: some(v) for address, v in self.local.items()}
        return part


def fresh(block: np.ndarray, warp: np.ndarray) -> State:
    registers: dict[str, list[Value]] = {"R": [0] * 256, "UR": [0] * 64, "P": [False] * 8, "UP": [False] * 8}
    registers["P"][7] = registers["UP"][7] = True
    return State(block, warp, registers)


Step = Callable[[State], None]
Get = Callable[[State], Value]


class Constants:
    """Constant bank 0: sizes of the launch and the kernel's parameters. (Others hold what the compiler put there.)"""

    def __init__(self, capability: int, block: int, grid: tuple[int, int, int], parameters: bytes) -> None:
        self.start = {80: 0x160, 90: 0x210}[capability]
        self._bytes = bytearray(self.start) + parameters
        struct.pack_into("<6I", self._bytes, 0, block, 1, 1, *grid)
        struct.pack_into("<I", self._bytes, 0x28, 0x00FFFFF0)  # where the stack begins

    def word(self, bank: int, offset: int) -> int | None:
        if bank != 0 or 0x30 <= offset < self.start:
            return None  # addresses of windows and literals: nothing that a loop depends on, or it is seen as unknown
        if offset + 4 > len(self._bytes):
            if offset < (len(self._bytes) + 3) // 4 * 4:
                return int.from_bytes(self._bytes[offset:].ljust(4, b"\0"), "little")
            raise Refusal(f"constant at {offset:#x}, parameters end at {len(self._bytes):#x}")
        return int(struct.unpack_from("<I", self._bytes, offset)[0])


def put(state: State, register: Register, value: Value, guard: Value) -> None:
    if register.constant:
        return
    values = state.registers[register.bank]
    if guard is True and state.mask is None:
        values[register.index] = value
        return
    old = values[register.index]
    if guard is False:
        return
    if guard is None or value is None:
        values[register.index] = None
    elif old is None and guard is not True and register.bank in ("R", "UR") and isinstance(guard, np.ndarray):
        # Data in a register that is used anew by some lanes. Were the others to take it for an address, it is in no tensor.
        values[register.index] = np.where(guard, _array(value), np.uint64(NOWHERE))
    elif old is None:
        # Lanes that are elsewhere held data in a register that is used anew here.
        values[register.index] = value if guard is True else None
    else:
        mask = guard if state.mask is None else state.mask if guard is True else guard & state.mask
        if register.bank in ("UR", "UP"):
            mask = mask.any(1, keepdims=True) if isinstance(mask, np.ndarray) and mask.ndim == 2 else mask
        values[register.index] = (
            do.boolean(np.where(mask, value, old))
            if register.bank in ("P", "UP")
            else np.where(mask, _array(value), _array(old))
        )


def _array(value: Value) -> Value:
    return value if isinstance(value, np.ndarray) else np.uint64(value)


class Steps:
    """Makes the functions for one launch."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants

    # --- operands -----------------------------------------------------------------------------------

    def register(self, register: Register) -> Get:
        bank, index = register
        if register.constant:
            constant: Value = True if bank in ("P", "UP") else 0
            return lambda state: constant
        return lambda state: state.registers[bank][index]

    def predicate(self, operand: Operand) -> Get:
        assert operand.register is not None, operand
        get = self.register(operand.register)
        if "!" not in operand.negated:
            return get
        return lambda state: None if (p := get(state)) is None else do.opposite(p)

    def guard(self, instruction: Instruction) -> Get:
        if instruction.guard is None:
            return lambda state: True
        get = self.register(instruction.guard)
        if not instruction.guard_negated:
            return get
        return lambda state: None if (p := get(state)) is None else do.opposite(p)

    def source(self, operand: Operand, words: int = 1) -> Get:
        """Of 32 or 64 bits, its sign or complement taken."""
        if operand.kind == "register":
            assert operand.register is not None
            register = operand.register
            if register.bank in ("P", "UP"):
                return self.predicate(operand)
            get = self.register(register)
            if words == 2 and not register.constant:
                low, high = get, self.register(Register(register.bank, register.index + 1))
                get = lambda state: _paired(low(state), high(state))  # noqa: E731
        elif operand.kind == "number":
            number = operand.number & (M64 if words == 2 else M32)
            get = lambda state: number  # noqa: E731
        elif operand.kind == "constant":
            get = self._constant(operand, words)
        else:
            return lambda state: None
        mask = M64 if words == 2 else M32
        if "-" in operand.negated:
            return lambda state: None if (v := get(state)) is None else ((v ^ mask) + 1) & mask
        if "~" in operand.negated:
            return lambda state: None if (v := get(state)) is None else v ^ mask
        return get

    def _constant(self, operand: Operand, words: int) -> Get:
        if not operand.terms:
            low = self.constants.word(operand.bank, operand.number)
            if words == 2:
                number = _paired(low, self.constants.word(operand.bank, operand.number + 4))
                return lambda state: number
            return lambda state: low
        offset = self.address(operand)

        def get(state: State) -> Value:
            place = offset(state)
            if place is None:
                return None
            if isinstance(place, int):
                return self.constants.word(operand.bank, place)
            found = [self.constants.word(operand.bank, int(v)) for v in place.ravel()]
            return None if None in found else np.array(found, np.uint64).reshape(place.shape)

        return get

    def address(self, operand: Operand, uniform_words: int = 1) -> Get:
        terms: list[tuple[Get, int]] = []
        wide = False
        for register, suffix in operand.terms:
            scale = 1
            for part in suffix.split(".") if suffix else ():
                if part.startswith("X"):
                    scale = int(part[1:])
                elif part not in ("64", "U32"):
                    raise Refusal(f"address {operand.text}")
            words = 2 if "64" in suffix.split(".") else uniform_words if register.bank == "UR" else 1
            wide = wide or words == 2
            terms.append((self.source(Operand("register", "", register), words), scale))
        number, mask = operand.number & M64, M64 if wide else M32

        def get(state: State) -> Value:
            total: Value = number
            for term, scale in terms:
                value = term(state)
                if value is None:
                    return None
                total = total + value * scale if isinstance(total, int) and isinstance(value, int) else (
                    np.uint64(total & M64) if isinstance(total, int) else total
                ) + (np.uint64(value) if isinstance(value, int) else value) * np.uint64(scale)
            return total & mask

        return get

    # --- instructions -------------------------------------------------------------------------------

    def step(self, instruction: Instruction) -> Step:
        """Writes what the instruction computes, or that it is unknown."""
        guard = self.guard(instruction)
        destinations = sass.written(instruction)
        compute = self._computation(instruction)
        if compute is None:

            def forget(state: State) -> None:
                on = guard(state)
                for register in destinations:
                    put(state, register, None, on)

            return forget
        if instruction.name == "R2P":
            parts = list(destinations)
        else:
            parts = [o.register for o in sass.split(instruction)[0] if o.register is not None]
        wide = len(destinations) > sum(not p.constant for p in parts) and instruction.name != "R2P"

        def run(state: State) -> None:
            on = guard(state)
            if on is False:
                return
            results = compute(state)
            if results is None:
                for register in destinations:
                    put(state, register, None, on)
                return
            for place, (register, value) in enumerate(zip(parts, results, strict=True)):
                if place == 0 and wide and value is not None:
                    put(state, register, value & M32, on)
                    put(state, Register(register.bank, register.index + 1), do.shifted_right(value, 32), on)
                elif place == 0 and wide:
                    put(state, register, None, on)
                    put(state, Register(register.bank, register.index + 1), None, on)
                else:
                    put(state, register, value, on)

        return run

    def _computation(self, instruction: Instruction) -> Callable[[State], list[Value] | None] | None:
        """The values of the operands that are written; None where they are data."""
        name = instruction.name
        if name in DATA:
            return None
        if name.startswith("U") and name[1:] in _FORMS and name not in _FORMS:
            name = name[1:]
        if name == "S2R" or name == "S2UR":
            return self._special(instruction)
        if name == "B2R":
            if instruction.modifiers != ("RESULT",):
                raise Refusal(instruction.text)
            return lambda state: [0, state.reduced]
        if name == "SHFL":
            return self._shuffle(instruction)
        if name == "LDL":
            return self._reload(instruction)
        if name in ("P2R", "R2P"):
            return self._packed_predicates(instruction)
        form = _FORMS.get(name)
        if form is None:
            raise Refusal(f"unknown instruction: {instruction.text}")
        count, sources = len(sass.split(instruction)[0]), sass.split(instruction)[1]
        getters = [self.source(o, sass._width_of_source(instruction, i)) for i, o in enumerate(sources)]

        def run(state: State) -> list[Value] | None:
            values = [get(state) for get in getters]
            results = form(instruction, values, count)
            if results is None:
                return None
            return results if isinstance(results, list) else [results]

        return run

    def _special(self, instruction: Instruction) -> Callable[[State], list[Value] | None]:
        what = instruction.operands[1].text
        values: dict[str, Callable[[State], Value]] = {
            "SR_TID.X": lambda s: s.warp[:, None] * np.uint64(32) + LANES,
            "SR_LANEID": lambda s: LANES,
            "SR_CTAID.X": lambda s: s.block[:, :1],
            "SR_CTAID.Y": lambda s: s.block[:, 1:2],
            "SR_CTAID.Z": lambda s: s.block[:, 2:3],
            "SR_TID.Y": lambda s: 0,
            "SR_TID.Z": lambda s: 0,
            "SR_CgaCtaId": lambda s: 0,
        }
        if what not in values:
            raise Refusal(instruction.text)
        get = values[what]
        return lambda state: [get(state)]

    def _shuffle(self, instruction: Instruction) -> Callable[[State], list[Value] | None]:
        value, lane = (self.source(o) for o in instruction.operands[2:4])
        how = instruction.modifiers[0]

        def run(state: State) -> list[Value] | None:
            v, by = value(state), lane(state)
            if v is None or by is None:
                return None
            if isinstance(v, int) or v.shape[1] == 1:
                return [True, v]
            by = by if isinstance(by, int) else by.astype(np.int64)
            lanes = LANES.astype(np.int64)
            source = {"IDX": lambda: lanes * 0 + by, "BFLY": lambda: lanes ^ by, "UP": lambda: lanes - by, "DOWN": lambda: lanes + by}
            found = source[how]()
            found = np.where((found < 0) | (found > 31), lanes, found)
            v = np.broadcast_to(v, (v.shape[0], 32))
            return [True, np.take_along_axis(v, np.broadcast_to(found, v.shape), 1)]

        return run

    def _reload(self, instruction: Instruction) -> Callable[[State], list[Value] | None]:
        address, words = self.address(instruction.operands[1]), sass.width(instruction)

        def run(state: State) -> list[Value] | None:
            place = address(state)
            if words > 2 or not isinstance(place, int):
                return None
            if words == 2:
                return [_paired(state.local.get(place, 0), state.local.get(place + 4, 0))]
            return [state.local.get(place, 0)]  # 0: what was never written is anything

        return run

    def spill(self, instruction: Instruction) -> Step:
        """STL: registers that do not fit may hold addresses."""
        address, data = self.address(instruction.operands[0]), instruction.operands[1].register
        assert data is not None
        registers = [data if data.constant else Register(data.bank, data.index + i) for i in range(sass.width(instruction))]
        getters = [self.register(register) for register in registers]

        def run(state: State) -> None:
            place = address(state)
            if not isinstance(place, int):
                raise Refusal(f"{instruction.text}: an array in local memory")
            for i, get in enumerate(getters):
                state.local[place + 4 * i] = get(state) if state.mask is None and instruction.guard is None else None

        return run

    def _packed_predicates(self, instruction: Instruction) -> Callable[[State], list[Value] | None]:
        if instruction.name == "P2R":
            if instruction.operands[2].register != Register("R", 255) or instruction.modifiers:
                raise Refusal(instruction.text)
            mask = instruction.operands[3].number

            def pack(state: State) -> list[Value] | None:
                total: Value = 0
                for i in range(7):
                    if mask >> i & 1:
                        p = state.registers["P"][i]
                        if p is None:
                            return None
                        total = total | do.shifted_left(do.as_number(p), i)
                return [total]

            return pack
        if instruction.modifiers:
            raise Refusal(instruction.text)
        get, mask = self.source(instruction.operands[1]), instruction.operands[2].number

        def unpack(state: State) -> list[Value] | None:
            v = get(state)
            if v is None:
                return None
            return [do.boolean((do.shifted_right(v, i) & 1) != 0) for i in range(7) if mask >> i & 1]

        return unpack


def _paired(low: Value, high: Value) -> Value:
    return None if low is None or high is None else low | do.shifted_left(high, 32)


# Results are data: of floating point, of memory, of other lanes' data.
DATA = {
    *("FFMA", "FADD", "FMUL", "FSEL", "FSET", "FMNMX", "HADD2", "HMUL2", "HSET2", "HMNMX2"),
    *("DADD", "DMUL", "DFMA", "DSETP", "F2F", "F2FP", "I2FP", "FRND", "HMMA", "HGMMA", "FSWZADD"),
    *("LDG", "LDS", "LDSM", "LD", "ATOMG", "ATOMS", "MATCH", "REDUX"),
}  # fmt: skip

# Comparisons of data that are known of ordinary data; see `_ordinary`.
COMPARED = {"FSETP", "HSETP2", "FCHK", "DSETP"}

_COMPARISONS = ("LT", "LE", "GT", "GE", "EQ", "NE")


def _known(form: Callable[[Instruction, list[Value], int], Any]) -> Callable[[Instruction, list[Value], int], Any]:
    """None of anything unknown."""
    return lambda instruction, values, count: None if any(v is None for v in values) else form(instruction, values, count)


@_known
def _iadd3(instruction: Instruction, values: list[Value], count: int) -> Any:
    total: Value = 0
    for v in values[:3]:
        total = total + v
    if "X" in instruction.modifiers:
        for carry in values[3:]:
            total = total + do.as_number(carry)
    # -x is ~x + 1 in hardware, which carries where x is 0.
    for v, o in zip(values, sass.split(instruction)[1], strict=False):
        if o.negated == "-" and count > 1:
            total = total + do.shifted_left(do.as_number(do.boolean(v == 0)), 32)
    carries = [do.boolean(do.shifted_right(total, 32) > i) for i in range(count - 1)]
    return [total & M32, *carries]


@_known
def _lea(instruction: Instruction, values: list[Value], count: int) -> Any:
    modifiers = instruction.modifiers
    if "HI" in modifiers:
        if "SX32" in modifiers:
            a, b, places, *carry = values
            top = do.shifted_right(do.shifted_left(do.widened(a), places), 32)
        else:
            a, b, c, places, *carry = values
            top = do.shifted_right(do.shifted_left(a | do.shifted_left(c, 32), places), 32)
    else:
        a, b, places, *carry = values
        top = do.shifted_left(a, places) & M32
    total = top + b
    if "X" in modifiers and carry:
        total = total + do.as_number(carry[0])
    return [total & M32, do.boolean(do.shifted_right(total, 32) > 0)][:count]


@_known
def _imad(instruction: Instruction, values: list[Value], count: int) -> Any:
    modifiers = instruction.modifiers
    a, b, c, *carry = values
    unsigned = "U32" in modifiers
    if "WIDE" in modifiers or "HI" in modifiers:
        product = _product(a, b) if unsigned else _product(do.widened(a), do.widened(b))
        total = (product + c) & M64
        over = do.boolean(total < c)
        if "X" in modifiers:
            total = (total + do.as_number(carry[0])) & M64
        result = do.shifted_right(total, 32) if "HI" in modifiers else total
        return [result, over][:count]
    total = _product(a, b) + c
    if "X" in modifiers and carry:
        total = total + do.as_number(carry[0])
    if count > 1:
        raise Refusal(instruction.text)
    return total & M32


def _product(a: Value, b: Value) -> Value:
    return a * b & M64 if isinstance(a, int) and isinstance(b, int) else a * b


def _isetp(instruction: Instruction, values: list[Value], count: int) -> Any:
    modifiers = instruction.modifiers
    how = next((m for m in modifiers if m in _COMPARISONS), None)
    combine = next((m for m in modifiers if m in ("AND", "OR", "XOR")), None)
    if how is None or combine is None:
        raise Refusal(instruction.text)
    a, b, other, *low = values
    if a is None or b is None or (low and low[0] is None and "EX" in modifiers):
        # What is false (true) whatever is compared stays so.
        if other is not None and combine != "XOR" and other is (combine == "OR"):
            return [other, other]
        return None
    signed = "U32" not in modifiers
    result = do.compared_high(how, a, b, signed, low[0]) if "EX" in modifiers else do.compared(how, a, b, signed)
    if other is None:
        return [result, None] if result is (combine == "OR") else None
    if combine == "AND":
        return [do.boolean(result & other), do.boolean(do.opposite(result) & other)]
    if combine == "OR":
        return [do.boolean(result | other), do.boolean(do.opposite(result) | other)]
    return [do.boolean(result ^ other), do.boolean(do.opposite(result) ^ other)]


def _ordinary(instruction: Instruction, values: list[Value], count: int) -> Any:
    """A comparison of data, where control flow depends on it. Ordinary data is finite: it is no NaN and below infinity.

    And what is compared with zero for being unequal is a sum of x · 0, by which kernels see what is not finite.
    """
    if instruction.name == "FCHK":  # a quotient that would overflow
        return False
    sources = sass.split(instruction)[1]
    how = next(m for m in instruction.modifiers if m not in ("BF16_V2", "FTZ", "MN"))
    second, other = sources[1], values[-1]
    if how in ("NAN", "NUM"):
        result = how == "NUM"
    elif "INF" in second.text:
        below = "-INF" not in second.text
        result = how in (("LT", "LE", "NE", "LTU", "LEU", "NEU") if below else ("GT", "GE", "NE", "GTU", "GEU", "NEU"))
    elif how in ("NEU", "NE") and second.register == Register("R", 255):
        result = False
    else:
        return None
    if other is None:
        return [result, None] if result is ("OR" in instruction.modifiers) else None
    if "OR" in instruction.modifiers:
        return [do.boolean(result | other), do.boolean((not result) | other)]
    return [do.boolean(result & other), do.boolean((not result) & other)]


def _lop3(instruction: Instruction, values: list[Value], count: int) -> Any:
    a, b, c, table, *rest = values
    if any(v is None for v in (a, b, c)):
        return None
    result = do.logic(table, a, b, c)
    if count == 1:
        return result
    return [do.boolean(result != 0), result]  # only with !PT for what it is combined with


def _plop3(instruction: Instruction, values: list[Value], count: int) -> Any:
    a, b, c, table, second = values
    if None in (x if not isinstance(x, np.ndarray) else 0 for x in (a, b, c)):
        options = [do.truth(table, *(u if v is None else v for v in (a, b, c))) for u in (False, True)]
        if any(isinstance(o, np.ndarray) for o in options) or options[0] != options[1] or sum(v is None for v in (a, b, c)) > 1:
            return None
        return [options[0], None]
    return [do.truth(table, a, b, c), do.truth(second, a, b, c)]


@_known
def _minmax(instruction: Instruction, values: list[Value], count: int) -> Any:
    a, b, least = values
    smaller = do.compared("LT", a, b, "U32" not in instruction.modifiers)
    return do.either(do.boolean(smaller == least), a, b)


@_known
def _addminmax(instruction: Instruction, values: list[Value], count: int) -> Any:
    a, b, c, least = values
    total = (a + b) & M32
    smaller = do.compared("LT", total, c, "U32" not in instruction.modifiers)
    return do.either(do.boolean(smaller == least), total, c)


def _hfma2(instruction: Instruction, values: list[Value], count: int) -> Any:
    operands = instruction.operands
    if not all(o.register == Register("R", 255) for o in operands[1:3]):
        return None
    numbers = [o.text for o in operands[3:]]
    if len(numbers) != 2 or not all(re.match(r"[-+]?[\d.]", n) for n in numbers) or "BF16_V2" in instruction.modifiers:
        return None
    return do.half_pair(*(float(n) if "0x" not in n else float(int(n, 16)) for n in numbers))


@_known
def _mufu(instruction: Instruction, values: list[Value], count: int) -> Any:
    return do.reciprocal(values[0]) if instruction.modifiers == ("RCP",) else None


def _vote(instruction: Instruction, values: list[Value], count: int) -> Any:
    p, how = values[-1], instruction.modifiers[0]
    if instruction.operands[0].register is None or instruction.operands[0].register.bank in ("R", "UR") or p is None:
        return None
    if isinstance(p, bool):
        return p
    return p.any(1, keepdims=True) if how == "ANY" else p.all(1, keepdims=True)


def _sel(instruction: Instruction, values: list[Value], count: int) -> Any:
    a, b, p = values
    if p is True or p is False:
        return a if p else b
    return None if any(v is None for v in values) else do.either(p, a, b)


def _first_lane(instruction: Instruction, values: list[Value], count: int) -> Any:
    return values[0][:, :1] if isinstance(values[0], np.ndarray) else values[0]


@_known
def _absolute(instruction: Instruction, values: list[Value], count: int) -> Any:
    x = values[0]
    return do.either(do.boolean(x >= do.SIGN), (x ^ M32) + 1, x) & M32


def _plain(compute: Callable[..., Value]) -> Callable[[Instruction, list[Value], int], Any]:
    return _known(lambda instruction, values, count: compute(*values))


_FORMS: dict[str, Callable[[Instruction, list[Value], int], Any]] = {
    "MOV": _plain(lambda x, *mask: x),
    "IADD3": _iadd3,
    "VIADD": _plain(lambda a, b: (a + b) & M32),
    "LEA": _lea,
    "IMAD": _imad,
    "ISETP": _isetp,
    "LOP3": _lop3,
    "PLOP3": _plop3,
    "SEL": _sel,
    "IMNMX": _minmax,
    "VIMNMX": _minmax,
    "VIADDMNMX": _addminmax,
    "SHF": _known(lambda instruction, v, count: do.funnel(instruction, *v)),
    "PRMT": _plain(do.permuted),
    "SGXT": _known(lambda instruction, v, count: do.extended(v[0], v[1], "U32" in instruction.modifiers)),
    "BMSK": _plain(lambda place, bits: do.truncate(do.shifted_left(do.shifted_left(1, bits) - 1, place))),
    "IABS": _absolute,
    "I2F": _known(lambda instruction, v, count: None if "F64" in instruction.modifiers else do.to_float(v[0], instruction)),
    "F2I": _known(lambda instruction, v, count: do.to_integer(v[0], instruction)),
    "MUFU": _mufu,
    "VOTE": _vote,
    "VOTEU": _vote,
    "HFMA2": _hfma2,
    "FSETP": _ordinary,
    "HSETP2": _ordinary,
    "DSETP": _ordinary,
    "FCHK": _ordinary,
    "R2UR": _first_lane,
    "LDC": _plain(lambda x: x),
    "CS2R": lambda instruction, values, count: 0 if instruction.operands[1].text == "SRZ" else None,
}
