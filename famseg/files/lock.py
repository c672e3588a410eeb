"""An output folder belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from famseg.files.errors import DataError

_LOCK = ".lock"


class Busy(DataError):
    """Another process is at work in the folder."""


def folder_for(out: str | None, what: str) -> Path:
    """`--out`, or runs/TIME-WHAT."""
    return Path(out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{what}")


@contextmanager
def locked(path: Path, remedy: str = "choose another --out", *, fresh: bool = True) -> Iterator[Path]:
    """`path` as this process's own inside the `with`: made where it is missing, and locked against every other process.

    The lock comes first and the checks after it, so two runs that start at once cannot both pass them. It is a file
    that the kernel, or the server of a network folder, gives to one process at a time and takes back however that
    process ends. On a file system without locks it belongs to whoever created it; a killed process leaves it behind.

    Args:
        remedy: for the message where `path` is not empty.
        fresh: whether `path` must be new or empty, so that results never mix with older ones.

    Raises:
        Busy: another process is at work in `path`.
        DataError: it has files in it (`fresh`), or it cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise DataError(f"out: expected a folder, {path} is a file; {remedy}")
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path / _LOCK)
    except OSError as error:
        raise DataError(f"out: {path} cannot be written to ({error.strerror}); choose another --out") from error
    if lock is None:
        raise Busy(
            f"out: another run is at work in {path} (it holds {_LOCK} there); "
            "choose another --out, or wait until it ends"
        )
    try:
        if fresh and any(entry.name != _LOCK for entry in path.iterdir()):
            raise DataError(f"out: expected a new or empty folder, {path} has files in it; {remedy}")
        yield path
    finally:
        with suppress(OSError):
            (path / _LOCK).unlink()
        os.close(lock)
        with suppress(OSError):  # not empty: there are results
            for folder in made:
                folder.rmdir()


def _lock(path: Path) -> int | None:
    """An open file that this process alone holds; None where another one holds it."""
    while True:
        created = not os.path.lexists(path)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if created else 0), 0o666)
        except FileExistsError:  # in this very moment
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if created and not isinstance(error, BlockingIOError):
                return file  # a file system without locks
            os.close(file)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # its holder ended and removed it between the two calls
