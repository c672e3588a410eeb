"""Which files of a folder are images, what they are called, and a word about the others."""

from __future__ import annotations

import os
import sys
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from famseg.files.dicom import is_dicom
from famseg.files.errors import DataError, one_line
from famseg.files.raster import FORMATS

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".j2k"),
    *(".dcm", ".dicom"),
)
_SYSTEM = ("thumbs.db", "desktop.ini", "icon\r")  # and names that start with a dot
_COMPANION = "._"  # macOS keeps a file's attributes beside it under this name, image suffix and all
_NAMED = 5  # files of a list that are named


def given_path(text: str | os.PathLike[str]) -> Path:
    """A path as typed; `~` is the home folder also where no shell has seen it (after a colon, in a YAML file)."""
    return Path(os.path.expanduser(text))


def stem(path: Path) -> str:
    """A file's name without an image's suffix. What follows any other dot belongs to the name: 1.2.840.10 is one."""
    return path.name[: -len(path.suffix)] if path.suffix.lower() in SUFFIXES else path.name


def same_name(text: str) -> str:
    """A name in the form in which names are compared: macOS and others write one ä in two ways."""
    return unicodedata.normalize("NFC", text)


def list_images(folder: Path) -> list[Path]:
    """The images in a folder (not in folders inside it), ordered by name; what else is there is told.

    An image is what has an image's suffix, so that a damaged one is named by who reads it, or an image's content.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); give another folder") from error
    files = [path for path in files if not is_hidden(path.name)]
    images = [path for path in files if _is_image(path)]
    tell_left_out(f"{folder}", "no image", [path.name for path in files if path not in set(images)])
    return images


def by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Files of one folder by their names without suffix. Raises DataError where two of them have the same."""
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(same_name(stem(path)), path)
        if other is not path:
            raise DataError(f"{path}: {other.name} has the same name but for the suffix; rename or remove one of them")
    return found


def tell_left_out(place: str, reason: str, names: Sequence[str]) -> None:
    """One line on standard error about what is not used, if there is any: how many, why, and the first names."""
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        listed = one_line(", ".join(names[:_NAMED]))
        print(f"famseg: {place}: {len(names)} left out ({reason}): {listed}{more}", file=sys.stderr, flush=True)


def is_hidden(name: str) -> bool:
    """Whether a file is the system's own and goes without a word."""
    return (name.startswith(".") and not name.startswith(_COMPANION)) or name.lower() in _SYSTEM


def _is_image(path: Path) -> bool:
    if path.name.startswith(_COMPANION) or path.is_dir() or (path.exists() and not path.is_file()):
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            if is_dicom(file.read(132)):
                return True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path, formats=FORMATS).close()
    except Image.DecompressionBombError:
        return True
    except Exception:  # whatever stops Pillow from knowing it
        return False
    return True
