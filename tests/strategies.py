"""Calls of the operations as hypothesis draws them for tests/test_properties.py. The repr of a Call makes it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

import famseg_kernels as fk
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation
from tests.native import DTYPES

OPERATIONS = {operation.spec.name: operation for operation in fk.OPERATIONS}
LONGEST = 67  # of an image's side and of a sequence: a prime, above the vectors and the usual chunks
Rand = Callable[..., Tensor]
Draw = Callable[[st.SearchStrategy], Any]


# --- the arguments of each operation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strips:
    name: ClassVar[str] = "strip_conv2d"
    parameters: ClassVar[tuple[int, ...]] = ()  # the places of what may be fp32 beside any x
    batched: ClassVar[tuple[int, ...]] = (0,)  # the places of what has one slice an image or sequence
    shape: tuple[int, int, int, int]
    square: int | None
    strips: tuple[tuple[int, int], ...]
    square_bias: bool = False
    row_biases: bool = False
    col_biases: bool = False

    def make(self, rand: Rand) -> tuple[Any, ...]:
        c, square = self.shape[1], self.square
        return (
            rand(*self.shape),
            None if square is None else rand(c, 1, square, square) / square,
            rand(c) if self.square_bias else None,
            [rand(c, 1, 1, k) / k**0.5 for k, _ in self.strips],
            [rand(c) for _ in self.strips if self.row_biases],
            [rand(c, 1, k, 1) / k**0.5 for _, k in self.strips],
            [rand(c) for _ in self.strips if self.col_biases],
        )


@dataclass(frozen=True)
class Image:
    name: ClassVar[str] = "ssd_scan_2d"
    parameters: ClassVar[tuple[int, ...]] = (1, 2, 5, 6)
    batched: ClassVar[tuple[int, ...]] = (0, 1, 3, 4)
    shape: tuple[int, int, int, int, int]
    state: int
    groups: int
    directions: int
    shared: bool
    skip: str | None  # D of "heads" or of "directions"
    dt_bias: bool
    chunk_size: int | None
    softplus: bool
    dt_limit: tuple[float, float]

    def make(self, rand: Rand) -> tuple[Any, ...]:
        *pixels, heads, _ = self.shape
        k = self.directions
        matrix = (*pixels, 1 if self.shared else k, self.groups, self.state)
        return (
            rand(*self.shape),
            rand(*pixels, k, heads) if self.softplus else rand(*pixels, k, heads).abs() * 0.3,
            -rand(k, heads).abs() - 0.2,
            rand(*matrix),
            rand(*matrix),
            None if self.skip is None else rand(heads) if self.skip == "heads" else rand(k, heads),
            rand(k, heads) if self.dt_bias else None,
            self.chunk_size,
            self.softplus,
            *self.dt_limit,
        )


@dataclass(frozen=True)
class Tokens:
    name: ClassVar[str] = "ssd_scan"
    parameters: ClassVar[tuple[int, ...]] = (1, 2, 5, 7, 8)
    batched: ClassVar[tuple[int, ...]] = (0, 1, 3, 4, 6, 8, 9)
    shape: tuple[int, int, int, int]
    state: int
    groups: int
    skip: str | None = None  # D of "heads" or of "channels"
    z: bool = False
    dt_bias: bool = False
    initial: bool = False
    sequences: torch.dtype | None = None  # of seq_idx
    bounds: tuple[int, ...] | None = None
    chunk_size: int | None = None
    softplus: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    final: bool = True

    def make(self, rand: Rand) -> tuple[Any, ...]:
        b, length, heads, headdim = self.shape
        matrix = (b, length, self.groups, self.state)
        arguments = (
            rand(*self.shape),
            rand(b, length, heads) if self.softplus else rand(b, length, heads).abs() * 0.3,
            -rand(heads).abs() - 0.2,
            rand(*matrix),
            rand(*matrix),
            None if self.skip is None else rand(heads) if self.skip == "heads" else rand(heads, headdim),
            rand(*self.shape) if self.z else None,
            rand(heads) if self.dt_bias else None,
            rand(b, heads, headdim, self.state) if self.initial else None,
        )
        # Stretches of any length, ids that come back, and padding below 0.
        ids = ((rand(b, length) > 1).cumsum(1) + (rand(b, 1) > 0) + 1) % 4 - 1
        return (
            *arguments,
            None if self.sequences is None else ids.to(self.sequences),
            None if self.bounds is None else torch.tensor(self.bounds),
            self.chunk_size,
            self.softplus,
            *self.dt_limit,
            self.final,
            self.bounds is not None,
        )


@dataclass(frozen=True)
class Reassembly:
    parameters: ClassVar[tuple[int, ...]] = ()
    batched: ClassVar[tuple[int, ...]] = (0, 1)
    name: str  # reassemble or carafe
    shape: tuple[int, int, int, int]
    k: int
    s: int
    g: int

    def make(self, rand: Rand) -> tuple[Any, ...]:
        (n, _, h, w), k, s, g = self.shape, self.k, self.s, self.g
        if self.name == "reassemble":
            return rand(*self.shape), 2 * rand(n, g * k * k * s * s, h, w), k, s, g
        return rand(*self.shape), rand(n, g, k * k, s * h, s * w).softmax(2).flatten(1, 2), k, g, s


@dataclass(frozen=True)
class Upsample:
    name: ClassVar[str] = "feature_aware_upsample"
    parameters: ClassVar[tuple[int, ...]] = ()
    batched: ClassVar[tuple[int, ...]] = (0, 1)
    shape: tuple[int, int, int, int]
    k: int
    s: int
    g: int
    compressed: int
    encoder: int
    dilation: int
    bias: bool

    def make(self, rand: Rand) -> tuple[Any, ...]:
        (n, _, h, w), k, s, g = self.shape, self.k, self.s, self.g
        logits = g * k * k * s * s
        weight = rand(logits, self.compressed, self.encoder, self.encoder)
        return (
            rand(*self.shape),
            2 * rand(n, self.compressed, h, w),
            weight / max(self.compressed**0.5 * self.encoder, 1),
            rand(logits) if self.bias else None,
            *(k, s, g, self.dilation),
        )


Form = Strips | Image | Tokens | Reassembly | Upsample


@dataclass(frozen=True)
class Call:
    """`fp32`: the places, of the flattened tensor arguments, of what is fp32 whatever x is."""

    form: Form
    dtype: torch.dtype = torch.float64
    seed: int = 0
    fp32: tuple[int, ...] = ()

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.form.name]

    def arguments(self) -> list[Any]:
        args = Case("", self.form.make, self.fp32, seed=self.seed).arguments(self.dtype)
        flat = self.operation.flatten(args)
        mixed = [t.float() if i in self.fp32 and t is not None else t for i, t in enumerate(flat)]
        return self.operation.replace(args, mixed)

    def random(self) -> torch.Generator:
        """For more numbers than the arguments."""
        return torch.Generator().manual_seed(self.seed + 1)


# --- strategies -----------------------------------------------------------------------------------------------------


def size(draw: Draw, most: int, empty: bool = True) -> int:
    """From 1 to `most`, and now and then 0."""
    return draw(st.integers(1, max(most, 1))) if not empty or draw(st.integers(0, 39)) else 0


def sides(draw: Draw, pixels: int, empty: bool = True) -> tuple[int, int]:
    """Height and width with at most `pixels` in all: as often 1 x 67 as square."""
    a = size(draw, min(LONGEST, pixels), empty)
    b = size(draw, min(LONGEST, pixels // max(a, 1)), empty)
    return (a, b) if draw(st.booleans()) else (b, a)


def odd(most: int) -> st.SearchStrategy[int]:
    return st.integers(0, most // 2).map(lambda i: 2 * i + 1)


ANY_DTYPE = st.sampled_from(DTYPES)
CHUNKS = st.none() | st.integers(1, 80) | st.just(10**12)
LIMITS = st.sampled_from([(0.0, math.inf), (0.0, math.inf), (0.1, 1.0), (0.4, 0.4), (-0.05, 0.5), (0.0, 1e-3)])


@st.composite
def strips(draw: Draw, empty: bool = True, biases: bool = True) -> Strips:
    h, w = sides(draw, 300, empty)
    n = size(draw, 3, empty)
    c = size(draw, min(1200 // max(n * h * w, 1), 35), empty)
    kernel = odd(11) | odd(63)
    square = draw(st.none() | (odd(63) if c * h * w < 200 else odd(11)))
    branches = draw(st.lists(st.tuples(kernel, kernel), max_size=3))
    given = [biases and draw(st.booleans()) for _ in range(3)]
    return Strips((n, c, h, w), square, tuple(branches), given[0] and square is not None, *given[1:])


def heads_and_sizes(draw: Draw, tokens: int, empty: bool) -> tuple[int, int, int, int]:
    """heads, headdim, state and groups."""
    groups = draw(st.integers(1, 3))
    heads = groups * size(draw, 3, empty)
    most = min(max(2400 // max(tokens * heads, 1), 2), 40)
    return heads, size(draw, most, empty), size(draw, most, empty), groups


@st.composite
def images(draw: Draw, empty: bool = True, pixels: int = 100, directions: Sequence[int] = (1, 2, 4)) -> Image:
    h, w = sides(draw, pixels, empty)
    n = size(draw, 2, empty)
    k = draw(st.sampled_from(directions))
    heads, headdim, state, groups = heads_and_sizes(draw, n * h * w * k, empty)
    skip = draw(st.sampled_from([None, "heads", "directions"]))
    shared, bias, softplus = (draw(st.booleans()) for _ in range(3))
    options = draw(CHUNKS), softplus, draw(LIMITS)
    return Image((n, h, w, heads, headdim), state, groups, k, shared, skip, bias, *options)


@st.composite
def tokens(draw: Draw, empty: bool = True, longest: int = LONGEST, plain: bool = False, batch: int = 3) -> Tokens:
    """`plain`: without states and sequences, but for final states."""
    length = size(draw, longest, empty)
    b = size(draw, batch, empty)
    heads, headdim, state, groups = heads_and_sizes(draw, b * length, empty)
    skip = draw(st.sampled_from([None, "heads", "channels"]))
    z, bias, softplus, final = (draw(st.booleans()) for _ in range(4))
    initial, sequences, bounds = False, None, None
    if not plain:
        initial = draw(st.booleans())
        sequences = draw(st.sampled_from([None, torch.int32, torch.int64]))
        if b == 1 and draw(st.booleans()):
            bounds = tuple(sorted(draw(st.lists(st.integers(0, length), min_size=2, max_size=5))))
    states = initial, sequences, bounds
    return Tokens(
        (b, length, heads, headdim), state, groups, skip, z, bias, *states, draw(CHUNKS), softplus, draw(LIMITS), final
    )


def windows(draw: Draw, empty: bool) -> tuple[tuple[int, int, int, int], int, int, int]:
    """x's shape, kernel size, scale and groups."""
    k, s = draw(odd(7)), draw(st.integers(1, 4))
    h, w = sides(draw, min(max(4000 // (k * s) ** 2, 1), 200), empty)
    n, g = size(draw, 3, empty), draw(st.integers(1, 3))
    return (n, g * size(draw, min(max(1200 // max(n * h * w * s * s, 1), 1), 20), empty), h, w), k, s, g


@st.composite
def reassemblies(draw: Draw, name: str, empty: bool = True) -> Reassembly:
    return Reassembly(name, *windows(draw, empty))


@st.composite
def upsamples(draw: Draw, empty: bool = True) -> Upsample:
    shape, k, s, g = windows(draw, empty)
    encoder = draw(odd(5)), draw(st.integers(1, 4) | st.just(LONGEST + 1))
    return Upsample(shape, k, s, g, size(draw, 20, empty), *encoder, draw(st.booleans()))


@st.composite
def with_an_interior(draw: Draw) -> Reassembly | Upsample:
    """Larger than the window."""
    k, s, g = draw(odd(5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    h, w = (k // 2 * 2 + side for side in sides(draw, 20, False))
    shape = size(draw, 2, False), g * size(draw, 4, False), h, w
    if draw(st.booleans()):
        return Reassembly("reassemble", shape, k, s, g)
    return Upsample(shape, k, s, g, size(draw, 5), draw(odd(3)), draw(st.integers(1, 2)), draw(st.booleans()))


FORMS: dict[str, Callable[..., st.SearchStrategy]] = {
    "strip_conv2d": strips,
    "ssd_scan_2d": images,
    "ssd_scan": tokens,
    "reassemble": lambda **options: reassemblies("reassemble", **options),
    "carafe": lambda **options: reassemblies("carafe", **options),
    "feature_aware_upsample": upsamples,
}


@st.composite
def calls(draw: Draw, forms: st.SearchStrategy, dtypes: st.SearchStrategy = ANY_DTYPE) -> Call:
    form, dtype = draw(forms), draw(dtypes)
    fp32 = tuple(place for place in form.parameters if draw(st.booleans())) if draw(st.booleans()) else ()
    return Call(form, dtype, draw(st.integers(0, 2**31)), fp32)


def exact(forms: st.SearchStrategy) -> st.SearchStrategy[Call]:
    """Calls in fp64 throughout, where two ways to the same numbers agree to many digits."""
    return st.builds(Call, forms, st.just(torch.float64), st.integers(0, 2**31))
