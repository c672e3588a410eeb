"""What integer, predicate and uniform instructions compute, for all lanes of several warps at once.

A value is a Python int, or a NumPy array of uint64 that broadcasts to (warps, 32); it holds 32 bits. A predicate is a
bool or an array of bools. What depends on data in memory is None: unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.issue.sass import Instruction, Refusal

Value = Any
M32, M64, SIGN = (1 << 32) - 1, (1 << 64) - 1, 1 << 31


def truncate(x: Value) -> Value:
    return x & M32


def widened(x: Value) -> Value:
    """32 signed bits as 64."""
    return (((x ^ SIGN) - SIGN) & M64) if isinstance(x, int) else (x ^ np.uint64(SIGN)) - np.uint64(SIGN)


def shifted_left(x: Value, n: Value) -> Value:
    """Of 64 bits, 64 places or more give zero."""
    if isinstance(x, int) and isinstance(n, int):
        return x << n & M64 if n < 64 else 0
    x, n = np.asarray(x, np.uint64), np.asarray(n, np.uint64)
    return np.where(n < 64, x << np.minimum(n, np.uint64(63)), np.uint64(0))


def shifted_right(x: Value, n: Value, signed: bool = False) -> Value:
    if isinstance(x, int) and isinstance(n, int):
        x = x - (1 << 64) if signed and x >> 63 else x
        return x >> min(n, 64) & M64
    x, n = np.asarray(x, np.uint64), np.asarray(n, np.uint64)
    if signed:
        return (x.astype(np.int64) >> np.minimum(n, np.uint64(63)).astype(np.int64)).astype(np.uint64)
    return np.where(n < 64, x >> np.minimum(n, np.uint64(63)), np.uint64(0))


def either(condition: Value, a: Value, b: Value) -> Value:
    if isinstance(condition, bool):
        return a if condition else b
    if not isinstance(a, np.ndarray):
        a = np.uint64(a)
    if not isinstance(b, np.ndarray):
        b = np.uint64(b)
    return np.where(condition, a, b)


def boolean(x: Value) -> Value:
    return bool(x) if isinstance(x, (bool, int, np.bool_)) else x


def opposite(p: Value) -> Value:
    return (not p) if isinstance(p, bool) else ~p


def as_number(p: Value) -> Value:
    return int(p) if isinstance(p, bool) else p.astype(np.uint64)


def _bits_of_float(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32).astype(np.uint64)


def _float_of_bits(x: Value) -> np.ndarray:
    return np.atleast_1d(np.asarray(x, np.uint64)).astype(np.uint32).view(np.float32)


def _same_kind(result: np.ndarray, like: Value) -> Value:
    return int(result.reshape(-1)[0]) if isinstance(like, int) else result


def to_float(x: Value, instruction: Instruction) -> Value:
    """I2F, of 32 or (U64) 64 bits; RP rounds up, which the division by a reciprocal counts on."""
    modifiers = instruction.modifiers
    bits = np.atleast_1d(np.asarray(x, np.uint64))
    if "U64" in modifiers or any(m.startswith("U") and m != "U64" for m in modifiers):
        exact = bits
    elif "S64" in modifiers:
        exact = bits.astype(np.int64)
    else:
        exact = bits.astype(np.uint32).view(np.int32)
    rounded = exact.astype(np.float32)
    if "RP" in modifiers:
        below = rounded.astype(np.float64) < exact.astype(np.float64)
        rounded = np.where(below, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return _same_kind(_bits_of_float(rounded), x)


def reciprocal(x: Value) -> Value:
    with np.errstate(divide="ignore", over="ignore"):
        return _same_kind(_bits_of_float(np.float32(1) / _float_of_bits(x)), x)


def to_integer(x: Value, instruction: Instruction) -> Value:
    """F2I.TRUNC, to 32 or 64 bits, saturating; of signed or unsigned."""
    modifiers = instruction.modifiers
    if not any(m.startswith("TRUNC") for m in modifiers):
        raise Refusal(instruction.text)
    wide = "U64" in modifiers or "S64" in modifiers
    unsigned = "U64" in modifiers or "U32" in modifiers
    value = np.nan_to_num(np.trunc(_float_of_bits(x).astype(np.float64)))
    if unsigned:
        top = float(2**64 - 2048) if wide else float(M32)
        return _same_kind(np.clip(value, 0, top).astype(np.uint64), x)
    top = float(2**63 - 1024) if wide else float(2**31 - 1)
    result = np.clip(value, -top - 1, top).astype(np.int64).astype(np.uint64)
    return _same_kind(result if wide else result & np.uint64(M32), x)


def compared(how: str, a: Value, b: Value, signed: bool) -> Value:
    if signed:
        a, b = a ^ SIGN, b ^ SIGN
    comparisons: dict[str, Callable[[], Value]] = {
        "LT": lambda: a < b, "LE": lambda: a <= b, "GT": lambda: a > b, "GE": lambda: a >= b,
        "EQ": lambda: a == b, "NE": lambda: a != b,
    }  # fmt: skip
    return boolean(comparisons[how]())


def compared_high(how: str, a: Value, b: Value, signed: bool, low: Value) -> Value:
    """The upper words of 64 bits, `low` the result of the lower ones."""
    if how == "NE":
        return compared("NE", a, b, signed) | low
    same = compared("EQ", a, b, signed) & low
    return same if how == "EQ" else compared(how[0] + "T", a, b, signed) | same


def logic(table: int, a: Value, b: Value, c: Value) -> Value:
    """LOP3: every bit of the result from the bits of a, b and c by the table."""
    simple = {0xC0: lambda: a & b, 0xFC: lambda: a | b, 0x3C: lambda: a ^ b, 0xFE: lambda: a | b | c,
              0xF8: lambda: a | (b & c), 0x96: lambda: a ^ b ^ c, 0x80: lambda: a & b & c}  # fmt: skip
    if table in simple:
        return simple[table]()
    result: Value = 0
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else a ^ M32) & (b if i & 2 else b ^ M32) & (c if i & 1 else c ^ M32))
    return result


def truth(table: int, a: Value, b: Value, c: Value) -> Value:
    """PLOP3."""
    result: Value = False
    for i in range(8):
        if table >> i & 1:
            result = result | (
                (a if i & 4 else opposite(a)) & (b if i & 2 else opposite(b)) & (c if i & 1 else opposite(c))
            )
    return boolean(result)


def permuted(a: Value, selector: Value, b: Value) -> Value:
    both = a | shifted_left(b, 32)
    result: Value = 0
    for i in range(4):
        nibble = shifted_right(selector, 4 * i) & 15
        byte = shifted_right(both, (nibble & 7) * 8) & 0xFF
        sign = (byte >> 7) * 0xFF if isinstance(byte, int) else (byte >> np.uint64(7)) * np.uint64(0xFF)
        result = result | shifted_left(either(boolean(nibble > 7), sign, byte), 8 * i)
    return result


def funnel(instruction: Instruction, low: Value, places: Value, high: Value) -> Value:
    """SHF: {high, low} by so many places."""
    modifiers = instruction.modifiers
    wide = "U64" in modifiers or "S64" in modifiers
    signed = "S32" in modifiers or "S64" in modifiers
    if "W" in modifiers:
        places = places & (63 if wide else 31)
    both = low | shifted_left(high, 32)
    if modifiers[0] == "L":
        if "HI" in modifiers:
            return truncate(shifted_right(shifted_left(both, places), 32))
        return truncate(shifted_left(low, places))
    if wide:
        moved = shifted_right(both, places, signed)
        return truncate(shifted_right(moved, 32) if "HI" in modifiers else moved)
    if "HI" in modifiers:
        return truncate(shifted_right(widened(high) if signed else high, places, signed))
    # Of 32 bits without HI: what is moved in from above comes from `high`.
    return truncate(shifted_right(both, either(boolean(places > 32), 32, places), False))


def extended(x: Value, bits: Value, unsigned: bool) -> Value:
    """SGXT: the lowest bits, with the sign of the last of them."""
    kept = x & ((shifted_left(1, bits) - 1) & M64)
    if unsigned:
        return truncate(kept)
    top = shifted_left(1, bits - 1)
    return truncate(((kept ^ top) - top) & M64 if isinstance(kept, int) else (kept ^ top) - top)


def half_pair(high: float, low: float) -> int:
    """Two fp16 in a register, of which HFMA2 makes constants."""
    pair = np.array([low, high], np.float16).view(np.uint16)
    return int(pair[0]) | int(pair[1]) << 16
