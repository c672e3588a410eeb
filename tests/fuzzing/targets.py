"""The readers of files that somebody else may have made, with small files to begin with: see tests/fuzzing."""

from __future__ import annotations

import io
import math
import os
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from famseg.cli.train import _parse
from famseg.data.folder import Folder, write_folder
from famseg.data.hc18 import HC18, fill_outline
from famseg.data.planes import Planes
from famseg.files.decoding import LARGEST
from famseg.files.errors import DataError
from famseg.files.images import read_colour_image, read_image
from famseg.files.labels import black_and_white, read_labels
from famseg.files.listing import list_images
from famseg.files.tables import read_table
from famseg.inference import load_network, predict
from famseg.models import create_model
from famseg.options import ConfigError
from famseg.study.plan import read_study
from famseg.training.config import TrainConfig
from famseg.training.finetune import images_behind, load_weights
from tests.checkpoints import write_checkpoint
from tests.dicom import dicom, region, save
from tests.fuzzing import mutators
from tests.fuzzing.binding import call
from tests.fuzzing.judge import Reader, expect, heard
from tests.samples import three_samples

SAMPLE = three_samples()[0]
GREY, MASK = SAMPLE.image[:12, :16].copy(), SAMPLE.mask[:12, 5:21].copy()
Changed = Callable[..., bytes]


@dataclass(frozen=True)
class Target:
    reader: Reader
    seeds: Callable[[Path], list[bytes]]  # a folder to work in
    formats: Sequence[Any] = ()
    largest: int = 2**14  # bytes of a file

    def mutator(self, seeds: Sequence[bytes]) -> Callable[[bytes, random.Random, mutators.Plain], bytes]:
        spare: dict[int, list[mutators.Part]] = {}
        for place, kind in enumerate(self.formats):
            for seed in seeds if isinstance(kind, mutators.Format) else ():
                try:
                    spare.setdefault(place, []).extend(kind.split(seed))
                except Exception:  # of another format
                    continue

        def change(content: bytes, draw: random.Random, plain: mutators.Plain) -> bytes:
            if draw.random() < 0.1 or not self.formats:
                return plain(content)
            for place, kind in enumerate(self.formats):
                if isinstance(kind, mutators.Text) or (spare.get(place) and _is(kind, content)):
                    return kind.changed(content, draw, plain, spare.get(place, ()))
            return plain(content)

        return change


def _is(kind: mutators.Format, content: bytes) -> bool:
    starts = {mutators.PNG: b"\x89PNG", mutators.JPEG: b"\xff\xd8", mutators.TIFF: b"II*\0", mutators.CHECKPOINT: b"PK"}
    return content.startswith(starts[kind]) if kind in starts else content[128:132] == b"DICM"


# --- pictures -------------------------------------------------------------------------------------------------------


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(content, kind, **options)
    return content.getvalue()


def deep_colour() -> bytes:
    rows = np.repeat(GREY[:4].astype(">u2") * 257, 3, 1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return mutators.PNG.join(
        [(b"IHDR", struct.pack(">IIBBBBB", 16, 4, 16, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    )


def _exif(turned: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = turned
    return exif


def _exact() -> list[bytes]:
    palette = Image.fromarray(MASK)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    bits = Image.fromarray(MASK > 0)
    deep = GREY.astype(np.uint16) * 256 + 3
    colour = Image.fromarray(np.stack([GREY, 255 - GREY, GREY // 2], 2))
    compressions = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
    return [
        encoded(GREY, "PNG", exif=_exif(6)),
        encoded(palette, "PNG", transparency=0),
        encoded(bits, "PNG"),
        encoded(deep, "PNG"),
        encoded(colour, "PNG", dpi=(72, 72)),
        encoded(colour.convert("RGBA"), "PNG"),
        encoded(colour.convert("LA"), "PNG"),
        deep_colour(),
        *(encoded(MASK, "TIFF", compression=compression) for compression in compressions),
        encoded(deep, "TIFF", exif=_exif(3)),
        encoded(bits, "TIFF", compression="group4"),
        encoded(colour, "TIFF", tiffinfo={254: 0}),
        encoded(colour.convert("CMYK"), "TIFF"),
        encoded(-MASK.astype(np.int32), "TIFF"),
        encoded(palette, "TIFF"),
        encoded(palette, "BMP"),
        encoded(colour, "BMP"),
        encoded(bits, "BMP"),
    ]


def _pictures(folder: Path) -> list[bytes]:
    colour = Image.fromarray(np.stack([GREY, 255 - GREY, GREY // 2], 2))
    others = {"save_all": True, "append_images": [Image.fromarray(255 - GREY)]}
    return [
        *_exact(),
        *(encoded(GREY, kind, **others) for kind in ("PNG", "GIF", "WEBP", "TIFF", "MPO")),
        encoded(GREY, "JPEG", quality=50),
        encoded(colour, "JPEG", exif=_exif(8)),
        encoded(GREY, "JPEG", progressive=True),
        encoded(colour.convert("CMYK"), "JPEG"),
        encoded(colour, "TIFF", compression="jpeg"),
        encoded(GREY, "GIF"),
        encoded(colour, "WEBP"),
        encoded(GREY, "WEBP", lossless=True),
        encoded(GREY, "JPEG2000"),
    ]


def _or_none(read: Callable[[], Any]) -> Any:
    """What is read, or None where it is refused, with whatever words."""
    with heard() as lines:
        try:
            value = read()
        except DataError:
            return None
    for line in lines:  # of what is read they are heard
        print(line)
    return value


def _expect_image(image: Any, dimensions: int) -> None:
    expect(isinstance(image, np.ndarray) and image.dtype == np.uint8, f"an image of {type(image)}")
    expect(image.ndim == dimensions and 0 < image.shape[0] * image.shape[1] <= LARGEST, f"an image of {image.shape}")


def _read_both(path: Path) -> None:
    """In grey and in colour, and found in its folder."""
    list_images(path.parent)
    image, pixel_size = read_image(path)
    _expect_image(image, 2)
    expect(pixel_size is None or 0 < pixel_size < math.inf, f"a pixel size of {pixel_size}")
    if (found := _or_none(lambda: read_colour_image(path))) is not None:
        colour, colour_size = found
        _expect_image(colour, 3)
        expect(colour.shape[:2] == image.shape and colour_size == pixel_size, "colour of another size")
        is_grey = (colour == colour[..., :1]).all()
        expect(not is_grey or (colour[..., 0] == image).all(), "grey in colour is another grey")
    if path.read_bytes()[128:132] != b"DICM":
        _expect_whole(path, image)


def _expect_whole(path: Path, image: np.ndarray) -> None:
    """What a decoder leaves out is what Pillow made the picture of: black, elsewhere white."""
    make = Image.core.new
    Image.core.new = lambda mode, size: Image.core.fill(mode, size, _WHITE.get(mode, 255))
    try:
        again, _ = read_image(path)
    finally:
        Image.core.new = make
    expect(again.shape == image.shape and (again == image).all(), "pixels that are not in the file")


_WHITE: dict[str, Any] = {
    **dict.fromkeys(("RGB", "YCbCr", "LAB", "HSV"), (255, 255, 255)),
    **dict.fromkeys(("RGBA", "CMYK", "RGBX", "RGBa"), (255, 255, 255, 255)),
    **dict.fromkeys(("LA", "PA", "La"), (255, 255)),
}


def _read_mask(path: Path) -> None:
    labels = read_labels(path)
    _expect_image(labels, 2)
    found = black_and_white(labels)
    expect(found is None or set(np.unique(found)) <= {0, 1}, "black and white")
    if labels.size < 10_000:
        head = fill_outline(labels > 0)
        expect(head.shape == labels.shape and head.dtype == bool and (head >= (labels > 0)).all(), "a filled outline")
    image = _or_none(lambda: read_image(path))
    expect(image is None or image[0].shape == labels.shape, "a mask turned otherwise than an image")


# --- DICOM ----------------------------------------------------------------------------------------------------------


def _records(folder: Path) -> list[bytes]:
    deep = GREY.astype(np.uint16) * 16
    group = dicom(GREY[:2, :2])  # any record is a sequence's item
    for name in list(group.dir()):
        delattr(group, name)
    group.WindowCenter, group.WindowWidth = 100, 50
    table = dicom(GREY[:2, :2])
    for name in list(table.dir()):
        delattr(table, name)
    table.LUTDescriptor, table.LUTData = [256, 0, 8], np.arange(256).astype("<u2").tobytes()
    outer = dicom(GREY[:2, :2])
    for name in list(outer.dir()):
        delattr(outer, name)
    outer.FrameVOILUTSequence = [group]
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]  # type: ignore[assignment]
        palette[f"{name}PaletteColorLookupTableData"] = bytes(range(256))  # type: ignore[assignment]
    shown = [
        dicom(GREY, SequenceOfUltrasoundRegions=[region(0.03), region(0.03)], PixelSpacing=[0.3, 0.3]),
        dicom(np.stack([GREY] * 3, 2), PixelAspectRatio=[1, 1]),
        dicom(deep, WindowCenter=[1000, 7], WindowWidth=[800, 3], VOILUTFunction="SIGMOID", PixelPaddingValue=0),
        dicom(deep, RescaleSlope=0.5, RescaleIntercept=-1024, PixelRepresentation=1, BitsStored=12, HighBit=11),
        dicom(255 - GREY, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE"),
        dicom(GREY, ModalityLUTSequence=[table], VOILUTSequence=[table]),
        dicom(GREY, SharedFunctionalGroupsSequence=[outer], NumberOfFrames=1),
        dicom(GREY, **palette),
        dicom(np.stack([GREY, GREY // 2, GREY], 2), PhotometricInterpretation="YBR_FULL"),
    ]
    jpeg = dicom(GREY)
    jpeg.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    jpeg.PixelData = encapsulate([encoded(GREY, "JPEG", quality=50)])
    run_length = dicom(GREY)
    run_length.compress(RLELossless)
    deflated = dicom(GREY, WindowCenter=100, WindowWidth=50)
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return [save(record, folder / "x").read_bytes() for record in (*shown, jpeg, run_length, deflated)]


# --- tables ---------------------------------------------------------------------------------------------------------

# The first byte of a file says which table it is.
_HEADS = ("ofd_1_x", "ofd_1_y", "ofd_2_x", "ofd_2_y", "bpd_1_x", "bpd_1_y", "bpd_2_x", "bpd_2_y")
_TABLES: dict[bytes, tuple[str, str, Callable[[Path], Any]]] = {
    b"F": ("folder/pixel_size.csv", "", lambda root: Folder(root / "folder")),
    b"H": ("hc18/training_set_pixel_size_and_HC.csv", "", lambda root: HC18(root / "hc18")),
    b"P": ("planes/FETAL_PLANES_DB_data.csv", ";", lambda root: Planes(root / "planes")),
    b"L": ("planes/Head.csv", "", lambda root: Planes(root / "planes")),
    b"M": ("planes/Femur.csv", "", lambda root: Planes(root / "planes")),
    b"A": ("african/African_planes_database.csv", "", lambda root: Planes(root / "african")),
}
_ROWS = {
    b"F": "filename,subject,pixel_size_mm,femur_length_mm,head_circumference_mm\n"
    "a.png,s1,0.25,12.5,80.125\nb.png,s1,,,\nc,s2,.5,,9e1\n",
    b"H": "filename,pixel size(mm),head circumference (mm)\n001_HC.png,0.25,80.1\n",
    b"P": "Image_name;Patient_num;Plane;Train \na;1;Fetal brain;1\nb;2;Fetal femur;0\nc;2;Other;0\n",
    b"L": ",".join(("image_name", *_HEADS, "px_to_mm_rate", "center_w", "center_h"))
    + "\na.png,10,17,29,17,20,10,20,24,0.25,20,15\n",
    b"M": "image_name,fl_1_x,fl_1_y,fl_2_x,fl_2_y,px_to_mm_rate\nb.png,5,4,19,5,\n",
    b"A": "Patient_num,Plane,Train,Center,Filename\n1,Fetal brain,1,Egypt,a.png\n1,Fetal femur,1,Ghana,b.png\n",
}  # fmt: skip
_CELLS = (
    *(b"", b"0", b"-1", b"0.25", b"1e400", b"1e-320", b"nan", b"1e308", b"1_0", b'"', b'"a\n"', b"a"),
    *(b"a.png", b"b.png"),
    *(b"../a.png", b"/", b".", b"\xff", b"\xef\xbb\xbf", b"\0", b"\r", b"\x85", b"\xe2\x80\xa8", b"\x1b[2J", b"fl_1_x"),
    *(b"filename", b"pixel_size_mm", b"Fetal brain", b"Fetal femur", b"Egypt", b"Ghana", b"center_w", b"px_to_mm_rate"),
)  # fmt: skip


def _put_table(content: bytes, folder: Path) -> Path:
    """Among the images that the tables are of, beside the other tables as they should be."""
    root = folder / "sources"
    if not root.exists():
        _write_sources(root)
    for kind, (name, _, _) in _TABLES.items():
        (root / name).write_text(_ROWS[kind])
    name, _, _ = _TABLES.get(content[:1], _TABLES[b"F"])
    (root / name).write_bytes(content[1:])
    return root / name


def _write_sources(root: Path) -> None:
    write_folder(three_samples(), root / "folder")
    image = (root / "folder" / "images" / "a.png").read_bytes()
    for folder in ("hc18/training_set", "planes/Images", "african/Egypt", "african/Ghana"):
        (root / folder).mkdir(parents=True)
    for name in ("planes/Images/a.png", "planes/Images/b.png", "african/Egypt/a.png", "african/Ghana/b.png"):
        (root / name).write_bytes(image)
    (root / "hc18" / "training_set" / "001_HC.png").write_bytes(image)
    outline = np.pad(np.pad(np.zeros((12, 16), np.uint8), 1, constant_values=255), ((8, 8), (11, 11)))
    (root / "hc18" / "training_set" / "001_HC_Annotation.png").write_bytes(encoded(outline, "PNG"))
    for name, kind in (("Head.csv", b"L"), ("Femur.csv", b"M")):
        (root / "african" / name).write_text(_ROWS[kind])


def _read_table(table: Path) -> None:
    place = f"{table.parent.name}/{table.name}"
    separator, open_source = next(rest for name, *rest in _TABLES.values() if name == place)
    if separator:
        _or_none(lambda: read_table(table, (), separator=separator))
    samples = open_source(table.parent.parent)
    expect(len(samples) == len(samples.subjects) > 0 and all(samples.subjects), "subjects")
    for index in range(len(samples)):
        sample = samples[index]
        _expect_image(sample.image, 2)
        expect(sample.mask.shape == sample.image.shape and sample.mask.max() <= 2, "a mask")
        for length in (sample.pixel_size, sample.femur_length, sample.head_circumference):
            expect(length is None or 0 < length < math.inf, f"a length of {length}")


# --- settings -------------------------------------------------------------------------------------------------------

_SCALARS = (
    *(b"0", b"-1", b"1", b"null", b"true", b"nan", b".inf", b"1e400", b"10000000000", b"0x7f", b"1_000", b"''", b"[]"),
    *(b"{}", b"[1, 2]", b"{a: 1}", b"&a", b"*a", b"<<: *a", b"!!binary aGk=", b"!!set {a}", b"? x", b"~", b"@x", b"%"),
    *(b"!!python/object/apply:os.system [id]", b"2001-01-01", b"2001-99-99", b"9" * 5000, b"[" * 200),
    *(b"\xff", b"\0", b"\xc2\x85"),
    *(b"adamw:1", b"sgd:1:lr=1..0", b"adamw:999999999", b"ce+dice", b"balanced", b"decoder:1", b"FL,FB", b"`"),
    *(b"phantom:0", b"phantom:4", b"folder:/", b"/dev/zero", b"/etc/hostname", b"famseg_nano", b"unext", b"config: x"),
    *(b"seeds: 3", b"folds: 2", b"seeds: 10000000000", b"d_state: 1000000", b"${HOME}", b"\xe2\x80\xa8"),
)  # fmt: skip
YAML = mutators.Text(b" :,[]{}", _SCALARS)
_OPTIONS = (
    {"data": "phantom:8", "model": "famseg_nano", "phases": "adamw:2,sgd:1:lr=0.01..0.0001", "image_size": 64},
    {"classes": "FL,FB", "loss": "ce+focal", "class_weights": "1,2,3", "batch_size": 4, "epochs": 9, "ema": 0.99},
    {"strategy": "i", "weights": "pretrained", "val_fraction": 0.3, "seed": 7, "workers": None, "compile": False},
    {"d_state": 8, "headdim": 16, "directions": 2, "shared_bc": True, "drop_path": 0.1, "context_rank": 3},
    {"decay": "adadelta", "phases": "adamw:3,adadelta:1", "folds": 3, "fold": 1, "learning_rate": 0.01},
)


def _settings(folder: Path) -> list[bytes]:
    return [yaml.safe_dump(options, sort_keys=False).encode() for options in _OPTIONS]


def _read_settings(path: Path) -> None:
    options = _parse(["--config", str(path)])
    config = TrainConfig(**{name: value for name, value in options.items() if name in TrainConfig.__dataclass_fields__})
    expect(type(config.image_size) is int and type(config.data) is str, "a setting of another type")
    expect(bool(config.plan()) and len(config.structures()) > 1, "no plan")


STUDY: dict[str, Any] = {
    "title": "Two networks",
    "about": "A sentence.",
    "scores": {"FB": "iou.FB", "mIoU": "miou"},
    "reference": "B",
    "options": {"phases": "adamw:1", "model": "unext"},
    "budgets": {"tiny": {"seeds": 2, "data": "phantom:4", "image_size": 32, "search": {"learning_rate": [0.04, 0.01]}}},
    "cells": {"A": {"published": [95.0, None]}, "B": {"loss": "ce+dice+edge"}, "C": {"against": "A", "epochs": 2}},
}


def _studies(folder: Path) -> list[bytes]:
    folds = {**STUDY, "budgets": {"cv": {"folds": 2, "data": "phantom:4", "image_size": 32}}}
    return [yaml.safe_dump(study, sort_keys=False).encode() for study in (STUDY, folds)]


def _read_study(path: Path) -> None:
    study = read_study(str(path))
    expect(0 < len(study.runs) <= 100_000 and len(study.cells) > 0, f"{len(study.runs)} runs")
    expect(isinstance(study.title, str) and study.repeats > 0, "no title or no runs")
    expect(all(math.isfinite(figure) for row in study.published.values() for figure in row.values()), "a figure")


# --- checkpoints ----------------------------------------------------------------------------------------------------

_TINY: dict[str, Any] = {
    **{"model": "famseg_nano", "classes": "FL,FB", "in_channels": 1, "image_size": 64, "seed": 0, "data": "phantom:10"},
    **{"widths": [2, 2, 2, 2], "strips": [1, 0, 0, 0], "bottles": [0, 0, 0, 1], "mlp_ratios": [1, 1, 1, 1]},
    **{"context": "none", "context_channels": 8, "upsample": "bilinear", "d_state": 2, "headdim": 4, "drop_path": 0.0},
}
_OF_A_RUN = ("model", "classes", "image_size", "seed", "data")
_NETWORK = {name: value for name, value in _TINY.items() if name not in _OF_A_RUN}


def _states() -> dict[str, Any]:
    torch.manual_seed(0)
    return dict(create_model("famseg_nano", **_NETWORK).state_dict())


def tiny(folder: Path, **more: Any) -> dict[str, Any]:
    """A checkpoint as famseg-train writes it, with the smallest network there is."""
    checkpoint = torch.load(write_checkpoint(folder / "x.ckpt"), weights_only=True)
    few = {name: dict(list(found.items())[:1]) for name, found in checkpoint["images"].items()}
    states = {f"model.{name}": value for name, value in _states().items()}
    return {**checkpoint, "config": _TINY, "state_dict": states, "images": few, **more}


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


class _Deed:
    """What a file made to do harm holds."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def _checkpoints(folder: Path) -> list[bytes]:
    known = {"head_circumference": {"weights": (0.1, 0.2, 0.3), "doubtful": 0.5}}
    contents = [
        tiny(folder),
        tiny(folder, ema=_states(), excess={"head_circumference": 1.5}, expectations=known),
        {"config": {"model": "unext"}, "state_dict": {}, "epoch": 1, "images": {}, "optimizer_states": []},
        tiny(folder, config={**_TINY, "harm": _Deed()}),
    ]
    return [mutators.CHECKPOINT.join(mutators.CHECKPOINT.split(saved(content))) for content in contents]


def _read_network(path: Path) -> None:
    network = load_network(path)
    expect(type(network.image_size) is int and 16 <= network.image_size <= 8192, f"image_size {network.image_size!r}")
    expect(type(network.epoch) is int and network.epoch > 0, f"epoch {network.epoch!r}")
    expect(network.in_channels in (1, 3) and len(network.classes) > 1, "classes or channels")
    expect(all(isinstance(v, float) and math.isfinite(v) for v in network.excess.values()), f"excess {network.excess}")
    numbers = [n for e in network.expectations.values() for n in (*e.weights, e.doubtful)]
    expect(all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers), f"expectations {numbers}")
    expect(all(isinstance(found, dict) for found in network.images.values()), f"images {network.images!r:.80}")
    names = [name for found in network.images.values() for pair in found.items() for name in pair]
    expect(all(isinstance(name, str) for name in (*network.images, *names)), "names of images")
    if network.image_size <= 128:
        image = GREY if network.in_channels == 1 else np.stack([GREY] * 3, 2)
        labels = next(predict(network, [image]))
        expect(labels.shape == GREY.shape and labels.max() < len(network.classes), "labels")


def _weights(folder: Path) -> list[bytes]:
    states = _states()
    encoder = {name: value for name, value in states.items() if name.startswith("encoder.")}
    wrapped = {"epoch": 3, "model": {f"module.{name}": value for name, value in encoder.items()}, "path": Path("x")}
    zipped = [states, encoder, {**wrapped, "best": np.float64(0.5)}, tiny(folder), {"harm": _Deed()}]
    return [
        *(mutators.CHECKPOINT.join(mutators.CHECKPOINT.split(saved(content))) for content in zipped),
        saved(dict(list(encoder.items())[:3]), _use_new_zipfile_serialization=False),
    ]


def _read_weights(path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("famseg_nano", **_NETWORK)
    words = load_weights(model, path)
    before = images_behind(path)
    expect(all(isinstance(name, str) for pair in before.items() for name in pair), "images behind it")
    expect(isinstance(words, str) and path.name in words, words)
    expect(all(value.isfinite().all() for value in model.state_dict().values()), "weights that are not finite")


# --- the native binding ---------------------------------------------------------------------------------------------


def _calls(folder: Path) -> list[bytes]:
    draw = random.Random(0)
    return [draw.randbytes(64) for _ in range(32)]


def _run_call(path: Path) -> None:
    call(path.read_bytes())


_DATA, _BOTH = (DataError,), (DataError, ConfigError)
TARGETS = {
    "images": Target(Reader(_read_both, _DATA), _pictures, (mutators.PNG, mutators.TIFF, mutators.JPEG)),
    "masks": Target(Reader(_read_mask, _DATA), lambda _: _exact(), (mutators.PNG, mutators.TIFF)),
    "dicom": Target(Reader(_read_both, _DATA), _records, (mutators.DICOM,)),
    "tables": Target(
        Reader(_read_table, _DATA, put=_put_table),
        lambda _: [kind + rows.encode() for kind, rows in _ROWS.items()],
        (mutators.Text(b",;", _CELLS),),
    ),
    "options": Target(Reader(_read_settings, (ConfigError,), "x.yaml", names_file=False), _settings, (YAML,), 4096),
    "study": Target(Reader(_read_study, _BOTH, "x.yaml", names_file=False), _studies, (YAML,), 4096),
    "checkpoint": Target(Reader(_read_network, _DATA, "x.ckpt"), _checkpoints, (mutators.CHECKPOINT,), 2**18),
    "weights": Target(Reader(_read_weights, _DATA, "x.pth"), _weights, (mutators.CHECKPOINT,), 2**18),
    "binding": Target(Reader(_run_call, (ValueError, TypeError), names_file=False), _calls),
}
