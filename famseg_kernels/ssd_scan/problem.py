"""One scan as every kernel takes it, and the calls of ssd_scan and ssd_scan_2d put into its terms.

To a kernel a sequence is an image of one column, scanned in one direction. What only sequences have is done here, once
for all backends: where sequences of a row start anew, and the states of packed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from famseg_kernels.spec import Backend
from famseg_kernels.ssd_scan import spec

TENSORS: Final = 9  # of a problem that have a gradient: its first fields


class Sizes(NamedTuple):
    """A problem in numbers."""

    batch: int
    height: int
    width: int
    heads: int
    headdim: int
    groups: int
    d_state: int
    directions: int
    matrices: int  # B and C of each direction, or 1: all read the same

    @property
    def states(self) -> tuple[int, ...]:
        """The shape of initial and final states."""
        return self.batch, self.heads, self.headdim, self.d_state


class Problem(NamedTuple):
    """A scan of images in 1, 2 or 4 directions. Tensors have the shapes that the operation was given.

    The shapes below are an image's; a sequence has no W and no directions.
    """

    x: Tensor  # (N, H, W, heads, headdim)
    dt: Tensor  # (N, H, W, directions, heads)
    A: Tensor  # (directions, heads)
    B: Tensor  # (N, H, W, directions or 1, groups, state)
    C: Tensor
    D: Tensor | None  # (heads,), (directions, heads), or of a sequence (heads, headdim)
    z: Tensor | None  # like x
    dt_bias: Tensor | None  # (directions, heads)
    initial_states: Tensor | None  # (N, heads, headdim, state)
    resets: Tensor | None  # (N, H), bool: the tokens that find a state of zero
    chunk_size: int | None
    dt_softplus: bool
    dt_min: float
    dt_max: float

    @property
    def is_image(self) -> bool:
        return self.x.dim() == 5

    @property
    def sizes(self) -> Sizes:
        # Unpacked at once: a slice of a shape costs most of a microsecond.
        if self.is_image:
            batch, height, width, heads, headdim = self.x.shape
            *_, matrices, groups, state = self.B.shape
            return Sizes(batch, height, width, heads, headdim, groups, state, self.dt.shape[3], matrices)
        batch, length, heads, headdim = self.x.shape
        *_, groups, state = self.B.shape
        return Sizes(batch, length, 1, heads, headdim, groups, state, 1, 1)

    def skip(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """D as (heads, headdim). That of several directions is applied once: their sum, in `dtype` (None: D's own)."""
        D = self.D
        if D is not None and self.is_image and D.dim() == 2:
            D = D.sum(0, dtype=dtype)
        return D.unsqueeze(1).expand(-1, self.x.shape[-1]) if D is not None and D.dim() == 1 else D

    def gradient_of_D(self, of_skip: Tensor | None) -> Tensor | None:
        """In D's shape, from that of `skip`."""
        if of_skip is None or self.D is None or (self.D.dim() == 2 and not self.is_image):
            return of_skip
        return of_skip.sum(1).expand(self.D.shape)


def operations(
    forward: Callable[[Problem, bool], list[Tensor]],
    final_states: Callable[[Problem], Tensor],
    backward: Callable[[Problem, Tensor | None, Tensor | None, Sequence[bool]], list[Tensor | None]],
    unsupported: Callable[..., str | None] | None = None,
) -> tuple[Backend, Backend]:
    """A backend's `ssd_scan` and `ssd_scan_2d`, from functions of a problem.

    forward: [y], with True [y, final states]. final_states: these alone. backward: from the gradients of y and of the
    final states (None: zero) those of a problem's tensors where they are needed, None elsewhere; D's in the shape of
    `Problem.skip`. Results are the caller's to write to.
    """

    def scan(*arguments: Any) -> list[Tensor]:
        call = spec.ScanArguments(*arguments)
        results = forward(_sequence(call), call.return_final_states)
        if call.return_varlen_states:
            results.append(torch.cat([final_states(part) for _, part in _packed(call)]))
        return results

    def scan_gradients(grads: Sequence[Tensor], needs: Sequence[bool], *arguments: Any) -> list[Tensor | None]:
        call = spec.ScanArguments(*arguments)
        problem = _sequence(call)
        found = backward(problem, grads[0], grads[1] if call.return_final_states else None, needs[:TENSORS])
        found[5] = problem.gradient_of_D(found[5])
        for index, (tokens, part) in enumerate(_packed(call) if call.return_varlen_states else ()):
            wanted = [need and t is not None for need, t in zip(needs, part[:TENSORS], strict=False)]
            shares = backward(part, None, grads[-1][index : index + 1], wanted)
            # A, dt_bias and the initial states are whole in every part; the others are a stretch of tokens.
            for place, share in enumerate(shares):
                whole = found[place]
                if share is not None and whole is not None:
                    (whole[:, tokens] if place in (0, 1, 3, 4) else whole).add_(share)
        return [*found, None, None]

    def scan_2d(*arguments: Any) -> Tensor:
        return forward(_image(*arguments), False)[0]

    def scan_2d_gradients(grad: Tensor, needs: Sequence[bool], *arguments: Any) -> list[Tensor | None]:
        problem = _image(*arguments)
        found = backward(problem, grad, None, [*needs[:6], False, needs[6], False])
        return [*found[:5], problem.gradient_of_D(found[5]), found[7]]

    return Backend(scan, scan_gradients, unsupported), Backend(scan_2d, scan_2d_gradients, unsupported)


def _sequence(call: spec.ScanArguments) -> Problem:
    return Problem(*call[:TENSORS], spec.resets(call.seq_idx), *spec.options_of(call))


def _packed(call: spec.ScanArguments) -> Iterator[tuple[slice, Problem]]:
    """The tokens of each packed sequence, and the scan that ends in its state."""
    for tokens, first in spec.packed(call.cu_seqlens, call.initial_states, call.x.shape[1]):
        yield (
            tokens,
            _sequence(
                call._replace(
                    x=call.x[:, tokens],
                    dt=call.dt[:, tokens],
                    B=call.B[:, tokens],
                    C=call.C[:, tokens],
                    D=None,
                    z=None,
                    initial_states=first,
                    seq_idx=None,
                )
            ),
        )


def _image(*arguments: Any) -> Problem:
    call = spec.Scan2dArguments(*arguments)
    return Problem(*call[:6], None, call.dt_bias, None, None, *spec.options_of(call))
