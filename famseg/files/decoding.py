"""The bytes of a file, and what a decoder says about them: nothing it remarks on is taken as a good picture."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from famseg.files.errors import DataError

LARGEST = 2**26  # px; beyond any scanner's frame, and labelling one that large takes 1 GB

# libjpeg ("Corrupt JPEG data: 523 extraneous bytes before marker 0xd9", "Premature end of JPEG file"), libtiff
# ("LZWDecode: Not enough data", "tempfile.tif: Using code not yet in table"), libpng ("libpng warning: IDAT: incorrect
# data check"), and what pydicom and Pillow warn of.
_COMPLAINT = re.compile(
    r".*(?:[Cc]orrupt|[Pp]remature|[Tt]runcated|End of file|Decode: |tempfile\.tif|JPEGLib|"
    r"libpng warning: I(?:DAT|END))"
)
_one_listener = threading.Lock()


@contextlib.contextmanager
def decoding(path: Path, remedy: str) -> Iterator[None]:
    """Names `path` in whatever goes wrong inside, in one line; a decoder that only complains has failed as well.

    Raises:
        DataError: with the reason of a DataError inside, of any other exception, or of the decoder's complaint.
    """
    failure: Exception | None = None
    with _standard_error() as heard, warnings.catch_warnings(record=True) as caught:  # one thread at a time
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:  # decoders raise whatever a file makes them stumble over
            failure = error
    remarks = (remark for remark in [*heard, *(str(w.message) for w in caught)] if _COMPLAINT.match(remark))
    if remark := next(remarks, None):
        raise DataError(f"{path}: cannot be decoded whole ({remark.strip()}); {remedy}") from failure
    if isinstance(failure, DataError):
        raise DataError(f"{path}: {failure}") from failure
    if failure is not None:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise DataError(f"{path}: cannot be decoded ({reason}); {remedy}") from failure


@contextlib.contextmanager
def _standard_error() -> Iterator[list[str]]:
    """The lines that C code writes to standard error inside: libjpeg and libtiff report damage in no other way.

    What is no complaint of a decoder is passed on afterwards: other threads write there too.
    """
    lines: list[str] = []
    with _one_listener:
        kept = os.dup(2)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)  # more than a pipe holds is dropped; nobody reads before the end
        os.dup2(writing, 2)
        os.close(writing)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            with open(reading, encoding="utf-8", errors="surrogateescape", newline="") as pipe:
                text = pipe.read()
            lines += text.splitlines()
            others = "".join(line for line in text.splitlines(keepends=True) if not _COMPLAINT.match(line))
            if others:
                os.write(2, others.encode("utf-8", "surrogateescape"))


def hear_jpeg(content: bytes) -> None:
    """Make libjpeg speak up about a damaged JPEG stream: Pillow keeps its remarks to itself, OpenCV prints them.

    An eighth of the size: all of the stream is read, little is computed.
    """
    cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)


def expect_size(height: int, width: int) -> None:
    """DataError for a picture too large to be labelled, before memory is asked for."""
    if height * width > LARGEST:
        raise DataError(f"expected at most {LARGEST / 1e6:.0f} million pixels, found {width}x{height}; crop it")


def file_bytes(path: Path) -> bytes:
    """The content of a file. Raises DataError when it cannot be read or is empty."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check that the file exists") from error
    except ValueError as error:  # a NUL in the name
        raise DataError(f"{str(path)!r}: cannot be read ({error}); check the name") from error
    if not content:
        raise DataError(f"{path}: the file is empty; copy it again")
    return content


def eight_bit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values to uint8, `low` and below to 0, `high` and above to 255; where these are one, what is above is white."""
    if high <= low:
        return (values > low).astype(np.uint8) * np.uint8(255)
    scaled = (values - np.float64(low)) * (255.0 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
