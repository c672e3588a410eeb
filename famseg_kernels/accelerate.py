"""fk.accelerate: swap the known slow modules of SegNeXt, mmseg, mmcv and VMamba models for ours, in place."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from famseg_kernels.reassembly.layer import FeatureAwareUpsample
from famseg_kernels.ssd_scan.op import ssd_scan_2d
from famseg_kernels.strip_conv.layer import StripAttention


@dataclass
class Report:
    """What `accelerate` did. swapped: module path → old and new class; left: module path → why it was kept."""

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{path}: {what}" for path, what in self.swapped.items()]
        lines += [f"{path}: left as it is: {why}" for path, why in self.left.items()]
        return "\n".join(lines) or "no module that famseg_kernels knows was found"


def accelerate(model: nn.Module) -> Report:
    """Replace SegNeXt's AttentionModule (mmseg's MSCAAttention) and mmcv's CARAFEPack inside `model`, in place.

    VMamba's SS2D stays; where it scans as Mamba-2 does (forward_type "m0…"), its `forward_core` becomes one op.
    Modules are known by class name and checked by structure; a look-alike that differs is left and reported. The new
    modules hold the very same Parameter objects, so optimizers and tied weights stay valid; training mode is kept.

    Returns:
        A report that prints one line a module.

    Raises:
        ValueError: `model` itself is a module to be replaced (there is no parent to put ours into).
    """
    report = Report()
    if type(model).__name__ in _REPLACEMENTS:
        raise ValueError(
            f"model: expected a model that contains {type(model).__name__}, got the module itself; wrap it, "
            "for example in torch.nn.Sequential"
        )
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "SS2D":
            _accelerate_core(path, module, report)
        replace = _REPLACEMENTS.get(type(module).__name__)
        if replace is None or isinstance(module, (StripAttention, FeatureAwareUpsample)):
            continue
        replacement, reason = replace(module)
        if replacement is None:
            report.left[path] = reason
            continue
        replacement.train(module.training)
        model.set_submodule(path, replacement)
        report.swapped[path] = f"{type(module).__name__} → {type(replacement).__name__}"
    return report


def _strip_attention(module: nn.Module) -> tuple[nn.Module | None, str]:
    weight = getattr(getattr(module, "conv0", None), "weight", None)
    if weight is None:
        return None, "it has no conv0 with a weight"
    return _adopt(module, StripAttention(weight.shape[0]))


def _feature_aware_upsample(module: nn.Module) -> tuple[nn.Module | None, str]:
    names = (
        "channels",
        "scale_factor",
        "up_kernel",
        "up_group",
        "encoder_kernel",
        "encoder_dilation",
        "compressed_channels",
    )
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        return None, f"it has no attribute {', '.join(missing)}"
    return _adopt(module, FeatureAwareUpsample(**{name: getattr(module, name) for name in names}))


def _adopt(old: nn.Module, new: nn.Module) -> tuple[nn.Module | None, str]:
    """`new` with the parameters of `old` (the same objects), or why that is not the same computation."""
    ours, theirs = dict(new.named_parameters()), dict(old.named_parameters())
    for name in ours.keys() | theirs.keys():
        if name not in theirs or name not in ours or ours[name].shape != theirs[name].shape:
            return None, f"its parameter {name} is not that of the published module"
    for path, conv in new.named_modules():
        if isinstance(conv, nn.Conv2d):
            other = old.get_submodule(path)
            for attribute in ("padding", "stride", "dilation", "groups"):
                if getattr(other, attribute, None) != getattr(conv, attribute):
                    return None, f"the {attribute} of its {path} is not that of the published module"
    if old._forward_hooks or old._forward_pre_hooks or old._backward_hooks:
        return None, "it has hooks that would be lost"
    for name, parameter in theirs.items():
        parent, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(parent), leaf, parameter)
    return new, ""


# VMamba's order of directions is row forward, column forward, row backward, column backward.
_ORDER = [0, 2, 1, 3]


def _accelerate_core(path: str, module: Any, report: Report) -> None:
    core = getattr(module, "forward_core", None)
    keywords = getattr(core, "keywords", {})
    function = getattr(getattr(core, "func", core), "__name__", "none")
    if function == _scan_core.__name__:
        return
    if function != "forward_corem0":
        reason = f"its forward_core is {function}; only Mamba-2's (forward_type m0) is this library's scan"
    elif keywords.get("scan_mode", "cross2d") != "cross2d":
        reason = f"it scans in the order {keywords['scan_mode']}, not cross2d"
    elif getattr(module, "initial_state", None) is not None:
        reason = "it carries a state from one call to the next"
    elif getattr(module, "x_proj_bias", None) is not None:
        reason = "its x_proj has a bias"
    else:
        module.forward_core = functools.partial(_scan_core, module)
        report.swapped[path] = "SS2D.forward_core → ssd_scan_2d"
        return
    report.left[path] = reason


def _scan_core(module: Any, x: Tensor) -> Tensor:
    """VMamba's forward_corem0, x (N, H, W, heads·p): every pixel is projected where it lies, nothing is unrolled."""
    directions, heads, headdim = module.Ds.shape
    weight = module.x_proj_weight[_ORDER]
    state = (weight.shape[1] - heads) // 2
    projected = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (directions, -1))
    dt, B, C = projected.split([heads, state, state], -1)
    A = -module.A_logs[_ORDER].float().exp()
    image = x.unflatten(-1, (heads, headdim))
    y = ssd_scan_2d(
        image, dt, A, B.unsqueeze(-2), C.unsqueeze(-2), dt_bias=module.dt_projs_bias[_ORDER], dt_softplus=True
    )
    y = y + image * module.Ds.sum(0)
    return module.out_norm(y.flatten(-2)).to(x.dtype)


_REPLACEMENTS = {
    "AttentionModule": _strip_attention,
    "MSCAAttention": _strip_attention,
    "CARAFEPack": _feature_aware_upsample,
}
