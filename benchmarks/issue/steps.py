"""An instruction of which the control flow or an address depends, as a Python function of the state of some warps."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.issue import arithmetic as do
from benchmarks.issue import forms, sass
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
            return (
                value[keep]
                if isinstance(value, np.ndarray) and value.shape[0] == len(keep) and len(keep) > 1
                else value
            )

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
    """Constant bank 0: sizes of the launch and the kernel's parameters; bank 2: the compiler's literals."""

    def __init__(
        self, capability: int, block: int, grid: tuple[int, int, int], parameters: bytes, literals: bytes = b""
    ) -> None:
        self._literals = literals
        self.start = {80: 0x160, 90: 0x210}[capability]
        self._bytes = bytearray(self.start) + parameters
        struct.pack_into("<6I", self._bytes, 0, block, 1, 1, *grid)
        struct.pack_into("<I", self._bytes, 0x28, 0x00FFFFF0)  # where the stack begins

    def word(self, bank: int, offset: int) -> int | None:
        if bank == 2 and offset + 4 <= len(self._literals):
            return int(struct.unpack_from("<I", self._literals, offset)[0])
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
        values[register.number] = value
        return
    old = values[register.number]
    if guard is False:
        return
    if guard is None or value is None:
        values[register.number] = None
    elif old is None and guard is not True and register.bank in ("R", "UR") and isinstance(guard, np.ndarray):
        # Data in a register that is used anew by some lanes. Were the others to take it for an address, it would be
        # one in no tensor.
        values[register.number] = np.where(guard, _array(value), np.uint64(NOWHERE))
    elif old is None:
        # Lanes that are elsewhere held data in a register that is used anew here.
        values[register.number] = value if guard is True else None
    else:
        mask = guard if state.mask is None else state.mask if guard is True else guard & state.mask
        if register.bank in ("UR", "UP"):
            mask = mask.any(1, keepdims=True) if isinstance(mask, np.ndarray) and mask.ndim == 2 else mask
        values[register.number] = (
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
                low, high = get, self.register(Register(register.bank, register.number + 1))
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

        def word(place: int) -> int | None:
            low = self.constants.word(operand.bank, place)
            return _paired(low, self.constants.word(operand.bank, place + 4)) if words == 2 else low

        def get(state: State) -> Value:
            place = offset(state)
            if place is None:
                return None
            if isinstance(place, int):
                return word(place)
            found = [word(int(v)) for v in place.ravel()]
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
                total = (
                    total + value * scale
                    if isinstance(total, int) and isinstance(value, int)
                    else (np.uint64(total & M64) if isinstance(total, int) else total)
                    + (np.uint64(value) if isinstance(value, int) else value) * np.uint64(scale)
                )
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
                    put(state, Register(register.bank, register.number + 1), do.shifted_right(value, 32), on)
                elif place == 0 and wide:
                    put(state, register, None, on)
                    put(state, Register(register.bank, register.number + 1), None, on)
                else:
                    put(state, register, value, on)

        return run

    def _computation(self, instruction: Instruction) -> Callable[[State], list[Value] | None] | None:
        """The values of the operands that are written; None where they are data."""
        name = instruction.name
        if name in forms.DATA:
            return None
        if name.startswith("U") and name[1:] in forms.FORMS and name not in forms.FORMS:
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
        form = forms.FORMS.get(name)
        if form is None:
            raise Refusal(f"unknown instruction: {instruction.text}")
        count, sources = len(sass.split(instruction)[0]), sass.split(instruction)[1]
        getters = [self.source(o, sass.width_of_source(instruction, i)) for i, o in enumerate(sources)]

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
            source = {
                "IDX": lambda: lanes * 0 + by,
                "BFLY": lambda: lanes ^ by,
                "UP": lambda: lanes - by,
                "DOWN": lambda: lanes + by,
            }
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
        registers = [
            data if data.constant else Register(data.bank, data.number + i) for i in range(sass.width(instruction))
        ]
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
