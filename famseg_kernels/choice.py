"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from famseg_kernels import backends
from famseg_kernels.spec import Backend, Later

log = logging.getLogger("famseg_kernels")

# What the tensors of a backend lie on; the reference takes any.
DEVICE = {"cuda": "cuda", "triton": "cpu" if backends.TRITON_INTERPRETS else "cuda", "cpu": "cpu"}


class Choice:
    """The backends of the operation `name`, of which one runs a call."""

    def __init__(self, name: str, implementations: dict[str, Backend | Later]) -> None:
        self.name = name
        self.implementations = implementations

    def refusal(self, backend: str, args: Sequence[Any], method: str) -> str | None:
        """None if `backend` can run `method` ("forward" or "backward") on these arguments, else why not."""
        if (reason := self._refusal_on(backend, args[0].device, method)) is not None:
            return reason
        unsupported = self.implementations[backend].unsupported
        return None if unsupported is None else unsupported(*args)

    @functools.cache  # noqa: B019 - operations live as long as the process
    def _refusal_on(self, backend: str, device: torch.device, method: str) -> str | None:
        """The part of a refusal that depends on x's device only: worth keeping, a call costs microseconds."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return f"it has no kernel for {self.name}"
        if (reason := backends.installed(backend)) != "ok":
            return reason
        if backend == "reference":  # plain PyTorch runs wherever PyTorch does; its backward is autograd's
            return None
        if device.type != DEVICE[backend]:
            return f"it runs on {DEVICE[backend]} tensors, x is on {device.type}"
        # A GPU is looked at for its own tensors only: one may serve where another is too old, and to look starts CUDA.
        if device.type == "cuda" and (refusal := backends.gpu_refusal(backend, device.index)) is not None:
            return refusal
        if getattr(implementation, method) is None:
            return f"it has no {method} kernel for {self.name}"
        return None

    def choose(self, backend: str, args: Sequence[Any], method: str) -> Backend | Later:
        """The implementation to run: the fastest possible one, or the one asked for if it can be honoured."""
        if backend != "auto":
            if (reason := self.refusal(backend, args, method)) is None:
                return self.implementations[backend]
            raise RuntimeError(
                f"{self.name}: backend {backend!r} was asked for but cannot run this call: {reason}. "
                "Use use_backend('auto') or 'reference', or unset FAMSEG_BACKEND."
            )
        skipped: dict[str, str] = {}
        for name in backends.BACKENDS:
            if name == "triton" and backends.TRITON_INTERPRETS:
                skipped[name] = "its interpreter is for tests only"
                continue
            reason = self.refusal(name, args, method)
            if reason is None and (other := self._faster(name, args, method)) is not None:
                reason = f"{other} is faster"
            if reason is None:
                log.debug("%s.%s: %s (skipped: %s)", self.name, method, name, skipped)
                return self.implementations[name]
            skipped[name] = reason
        raise RuntimeError(f"{self.name}: no backend can run this call: {skipped}")

    def _faster(self, backend: str, args: Sequence[Any], method: str) -> str | None:
        """The later backend that `backend` itself holds to be faster at this call, if that one can run it."""
        faster = self.implementations[backend].faster
        other = None if faster is None else faster(method, *args)
        return other if other is not None and self.refusal(other, args, method) is None else None
