"""Arguments of one call, made from a seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Arguments of one call, made from a seed: the unit of the contract tests and of the benchmarks.

    `make(rand)` returns the op's arguments in fp64 on the CPU; `rand(*shape)` draws standard normal numbers.
    `keep_fp32` are the places (among the flattened tensor arguments) of what stays fp32 beside a lower-precision x.
    `tags` are words that say what the case is good for, where a test takes a few cases only:
        ordinary: no edge and nothing left out.
        options: together, those of an operation reach every branch of a backend's Python code.
    """

    name: str
    make: Callable[[Callable[..., Tensor]], tuple[Any, ...]]
    keep_fp32: tuple[int, ...] = ()
    tags: str = ""
    seed: int = 0

    def arguments(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
        """The arguments, rounded to `dtype` (so that every precision sees the same numbers as its truth)."""
        generator = torch.Generator().manual_seed(self.seed)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        position = itertools.count()

        def cast(value: Any) -> Any:
            if isinstance(value, (list, tuple)) and not all(isinstance(v, (int, float)) for v in value):
                return [cast(v) for v in value]
            if value is None or isinstance(value, Tensor):
                index = next(position)
                if isinstance(value, Tensor) and value.is_floating_point():
                    wide = index in self.keep_fp32 and dtype.itemsize < 4
                    return value.to(device, torch.float32 if wide else dtype)
                return value.to(device) if isinstance(value, Tensor) else None
            return value

        return tuple(cast(value) for value in self.make(rand))
