"""Whether a layer may read the weight and the bias of a child convolution instead of calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

_FORWARD, _CONV_FORWARD = nn.Conv2d.forward, nn.Conv2d._conv_forward


def altered(conv: nn.Module) -> str:
    """Why calling `conv` may do more than nn.Conv2d does with its weight and bias, or ""."""
    kind = type(conv)
    # A wrapper, a parametrized or quantised module, nn.Identity, …
    if kind is not nn.Conv2d and kind.__dict__.get("stands_for") is not nn.Conv2d:
        return f"is a {kind.__module__}.{kind.__qualname__}"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "has hooks"
    own = conv.__dict__
    return "has another forward" if "forward" in own or "_conv_forward" in own else ""


def patched() -> bool:
    """Whether all convolutions have another forward than torch's, as for seamless tiling."""
    return nn.Conv2d.forward is not _FORWARD or nn.Conv2d._conv_forward is not _CONV_FORWARD


def watched() -> bool:
    """Whether there are hooks on all modules, other than those of FlopCounterMode, which counts the op itself."""
    forward = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
    backward = (torch_module._global_backward_pre_hooks, torch_module._global_backward_hooks)
    groups = (*forward, *backward)
    if not any(groups):
        return False
    hooks = [hook for group in groups for hook in group.values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)
