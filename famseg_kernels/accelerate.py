"""fk.accelerate: make the known slow modules of SegNeXt, mmseg, mmcv and VMamba models run as ours, in place.

A module becomes ours by a change of its class: the object stays, with its parameters, hooks, attributes and mode, and
so does everything that refers to it. That is done only where it has been shown to compute the same: its structure is
that of the published module, and on a private copy with random weights old and new give the same output and gradients.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg_kernels.children import altered
from famseg_kernels.reassembly.layer import Carafe, FeatureAwareUpsample
from famseg_kernels.reassembly.op import carafe
from famseg_kernels.ssd_scan.layer import rates
from famseg_kernels.ssd_scan.op import ssd_scan_2d
from famseg_kernels.strip_conv.layer import StripAttention, unfusable

# Largest difference of outputs and gradients, relative by the norm. Outputs are of order 1, so that 1e-3 too much
# everywhere is found. fp64 is held to the same: VMamba computes A and D in fp32. Low precision rounds after every
# convolution; there fp32 is compared as well.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Report:
    """What `accelerate` did. swapped: module path → what became what; left: module path → why it stayed as it was."""

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{path or 'the model'}: {what}" for path, what in self.swapped.items()]
        lines += [f"{path or 'the model'}: left as it is: {why}" for path, why in self.left.items()]
        return "\n".join(lines) or "no module that famseg_kernels knows was found"


def accelerate(model: nn.Module) -> Report:
    """Turn SegNeXt's AttentionModule (mmseg's MSCAAttention) and mmcv's CARAFEPack and CARAFE in `model` into ours.

    VMamba's SS2D stays; where it scans as Mamba-2 does (forward_type "m0…"), its `forward_core` becomes one op.
    Modules are known by class name. One is swapped only if its structure is the published one (nothing wrapped,
    hooked or replaced inside) and if its output and gradients, in training and evaluation, equal ours on a copy with
    random weights, on its device and in its dtype. Weights, buffers, random state and modes of the model are not
    touched. Every known module that is not swapped is in the report, with the reason.

    A swapped module is the same object with another class: parameters, hooks, attributes and mode stay, and so does
    what refers to it. A second call finds nothing to do. mmcv's operator and VMamba's kernel have no code for some
    devices: there the rest of the module is compared, and the report says so.

    Returns:
        A report that prints one line a module.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    outcomes: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) not in outcomes:  # a shared module is found at each of its places
            outcomes[id(module)] = _accelerate_one(module)
        swapped, left = outcomes[id(module)]
        if swapped:
            report.swapped[path] = swapped
        elif left:
            report.left[path] = left
    return report


@dataclass
class _Kind:
    """A module known by its class name."""

    becomes: str
    swap: Callable[[Any], None]
    # Why its structure is not the published one, or "".
    structure: Callable[[Any], str]
    # Shapes of the inputs that it is compared on: few pixels, unequal sides.
    shapes: Callable[[Any], list[tuple[int, ...]]]
    # Puts something in the place of an operator that has no code for the device, and says what; or "" if it may not.
    stand_in: Callable[[Any], str] = lambda module: ""
    attributes: tuple[str, ...] = ()
    run: str = "forward"


def _accelerate_one(module: nn.Module) -> tuple[str, str]:
    """Swap `module` if it may be: what became what, or why not; two empty strings where there is nothing to do."""
    if isinstance(module, (StripAttention, FeatureAwareUpsample, Carafe)):
        return "", ""
    if isinstance(module, torch.jit.ScriptModule):
        known = module.original_name in _KINDS
        return "", "it is TorchScript already; accelerate the model before torch.jit" if known else ""
    name = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _KINDS), "")
    if not name or _function_of(getattr(module, "forward_core", None)) is _scan_core:
        return "", ""
    if type(module).__name__ != name:
        return "", f"it is a {type(module).__name__}, derived from {name}"
    kind = _KINDS[name]
    if reason := kind.structure(module) or (_surprise(module, kind) if kind.run == "forward" else ""):
        return "", reason
    reason, remark = _difference(module, kind)
    if reason:
        return "", reason
    kind.swap(module)
    return f"{name}{'' if kind.run == 'forward' else '.' + kind.run} → {kind.becomes}{remark}", ""


def _surprise(module: nn.Module, kind: _Kind) -> str:
    """What `module` has beside the published structure and would lose with its class; or ""."""
    cls = type(module)
    for name in vars(module):
        if callable(getattr(cls, name, None)):
            return f"its {name} was replaced on the instance"
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            expected = name in ("__init__", "forward", "__repr__", "extra_repr")
            if isinstance(value, FunctionType) and hasattr(nn.Module, name) and not expected:
                return f"its class has a {name} of its own"
    if len(inspect.signature(cls.forward).parameters) != 1 + len(kind.shapes(module)):
        return f"its forward takes {inspect.signature(cls.forward)}"
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    for name in code.co_names if code else ():
        if name in vars(module) and name not in (*kind.attributes, "training"):
            return f"its forward reads {name}, which the published module does not have"
    buffer = next((name for name, _ in module.named_buffers()), "")
    return f"it has a buffer, {buffer}" if buffer else ""


def _difference(module: nn.Module, kind: _Kind) -> tuple[str, str]:
    """Why `module` has not been shown to compute what ours does, or ""; and a remark on how it was compared, or ""."""
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in _TOLERANCE:
            return f"its {name} is a {type(parameter).__name__} of {parameter.dtype}, not a plain parameter", ""
        if parameter.is_meta:
            return f"its {name} is on the meta device, where no outputs can be compared", ""
    remark = ""
    first = next(module.parameters(), torch.empty(0))
    with _aside(first.device):
        for dtype in (torch.float32, first.dtype) if first.dtype.itemsize < 4 else (first.dtype,):
            generator = torch.Generator().manual_seed(0)
            try:
                theirs = _private_copy(module, generator).to(dtype)
                ours = copy.deepcopy(theirs)
                kind.swap(ours)
            except Exception as error:
                return f"it cannot be copied and changed: {_told(error)}", ""
            inputs = [_random(generator, shape).to(first.device, dtype) for shape in kind.shapes(module)]
            expected = _results(theirs, kind, inputs)
            if isinstance(expected, str) and (stand_in := kind.stand_in(theirs)):
                remark = f" ({stand_in}: {expected})"
                expected = _results(theirs, kind, inputs)
            if isinstance(expected, str):
                return f"its {kind.run} cannot be compared in {dtype}: {expected}", ""
            actual = _results(ours, kind, inputs)
            if isinstance(actual, str):
                return f"ours does not run in {dtype}: {actual}", ""
            for name, right in expected.items():
                value = actual[name]
                if (value.shape, value.dtype) != (right.shape, right.dtype):
                    return f"its {name} is {right.dtype} of shape {tuple(right.shape)}, unlike ours", ""
                difference = float((value - right).norm() / right.norm().clamp_min(1e-6))
                if not difference <= _TOLERANCE[dtype]:  # not a number is no agreement
                    return f"its {name} differs from ours by {difference:.1e} in {dtype}", ""
    return "", remark


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Nothing of what runs in here is seen outside; all of it is exact, and recorded by autograd."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _private_copy(module: nn.Module, generator: torch.Generator) -> Any:
    """A copy without hooks, which could tell of it or reach far, and with random weights: fresh ones may be zero."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        memo.update({id(value): type(value)() for name, value in vars(inner).items() if "_hooks" in name})
    twin = copy.deepcopy(module, memo)
    for parameter in twin.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.requires_grad_(False).copy_(scale * _random(generator, parameter.shape))
    return twin.requires_grad_()


def _random(generator: torch.Generator, shape: Iterable[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)


def _results(module: nn.Module, kind: _Kind, inputs: list[Tensor]) -> dict[str, Tensor] | str:
    """Outputs in evaluation and training and all gradients, by name; or why there are none."""
    before = dict(vars(module))
    found = {}
    try:
        for mode in (False, True):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            found[f"output in {'training' if mode else 'evaluation'}"] = y = getattr(module.train(mode), kind.run)(
                *leaves
            )
        names = [*(f"gradient of input {i}" for i in range(len(leaves))), *dict(module.named_parameters())]
        wanted = [*leaves, *module.parameters()]
        cotangent = _random(torch.Generator().manual_seed(1), y.shape).to(y)
        gradients = torch.autograd.grad(y, wanted, cotangent, allow_unused=True, materialize_grads=True)
    except Exception as error:  # whatever the code of others raises: it is told, and the module is left
        return _told(error)
    for name, value in vars(module).items():
        if name != "training" and value is not before.get(name):
            return f"it changes its own {name}"
    return {name: value.detach() for name, value in (found | dict(zip(names, gradients, strict=True))).items()}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _children(module: nn.Module, names: list[str]) -> str:
    """Why the children of `module` are not these, each an nn.Conv2d and no more; or ""."""
    if module._modules.keys() != set(names):
        return f"its children are {', '.join(module._modules) or 'none'}; the published module has {', '.join(names)}"
    if module._parameters:
        return f"it has a parameter of its own, {next(iter(module._parameters))}"
    for name, child in module._modules.items():
        if child is None:
            return f"its {name} is None"
        if reason := altered(child):
            return f"its {name} {reason}"
        if child._parameters.get("weight") is None:
            return f"its {name} holds no weight of its own"
    return ""


def _whole_numbers(module: nn.Module, names: Iterable[str]) -> str:
    missing = [name for name in names if not isinstance(getattr(module, name, None), int)]
    return f"it has no whole number {', '.join(missing)}" if missing else ""


# --- SegNeXt: any number and sizes of branches ----------------------------------------------------------------


def _branches(module: nn.Module) -> range:
    return range((len(module._modules) - 2) // 2)


def _strip_structure(module: nn.Module) -> str:
    strips = [f"conv{i}_{j}" for i in _branches(module) or range(3) for j in (1, 2)]
    if reason := _children(module, ["conv0", *strips, "conv3"]):
        return reason
    reason = unfusable(
        module.get_submodule("conv0"),
        [module.get_submodule(f"conv{i}_1") for i in _branches(module)],
        [module.get_submodule(f"conv{i}_2") for i in _branches(module)],
    )
    return f"its {reason}" if reason else ""


def _become_strip_attention(module: Any) -> None:
    module.branches = len(_branches(module))
    module.__class__ = StripAttention


# --- mmcv -------------------------------------------------------------------------------------------------


_PACK = (
    "channels",
    "scale_factor",
    "up_kernel",
    "up_group",
    "encoder_kernel",
    "encoder_dilation",
    "compressed_channels",
)
_CARAFE = ("kernel_size", "group_size", "scale_factor")


def _pack_structure(module: nn.Module) -> str:
    return _children(module, ["channel_compressor", "content_encoder"]) or _whole_numbers(module, _PACK)


def _become_feature_aware_upsample(module: Any) -> None:
    module.__class__ = FeatureAwareUpsample


def _become_carafe(module: Any) -> None:
    module.__class__ = Carafe


def _is_mmcv(module: nn.Module) -> bool:
    return type(module) is getattr(sys.modules.get("mmcv.ops.carafe"), type(module).__name__, None)


def _our_carafe_in_pack(module: Any) -> str:
    if not _is_mmcv(module):
        return ""
    sizes = {"kernel_size": module.up_kernel, "group_size": module.up_group, "scale_factor": module.scale_factor}
    module.feature_reassemble = functools.partial(carafe, **sizes)
    return "compared with our carafe in the place of mmcv's, which does not run here"


def _our_carafe(module: Any) -> str:
    if not _is_mmcv(module):
        return ""
    module.forward = functools.partial(carafe, **{name: getattr(module, name) for name in _CARAFE})
    return "not compared, as mmcv's operator does not run here"


def _carafe_shapes(module: Any) -> list[tuple[int, ...]]:
    k, groups, s = (getattr(module, name) for name in _CARAFE)
    return [(2, 2 * groups, 7, 6), (2, k * k * groups, 7 * s, 6 * s)]


# --- VMamba -----------------------------------------------------------------------------------------------

# VMamba's order of directions is row forward, column forward, row backward, column backward.
_ORDER = [0, 2, 1, 3]


def _function_of(core: Any) -> Any:
    """The function in a bound method or a partial of one."""
    core = getattr(core, "func", core)
    return getattr(core, "__func__", core)


def _core_structure(module: Any) -> str:
    core = getattr(module, "forward_core", None)
    keywords = getattr(core, "keywords", {})
    function = getattr(_function_of(core), "__name__", "none")
    if function != "forward_corem0":
        return f"its forward_core is {function}; only Mamba-2's (forward_type m0) is this library's scan"
    if keywords.get("scan_mode", "cross2d") != "cross2d":
        return f"it scans in the order {keywords['scan_mode']}, not cross2d"
    if getattr(module, "initial_state", None) is not None:
        return "it carries a state from one call to the next"
    if getattr(module, "x_proj_bias", None) is not None:
        return "its x_proj has a bias"
    for name, dims in (("x_proj_weight", 3), ("Ds", 3), ("A_logs", 2), ("dt_projs_bias", 2)):
        value = getattr(module, name, None)
        if not isinstance(value, Tensor) or value.dim() != dims or len(value) != len(_ORDER):
            return f"its {name} is not that of four directions"
    return ""


def _become_one_scan(module: Any) -> None:
    module.forward_core = functools.partial(_scan_core, module)


def _torch_scan(module: Any) -> str:
    if "selective_scan_backend" not in inspect.signature(module.forward_core).parameters:
        return ""
    module.forward_core = functools.partial(module.forward_core, selective_scan_backend="torch")
    return "compared with its scan in PyTorch, as its kernel does not run here"


def _scan_core(module: Any, x: Tensor) -> Tensor:
    """VMamba's forward_corem0, x (N, H, W, heads·p): every pixel is projected where it lies, nothing is unrolled."""
    directions, heads, headdim = module.Ds.shape
    weight = module.x_proj_weight[_ORDER]
    state = (weight.shape[1] - heads) // 2
    projected = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (directions, -1))
    dt, B, C = projected.split([heads, state, state], -1)
    A = rates(module.A_logs[_ORDER])
    image = x.unflatten(-1, (heads, headdim))
    y = ssd_scan_2d(
        image, dt, A, B.unsqueeze(-2), C.unsqueeze(-2), dt_bias=module.dt_projs_bias[_ORDER], dt_softplus=True
    )
    y = y + image * module.Ds.sum(0)
    return module.out_norm(y.flatten(-2)).to(x.dtype)


_STRIP = _Kind(
    "StripAttention",
    _become_strip_attention,
    _strip_structure,
    shapes=lambda module: [(2, module.conv0.in_channels, 13, 12)],
)
_KINDS = {
    "AttentionModule": _STRIP,
    "MSCAAttention": _STRIP,
    "CARAFEPack": _Kind(
        "FeatureAwareUpsample",
        _become_feature_aware_upsample,
        _pack_structure,
        shapes=lambda module: [(2, module.channels, 7, 6)],
        stand_in=_our_carafe_in_pack,
        attributes=_PACK,
    ),
    "CARAFE": _Kind(
        "Carafe",
        _become_carafe,
        lambda module: _children(module, []) or _whole_numbers(module, _CARAFE),
        shapes=_carafe_shapes,
        stand_in=_our_carafe,
        attributes=_CARAFE,
    ),
    "SS2D": _Kind(
        "ssd_scan_2d",
        _become_one_scan,
        _core_structure,
        shapes=lambda module: [(2, 7, 5, module.Ds[0].numel())],
        stand_in=_torch_scan,
        run="forward_core",
    ),
}
