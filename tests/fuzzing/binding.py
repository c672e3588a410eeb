"""Calls of the public operations from bytes: shapes, dtypes, strides, and what is no tensor at all.

Contiguous arguments and all that the CPU kernels allocate begin or end at a page that cannot be touched, so that a
kernel that leaves its arrays ends the process. Results are filled with NaN beforehand: what a kernel forgets to write
shows beside the reference's.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import famseg_kernels as fk
from famseg_kernels.backends import requesting
from tests.fuzzing.judge import expect

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
NUMBERS = (0, -1, 2, 3, 2**31, 2**62, 2**63, 1.5, math.nan, math.inf)
SCALARS = (*NUMBERS, "3", None, True, [], (0.0,), (1.0, 0.0), (0.1, math.nan))
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_empty = torch.empty


def guarded(shape: tuple[int, ...], dtype: torch.dtype, front: bool) -> Tensor:
    """A contiguous tensor that ends at a page that cannot be touched; with `front` it begins at one."""
    count = math.prod(shape)
    if not count:
        return _empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (0, pages + 1):
        if _libc.mprotect(ctypes.c_void_p(start + at * _PAGE), ctypes.c_size_t(_PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE if front else (pages + 1) * _PAGE - size
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


@contextlib.contextmanager
def _guarding(front: bool) -> Iterator[None]:
    """torch.empty and empty_like as the CPU backends call them."""
    like = torch.empty_like

    def laid_out(shape: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        if memory_format == torch.channels_last:
            n, c, h, w = shape
            found = guarded((n, h, w, c), dtype, front).permute(0, 3, 1, 2)
        else:
            found = guarded(tuple(shape), dtype, front)
        return found.fill_(math.nan) if dtype.is_floating_point else found

    def empty(*shape: Any, dtype: Any = None, memory_format: Any = torch.contiguous_format, **options: Any) -> Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if options or dtype is None:
            return _empty(*shape, dtype=dtype, memory_format=memory_format, **options)
        return laid_out(shape, dtype, memory_format)

    def empty_like(t: Tensor, *, memory_format: Any = torch.preserve_format, **options: Any) -> Tensor:
        plain = options or t.device.type != "cpu" or (memory_format == torch.preserve_format and not t.is_contiguous())
        if plain:
            return like(t, memory_format=memory_format, **options)
        return laid_out(t.shape, t.dtype, memory_format)

    torch.empty, torch.empty_like = empty, empty_like  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = _empty, like


class _Draw(random.Random):
    """Choices out of bytes, which a change of one byte changes in one place; zeros when they are used up."""

    def __init__(self, content: bytes) -> None:
        super().__init__(0)
        self._bytes = iter(content)

    def byte(self) -> int:
        return next(self._bytes, 0)

    def to(self, most: int, least: int = 0) -> int:
        return least + self.byte() % (most - least + 1)

    def one(self, options: Any) -> Any:
        return options[self.byte() % len(options)]

    def chance(self, part: int) -> bool:
        return self.byte() % part == 1


class _Maker:
    def __init__(self, draw: _Draw) -> None:
        self.draw, self.dtype, self.front = draw, draw.one(FLOATS), draw.chance(2)
        self.numbers = torch.Generator().manual_seed(draw.byte())

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers: contiguous and guarded, or with other strides."""
        dtype = self.dtype if dtype is None else dtype
        order = list(range(len(shape)))
        layout = self.draw.to(9)
        if layout == 1:
            order.reverse()
        elif layout == 2 and len(shape) == 4:
            order = [0, 2, 3, 1]  # channels last
        elif layout == 3:
            wider = guarded(tuple(2 * size + 1 for size in shape), dtype, self.front)
            return wider.copy_(self._random(wider.shape))[tuple(slice(1, None, 2) for _ in shape)]
        elif layout == 4:
            narrow = tuple(1 if self.draw.chance(2) else size for size in shape)
            return guarded(narrow, dtype, self.front).copy_(self._random(narrow)).expand(shape)
        dense = guarded(tuple(shape[i] for i in order), dtype, self.front)
        dense.copy_(self._random(dense.shape))
        return dense.permute(*(order.index(i) for i in range(len(shape)))) if shape else dense

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=self.numbers)
        if self.draw.chance(16) and values.numel():
            values.view(-1)[self.draw.byte() % values.numel()] = self.draw.one((math.nan, math.inf, -math.inf, 1e38))
        return values


def _strips(make: _Maker, draw: _Draw) -> dict[str, Any]:
    n, c, h, w = draw.to(2), draw.to(19), draw.to(40), draw.to(40)
    sizes = [(2 * draw.to(31) + 1, 2 * draw.to(31) + 1) for _ in range(draw.to(3))]
    square = draw.one((None, 1, 3, 5, 7, 63))
    return {
        "x": make(n, c, h, w),
        "square_weight": None if square is None else make(c, 1, square, square),
        "square_bias": None if square is None or draw.chance(2) else make(c),
        "row_weights": [make(c, 1, 1, k) for k, _ in sizes],
        "row_biases": None if draw.chance(2) else [make(c) for _ in sizes],
        "col_weights": [make(c, 1, k, 1) for _, k in sizes],
        "col_biases": None if draw.chance(2) else [None if draw.chance(2) else make(c) for _ in sizes],
    }


def _limits(draw: _Draw) -> Any:
    return draw.one(((0.0, math.inf), (0.0, 0.1), (0.2, 0.2), (-1.0, 3.0), (-math.inf, math.inf)))


def _scan_2d(make: _Maker, draw: _Draw) -> dict[str, Any]:
    n, h, w, k = draw.to(2), draw.to(9), draw.to(20), draw.one((1, 2, 4))
    groups = draw.to(3, 1)
    heads, p, s = groups * draw.to(3), draw.to(35), draw.to(35)
    shared = draw.one((k, k, 1))
    return {
        "x": make(n, h, w, heads, p),
        "dt": make(n, h, w, k, heads),
        "A": -make(k, heads).abs(),
        "B": make(n, h, w, shared, groups, s),
        "C": make(n, h, w, shared, groups, s),
        "D": draw.one((None, make(heads), make(k, heads))),
        "dt_bias": None if draw.chance(2) else make(k, heads),
        "dt_softplus": draw.chance(2),
        "dt_limit": _limits(draw),
        "chunk_size": draw.one((None, 1, 4, 7, 64, 2**40)),
    }


def _scan(make: _Maker, draw: _Draw) -> dict[str, Any]:
    b, length = draw.to(3), draw.to(70)
    groups = draw.to(3, 1)
    heads, p, s = groups * draw.to(3), draw.to(35), draw.to(35)
    varied = b == 1 and draw.chance(2)
    bounds = sorted([0, *(draw.to(length) for _ in range(2)), length])
    return {
        "x": make(b, length, heads, p),
        "dt": make(b, length, heads),
        "A": -make(heads).abs(),
        "B": make(b, length, groups, s),
        "C": make(b, length, groups, s),
        "chunk_size": draw.one((None, 1, 4, 7, 64, 2**40)),
        "D": draw.one((None, make(heads), make(heads, p))),
        "z": draw.one((None, make(b, length, heads, p))),
        "dt_bias": None if draw.chance(2) else make(heads),
        "initial_states": None if draw.chance(2) else make(b, heads, p, s),
        "seq_idx": make(b, length, dtype=draw.one((torch.int32, torch.int64))) if draw.chance(2) else None,
        "cu_seqlens": torch.tensor(bounds) if varied else None,
        "dt_softplus": draw.chance(2),
        "dt_limit": _limits(draw),
        "return_final_states": draw.chance(2),
        "return_varlen_states": varied,
        "state_dtype": draw.one((None, None, torch.float32, torch.float64, torch.int64)),
    }


def _reassemble(make: _Maker, draw: _Draw) -> dict[str, Any]:
    n, h, w, k, s, g = draw.to(2), draw.to(12), draw.to(12), draw.one((1, 3, 5, 7)), draw.to(3, 1), draw.to(3, 1)
    x, logits = make(n, g * draw.to(11), h, w), make(n, g * k * k * s * s, h, w)
    return {"x": x, "logits": logits, "kernel_size": k, "scale": s, "groups": g}


def _carafe(make: _Maker, draw: _Draw) -> dict[str, Any]:
    n, h, w, k, s, g = draw.to(2), draw.to(12), draw.to(12), draw.one((1, 3, 5, 7)), draw.to(3, 1), draw.to(3, 1)
    x, masks = make(n, g * draw.to(11), h, w), make(n, g * k * k, s * h, s * w)
    return {"features": x, "masks": masks, "kernel_size": k, "group_size": g, "scale_factor": s}


def _upsample(make: _Maker, draw: _Draw) -> dict[str, Any]:
    n, h, w, k, s, g = draw.to(2), draw.to(20), draw.to(20), draw.one((1, 3, 5)), draw.to(2, 1), draw.to(2, 1)
    compressed, encoder, logits = draw.to(9), draw.one((1, 3, 5)), g * k * k * s * s
    return {
        "x": make(n, g * draw.to(9), h, w),
        "compressed": make(n, compressed, h, w),
        "weight": make(logits, compressed, encoder, encoder),
        "bias": None if draw.chance(2) else make(logits),
        **{"kernel_size": k, "scale": s, "groups": g, "dilation": draw.one((1, 1, 2, 7, 30))},
    }


CALLS: tuple[tuple[Callable[..., Any], Callable[[_Maker, _Draw], dict[str, Any]]], ...] = (
    (fk.strip_conv2d, _strips),
    (fk.ssd_scan_2d, _scan_2d),
    (fk.ssd_scan, _scan),
    (fk.reassemble, _reassemble),
    (fk.carafe, _carafe),
    (fk.feature_aware_upsample, _upsample),
)


def _changed(value: Any, make: _Maker, draw: _Draw) -> Any:
    """Another value in its place."""
    if isinstance(value, (list, tuple)) and value and not draw.chance(4):
        at = draw.byte() % len(value)
        return [_changed(v, make, draw) if i == at else v for i, v in enumerate(value)]
    if not isinstance(value, Tensor):
        return make(*(draw.to(4) for _ in range(draw.to(4)))) if draw.chance(4) else draw.one(SCALARS)
    change, shape = draw.to(11), list(value.shape)
    at = draw.byte() % max(len(shape), 1)
    if change == 0:
        return value.to(draw.one((*FLOATS, *OTHERS)))
    if change == 1 and shape:
        shape[at] = max(shape[at] + draw.one((-1, 1, 2, 16)), 0)
        return make(*shape)
    if change == 2:
        return value.unsqueeze(draw.byte() % (len(shape) + 1))
    if change == 3 and shape and shape[at]:
        return value.select(at, 0)
    if change == 4 and shape:
        return value.transpose(at, draw.byte() % len(shape))
    if change == 5 and value.numel():  # places that overlap
        return value.contiguous().as_strided(shape, [draw.to(1) for _ in shape])
    if change == 6:
        return draw.one(
            (value.to("meta"), value.to_sparse() if value.numel() else None, value.numpy, [value], value.flatten())
        )
    if change == 7 and value.is_floating_point():
        return torch.complex(value.float(), value.float()).imag if draw.chance(2) else value.double().to(value.dtype)
    if change == 8 and value.is_floating_point():
        return value.detach().clone().fill_(draw.one((math.nan, math.inf, 0, -1)))
    if change == 9:
        return torch.nn.Parameter(value, requires_grad=value.is_floating_point())
    return draw.one(SCALARS)


def call(content: bytes) -> None:
    """Forward, and backward where something asks for it, as the reference gives it."""
    draw = _Draw(content)
    function, arguments = draw.one(CALLS)
    make = _Maker(draw)
    given = arguments(make, draw)
    for _ in range(draw.one((0, 0, 1, 1, 2))):
        name = draw.one(list(given))
        given[name] = _changed(given[name], make, draw)
    if draw.chance(2):
        given = {name: _learning(value, draw) for name, value in given.items()}
    with _guarding(make.front):
        found = _results(function, given)
    with requesting("reference"):
        known = _results(function, given)
    known_numbers = all(bool(t.isfinite().all()) for t in _floats(given.values()))
    for value, other in zip(found, known, strict=True):
        expect(value.shape == other.shape and value.dtype == other.dtype, f"{function.__name__}: {value.shape}")
        finite = other.isfinite() & (other.abs() < 1e30)
        if known_numbers and finite.any():  # else zeros outside an image may be read or not
            expect(not value[finite].isnan().any(), f"{function.__name__}: NaN where the reference has none")
            if value.dtype in (torch.float32, torch.float64):
                apart = (value - other)[finite].abs().max() / other[finite].abs().max().clamp(min=1)
                expect(bool(apart < 1e-2), f"{function.__name__}: off by {apart:.2g}")


def _floats(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _floats(value)
        elif isinstance(value, Tensor) and value.dtype in FLOATS and value.device.type == "cpu":
            yield value


def _learning(value: Any, draw: _Draw) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and draw.chance(2):
        return value.detach().requires_grad_()
    return value


def _results(function: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
    result = function(**given)
    outputs = [result] if isinstance(result, Tensor) else [r for r in result if isinstance(r, Tensor)]
    for output in outputs:
        expect(output.device.type in ("cpu", "meta"), f"a result on {output.device}")
    outputs = [output for output in outputs if output.device.type == "cpu"]
    leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    learning = [output for output in outputs if output.requires_grad]
    if not learning:
        return outputs
    gradients = torch.autograd.grad([o.float().sum() for o in learning], leaves, allow_unused=True)
    return [*(output.detach() for output in outputs), *(g for g in gradients if g is not None)]
