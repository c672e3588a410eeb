"""What the settings of all commands have in common: how one is declared and checked, and those of using a network."""

from __future__ import annotations

import dataclasses
import platform
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
import yaml

from famseg_kernels import available_backends
from famseg_kernels.backends import CHOICES as BACKENDS

LARGEST_SEED = 2**32 - 1
_LARGEST = 1_000_000  # of whatever is counted: what is more is a slip


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, what is expected and what came."""

    exit_code = 2


def option(default: Any, help: str, *, path: bool = False) -> Any:
    """A dataclass field that is a flag of a command.

    Args:
        path: of a file or folder: a command takes a `~` at its beginning for the home folder.
    """
    return dataclasses.field(default=default, metadata={"help": help, "path": path})


def expect_number(name: str, value: float, minimum: float, maximum: float = _LARGEST) -> None:
    """ConfigError where `value` is not in the range or is no number at all."""
    if not value >= minimum:
        raise ConfigError(f"{name}: expected at least {minimum}, got {value}")
    if not value <= maximum:
        raise ConfigError(f"{name}: expected at most {maximum}, got {value}")


def expect_no_references(text: str) -> None:
    """yaml.YAMLError where a name stands for values: ten lines of such names can stand for billions of values."""
    if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise yaml.YAMLError("references like *name are not known here; write their values out")


def device_for(device: str, backend: str) -> str:
    """ "cpu" or "cuda" for the wish "auto", "cpu" or "cuda"; ConfigError where device or backend are not there."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device: cuda was asked for, but torch sees no CUDA GPU; use --device cpu or auto")
    if backend not in BACKENDS:
        raise ConfigError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in ("auto", "reference") and (reason := available_backends()[backend]) != "ok":
        raise ConfigError(f"backend: {backend} is not available: {reason}")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def cpu_has_bf16() -> bool:
    """Whether this CPU has units for bf16."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_of_slow_bf16(precision: str, device: str) -> None:
    """A line on standard error where bf16 is asked for and the CPU it is to run on has no units for it."""
    if precision == "bf16" and device == "cpu" and not cpu_has_bf16():
        print("precision: this CPU has no bf16 units; bf16 takes longer than fp32 here", file=sys.stderr, flush=True)


DEVICE_HELP = "auto, cpu or cuda"
BACKEND_HELP = f"famseg_kernels backend: {', '.join(BACKENDS)}"
CHECKPOINT_HELP = "a run's checkpoints/best.ckpt"
OR_PRETRAINED = "; default: the network that comes with famseg"


@dataclass(frozen=True)
class InferenceOptions:
    """How a trained network is run."""

    flips: bool = option(False, "average over the image and its mirror image (twice the time)")
    batch_size: int = option(8, "images a step")
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32, or bf16: faster where the CPU or GPU has units for it")
    device: Literal["auto", "cpu", "cuda"] = option("auto", DEVICE_HELP)
    backend: str = option("auto", BACKEND_HELP)

    def __post_init__(self) -> None:
        expect_number("batch_size", self.batch_size, 1)
