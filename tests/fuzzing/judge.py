"""What is promised of every reader of files, and whether it is kept for one file.

A reader returns a value that is valid and in which no library saw damage, or raises an error for people: one line that
names the file. It does so within two seconds and 2 GiB, runs no code that the file names, writes nothing, and lets
libraries say little.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from famseg.files.errors import one_line

SECONDS = 2.0  # of the processor's time
MEMORY = 2**31  # bytes, beside what the process has
LONGEST = 1000  # signs in a message
MOST_LINES = 20  # said beside it
_OURS = re.compile(r"/(?:famseg|famseg_kernels)/[\w/]+\.py$")
_NO_MEMORY = re.compile(r"(?:out of|enough|allocate|insufficient) memory|bad_alloc", re.IGNORECASE)
# A length in a pickle is asked for before the file is found to be shorter, and never touched.
_ASKS = ("torch/serialization.py", "torch/_weights_only_unpickler.py")
_DEEDS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn", "os.kill"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "shutil.rmtree"),
    *("socket.connect", "ctypes.dlopen", "pickle.find_class"),
)
_WRITES_CODE = ("typing", "dataclasses", "annotationlib", "collections")  # for annotations and classes, not from files
# What a library may say of a file that is read nevertheless is no more than a remark on its form.
_DAMAGE = re.compile(
    r"error|corrupt|invalid(?! SOS)|incorrect data|not enough|too (?:few|little|short)|fail|overrun|bad |premature|"
    r"truncat|unexpected|missing|damage|broken",
    re.IGNORECASE,
)


class Broken(Exception):
    """A promise that was not kept. `fault` is the same for the same cause, as far as can be told."""

    def __init__(self, fault: str, words: str) -> None:
        super().__init__(f"{fault}: {words}")
        self.fault = fault


class _TooSlow(BaseException):
    """Not an Exception: readers turn those into errors for people."""


@dataclass(frozen=True)
class Reader:
    """`read` raises Broken itself for a value that is not valid."""

    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]  # for people
    filename: str = "x"
    names_file: bool = True  # in the message; else what in it is wrong
    put: Callable[[bytes, Path], Path] | None = None  # content and a folder to the file's path


def expect(valid: bool, what: str) -> None:
    if not valid:
        raise Broken("not valid", what)


def judge(reader: Reader, content: bytes, folder: Path) -> str:
    """What the reader says to a file of this content, "" where it returns a value. Raises Broken."""
    if reader.put is None:
        path = folder / reader.filename
        path.write_bytes(content)
    else:
        path = reader.put(content, folder)
    failure: BaseException | None = None
    with heard() as lines, _limited(), warnings.catch_warnings(record=True) as caught, _watched() as deeds:
        warnings.simplefilter("default")
        start = time.process_time()
        try:
            reader.read(path)
        except (Exception, _TooSlow, RecursionError) as error:
            failure = error
        seconds = time.process_time() - start
    if isinstance(failure, Broken):
        raise failure
    if deeds:
        raise Broken("did something", ", ".join(deeds[:3]))
    if failure is not None and (short := _out_of_memory(failure)) is not None:
        raise Broken(f"memory {_place(short)}", _words(short)) from failure
    if isinstance(failure, _TooSlow) or seconds > SECONDS:
        place = "" if failure is None else _place(failure)
        raise Broken(f"slow {place}", f"{seconds:.1f} s of the processor") from failure
    if failure is not None and not isinstance(failure, reader.errors):
        raise Broken(f"{type(failure).__name__} {_place(failure)}", _words(failure)) from failure
    message = "" if failure is None else one_line(str(failure))  # as commands print it
    said = [line for line in lines if not line.startswith("famseg: ")] + [_words(w.message) for w in caught]
    damage = [line for line in said if _DAMAGE.search(line)] if failure is None else []
    if damage or len(lines) + len(caught) > MOST_LINES:
        first = [*damage, *said, *lines][0]
        kind = "read in spite of" if damage else "says a lot:"
        raise Broken(f"{kind} {re.sub(r'[^a-zA-Z ]+', '', first)[:40]}", f"{len(said)} lines: {first[:200]}")
    named = str(path) in message or f"{path.parent}: " in message or not reader.names_file
    if failure is not None and not (named and message.strip() and message.isprintable() and len(message) <= LONGEST):
        kind = "no name" if not named else "too long" if len(message) > LONGEST else "not one line of text"
        raise Broken(f"{kind} {_place(failure)}", repr(message[:200])) from failure
    return message


def _place(error: BaseException) -> str:
    """The last line of this project's code that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _OURS.search(frame.filename)] or frames[-1:]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"


def _words(error: object) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _out_of_memory(error: BaseException) -> BaseException | None:
    seen: BaseException | None = error
    while seen is not None:
        is_library = not isinstance(seen, ValueError) and _NO_MEMORY.search(str(seen))
        if isinstance(seen, MemoryError) or is_library:
            frames = traceback.extract_tb(seen.__traceback__)
            return None if frames and frames[-1].filename.endswith(_ASKS) else seen
        seen = seen.__cause__ or seen.__context__
    return None


# --- what is watched meanwhile --------------------------------------------------------------------------------------

_deeds: list[str] | None = None
_is_hooked = False


def _hook(event: str, arguments: Sequence[Any]) -> None:
    if _deeds is None:
        return
    done = ""
    if event in _DEEDS:
        done = f"{event} {arguments!r:.80}"
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and isinstance(arguments[2], int):
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        done = f"opened {arguments[0]!r:.80} to write" if writes else ""
    elif event == "exec" and getattr(arguments[0], "co_filename", "").startswith("<string"):
        module = sys._getframe(1).f_globals.get("__name__")
        done = "" if module in _WRITES_CODE else f"ran a text as code in {module}"
    if done and not _importing():
        _deeds.append(done)


def _importing() -> bool:
    """Whether it is a module that does it while it is imported, late: of this machine, not of a file."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """What was done that no reader does."""
    global _deeds, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)  # for the life of the process
        _is_hooked = True
    _deeds = deeds = []
    try:
        yield deeds
    finally:
        _deeds = None


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The lines that go to standard output and error inside, whoever writes them."""
    lines: list[str] = []
    sys.stdout.flush()
    with open(os.memfd_create("heard"), "w+b") as file:
        kept = os.dup(1), os.dup(2)
        before = sys.stdout, sys.stderr
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with open(1, "w", closefd=False) as out, open(2, "w", closefd=False) as err:
            sys.stdout, sys.stderr = out, err
            try:
                yield lines
            finally:
                sys.stdout, sys.stderr = before
                out.flush()
                err.flush()
                for number, copy in zip((1, 2), kept, strict=True):
                    os.dup2(copy, number)
                    os.close(copy)
        file.seek(0)
        lines += file.read(2**20).decode("utf-8", "replace").splitlines()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """MEMORY, and an end to what takes much longer than SECONDS, unless it never comes back from C."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _interrupt)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _interrupt(*_: object) -> None:
    raise _TooSlow
