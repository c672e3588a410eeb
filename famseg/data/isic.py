"""The ISIC challenges' lesion segmentation (2016, 2017, and Task 1 of 2018): photographs of skin, and lesions' masks.

*_Data/ or *_Input/    ISIC_NNNNNNN.jpg: colour
*_GroundTruth/         ISIC_NNNNNNN_segmentation.png, or _Segmentation: 0, and 255 in the lesion
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from famseg.data.sample import Sample
from famseg.files.errors import DataError
from famseg.files.images import read_colour_image, read_image
from famseg.files.labels import black_and_white, read_labels, require_same_size
from famseg.files.listing import by_name, given_path, list_images, stem, tell_left_out

_IMAGES, _MASKS = ("_Data", "_Input"), "_GroundTruth"
_IMAGE, _MASK = re.compile(r"ISIC_\d{7}"), re.compile(r"(ISIC_\d{7})_[Ss]egmentation")


class ISIC(Sequence[Sample]):
    """The samples of one part of a challenge (training, validation or test), ordered by name, read when asked for.

    `directory` holds a folder of images and its folder of masks, or is the former with the latter beside it. Pairs are
    checked at construction (listing only), pixels at reading. The archives say nothing of patients: every image counts
    as its own subject. There are no pixel sizes.

    Args:
        colour: images as (H, W, 3) instead of (H, W).

    Raises:
        DataError: not one such pair of folders, an image without a mask or with two, files that cannot be decoded or
            differ in size, a mask with other values than 0 and 255.
    """

    labels = ("background", "lesion")

    def __init__(self, directory: str | os.PathLike[str], *, colour: bool = False) -> None:
        self._read = read_colour_image if colour else read_image
        self.directory, candidates = _folders(given_path(directory))
        images = by_name(list_images(self.directory))
        others = [path.name for name, path in images.items() if not _IMAGE.fullmatch(name)]
        tell_left_out(f"{self.directory}", "no name like ISIC_0000000.jpg", others)
        self.names = sorted(name for name in images if _IMAGE.fullmatch(name))
        if not self.names:
            raise DataError(f"{self.directory}: expected images like ISIC_0000000.jpg, found none; unpack them here")
        folder, masks = _masks(candidates, self.names, self.directory)
        self._files: list[tuple[Path, Path]] = []
        for name in self.names:
            if name not in masks:
                raise DataError(f"{images[name]}: its mask {folder / name}_segmentation.png is missing; add it")
            self._files.append((images[name], masks[name]))

    @property
    def subjects(self) -> list[str]:
        """The subject of every sample, without reading an image."""
        return self.names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        name, (image_path, mask_path) = self.names[index], self._files[index]
        (image, _), mask = self._read(image_path), read_labels(mask_path)
        require_same_size(image, mask, image_path, mask_path)
        lesion = black_and_white(mask) if mask.any() else mask
        if lesion is None:
            raise DataError(f"{mask_path}: expected the values 0 and 255, found others; unpack the archive again")
        return Sample(name=name, subject=name, image=image, mask=lesion)


def _folders(directory: Path) -> tuple[Path, list[Path]]:
    """The folder of images, and those in which its masks may be."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such folder; give the folder that holds ISIC's *_Input/ and *_GroundTruth/")
    root = Path(os.path.abspath(directory))  # by the name it was given: a link's target may be called anything
    found = _subfolders(root, _IMAGES) or ([root] if root.name.endswith(_IMAGES) else [])
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{directory}: expected one folder of images, called *_Data or *_Input, found {names}; "
            + (f"give one of them, like isic:{found[0]}" if found else "give the folder that holds it")
        )
    return found[0], _subfolders(found[0].parent, (_MASKS,))


def _subfolders(root: Path, endings: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.name.endswith(endings) and path.is_dir())


def _masks(candidates: Sequence[Path], names: Sequence[str], images: Path) -> tuple[Path, dict[str, Path]]:
    """The one folder with masks of these images, and its masks by the image's name."""
    wanted, pairs = set(names), {}
    alone: dict[Path, list[str]] = {}
    for folder in candidates:
        masks: dict[str, Path] = {}
        alone[folder] = []
        for path in list_images(folder):
            match = _MASK.fullmatch(stem(path))
            if match is None or match[1] not in wanted:
                alone[folder].append(path.name)
            elif other := masks.get(match[1]):
                raise DataError(f"{path}: {match[1]} has a mask already, {other.name}; remove one of them")
            else:
                masks[match[1]] = path
        if masks:
            pairs[folder] = masks
    if len(pairs) != 1:
        found = ", ".join(folder.name for folder in pairs) or "none"
        raise DataError(
            f"{images.parent}: expected one folder *{_MASKS} with masks of {images.name}, like "
            f"{names[0]}_segmentation.png, found {found}; put it beside the images"
        )
    folder, masks = next(iter(pairs.items()))
    tell_left_out(f"{folder}", f"no mask of an image in {images.name}", alone[folder])
    return folder, masks
