"""One operation = one `Operation`: its spec, its backends, and how torch sees it.

An operation is a torch.library op `famseg::<name>` with a backward op `famseg::<name>_backward` beside it. Both
take the backend's name as their last argument: the choice made by the caller's thread reaches autograd's threads
and is part of a compiled graph. Autograd is registered on the op itself (so that opcheck, torch.compile and
AOTAutograd see it) by one generic autograd.Function that saves nothing but the inputs.

What no kernel can do, the definition does: the reference is the decomposition of the op to aten. Forward-mode
derivatives go through it, and so does a TorchScript trace, which has to run without Python. docs/transformations.md
says what may be done to an op.

What a call costs before any arithmetic: `python -m benchmarks.overhead`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from famseg_kernels import backends

log = logging.getLogger("famseg_kernels")

_library = torch.library.Library("famseg", "DEF")


@dataclass(frozen=True)
class Case:
    """Arguments of one call, made from a seed: the unit of the contract tests and of the benchmarks.

    `make(rand)` returns the op's arguments in fp64 on the CPU; `rand(*shape)` draws standard normal numbers.
    `keep_fp32` are the places (among the flattened tensor arguments) of what stays fp32 beside a lower-precision x.
    """

    name: str
    make: Callable[[Callable[..., Tensor]], tuple[Any, ...]]
    keep_fp32: tuple[int, ...] = ()
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


@dataclass(frozen=True)
class Spec:
    """The one source of truth about an operation; see `famseg_kernels/<room>/spec.py`.

    schema: the op's arguments and results in torch's schema language, without name and backend.
    check: raises ValueError/TypeError for arguments that break the contract.
    fake: result tensors (uninitialised) for given arguments: shapes, dtypes, strides.
    flops: forward FLOPs, 2 per multiply–add. moved_bytes: bytes that any implementation must move.
    """

    name: str
    schema: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    flops: Callable[..., int]
    moved_bytes: Callable[..., int]
    cases: tuple[Case, ...] = field(default=())


class NotFinite(Exception):
    """Raised by a kernel for results that are not all finite, and so are not those of the definition in their places.

    The call is then computed by the reference's `exact` form: the definition one token at a time, slower by far.
    """


class Later:
    """A backend module (or a name in it) that is imported when it is first used: Triton costs a second to import."""

    def __init__(self, module: str, name: str | None = None) -> None:
        self._module, self._name = module, name

    @functools.cached_property
    def _target(self) -> Any:
        module = importlib.import_module(self._module)
        return module if self._name is None else getattr(module, self._name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._target, attribute)


class Operation:
    """A spec with its backends, registered with torch."""

    def __init__(self, spec: Spec, implementations: dict[str, Any]) -> None:
        self.spec = spec
        self.implementations = implementations
        arguments, results = (part.strip() for part in spec.schema.split("->"))
        arguments = arguments.removeprefix("(").removesuffix(")")
        self._returns_list = results == "Tensor[]"
        types = [argument.strip().split(" ")[0] for argument in arguments.split(",")]
        self._is_tensor = [kind.startswith("Tensor") for kind in types]
        self._is_list = [kind.endswith("[]") for kind in types]
        name = spec.name
        _library.define(f"{name}({arguments}, str backend) -> {results}")
        _library.define(f"{name}_backward(Tensor[] grads, {arguments}, bool[] needs, str backend) -> Tensor[]")
        self.packet = getattr(torch.ops.famseg, name)
        self.overload = self.packet.default
        self.backward_overload = getattr(torch.ops.famseg, f"{name}_backward").default
        for overload, run, fake, autograd in (
            (self.overload, self._run_forward, self._fake_forward, self._autograd_forward),
            (self.backward_overload, self._run_backward, self._fake_backward, self._autograd_backward),
        ):
            qualified = overload.name()
            _library.impl(qualified, run, "CompositeExplicitAutograd")
            torch.library.register_fake(qualified, fake, lib=_library)
            _library.impl(qualified, autograd, "Autograd", with_keyset=True)
            torch.library.register_vmap(qualified, functools.partial(_one_by_one, overload), lib=_library)
        # torch.onnx.export(dynamo=True) takes its decompositions from this table, as get_decompositions does.
        register_decomposition(self.overload)(self.decomposed)
        # And fake tensors of symbolic sizes take it for the op's shapes too, at a second a call, but for this line.
        register_decomposition(self.overload, type="meta")(self._fake_forward)
        register_flop_formula(self.packet, get_raw=True)(self._count_forward)
        register_flop_formula(getattr(torch.ops.famseg, f"{name}_backward"), get_raw=True)(self._count_backward)

    def __call__(self, *args: Any) -> Any:
        """Run on the backend asked for by `use_backend`, FAMSEG_BACKEND or automatic choice."""
        if torch.jit.is_tracing():  # the trace has to run without Python, where only aten is
            return self.decomposed(*args, "reference")
        return self.packet(*args, backends.requested())

    # --- arguments ----------------------------------------------------------------------------------

    def flatten(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The tensor arguments in order, lists unrolled; absent ones keep their place as None."""
        flat: list[Tensor | None] = []
        for value, is_tensor, is_list in zip(args, self._is_tensor, self._is_list, strict=True):
            if is_list and is_tensor:
                flat.extend(value)
            elif is_tensor:
                flat.append(value)
        return flat

    def replace(self, args: Sequence[Any], flat: Sequence[Tensor | None]) -> list[Any]:
        """`args` with its tensor arguments taken from `flat`: the inverse of `flatten`."""
        position = 0
        result: list[Any] = []
        for value, is_tensor, is_list in zip(args, self._is_tensor, self._is_list, strict=True):
            if is_list and is_tensor:
                result.append(list(flat[position : position + len(value)]))
                position += len(value)
            elif is_tensor:
                result.append(flat[position])
                position += 1
            else:
                result.append(value)
        return result

    # --- backend choice -----------------------------------------------------------------------------

    def refusal(self, name: str, args: Sequence[Any], method: str) -> str | None:
        """None if backend `name` can run `method` ("forward" or "backward") on these arguments, else why not."""
        if (reason := self._refusal_on(name, args[0].device, method)) is not None:
            return reason
        unsupported = getattr(self.implementations[name], "unsupported", None)  # absent: takes what the spec allows
        return None if unsupported is None else unsupported(*args)

    @functools.cache  # noqa: B019 - operations live as long as the process
    def _refusal_on(self, name: str, device: torch.device, method: str) -> str | None:
        """The part of a refusal that depends on x's device only: worth keeping, a call costs microseconds."""
        implementation = self.implementations.get(name)
        if implementation is None:
            return f"it has no kernel for {self.spec.name}"
        if (reason := backends.installed(name)) != "ok":
            return reason
        if name == "reference":  # plain PyTorch runs wherever PyTorch does; its backward is autograd's
            return None
        if device.type != _DEVICE[name]:
            return f"it runs on {_DEVICE[name]} tensors, x is on {device.type}"
        # A GPU is looked at for its own tensors only: one may serve where another is too old, and to look starts CUDA.
        if device.type == "cuda" and (refusal := backends.gpu_refusal(name, device.index)) is not None:
            return refusal
        if not hasattr(implementation, method):
            return f"it has no {method} kernel for {self.spec.name}"
        return None

    def choose(self, backend: str, args: Sequence[Any], method: str) -> Any:
        """The implementation to run: the fastest possible one, or the one asked for if it can be honoured."""
        if backend != "auto":
            if (reason := self.refusal(backend, args, method)) is None:
                return self.implementations[backend]
            raise RuntimeError(
                f"{self.spec.name}: backend {backend!r} was asked for but cannot run this call: {reason}. "
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
                log.debug("%s.%s: %s (skipped: %s)", self.spec.name, method, name, skipped)
                return self.implementations[name]
            skipped[name] = reason
        raise RuntimeError(f"{self.spec.name}: no backend can run this call: {skipped}")

    def _faster(self, name: str, args: Sequence[Any], method: str) -> str | None:
        """The later backend that `name` itself holds to be faster at this call, if that one can run it."""
        faster = getattr(self.implementations[name], "faster", None)
        other = None if faster is None else faster(method, *args)
        return other if other is not None and self.refusal(other, args, method) is None else None

    # --- kernels behind torch's dispatcher ------------------------------------------------------------

    def _run_forward(self, *arguments: Any) -> Any:
        *args, backend = arguments
        implementation = self.choose(backend, args, "forward")
        reference = self.implementations["reference"]
        with _plain_arithmetic(args[0].device.type):
            try:
                results = implementation.forward(*args)
                if implementation is reference and hasattr(reference, "exact"):
                    _check_finite(results)
            except NotFinite:
                implementation, results = reference, reference.exact(*args)
        if implementation is not reference:
            return results
        # Kernels allocate what the spec says; plain PyTorch leaves its own strides, at least in dimensions of size 1.
        expected = self.spec.fake(*args)
        if self._returns_list:
            return [_laid_out(r, e) for r, e in zip(results, expected, strict=True)]
        return _laid_out(results, expected)

    def _run_backward(self, grads: list[Tensor], *arguments: Any) -> list[Tensor]:
        *args, needs, backend = arguments
        implementation = self.choose(backend, args, "backward")
        reference = self.implementations["reference"]
        with _plain_arithmetic(args[0].device.type):
            try:
                if implementation is reference:
                    results = self._differentiate(reference.forward, grads, needs, args)
                    if hasattr(reference, "exact"):
                        _check_finite([*results, *grads])
                else:
                    results = implementation.backward(grads if self._returns_list else grads[0], needs, *args)
            except NotFinite:
                results = self._differentiate(reference.exact, grads, needs, args)
        return self.promised_gradients(results, grads, needs, args)

    def promised_gradients(
        self, results: Sequence[Tensor | None], grads: Sequence[Tensor], needs: Sequence[bool], args: Sequence[Any]
    ) -> list[Tensor]:
        """The gradients that are needed, as the fake kernel promises them: dtype and strides of empty_like, own memory.

        A backend may return any dtype and strides, the same tensor twice, an incoming gradient, or None for zeros.
        """
        flat = self.flatten(args)
        taken = {_storage(t) for t in (*grads, *flat) if t is not None}
        found = []
        for tensor, result, need in zip(flat, results, needs, strict=True):
            if not need or tensor is None:
                continue
            if result is None:
                found.append(torch.zeros_like(tensor))
            elif result.dtype != tensor.dtype or _storage(result) in taken:
                found.append(torch.empty_like(tensor).copy_(result))
            elif tensor.is_contiguous() and result.stride() == tensor.stride():
                found.append(result)
            else:
                found.append(_laid_out(result, torch.empty_like(tensor)))
            taken.add(_storage(found[-1]))
        return found

    def _differentiate(
        self, forward: Callable[..., Any], grads: list[Tensor], needs: list[bool], args: Sequence[Any]
    ) -> list[Any]:
        """The reference's backward: autograd of its forward, recomputed."""
        flat: list[Any] = self.flatten(args)
        with _recording():
            leaves = [t.detach().requires_grad_() if need else t for t, need in zip(flat, needs, strict=True)]
            outputs = forward(*self.replace(args, leaves))
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            outputs = outputs if self._returns_list else [outputs]
            used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
            results = iter(torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], allow_unused=True))
        return [next(results) if need else None for need in needs]

    def _fake_forward(self, *args: Any) -> Any:
        return self.spec.fake(*args[:-1])

    def _fake_backward(self, grads: list[Tensor], *arguments: Any) -> list[Tensor]:
        *args, needs, _ = arguments
        flat: list[Any] = self.flatten(args)
        return [torch.empty_like(t) for t, need in zip(flat, needs, strict=True) if need]

    def decomposed(self, *args: Any) -> Any:
        """The op in aten, by its definition: differentiable as any PyTorch code is. The last argument is not used."""
        with _plain_arithmetic(args[0].device.type):
            return self.implementations["reference"].forward(*args[:-1])

    def _autograd_forward(self, keyset: Any, *args: Any) -> Any:
        flat = self.flatten(args[:-1])
        if _has_tangent(flat):
            if args[-1] not in ("auto", "reference"):
                raise RuntimeError(
                    f"{self.spec.name}: backend {args[-1]!r} was asked for but has no forward-mode derivative; "
                    "use use_backend('auto') or 'reference', or unset FAMSEG_BACKEND."
                )
            return self.decomposed(*args)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
            if args[-1] not in ("auto", "reference"):
                self.choose(args[-1], args[:-1], "backward")  # raise at the call, not in its backward
            result = _applied(_Differentiable, self, keyset, args, *flat)
            return list(result) if self._returns_list else result
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def _autograd_backward(self, keyset: Any, grads: list[Tensor], *args: Any) -> list[Tensor]:
        inputs = [*grads, *self.flatten(args[:-2])]
        if _has_tangent(inputs):
            raise RuntimeError(_no_second_derivative(self.spec.name))
        return list(_applied(_OnceDifferentiable, self, keyset, len(grads), args, *inputs))

    def _count_forward(self, *args: Any, **_: Any) -> int:
        return self.spec.flops(*args[:-1])

    def _count_backward(self, grads: list[Tensor], *args: Any, **_: Any) -> int:
        # Every multiply–add of the forward has one partner for either factor's gradient.
        return 2 * self.spec.flops(*args[:-2])


_DEVICE = {"cuda": "cuda", "triton": "cpu" if backends.TRITON_INTERPRETS else "cuda", "cpu": "cpu"}


def _applied(function: Any, *args: Any) -> Any:
    """function.apply. Under torch.func this is one level of the transforms; the dispatcher goes from one to another."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)


def _redispatch(overload: Any, keyset: Any, *args: Any) -> Any:
    """The op below autograd; called inside an autograd.Function, which has switched recording off."""
    keyset = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return overload.redispatch(keyset, *args)
        # Off for this level only: the next one has its own derivatives to record.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return overload.redispatch(keyset, *args)


class _Differentiable(_SingleLevelFunction):
    """Any operation with its backward op; the graph keeps the inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, keyset: Any, args: Sequence[Any], *flat: Tensor | None) -> Any:
        ctx.operation = operation
        ctx.save_for_backward(*flat)
        *plain, ctx.backend = args
        # The saved tensors are kept once, by save_for_backward; here only their places and the plain values stay.
        ctx.template = operation.replace(plain, [None] * len(flat))
        result = _redispatch(operation.overload, keyset, *args)
        return tuple(result) if isinstance(result, list) else result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        operation: Operation = ctx.operation
        args = operation.replace(ctx.template, ctx.saved_tensors)
        needs = list(ctx.needs_input_grad[3:])
        results = iter(operation.backward_overload(list(grads), *args, needs, ctx.backend))
        return None, None, None, *(next(results) if need else None for need in needs)


class _OnceDifferentiable(_SingleLevelFunction):
    """The backward op; differentiating it again is an error, never a silent None."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, keyset: Any, grads: int, args: Sequence[Any], *flat: Any) -> Any:
        ctx.name = operation.spec.name
        return tuple(_redispatch(operation.backward_overload, keyset, list(flat[:grads]), *args))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_no_second_derivative(ctx.name))


def _no_second_derivative(name: str) -> str:
    return (
        f"{name} has no second derivative: its backward cannot be differentiated again. "
        "Call backward/grad without create_graph=True through this layer."
    )


def _has_tangent(flat: Sequence[Tensor | None]) -> bool:
    """Whether forward-mode derivatives are asked for: the autograd.Functions below would drop them without a word."""
    # A compiled graph replays torch.func.jvp without the level that Python counts. Levels other than 0 are functorch's.
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return False
    return any(t is not None and forward_ad.unpack_dual(t, level=0).tangent is not None for t in flat)


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, (list, tuple))  # None is one


def _one_by_one(overload: Any, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """The op under torch.vmap: once a slice, stacked. Any argument may be batched, weights too."""

    def part(index: int) -> Any:
        def select(value: Any, dim: int | None) -> Any:
            if dim is None:
                return value
            return value.select(dim, index) if info.batch_size else value.new_zeros(value.movedim(dim, 0).shape[1:])

        return overload(*pytree.tree_map(select, args, in_dims, is_leaf=_is_leaf))

    results = [part(index) for index in range(max(info.batch_size, 1))]
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts)[: info.batch_size], *results)
    return stacked, pytree.tree_map(lambda _: 0, stacked)


def _check_finite(results: Tensor | Sequence[Tensor | None]) -> None:
    for result in [results] if isinstance(results, Tensor) else results:
        if result is not None and not torch.isfinite(result).all():
            raise NotFinite


_NO_CHANGE = nullcontext()


def _plain_arithmetic(device_type: str) -> AbstractContextManager[Any]:
    """Inside a kernel autocast is over: the op has cast its data already, the rest must keep its precision."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NO_CHANGE


@contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record although we are below it in the dispatcher (and maybe inside a dispatch mode)."""
    key = torch._C.DispatchKey.AutogradFunctionality
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    return result if result.stride() == like.stride() else like.copy_(result)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for data tensors beside x, or None (no autocast, or fp64 which it leaves alone)."""
    if x.dtype == torch.float64 or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)
