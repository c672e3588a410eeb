"""What the commands have in common: one line for what went wrong, exit codes, and an output that may be cut off."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from famseg.cli import evaluate, export, predict, train
from famseg.cli.command import run
from famseg.training.config import ConfigError, Diverged

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main, "export": export.main}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-such-flag"], "no-such-flag"),
        (["--config"], "expected one argument"),
        (["--config", "/nowhere.yaml"], "nowhere"),
        (["--config", "{bad}"], "parsing"),
        (["--config", "{unknown}"], "colour"),
        (["--config", "{list}"], "config"),
        (["--out", "a", "b", "--out"], "expected one argument"),
    ],
)
def test_a_usage_error_is_one_line_with_the_way_to_help(name, arguments, words, tmp_path, capsys):
    files = {"bad": "a: [1", "unknown": "colour: 1", "list": "- 1"}
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    given = [argument.format(**{file: tmp_path / file for file in files}) for argument in arguments]
    assert COMMANDS[name](given) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"famseg-{name}: ") and message.count("\n") == 1
    assert words in message and f"famseg-{name} --help" in message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("two\nlines"), 2),
        (Diverged("nan"), 3),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "metrics.json"), 1),
        (MemoryError(), 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), 1),
    ],
)
def test_exit_codes(error, code, capsys):
    def body():
        raise error

    assert run("famseg-x", body) == code
    message = capsys.readouterr().err
    assert message.startswith("famseg-x: ") and message.count("\n") == 1


def in_another_process(body: Callable[[], int], stdout: int) -> tuple[int, str]:
    """Exit code and standard error of a command with this body and standard output, as at an interpreter's end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(stdout, 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.BufferedWriter(io.FileIO(fd, "w")), "ascii") for fd in (1, 2))
        code = run("famseg-x", body)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            code = 120
        os._exit(code)
    os.close(writer)
    with open(reader) as errors:
        message = errors.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), message


def say(text: str, flush: bool, code: int = 0) -> Callable[[], int]:
    return lambda: print(text, flush=flush) or code


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_has_gone_ends_it_quietly(flush):
    reader, writer = os.pipe()
    os.close(reader)
    assert in_another_process(say("a line", flush), writer) == (141, "")
    os.close(writer)


@pytest.mark.parametrize("flush", [False, True])
def test_an_output_that_cannot_be_written_is_named(flush):
    with open("/dev/full", "wb") as full:
        code, message = in_another_process(say("a line", flush), full.fileno())
    assert (code, message) == (1, "famseg-x: standard output cannot be written (No space left on device)\n")


def test_a_sign_that_the_output_lacks_is_escaped(tmp_path: Path):
    with open(tmp_path / "out", "wb") as out:
        assert in_another_process(say("mm² \udcff", False), out.fileno()) == (0, "")
    assert (tmp_path / "out").read_text() == "mm\\xb2 \\udcff\n"


def test_head_of_a_real_command():
    script = "import sys; from famseg.cli.train import main; sys.exit(main(['--summary']))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --- what must be said before torch is imported -------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing", "a_count", "a_policy"],
)
def test_threads_are_told_to_sleep_soon_unless_the_user_says_otherwise(given, expected):
    code = "import sys, os, famseg.cli; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", expected]


def test_the_package_gives_what_it_names_and_nothing_else():
    import famseg

    assert all(callable(getattr(famseg, name)) for name in famseg.__all__)
    with pytest.raises(AttributeError, match="'famseg' has no attribute 'nothing'"):
        famseg.nothing  # noqa: B018
