"""What is launched for a call, and how it is cut into programs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from famseg_kernels import backends, launch
from famseg_kernels.ssd_scan.problem import TENSORS, Problem, operations
from famseg_kernels.ssd_scan.triton.gradients import matrix_gradients, pair_gradients, step_gradients
from famseg_kernels.ssd_scan.triton.image import mix_image
from famseg_kernels.ssd_scan.triton.mix import mix_axis, mix_direction
from famseg_kernels.ssd_scan.triton.states import chunk_states
from famseg_kernels.ssd_scan.triton.steps import Rows, Sizes, Steps, Sums, running_sums


class Configuration(NamedTuple):
    """How bf16 is cut. What runs in TF32 takes at most 32 of everything."""

    chunk: int  # tokens of a chunk, at most
    tile: int  # of headdim and state that a program takes at once, at most; for states the larger of both
    # The same in backward: nothing but inputs is kept for it, so its chunks may be others.
    backward_chunk: int
    backward_tile: int
    image: int  # pixels, at most, of a bf16 image whose four directions are one matrix
    num_stages: int


# By compute capability × 10; 0 stands for every other chip and for the interpreter. These are the largest that sm_80
# and sm_90 hold in registers: a tile of 64 × 64 takes 32 of 255 with 4 warps. With chunks of 64 the gradients of B, C
# and steps spill 300 to 1300 bytes a thread.
CONFIGURATIONS = {
    80: Configuration(chunk=64, tile=64, backward_chunk=32, backward_tile=64, image=600, num_stages=2),
    90: Configuration(chunk=64, tile=64, backward_chunk=32, backward_tile=64, image=600, num_stages=2),
    0: Configuration(chunk=64, tile=64, backward_chunk=32, backward_tile=64, image=600, num_stages=2),
}
_WARPS = 4
# Channels of the heads that share a program's G in `mix_direction` and `mix_axis`: narrow heads go together.
_WIDTH = 64


class _Plan:
    """A problem cut into programs, for forward or backward; not an empty one.

    Tensors like x are (batch, tokens, heads · headdim) here, states (direction, batch, chunk, head, headdim, state).
    """

    def __init__(self, problem: Problem, *, backward: bool = False) -> None:
        x, self.softplus = problem.x, problem.dt_softplus
        batch, height, width, self.heads, self.headdim, self.groups, self.state, self.directions, self.matrices = (
            problem.sizes
        )
        self.batches, self.tokens = batch, height * width
        self.x, self.dt, self.B, self.C = (self.rows(t) for t in (x, problem.dt, problem.B, problem.C))
        bias = _contiguous(problem.dt_bias)
        self.steps = Steps(_strided(self.dt), problem.A.contiguous(), bias, problem.dt_min, problem.dt_max)
        self.resets = None if problem.resets is None else problem.resets.int()
        self.skip = _contiguous(problem.skip(torch.float32))
        tuned = CONFIGURATIONS.get(launch.capability(x.device), CONFIGURATIONS[0])
        longest, tile = (tuned.backward_chunk, tuned.backward_tile) if backward else (tuned.chunk, tuned.tile)
        limit = 64 if x.dtype == torch.bfloat16 else 32
        # Of fp16, as TF32, `matrix_gradients` takes all of 64 channels at once: unrolled by the compiler, a loop over
        # 16 or 32 of them keeps too much in registers (88 and 296 bytes of stack a thread, and none of 64).
        self.tile = min(64 if backward and x.dtype == torch.float16 else limit, tile)
        self.state_tile = min(limit, max(tuned.tile, tuned.backward_tile))
        self.config = launch.Config(_WARPS, tuned.num_stages)
        # In fp32, with two stages `pair_gradients` and `mix_direction` keep 80 bytes on the stack by Triton 3.9. With
        # three it is at most 56, as by 3.6.
        self.deep_config = self.config._replace(num_stages=3) if x.dtype == torch.float32 else self.config
        longest = min(limit, longest, _power_of_two(problem.chunk_size or longest))
        self.chunk = max(16, min(longest, _power_of_two(self.tokens)))
        self.chunks = -(-self.tokens // self.chunk)
        self.sizes = Sizes(batch, height, width, self.chunks, self.heads, self.groups)
        # Not of narrow heads, which share G in `mix_axis`, nor without bf16: M would be made for every 32 channels
        # again.
        suits = x.dtype == torch.bfloat16 and self.directions == 4 and self.headdim >= 32
        # What is multiplied in bf16 is stored so; fp16 has not the range.
        self.states_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        self.one_matrix = suits and self.tokens <= tuned.image

    def constants(self, tile: int) -> dict[str, Any]:
        """What the kernels that take tiles know at compile time."""
        # fp16 products run as TF32: as many digits, but steps and states may be beyond fp16's range. Triton's
        # interpreter has no product of bf16.
        narrow = self.x.dtype == torch.bfloat16 and not backends.TRITON_INTERPRETS
        return {
            "P": self.headdim,
            "N": self.state,
            "CHUNK": self.chunk,
            "BLOCK_P": max(16, min(tile, _power_of_two(self.headdim))),
            "BLOCK_N": max(16, min(tile, _power_of_two(self.state))),
            "DOT": tl.bfloat16 if narrow else tl.float32,
            "PRECISION": "tf32x3" if self.x.dtype == torch.float32 else "tf32",
        }

    def rows(self, t: Tensor) -> Tensor:
        """(batch, tokens, features); a copy only where tokens are not one stride apart or features have gaps."""
        t = t.reshape(self.batches, self.tokens, -1)
        return t if t.stride(2) == 1 else t.contiguous()

    @functools.cached_property
    def sums(self) -> Sums:
        return self.running_sums(self.chunk, self.chunks, by_pixel=False)

    def running_sums(self, chunk: int, chunks: int, *, by_pixel: bool) -> Sums:
        sums = Sums(*(self.fp32(self.directions, self.batches, self.heads, chunks, chunk) for _ in Sums._fields))
        launch.run(
            running_sums,
            (self.directions * self.batches * chunks * self.heads,),
            launch.Config(num_warps=max(1, min(_WARPS, chunk // 64))),
            steps=self.steps,
            **sums._asdict(),
            sizes=self.sizes._replace(chunks=chunks),
            SOFTPLUS=self.softplus,
            BY_PIXEL=by_pixel,
            CHUNK=chunk,
        )
        return sums

    def states(
        self, u: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None, *, gradient: bool
    ) -> Tensor | None:
        """The states that enter each chunk, from X and B, or the gradients of those that leave it, from dY and C.

        first, last: the state of the sequence at its begin and at its end, last is written.
        """
        shape = (self.directions, self.batches, self.chunks, self.heads, self.headdim, self.state)
        states = u.new_empty(shape, dtype=self.states_dtype)
        constants = self.constants(self.state_tile)
        blocks = -(-self.headdim // constants["BLOCK_P"]) * -(-self.state // constants["BLOCK_N"])
        launch.run(
            chunk_states,
            (self.directions * self.batches * self.heads * blocks,),
            self.config,
            u=_strided(u),
            v=_strided(v),
            sums=self.sums,
            resets=self.resets,
            states=states,
            first=first,
            last=last,
            sizes=self.sizes,
            # No array of NumPy, as which the interpreter takes a number, bounds a range.
            chunks=tl.constexpr(self.chunks) if backends.TRITON_INTERPRETS else self.chunks,
            directions=self.directions,
            matrices=self.matrices,
            GRADIENT=gradient,
            **constants,
        )
        return states

    def entering(self, initial: Tensor | None, *others: Tensor | None, last: Tensor | None = None) -> Tensor | None:
        """The states that enter each chunk, or None where nothing enters or leaves the only one."""
        if self.chunks == 1 and all(t is None for t in (initial, last, *others)):
            return None
        return self.states(self.x, self.B, initial, last, gradient=False)

    def mix(
        self,
        u: Tensor,
        states: Tensor | None,
        *,
        transposed: bool = False,
        gate: Tensor | None = None,
        y_gradient: Tensor | None = None,
        gate_gradient: Tensor | None = None,
    ) -> Tensor:
        """y from X and states, or (transposed) the gradient of x from dY and the states' gradients.

        Of one direction also with a gate: see `mix_direction`.
        """
        left, right = (self.B, self.C) if transposed else (self.C, self.B)
        if self.one_matrix:
            return self.mix_image(u, left, right, transposed)
        heads = _divisor(self.heads // self.groups, max(1, _WIDTH // self.headdim))
        grid = (self.batches * self.chunks * (self.heads // heads),)
        common = {
            "u": _strided(u),
            "left": _strided(left),
            "right": _strided(right),
            "sums": self.sums,
            "states": states,
            "sizes": self.sizes,
            "TRANSPOSED": transposed,
            "HEADS": heads,
            **self.constants(self.tile),
        }
        if self.directions == 1:
            y = self.like_x(self.x.dtype)
            gates = {"gate": gate, "y_gradient": y_gradient, "gate_gradient": gate_gradient}
            launch.run(
                mix_direction, grid, self.deep_config, resets=self.resets, skip=self.skip, **gates, y=y, **common
            )
            return y
        part, shared = None, self.matrices == 1
        if self.x.dtype == torch.float32:
            # Three TF32 products keep two parts of every factor: of 32 channels they would not fit into registers.
            common["BLOCK_P"] = 16
            if self.state % self.tile:  # nor, by Triton 3.9, what masks a last block
                common["BLOCK_N"] = 16
        for axis in range(self.directions // 2):
            # What the second axis adds to is kept in fp32.
            y = self.like_x(torch.float32 if self.directions == 4 and axis == 0 else self.x.dtype)
            skip = self.skip if axis == 0 else None
            launch.run(mix_axis, grid, self.config, skip=skip, part=part, y=y, AXIS=axis, SHARED=shared, **common)
            part = y
        return y

    def mix_image(self, u: Tensor, left: Tensor, right: Tensor, transposed: bool) -> Tensor:
        whole = _power_of_two(self.tokens)
        # Of 64 pixels a program's tiles would not fit into registers.
        constants = self.constants(self.state_tile) | {"CHUNK": min(self.chunk, 32)}
        tiles = -(-self.tokens // constants["CHUNK"])
        blocks = -(-self.headdim // constants["BLOCK_P"])
        y = self.like_x(self.x.dtype)
        launch.run(
            mix_image,
            (self.batches * tiles * self.heads * blocks,),
            self.config,
            u=_strided(u),
            left=_strided(left),
            right=_strided(right),
            sums=self.running_sums(whole, 1, by_pixel=True),
            skip=self.skip,
            y=y,
            sizes=self.sizes._replace(chunks=1),
            TRANSPOSED=transposed,
            SHARED=self.matrices == 1,
            TILES=tiles,
            TOKENS=whole,
            **constants,
        )
        return y

    def gradients(
        self,
        dy: Tensor,
        states: Tensor | None,
        needs: Sequence[bool],
        of_final: Tensor | None = None,
        of_initial: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Gradients of x, dt, A, B, C, D (heads, headdim) and dt_bias, by their elements, where `needs`.

        of_final: the gradient of the final states; of_initial, of the initial ones, is written.
        """
        state_gradients = None
        if states is not None:
            state_gradients = self.states(dy, self.C, of_final, of_initial, gradient=True)
        of_x = self.mix(dy, state_gradients, transposed=True) if needs[0] else None
        if not any(needs[1:]):
            return [of_x, *itertools.repeat(None, 6)]
        of_B, of_C, of_step, of_log, of_D = self.matrix_gradients(dy, states, state_gradients)
        of_dt, of_A, of_bias = self.step_gradients(of_step, of_log)
        found = [of_x, of_dt, of_A, of_B, of_C, of_D, of_bias]
        return [g if need else None for g, need in zip(found, needs, strict=True)]

    def matrix_gradients(
        self, dy: Tensor, states: Tensor | None, state_gradients: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of B and C, of steps and their log-decays (parts, batch, tokens, columns), of D."""
        constants = self.constants(self.tile)
        # Three TF32 products keep two parts of every factor: of 32 columns they would not fit into registers.
        width = 16 if self.x.dtype == torch.float32 else constants["BLOCK_N"]
        parts = -(-self.state // width)
        programs = self.directions * self.batches * self.chunks * self.groups
        in_group = self.heads // self.groups
        # The heads of a group add to one gradient of B and C. Where there are too few programs for a GPU they are
        # split, and the shares added: fp32 and up to 8 times B and C, but of a problem that is small. Likewise each
        # direction has its share where all read the same B and C.
        splits = next(
            (s for s in range(1, 9) if in_group % s == 0 and programs * parts * s >= 256), _divisor(in_group, 8)
        )
        alone = splits == 1 and self.matrices == self.directions
        shape = (splits, self.batches, self.tokens, self.directions, self.groups, self.state)
        of_B, of_C = (self.x.new_empty(shape, dtype=self.x.dtype if alone else torch.float32) for _ in "BC")
        columns = self.directions * self.heads
        of_step, of_log = (self.fp32(1 + parts, self.batches, self.tokens, columns) for _ in range(2))
        of_skip = None if self.skip is None else self.fp32(self.batches * self.chunks, self.heads, self.headdim)
        of_gram = self.x.new_empty((programs * splits, self.chunk, self.chunk), dtype=self.states_dtype)
        common = {
            "x": _strided(self.x),
            "dy": _strided(dy),
            "B": _strided(self.B),
            "C": _strided(self.C),
            "sums": self.sums,
            "resets": self.resets,
            "of_gram": of_gram,
            "of_step": of_step,
            "of_log": of_log,
            "sizes": self.sizes,
            "splits": splits,
            "directions": self.directions,
            "matrices": self.matrices,
            "HEADS": in_group // splits,
            **constants,
        }
        launch.run(pair_gradients, (programs * splits,), self.deep_config, of_skip=of_skip, **common)
        launch.run(
            matrix_gradients,
            (programs * splits, parts),
            self.config,
            states=states,
            state_gradients=state_gradients,
            of_B=of_B,
            of_C=of_C,
            **(common | {"BLOCK_N": width}),
        )
        if not alone:
            shares = (0, 3) if self.matrices == 1 else (0,)
            of_B, of_C = of_B.sum(shares), of_C.sum(shares)
        return of_B, of_C, of_step, of_log, None if of_skip is None else of_skip.sum(0)

    def step_gradients(self, of_step: Tensor, of_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of dt, A and dt_bias."""
        parts, *_, columns = of_step.shape
        rows, row_block, column_block = self.batches * self.tokens, 64, min(32, _power_of_two(columns))
        row_blocks = -(-rows // row_block)
        of_dt = self.dt.new_empty((self.batches, self.tokens, columns))
        of_A, of_bias = (self.fp32(row_blocks, columns) for _ in range(2))
        launch.run(
            step_gradients,
            (row_blocks * -(-columns // column_block),),
            launch.Config(_WARPS),
            steps=self.steps,
            resets=self.resets,
            of_step=of_step,
            of_log=of_log,
            of_dt=of_dt,
            of_A=of_A,
            of_bias=of_bias,
            rows=rows,
            tokens=self.tokens,
            columns=columns,
            SOFTPLUS=self.softplus,
            PARTS=parts,
            ROWS=row_block,
            COLUMNS=column_block,
        )
        return of_dt, of_A.sum(0), of_bias.sum(0)

    def fp32(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def like_x(self, dtype: torch.dtype) -> Tensor:
        return self.x.new_empty((self.batches, self.tokens, self.heads * self.headdim), dtype=dtype)


def _power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def _divisor(of: int, limit: int) -> int:
    """The largest divisor up to the limit."""
    return max(d for d in range(1, limit + 1) if of % d == 0)


def _strided(t: Tensor) -> Rows:
    """A tensor (batch, tokens, features) as the kernels take it."""
    return Rows(t, t.stride(0), t.stride(1))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# --- the backend --------------------------------------------------------------------------------------------


def _unsupported(x: Tensor, *_: Any) -> str | None:
    return "there is no kernel for float64" if x.dtype == torch.float64 else None


def _forward(problem: Problem, wants_states: bool) -> list[Tensor]:
    x = problem.x
    final = _room_for_states(problem) if wants_states else None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        with launch.on(x.device):
            plan = _Plan(problem)
            states = None
            if not plan.one_matrix:
                states = plan.entering(_contiguous(problem.initial_states), last=final)
            y = plan.mix(plan.x, states, gate=_contiguous(problem.z)).view(x.shape)
    return [y] if final is None else [y, final]


def _final_states(problem: Problem) -> Tensor:
    final = _room_for_states(problem)
    if problem.x.numel():
        with launch.on(problem.x.device):
            _Plan(problem).entering(_contiguous(problem.initial_states), last=final)
    return final


def _room_for_states(problem: Problem) -> Tensor:
    """For the final ones, filled as they are where there is no token: with the initial ones."""
    initial = problem.initial_states
    states = problem.x.new_zeros(problem.sizes.states, dtype=torch.float32)
    return states if initial is None else states.copy_(initial)


def _backward(
    problem: Problem, dy: Tensor | None, of_final: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    x, z, initial = problem.x, problem.z, problem.initial_states
    of_final = _contiguous(of_final)
    like = (*problem[:5], problem.skip(), *problem[6:TENSORS])
    found: list[Tensor | None]
    if x.numel():
        of_z = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
        of_initial = None if initial is None else x.new_empty(initial.shape, dtype=torch.float32)
        with launch.on(x.device):
            plan = _Plan(problem, backward=True)
            states = plan.entering(_contiguous(initial), of_final)
            dy = torch.zeros_like(x) if dy is None else dy
            if z is not None:
                dy = plan.mix(plan.x, states, gate=z.contiguous(), y_gradient=dy.contiguous(), gate_gradient=of_z)
            *found, of_bias = plan.gradients(plan.rows(dy), states, [*needs[:6], needs[7]], of_final, of_initial)
        found += [of_z, of_bias, of_initial]
    else:
        found = [None if t is None else torch.zeros_like(t) for t in like]
        if initial is not None and of_final is not None:
            found[8] = of_final.clone()
    return [
        g.reshape(t.shape) if need and g is not None and t is not None else None
        for g, t, need in zip(found, like, needs, strict=True)
    ]


scan, scan_2d = operations(_forward, _final_states, _backward, _unsupported)
