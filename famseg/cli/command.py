"""What the commands share: flags from a dataclass, exit codes, a progress bar."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_type_hints

import cv2
from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console
from rich.progress import track

from famseg.files.errors import DataError
from famseg.training.config import ConfigError

Item = TypeVar("Item")


def build_parser(
    prog: str,
    description: str | None,
    options: type,
    positional: Sequence[str] = (),
    config_help: str = "YAML file with any of the flags below",
) -> ArgumentParser:
    """One flag per field of a dataclass with the help in its metadata, and `--config` for YAML with the same names.

    A flag of a bool may stand alone: `--flips` is `--flips true`. Fields named in `positional` are arguments
    without a flag; they are given on the command line only.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", action=ActionConfigFile, help=config_help)
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        several = field.default_factory is not dataclasses.MISSING
        text = field.metadata["help"]
        if field.name in positional:
            # Optional for the parser: its own message about what is missing is longer than a line.
            parser.add_argument(field.name, type=str, nargs="*" if several else "?", default=None, help=text)
        else:
            flag = "--" + field.name.replace("_", "-")
            switch: dict[str, Any] = {"nargs": "?", "const": True} if hints[field.name] is bool else {}
            parser.add_argument(flag, type=hints[field.name], default=field.default, help=text, **switch)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The options by name; bad ones end the program with one line and exit code 2."""
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if name != "config"}


def run(prog: str, body: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code: 2 and one line for bad usage or input, 130 for an interrupt, 1 for a full disk, else `body`'s own.

    Anything else is a bug and ends in its traceback, exit code 1.
    """
    # OpenCV's own remarks on damaged files; ours say what to do.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return body()
    except (DataError, ConfigError) as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, interrupted
    except OSError as error:  # a full disk, a folder that cannot be written
        code, message = 1, str(error)
    print(f"{prog}: {message}", file=sys.stderr)
    return code


def required(name: str, value: Any, example: str) -> None:
    """ConfigError when an argument that has no default was not given."""
    if value is None or value == []:
        raise ConfigError(f"{name}: is missing; give it like {example}")


def progress(items: Sequence[Item], words: str) -> Iterable[Item]:
    """The items, with a progress bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    return track(items, words, console=console, transient=True, disable=not console.is_terminal)
