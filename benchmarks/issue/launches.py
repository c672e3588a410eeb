"""What an operation launches on a chip that is not there: grid, arguments and machine code of every kernel.

Backends are called with tensors that hold no data. Triton's launches are caught at their door,
famseg_kernels/launch.py, and compiled by Triton's own compiler; they are cached where Triton caches.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import ahead, measure
from benchmarks.issue.sass import Refusal
from famseg_kernels import launch
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation

FIRST = 1 << 32  # address of the first tensor


@dataclass
class Addresses:
    """Gives every tensor's memory a place of its own."""

    size: dict[int, int] = field(default_factory=dict)  # base → bytes
    _base: dict[int, int] = field(default_factory=dict)
    _kept: list[torch.Tensor] = field(default_factory=list)  # so that no other tensor gets its identity
    _next: int = FIRST

    def of(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._base:
            self._base[storage._cdata] = self.room(int(storage.nbytes()))
            self._kept.append(tensor)
        return self._base[storage._cdata] + int(tensor.storage_offset()) * tensor.element_size()

    def room(self, nbytes: int) -> int:
        base = self._next
        self.size[base] = nbytes
        self._next += (nbytes + (1 << 20)) // 512 * 512
        return base


@dataclass(frozen=True)
class Launch:
    backend: str
    kernel: str  # name to be shown
    symbol: str
    cubin: bytes
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes of dynamic shared memory
    parameters: bytes
    tensors: dict[int, int]  # base → bytes
    # Of an operator of torch between the kernels: what it reads and writes, its FLOPs, on tensor cores if in 16 bits.
    torch_bytes: int = 0
    torch_flops: float = 0.0
    torch_tensor_cores: bool = False


_FORMATS = {
    **{"i1": "b", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"},
    **{"fp32": "f", "fp64": "d"},
}


def triton_launches(
    operation: Operation, case: Case, dtype: torch.dtype, capability: int
) -> tuple[list[Launch], list[Launch]]:
    """Of forward and of backward."""
    from triton.runtime import driver

    addresses = Addresses()
    found: list[Launch] = []

    def catch(kernel: Any, grid: tuple[int, ...], config: launch.Config, **arguments: Any) -> None:
        result = kernel.warmup(grid=grid, **arguments, **config._asdict())
        found.append(triton_launch(kernel, result, grid, arguments, addresses))

    def taken() -> list[Launch]:
        forward = list(found)
        found.clear()
        return forward

    driver.set_active(ahead.Chip(capability))
    with mock.patch.object(launch, "run", catch), mock.patch.object(launch, "capability", lambda _: capability):
        return called(operation, case, dtype, "triton", taken)


def triton_launch(
    kernel: Any, result: Any, grid: tuple[int, ...], arguments: dict[str, Any], addresses: Addresses
) -> Launch:
    """Of a kernel and what Triton made of it; `arguments` by name."""
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(
        "triton",
        kernel.__name__,
        result.metadata.name,
        result.asm["cubin"],
        (x, y, z),
        32 * result.metadata.num_warps,
        result.metadata.shared,
        _parameters(result.src.signature, arguments, addresses),
        addresses.size,
    )


def called(
    operation: Operation, case: Case, dtype: torch.dtype, backend: str, taken: Callable[[], list[Launch]]
) -> tuple[list[Launch], list[Launch]]:
    """Call forward and backward without data; `taken` gives what was launched since it was last asked."""
    args = ahead.without_data(operation, case, dtype)
    implementation = operation.implementations[backend]
    assert implementation.unsupported and implementation.forward and implementation.backward
    if (reason := implementation.unsupported(*args)) is not None:
        raise Refusal(reason)
    between: list[Launch] = []
    with Torch(between.append):
        results = implementation.forward(*args)
    forward = taken() + between
    between.clear()
    grads = [torch.empty_like(r) for r in results] if isinstance(results, list) else torch.empty_like(results)
    needs = [t is not None and t.is_floating_point() for t in operation.flatten(args)]
    with Torch(between.append):
        implementation.backward(grads, needs, *args)
    return forward, taken() + between


class Torch(TorchDispatchMode):
    """Gives `add` what torch itself computes between kernels: sums of partial results, copies, zeros."""

    def __init__(self, add: Callable[[Launch], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not measure.moves_nothing(func):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            moved = sum(t.nbytes for t in tensors if t.device.type == "meta")
            if moved:
                name = func.overloadpacket._qualified_op_name.split("::")[-1]
                flops = measure.flops_of(func, args, kwargs, result)
                half = tensors[0].dtype.itemsize == 2
                self._add(Launch("torch", f"torch {name}", "", b"", (1, 1, 1), 0, 0, b"", {}, moved, flops, half))
        return result


def _parameters(signature: Any, arguments: dict[str, Any], addresses: Addresses) -> bytes:
    """The kernel's parameters: those of its signature that are no compile-time constants, each aligned to its size.

    Two addresses of scratch memory follow, which no kernel here uses.
    """
    packed = bytearray()

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for k, v in zip(kind, value, strict=True):
                add(k, v)
        elif kind == "constexpr":
            return
        elif kind.startswith("*"):
            _append(packed, struct.pack("<Q", addresses.of(value)))
        elif kind in _FORMATS:
            _append(packed, struct.pack("<" + _FORMATS[kind], value))
        else:
            raise Refusal(f"an argument of type {kind}")

    for name, kind in signature.items():
        add(kind, arguments.get(name))
    for _ in range(2):
        _append(packed, struct.pack("<Q", 0))
    return bytes(packed)


def _append(packed: bytearray, field_: bytes) -> None:
    packed += b"\0" * (-len(packed) % len(field_)) + field_
