"""What each instruction computes from the values of its operands: a form an opcode."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.issue import arithmetic as do
from benchmarks.issue import sass
from benchmarks.issue.arithmetic import M32, M64, Value
from benchmarks.issue.sass import Instruction, Refusal, Register

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
    return lambda instruction, values, count: (
        None if any(v is None for v in values) else form(instruction, values, count)
    )


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
    if count > 1 and sass.split(instruction)[1][0].negated == "-":  # as in IADD3
        total = total + do.shifted_left(do.as_number(do.boolean(top == 0)), 32)
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
    a, b, c, table, *_ = values
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
        if (
            any(isinstance(o, np.ndarray) for o in options)
            or options[0] != options[1]
            or sum(v is None for v in (a, b, c)) > 1
        ):
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


FORMS: dict[str, Callable[[Instruction, list[Value], int], Any]] = {
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
    "I2F": _known(
        lambda instruction, v, count: None if "F64" in instruction.modifiers else do.to_float(v[0], instruction)
    ),
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
