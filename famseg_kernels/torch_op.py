"""How torch sees an operation: the only place that knows torch's dispatcher, autograd and transforms from inside.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from famseg_kernels.choice import Choice
from famseg_kernels.spec import Backend, Later, NotFinite, Spec

_library = torch.library.Library("famseg", "DEF")


class Operation(Choice):
    """A spec with its backends, registered with torch."""

    def __init__(self, spec: Spec, implementations: dict[str, Backend | Later]) -> None:
        super().__init__(spec.name, implementations)
        self.spec = spec
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

    # --- kernels behind torch's dispatcher ------------------------------------------------------------

    def _run_forward(self, *arguments: Any) -> Any:
        *args, backend = arguments
        implementation: Any = self.choose(backend, args, "forward")
        reference: Any = self.implementations["reference"]
        with _plain_arithmetic(args[0].device.type):
            try:
                results = implementation.forward(*args)
                if implementation is reference and reference.exact is not None:
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
        implementation: Any = self.choose(backend, args, "backward")
        reference: Any = self.implementations["reference"]
        with _plain_arithmetic(args[0].device.type):
            try:
                if implementation is reference:
                    results = self._differentiate(reference.forward, grads, needs, args)
                    if reference.exact is not None:
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
                    f"{self.name}: backend {args[-1]!r} was asked for but has no forward-mode derivative; "
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
            raise RuntimeError(_no_second_derivative(self.name))
        return list(_applied(_OnceDifferentiable, self, keyset, len(grads), args, *inputs))

    def _count_forward(self, *args: Any, **_: Any) -> int:
        return self.spec.flops(*args[:-1])

    def _count_backward(self, grads: list[Tensor], *args: Any, **_: Any) -> int:
        # Every multiply–add of the forward has one partner for either factor's gradient.
        return 2 * self.spec.flops(*args[:-2])


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
        ctx.name = operation.name
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


def wants_autocast(x: Any) -> bool:
    """Whether autocast has something to say of a call whose first tensor is `x`. It leaves fp64 alone."""
    if not isinstance(x, Tensor) or x.device.type == "meta" or x.dtype == torch.float64:
        return False
    return torch.is_autocast_enabled(x.device.type)


def autocast(tensors: Sequence[Any]) -> Sequence[Any]:
    """The data tensors of a call, x first, as autocast wants them. What is no tensor is left to the checks."""
    x = tensors[0]
    if not wants_autocast(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t.to(dtype) if isinstance(t, Tensor) else t for t in tensors]
