"""The fuzzer of tests/fuzzing: what it found stays mended, it finds what is planted, and a short run finds nothing."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFile
from pydicom.uid import DeflatedExplicitVRLittleEndian

from famseg.files.errors import DataError
from famseg.files.images import read_grey
from famseg.options import ConfigError
from tests.dicom import dicom, save
from tests.fuzzing import judge as fuzz_judge
from tests.fuzzing import mutators as fuzz_mutators
from tests.fuzzing.__main__ import NAMES, warm
from tests.fuzzing.judge import Broken, Reader, judge
from tests.fuzzing.targets import GREY, STUDY, TARGETS, deep_colour, encoded, saved, tiny

ROOT = Path(__file__).parent.parent
PNG = fuzz_mutators.PNG


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] | None = None) -> bytes:
    """A grey picture that claims another size, with chunks after its header."""
    header, *others = PNG.split(encoded(GREY, "PNG"))
    body = header[1] if size is None else struct.pack(">II", *size) + header[1][8:]
    return PNG.join([(header[0], body), *chunks, *others])


class Harm:
    def __reduce__(self) -> object:
        return os.system, ("true",)


def harm() -> bytes:
    return pickle.dumps({"state_dict": Harm()}, protocol=2)


def archive(content: bytes) -> bytes:
    parts = [(f"archive/{name}".encode(), body) for name, body in (("data.pkl", content), ("version", b"3\n"))]
    return fuzz_mutators.CHECKPOINT.join([*parts, (b"archive/byteorder", b"little")])


def rows(count: int) -> bytes:
    """A PNG of 12 rows, of which there are so many."""
    header, _, *others = PNG.split(encoded(GREY, "PNG"))
    return PNG.join([header, (b"IDAT", zlib.compress((b"\0" + bytes(16)) * count)), *others])


def tall() -> bytes:
    """A TIFF of 100 rows with one strip of 12."""
    form, height = fuzz_mutators.TIFF, struct.pack("<H", 257)
    parts = form.split(encoded(GREY, "TIFF"))
    return form.join([(tag, struct.pack("<HII", 4, 1, 100) if tag == height else body) for tag, body in parts])


def deflated(folder: Path) -> bytes:
    record = dicom(GREY)
    record.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return save(record, folder / "deflated").read_bytes()


def half_a_palette(folder: Path) -> bytes:
    record = dicom(GREY, PhotometricInterpretation="PALETTE COLOR")
    for name, count in (("Red", 256), ("Green", 256), ("Blue", 0)):
        setattr(record, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
        setattr(record, f"{name}PaletteColorLookupTableData", bytes(range(count)))
    return save(record, folder / "palette").read_bytes()


def trained(folder: Path, **config: object) -> bytes:
    whole = tiny(folder)
    return saved({**whole, "config": {**whole["config"], **config}})


def with_states(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    whole = tiny(folder)
    return saved({**whole, "state_dict": {name: change(value) for name, value in whole["state_dict"].items()}})


def nameless(folder: Path) -> bytes:
    return saved(tiny(folder, state_dict={3: torch.zeros(1)}))


def expecting(folder: Path) -> bytes:
    return saved(tiny(folder, expectations={"x": {"weights": "abc", "doubtful": "x"}}))


def in_itself() -> bytes:
    content: dict[str, object] = {}
    content["model"] = content
    return saved(content)


def study(**sections: object) -> bytes:
    return yaml.safe_dump({**STUDY, **sections}).encode()


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

# The target, a file, and words of the refusal.
KEPT: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "100,000 x 100,000 pixels": ("images", lambda _: png(size=(100_000, 100_000)), "pixels"),
    "most pixels that there can be": ("masks", lambda _: png(size=(2**31 - 1, 2**31 - 1)), "pixels"),
    "a second picture": ("images", lambda _: png((b"acTL", struct.pack(">II", 1000, 0))), "expected one picture"),
    "a call in a checkpoint": ("checkpoint", lambda _: archive(harm()), "damaged or no checkpoint"),
    "a call in weights": ("weights", lambda _: archive(harm()), "only code could read"),
    "a call in weights of an old format": ("weights", lambda _: harm(), "no tensors"),
    "a call in settings": ("options", lambda _: b"data: !!python/object/apply:os.system [id]", "python/object"),
    "a call in a study": ("study", lambda _: b"title: !!python/object/apply:os.system [id]", "python/object"),
    "a class in settings": ("options", lambda _: b"data: {class_path: os.system}", "data: "),
    "half of a picture": ("images", lambda _: rows(6), "ends after 50% of its pixels"),
    "half of a mask": ("masks", lambda _: rows(6), "ends after 50% of its pixels"),
    "one strip of nine": ("masks", lambda _: tall(), "strips for a part"),
    "labels by the luma of 16-bit colour": ("masks", lambda _: deep_colour(), "16-bit colour"),
    "2^31 pictures": ("images", lambda _: png((b"acTL", struct.pack(">II", 2**31, 0))), "found 2147483649"),
    "a deflated record": ("dicom", deflated, "deflated"),
    "a command to the terminal": ("tables", lambda _: b"F\x1b[2J\n", "found \\x1b[2J"),
    "no text": ("options", lambda _: b"\xff\xfe", "can't decode byte"),
    "a palette without blue": ("dicom", half_a_palette, "without one of red"),
    "400 digits": ("options", lambda _: b"learning_rate: " + b"9" * 400, "too large"),
    "null": ("options", lambda _: b"data: null", "data: expected a value"),
    "5,000 digits": ("options", lambda _: b"seed: " + b"9" * 5000, "digits"),
    "a billion laughs in settings": ("options", lambda _: f"{LAUGHS}data: *i".encode(), "references"),
    "a billion laughs in a study": ("study", lambda _: f"{LAUGHS}scores: *i".encode(), "references"),
    "a day that there is not": ("study", lambda _: b"title: 2001-99-99", "cannot be read"),
    "depth": ("study", lambda _: b"[" * 5000, "cannot be read"),
    "a list for a name": ("study", lambda _: study(reference=["A"]), "reference: expected one of"),
    "a word for a figure": (
        "study",
        lambda _: study(cells={"A": {}, "B": {"published": ["x", 1]}}),
        "published: expected",
    ),
    "too many seeds": ("study", lambda _: study(budgets={"b": {"seeds": 10**10}}), "from 1 to 1000"),
    "no size": ("checkpoint", lambda folder: trained(folder, image_size=None), "image_size None"),
    "a size below 0": ("checkpoint", lambda folder: trained(folder, image_size=-5), "image_size -5"),
    "classes that are no text": ("checkpoint", lambda folder: trained(folder, classes=3), "another version"),
    "a wide network": ("checkpoint", lambda folder: trained(folder, widths=[4096] * 4, headdim=4096), "larger network"),
    "a deep network": (
        "checkpoint",
        lambda folder: trained(folder, strips=[10**8, 0, 0, 0]),
        "strips: expected at most",
    ),
    "complex weights": ("checkpoint", lambda folder: with_states(folder, lambda t: t * 1j), "expected real numbers"),
    "an expectation of text": ("checkpoint", expecting, "expected 3 weights"),
    "names that are numbers": ("checkpoint", nameless, "not written"),
    "10^10 zeros": ("weights", lambda _: saved({"a": torch.zeros(()).expand(10**5, 10**5)}), "claims 10000000000"),
    "a dict in itself": ("weights", lambda _: in_itself(), "holds no weights"),
    "weights that diverged": ("weights", lambda folder: with_states(folder, lambda t: t * math.nan), "not finite"),
    "a path in a table": ("tables", lambda _: b"F/filename,pixel_size_mm\n../../a.png,1\n", "expected the column"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_fuzzer_begins_with_is_read_or_refused(name: str, folder: Path) -> None:
    target = TARGETS[name]
    seeds = target.seeds(folder)
    warm(target, seeds, folder)
    words = [judge(target.reader, seed, folder) for seed in seeds]
    assert words.count("") >= len(words) / 3
    for seed in seeds:
        assert name == "binding" or len(seed) <= target.largest


@pytest.mark.parametrize("name", KEPT)
def test_a_finding_stays_mended(name: str, folder: Path) -> None:
    target, content, words = KEPT[name]
    warm(TARGETS[target], TARGETS[target].seeds(folder)[:1], folder)
    assert words in judge(TARGETS[target].reader, content(folder), folder)


# --- that it can fail -----------------------------------------------------------------------------------------------


def reader(read: Callable[[Path], object]) -> Reader:
    return Reader(read, (DataError, ConfigError))


def refusing(words: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        raise ConfigError(words.format(path=path))  # which leaves its words as they are

    return read


def warned(path: Path) -> None:
    os.write(2, b"TIFFFillStrip: Read error on strip 0\n")


def written(path: Path) -> None:
    path.with_name("other").write_text("")


def wasteful(path: Path) -> object:
    try:
        return bytearray(2**33)
    except MemoryError as error:
        raise DataError(f"{path}: cannot be decoded") from error


def busy(path: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda path: {}["x"], "KeyError"),
        (lambda path: pickle.loads(harm()), "did something: .*os.system"),
        (written, "did something: opened .*other"),
        (warned, "read in spite of TIFFFillStrip"),
        (lambda path: [os.write(2, b"hm\n") for _ in range(30)], "says a lot"),
        (refusing("cannot be read"), "no name"),
        (refusing("{path}: a sign for terminals, \x1b[2J"), "not one line"),
        (refusing("{path}: " + "x" * 2000), "too long"),
        (wasteful, "memory"),
        (busy, "slow"),
    ],
    ids=["error", "call", "write", "damage", "talk", "no name", "sign", "length", "memory", "time"],
)
def test_a_reader_that_breaks_its_promise_is_found_out(
    read: Callable[[Path], object], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_judge, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz_judge, "one_line", str)  # which mends signs and length
    with pytest.raises(Broken, match=fault):
        judge(reader(read), b"x", tmp_path)
    assert judge(reader(refusing("{path}: is damaged")), b"x", tmp_path).endswith("is damaged")
    assert judge(reader(read_grey), encoded(GREY, "PNG"), tmp_path) == ""


def test_pixels_that_a_decoder_makes_up_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(GREY, "BMP")
    assert "truncated" in judge(TARGETS["images"].reader, whole[:-40], tmp_path)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(Broken, match="pixels that are not in the file"):
        judge(TARGETS["images"].reader, whole[:-40], tmp_path)


GONE = """
import struct, sys
from pathlib import Path
from PIL import Image
from famseg.files import raster
from tests.fuzzing import judge
from tests.fuzzing.targets import GREY, TARGETS, encoded

content = bytearray(encoded(Image.fromarray(GREY).convert("RGB"), "BMP"))
struct.pack_into("<ii", content, 18, 13_000, 13_000)
assert "pixels" in judge.judge(TARGETS["images"].reader, bytes(content), Path(sys.argv[1]))
raster.expect_size = lambda height, width: None
judge.MEMORY = 2**28
try:
    judge.judge(TARGETS["images"].reader, bytes(content), Path(sys.argv[1]))
except judge.Broken as broken:
    print(broken)
"""


def test_a_check_that_is_gone_is_found_out(tmp_path: Path) -> None:
    """In a process of its own: another one may have taken and freed as much memory before."""
    ended = run("-c", GONE, str(tmp_path))
    assert "memory" in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.parametrize(("front", "place"), [(False, "t.data_ptr() + t.nbytes"), (True, "t.data_ptr() - 1")])
def test_a_kernel_that_leaves_its_arrays_ends_the_process(front: bool, place: str) -> None:
    code = (
        "import ctypes, torch; from tests.fuzzing.binding import guarded\n"
        f"t = guarded((3, 5), torch.float32, {front}).fill_(1.0)\n"
        f"assert ctypes.string_at(t.data_ptr(), t.nbytes); print('inside', flush=True); ctypes.string_at({place}, 1)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ended.stdout, ended.returncode) == ("inside\n", -11), ended.stderr


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_a_changed_file_still_has_its_checksums_and_lengths(kind: str) -> None:
    content = encoded(GREY, kind)
    form = getattr(fuzz_mutators, kind)
    again = Image.open(io.BytesIO(form.join(form.split(content))))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(io.BytesIO(content))))


# --- libFuzzer ------------------------------------------------------------------------------------------------------

needs_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")

PLANTED = """
import sys
from tests.fuzzing import __main__ as fuzz

def planted(names, real=fuzz._instrumented):
    targets = real(names)
    import famseg.files.tables as tables
    parse = tables.parse_positive
    tables.parse_positive = lambda text: parse(text) or [][0]
    return targets

fuzz._instrumented = planted
sys.exit(fuzz.main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


@needs_atheris
def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    ended = run("-c", PLANTED, "tables", "--runs", "500", "--findings", str(tmp_path))
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "IndexError" in ended.stdout


@needs_atheris
def test_a_short_run_of_every_target_finds_nothing(tmp_path: Path) -> None:
    ended = run("-m", "tests.fuzzing", "all", "--runs", "250", "--findings", str(tmp_path))
    lines = ended.stdout.splitlines()
    assert [line.split(",")[0] for line in lines if "executions" in line] == [
        f"{name}: 250 executions" for name in NAMES
    ]
    assert ended.returncode == 0, ended.stdout + ended.stderr
