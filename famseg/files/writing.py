"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from famseg.files.errors import DataError


def empty_folder(path: Path, remedy: str = "choose another --out") -> Path:
    """`path`, which must not exist or be an empty folder: results never mix with older ones. Nothing is made yet.

    Raises:
        DataError: there are files in it, or it is a file itself.
    """
    if path.is_dir() and any(path.iterdir()):
        raise DataError(f"out: expected a new or empty folder, {path} has files in it; {remedy}")
    if path.exists() and not path.is_dir():
        raise DataError(f"out: expected a folder, {path} is a file")
    return path


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it.

    Raises:
        OSError: it cannot be written; `filename` is `path`.
    """
    # Short: `path` may have the longest name there is.
    temporary = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
