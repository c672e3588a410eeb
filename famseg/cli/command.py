"""What the commands share: flags from a dataclass, exit codes, the device."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_type_hints

import cv2
import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console
from rich.progress import track

from famseg.data.errors import DataError
from famseg.training.config import ConfigError
from famseg_kernels import available_backends
from famseg_kernels.backends import CHOICES

Item = TypeVar("Item")


def build_parser(prog: str, description: str | None, options: type, positional: Sequence[str]) -> ArgumentParser:
    """One flag per field of a dataclass with the help in its metadata, and `--config` for YAML with the same names.

    Fields named in `positional` are arguments without a flag; they are given on the command line only.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the flags below")
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        several = field.default_factory is not dataclasses.MISSING
        text = field.metadata["help"]
        if field.name in positional:
            # Optional for the parser: its own message about what is missing is longer than a line.
            parser.add_argument(field.name, type=str, nargs="*" if several else "?", default=None, help=text)
        else:
            parser.add_argument(
                "--" + field.name.replace("_", "-"), type=hints[field.name], default=field.default, help=text
            )
    return parser


def run(prog: str, parser: ArgumentParser, arguments: Sequence[str] | None, body: Callable[..., int]) -> int:
    """Parse and run; exit code 2 and one line for bad usage or input, 130 for an interrupt, else `body`'s own.

    Anything else is a bug and ends in its traceback, exit code 1.
    """
    cv2.utils.logging.setLogLevel(
        cv2.utils.logging.LOG_LEVEL_SILENT
    )  # its own remarks on damaged files; ours say what to do
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if name != "config"}
    try:
        return body(**options)
    except (DataError, ConfigError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def required(name: str, value: Any, example: str) -> None:
    """ConfigError when an argument that has no default was not given."""
    if value is None or value == []:
        raise ConfigError(f"{name}: is missing; give it like {example}")


def progress(items: Sequence[Item]) -> Iterable[Item]:
    """The items, with a progress bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    return track(items, "images", console=console, transient=True, disable=not console.is_terminal)


def device_for(device: str, backend: str) -> str:
    """ "cpu" or "cuda" for the wish "auto", "cpu" or "cuda"; ConfigError where device or backend are not there."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device: cuda was asked for, but torch sees no CUDA GPU; use --device cpu or auto")
    if backend not in CHOICES:
        raise ConfigError(f"backend: expected one of {', '.join(CHOICES)}, got {backend!r}")
    if backend not in ("auto", "reference") and (reason := available_backends()[backend]) != "ok":
        raise ConfigError(f"backend: {backend} is not available: {reason}")
    return "cuda" if has_gpu and device != "cpu" else "cpu"
