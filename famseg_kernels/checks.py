"""Argument checks shared by all operations: one place where errors get their words.

A message names the argument, what was expected and what came; nothing runs before all checks have passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: Any, dims: int) -> None:
    """`value` is a tensor with `dims` dimensions."""
    _strided(name, value)
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(value.shape)}")


def _strided(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def data(name: str, value: Any, dims: int) -> None:
    """`value` is the tensor that sets the call's dtype."""
    tensor(name, value, dims)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")


def items(name: str, value: Any) -> list[Any]:
    """`value`, a list of tensors or anything that gives them one by one (but for one tensor: that gives its rows)."""
    if isinstance(value, (list, tuple)):  # first: to ask for an abstract class takes a microsecond
        return list(value)
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
    return list(value)


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)} {meaning}, got {tuple(value.shape)}")


def companion(
    name: str, value: Any, x: Tensor, dims: int | None = None, *, fp32_allowed: bool = False, x_name: str = "x"
) -> None:
    """`value`, a tensor with `dims` dimensions (None: any), goes with `x`: same device, same dtype.

    `fp32_allowed`: or float32, where the contract allows it beside any x.
    """
    if dims is None:
        _strided(name, value)
    else:
        tensor(name, value, dims)
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like {x_name}, got {value.device}")
    if value.dtype == x.dtype or (fp32_allowed and value.dtype == torch.float32):
        return
    alternative = " or torch.float32" if fp32_allowed and x.dtype != torch.float32 else ""
    raise TypeError(f"{name}: expected {x.dtype} like {x_name}{alternative}, got {value.dtype}")


def integer(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected less than 2**63, got {value}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r:.80}")


def odd(name: str, value: int, maximum: int | None = None) -> None:
    """A kernel size: odd, so that "same" padding is symmetric."""
    if value % 2 == 0:
        raise ValueError(f"{name}: expected an odd kernel size, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}: expected a kernel size of at most {maximum}, got {value}")


def divides(name: str, value: int, total_name: str, total: int) -> None:
    if total % value:
        raise ValueError(f"{name}: expected a divisor of {total_name} = {total}, got {value}")


def dtype_name(x: Tensor) -> str:
    """What the native modules call x's dtype: "float32", "bfloat16", …"""
    return str(x.dtype).removeprefix("torch.")


def image_format(x: Tensor) -> torch.memory_format:
    """The memory format of a result shaped like the image tensor x: channels_last if x is, or is a part of such a
    tensor's channels, as torch's convolutions have it; else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    (_, c, h, w), (n_stride, c_stride, h_stride, w_stride) = x.shape, x.stride()
    nested = c_stride == 1 and w_stride >= c and h_stride >= w * w_stride and n_stride >= h * h_stride
    return torch.channels_last if nested and c > 1 else torch.contiguous_format
