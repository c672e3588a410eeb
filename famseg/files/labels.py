"""Masks: index images, one label a pixel."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from famseg.anatomy import BY_LABEL, Structure
from famseg.files.errors import DataError
from famseg.files.raster import open_picture
from famseg.files.writing import write_atomic


def read_labels(path: Path) -> np.ndarray:
    """Decode an index image to (H, W) uint8 labels as stored (a palette is not looked up), turned like an image.

    Raises:
        DataError: as `open_picture`, the format is a lossy one, or it holds colours instead of one label per pixel.
    """
    picture = open_picture(path, exact=True, colour=True)
    if picture.mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
        raise DataError(
            f"{path}: expected one label per pixel (8-bit grey or palette PNG), found mode {picture.mode}; "
            "save the label indices, not their colours"
        )
    labels = np.asarray(picture)
    # Wider index files are fine as long as the labels fit; the caller judges the values that do.
    return np.where((labels < 0) | (labels > 255), 255, labels).astype(np.uint8)


def require_same_size(image: np.ndarray, mask: np.ndarray, image_path: Path, mask_path: Path) -> None:
    """DataError when an image and its mask differ in size."""
    if image.shape[:2] != mask.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], mask.shape
        raise DataError(
            f"{mask_path}: expected {w}x{h} pixels as in {image_path.name}, found {mask_w}x{mask_h}; "
            "export the pair again at one size"
        )


def black_and_white(mask: np.ndarray) -> np.ndarray | None:
    """A mask (H, W) of 0 and 255 as labels 0 and 1; None for one that holds anything else, or nothing but 0."""
    white = mask == 255
    return white.astype(np.uint8) if white.any() and not mask[~white].any() else None


def write_labels(path: Path, labels: np.ndarray, classes: Sequence[Structure] = BY_LABEL) -> None:
    """Write labels (H, W) uint8 as a palette PNG: viewers show the classes' colours, readers see the indices."""
    content = io.BytesIO()
    picture = Image.fromarray(labels)
    picture.putpalette([value for structure in classes for value in structure.palette])
    picture.save(content, format="PNG")
    write_atomic(path, content.getvalue())
