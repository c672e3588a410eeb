"""What an operation is (`Spec`) and what computes it (`Backend`)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from famseg_kernels.testing.case import Case


@dataclass(frozen=True)
class Spec:
    """The one source of truth about an operation; see `famseg_kernels/<room>/spec.py`.

    schema: the op's arguments and results in torch's schema language, without name and backend.
    check: raises ValueError/TypeError for arguments that break the contract.
    fake: result tensors (uninitialised) for given arguments: shapes, dtypes, strides.
    flops: forward FLOPs, 2 per multiply–add. moved_bytes: bytes that any implementation must move.
    cases: what the operation is tested on.
    """

    name: str
    schema: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    flops: Callable[..., int]
    moved_bytes: Callable[..., int]
    cases: tuple[Case, ...] = ()


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    forward(*arguments): the results, a tensor or a list as the schema has it.
    backward(grads, needs, *arguments): the gradients of the flattened tensor arguments where `needs`, None elsewhere.
        `grads` is one tensor where the result is one. None: there is no backward; the reference's is autograd's.
    unsupported(*arguments): None where the backend can run the call, else the reason. None: it takes what the spec
        allows.
    faster(method, *arguments): the backend that automatic choice takes instead where it can, for "forward" or
        "backward"; None where this one is faster.
    exact(*arguments): the forward of a reference whose usual one is not the definition where something is not finite.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Sequence[Tensor | None]] | None = None
    unsupported: Callable[..., str | None] | None = None
    faster: Callable[..., str | None] | None = None
    exact: Callable[..., Any] | None = None


class Later:
    """The `Backend` of this name in a module that is imported when it is first used: Triton takes a second."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    @functools.cached_property
    def _backend(self) -> Backend:
        backend: Backend = getattr(importlib.import_module(self._module), self._name)
        return backend

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._backend, attribute)


class NotFinite(Exception):
    """Raised by a kernel for results that are not all finite, and so are not those of the definition in their places.

    The call is then computed by the reference's `exact` form: the definition one token at a time, slower by far.
    """
