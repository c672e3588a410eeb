"""famseg-predict: masks, overlays and millimetres of images.

Reads PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000 (grey or colour, 8 or 16 bit) and, with pydicom installed, DICOM.
Writes to DIR masks/NAME.png (0 background, then the network's classes as it counts them: 1 femur, 2 head unless it was
trained with other ones; at the image's own size), overlays/NAME.png and biometrics.csv.

Exit code: 0 all images done, 1 some could not be read and were skipped, 2 none could, the results cannot be written
(a full disk), or bad usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from famseg.anatomy import Structure, measures_of, reported
from famseg.biometrics import Axis, Ellipse, doubts
from famseg.cli.command import build_parser, chosen_network, parse, progress, required, run
from famseg.files.errors import DataError
from famseg.files.images import read_colour_image, read_image, write_image
from famseg.files.labels import write_labels
from famseg.files.listing import given_path, list_images, stem
from famseg.files.lock import folder_for, locked
from famseg.files.tables import parse_positive, read_table, write_table
from famseg.gestation import hadlock, intergrowth
from famseg.inference import Network, Reading, readings
from famseg.options import ConfigError, InferenceOptions, device_for, option, warn_of_slow_bf16
from famseg.reporting.overlay import draw_overlay

PROG = "famseg-predict"
PIXEL_SIZE = "pixel_size_mm"
_CHECKPOINTS = (".ckpt", ".pt", ".pth")  # the ends of names that are no image's
_LONGEST_NAME = 255  # bytes, of every usual file system


@dataclass(frozen=True)
class Options(InferenceOptions):
    images: list[str] = field(
        default_factory=list,
        metadata={
            "help": "image files, and folders of image files; before them a checkpoint of famseg-train (.ckpt), where "
            "the network that comes with famseg is not to be used"
        },
    )
    out: str | None = option(
        None, "new or empty folder for masks/, overlays/ and biometrics.csv; default: runs/TIME-predict", path=True
    )
    pixel_size: str | None = option(
        None, "mm per pixel of all images, or a CSV file with columns filename,pixel_size_mm; default: DICOM's own"
    )
    gestational_age: bool = option(
        False, "also estimate weeks from the lengths, by Hadlock (1984) and INTERGROWTH-21st (2016)"
    )


@dataclass(frozen=True)
class Source:
    """One image that could be read."""

    path: Path
    image: np.ndarray  # (H, W) uint8, for a network of colour (H, W, 3)
    pixel_size: float | None  # mm
    pixel_size_from: str  # "given", "file" or ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code as in the module's description."""
    parser = build_parser(PROG, __doc__, Options, positional=("images",))
    return run(PROG, lambda: _predict(Options(**parse(parser, Options, arguments))))


def _predict(options: Options) -> int:
    named = bool(options.images) and Path(options.images[0]).suffix in _CHECKPOINTS
    checkpoint = os.path.expanduser(options.images[0]) if named else None
    images = options.images[1:] if named else options.images
    required("images", images, f"{PROG} {options.images[0] + ' ' if named else ''}scan.png folder/")
    device = device_for(options.device, options.backend)
    warn_of_slow_bf16(options.precision, device)
    pixel_size = _pixel_sizes(options.pixel_size)
    paths = _files(images)
    network = chosen_network(checkpoint)
    with locked(folder_for(options.out, "predict")) as out:
        return _predict_all(network, paths, pixel_size, options, device, out)


def _predict_all(
    network: Network,
    paths: Sequence[Path],
    pixel_size: Callable[[Path], float | None],
    options: Options,
    device: str,
    out: Path,
) -> int:
    skipped, read = 0, read_image if network.in_channels == 1 else read_colour_image
    pending: deque[Source] = deque()

    def images() -> Iterator[np.ndarray]:
        nonlocal skipped
        for path in progress(paths, "images"):
            try:
                pending.append(_read(path, pixel_size, read))
            except DataError as error:
                print(f"{PROG}: skipped: {error}", file=sys.stderr, flush=True)
                skipped += 1
            else:
                yield pending[-1].image

    rows: list[dict[str, Any]] = []
    found = readings(
        network,
        images(),
        batch_size=options.batch_size,
        flips=options.flips,
        precision=options.precision,
        device=device,
        backend=options.backend,
    )
    try:
        for reading in found:
            rows.append(_write(out, pending.popleft(), reading, network, options.gestational_age))
    except OSError as error:
        if error.filename is None:  # standard error is closed, say
            raise
        reason = f"cannot be written ({error.strerror}); {len(rows)} of {len(paths)} images are done"
        raise DataError(f"{error.filename}: {reason}; make room or choose another --out") from error
    finally:  # also when interrupted: the table has a line for every mask
        if rows:
            write_table(out / "biometrics.csv", rows)
    print(f"{len(rows)} of {len(paths)} images done; results in {out}" if rows else f"none of {len(paths)} images done")
    if rows and not measures_of(network.classes):
        print("nothing is measured of what this network finds: biometrics.csv has no lengths")
    return (1 if rows else 2) if skipped else 0


def _files(inputs: Sequence[str]) -> list[Path]:
    """Every file once, folders listed by name. Raises DataError where results would overwrite each other."""
    paths: list[Path] = []
    for name in inputs:
        path = given_path(name)
        if path.is_dir():
            inside = list_images(path)
            if not inside:
                raise DataError(f"{path}: expected images, found none in this folder")
            paths += inside
        else:
            paths.append(path)
    paths = list(dict.fromkeys(paths))
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(stem(path), path)
        if other is not path:
            raise DataError(f"{path}: would overwrite the results of {other}; give them separately, each its own --out")
    return paths


def _pixel_sizes(text: str | None) -> Callable[[Path], float | None]:
    """The given mm per pixel of an image file, None where it was not given."""
    if text is None:
        return lambda path: None
    if text.lower().endswith(".csv"):
        table = read_table(given_path(text), (PIXEL_SIZE,))
        for row in table.values():
            row.millimetres(PIXEL_SIZE)  # a bad cell ends the command before any image is read
        return lambda path: None if (row := table.row(path)) is None else row.millimetres(PIXEL_SIZE)
    size = parse_positive(text)
    if size is None:
        raise ConfigError(f"pixel_size: expected a positive number of mm or a CSV file, got {text!r}")
    return lambda path: size


def _read(
    path: Path, given: Callable[[Path], float | None], read: Callable[[Path], tuple[np.ndarray, float | None]]
) -> Source:
    if len(os.fsencode(f"{stem(path)}.png")) > _LONGEST_NAME:
        raise DataError(f"{path}: its results would have a name of more than {_LONGEST_NAME} bytes; rename it")
    image, own = read(path)
    if (size := given(path)) is not None:
        return Source(path, image, size, "given")
    return Source(path, image, own, "" if own is None else "file")


def _write(out: Path, source: Source, reading: Reading, network: Network, with_age: bool) -> dict[str, Any]:
    """Write one image's mask and overlay; its line of biometrics.csv."""
    labels, classes = reading.labels, network.classes
    height, width = labels.shape
    row: dict[str, Any] = {
        "file": str(source.path),
        "width": width,
        "height": height,
        "pixel_size_mm": source.pixel_size,
        "pixel_size_from": source.pixel_size_from,
    }
    flags = [] if source.pixel_size is not None or not measures_of(classes) else ["no pixel size"]
    shapes: dict[str, Ellipse | Axis | None] = {}
    caption = []
    for structure in reported(classes):
        region = labels == structure.label
        if (measure := structure.measure) is None:
            caption += [structure.word] if region.any() else []
            continue
        shape = shapes[structure.name] = measure.fit(region)
        pixels = None if shape is None else shape.length
        mm = None if pixels is None or source.pixel_size is None else pixels * source.pixel_size
        row |= {f"{measure.name}_mm": mm, f"{measure.name}_px": pixels}
        if measure.name in network.expectations:
            error, size = reading.expected_error.get(measure.name), source.pixel_size
            row[f"{measure.name}_expected_error_mm"] = None if error is None or size is None else error * size
        if shape is None:
            if region.any():
                flags.append(f"{structure.word}: cannot be measured")
            continue
        found = [*doubts(region, shape), *reading.doubts(measure.name, source.pixel_size)]
        flags += [f"{structure.word}: {doubt}" for doubt in found]
        value = f"{mm:.1f} mm" if mm is not None else f"{pixels:.0f} px"
        caption.append(f"{measure.short} {value}" + (f"  ({', '.join(found)})" if found else ""))
    if not labels.any():
        flags.append("nothing found")
    if with_age:
        flags += _add_ages(row, classes)
    row["flags"] = "; ".join(flags)
    overlay = draw_overlay(source.image, labels, shapes, caption=caption or ["nothing found"], classes=classes)
    write_image(out / "overlays" / f"{stem(source.path)}.png", overlay)
    write_labels(
        out / "masks" / f"{stem(source.path)}.png", labels, classes
    )  # last: every mask has its line of the table
    return row


def _add_ages(row: dict[str, Any], classes: Sequence[Structure]) -> list[str]:
    """Add the ages to a line of biometrics.csv; returns what is to be said of them."""
    flags, measured = [], {measure.name: row[f"{measure.name}_mm"] for measure in measures_of(classes).values()}
    for name, mm in measured.items():
        age = None if mm is None else hadlock(name, mm)
        row[f"{name}_weeks_hadlock"] = None if age is None else age.weeks
        row[f"{name}_two_sd_weeks_hadlock"] = None if age is None else age.two_sd
        if mm is not None and age is None:
            flags.append(f"age: {name.replace('_', ' ')} outside of Hadlock's 12 to 42 weeks")
    if "head_circumference" in measured:
        head = measured["head_circumference"]
        # By the head alone: a plane shows one of the two, and a femur found beside a head is more likely none.
        age_21st = None if head is None else intergrowth(head)
        row["weeks_intergrowth21st"] = age_21st
        if head is not None and age_21st is None:
            flags.append("age: outside of INTERGROWTH-21st's 14 to 40 weeks")
    return flags


if __name__ == "__main__":
    sys.exit(main())
