"""What the commands share: flags from a dataclass, exit codes, a progress bar."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import cv2
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, get_loader, set_loader
from rich.console import Console
from rich.progress import track

from famseg.files.errors import one_line
from famseg.memory import keep_freed_memory
from famseg.options import ConfigError, expect_no_references

if TYPE_CHECKING:
    from famseg.inference import Network

Item = TypeVar("Item")
_load_yaml = get_loader("yaml")


def _load_plain_yaml(text: str) -> Any:
    expect_no_references(text)
    return _load_yaml(text)


set_loader("yaml", _load_plain_yaml, exceptions=(yaml.YAMLError,))


def build_parser(
    prog: str,
    description: str | None,
    options: type,
    positional: Sequence[str] = (),
    config_help: str = "YAML file with any of the flags below",
) -> ArgumentParser:
    """One flag per field of a dataclass with the help in its metadata, and `--config` for YAML with the same names.

    A flag of a bool may stand alone: `--flips` is `--flips true`. Fields named in `positional` are arguments
    without a flag; they are given on the command line only. Fields of a base class come last.
    """
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help=config_help)
    hints = get_type_hints(options)
    own = inspect.get_annotations(options)
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name not in own):
        several = field.default_factory is not dataclasses.MISSING
        text = field.metadata["help"]
        if field.name in positional:
            # Optional for the parser: its own message about what is missing is longer than a line.
            parser.add_argument(field.name, type=str, nargs="*" if several else "?", default=None, help=text)
        else:
            flag = "--" + field.name.replace("_", "-")
            switch: dict[str, Any] = {"nargs": "?", "const": True} if hints[field.name] in (bool, bool | None) else {}
            parser.add_argument(flag, type=hints[field.name], default=field.default, help=text, **switch)
    return parser


def parse(parser: ArgumentParser, options: type, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The options by name, with `~` expanded also where no shell has done it: in YAML, and after `=`.

    Raises:
        ConfigError: one line, for what cannot be understood.
    """
    try:
        parsed = vars(parser.parse_args(arguments))
    except (argparse.ArgumentError, ArithmeticError, ValueError, RecursionError) as error:  # of files that are no YAML
        words = re.sub(r'^Parser key "(\w+)":', r"\1:", " ".join(str(error).split()))
        raise ConfigError(f"{words}; {parser.prog} --help lists all options") from None
    for field in dataclasses.fields(options):
        if field.metadata.get("path") and (value := parsed[field.name]):
            parsed[field.name] = os.path.expanduser(value)
    return {name: value for name, value in parsed.items() if name != "config"}


def run(prog: str, body: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code: `body`'s own, or with one line on standard error 2 for bad usage or input, 3 for a training that
    diverged, 130 for an interrupt, 1 for a full disk or too little memory.

    141, without a line, where nobody reads the output any more (`| head`). Anything else is a bug and ends in its
    traceback, exit code 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a sign that the terminal lacks costs no result
    # OpenCV's own remarks on damaged files; ours say what to do.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ["OPENCV_LOG_LEVEL"] = "SILENT"  # of processes that this one starts
    keep_freed_memory()
    code = 0
    try:
        code, message = _outcome(body, interrupted)
        if message:
            print(f"{prog}: {one_line(message)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or 128 + signal.SIGPIPE
        _drop_output()
    except OSError as error:
        code = code or 1
        with suppress(OSError):
            print(f"{prog}: standard output cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        _drop_output()
    return code


def _drop_output() -> None:
    """What is left in the buffers would be flushed once more, and complained about, at the interpreter's end."""
    with open(os.devnull, "wb") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                os.dup2(nowhere.fileno(), stream.fileno())


def _outcome(body: Callable[[], int], interrupted: str) -> tuple[int, str]:
    """`body`'s exit code and "", or another one and what to say."""
    try:
        return body(), ""
    except KeyboardInterrupt:
        return 130, interrupted
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that cannot be written
        if error.errno == errno.ENOSPC and error.filename is None:
            raise  # of standard output: files are named where they are written
        return 1, str(error)
    except (MemoryError, RuntimeError, ValueError) as error:
        if (code := getattr(error, "exit_code", None)) is not None:  # DataError, ConfigError, Diverged
            return code, str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            return 1, "not enough memory; try a smaller batch size, image size or model"
        raise


def chosen_network(checkpoint: str | None) -> Network:
    """The network of a checkpoint; without one that which comes with famseg, and a line that says so."""
    from famseg.inference import load_network, load_pretrained  # not for `famseg-train --help`

    if checkpoint is not None:
        return load_network(checkpoint)
    network = load_pretrained()
    print(f"no checkpoint named: taking the network that comes with famseg ({network.config['model']})", flush=True)
    return network


def required(name: str, value: Any, example: str) -> None:
    """ConfigError when an argument that has no default was not given."""
    if value is None or value == []:
        raise ConfigError(f"{name}: is missing; give it like {example}")


def progress(items: Sequence[Item], words: str) -> Iterable[Item]:
    """The items, with a progress bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    return track(items, words, console=console, transient=True, disable=not console.is_terminal)
