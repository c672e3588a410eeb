"""The classes stand in one table: another structure is an entry of it, and nothing else spells what is in it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

from famseg import anatomy
from famseg.anatomy import BY_LABEL, CLASSES, MEASURES, OBJECTS
from famseg.data.sample import Sample

ROOT = Path(__file__).parent.parent


def test_labels_count_from_the_background_and_names_stay_as_files_hold_them():
    assert [structure.label for structure in BY_LABEL] == list(range(len(BY_LABEL)))
    assert CLASSES == ("background", "FL", "FB")
    assert {name: measure.name for name, measure in MEASURES.items()} == {
        "FB": "head_circumference",
        "FL": "femur_length",
    }


def test_data_sets_can_give_the_truth_of_every_measure():
    assert {measure.name for measure in MEASURES.values()} <= {field.name for field in dataclasses.fields(Sample)}


def test_no_other_file_spells_the_colours():
    spelled = [re.escape(structure.ink) for structure in BY_LABEL]
    for structure in OBJECTS:
        for rgb in (structure.shade, structure.palette):
            spelled += [r",\s*".join(map(str, order)) for order in (rgb, rgb[::-1])]
            spelled.append("#{:02x}{:02x}{:02x}".format(*rgb))
    pattern = re.compile("|".join(rf"(?<!\d){text}(?!\d)" for text in spelled), re.IGNORECASE)
    table = Path(anatomy.__file__)
    assert pattern.search(table.read_text())
    files = [path for folder in ("famseg", "docs/figures") for path in (ROOT / folder).rglob("*")]
    for path in files:
        if path.suffix in (".py", ".html", ".yaml") and path != table:
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)} spells {found[0] if found else ''}"


ENTRY = """
    Structure(
        label=3, name="AC", word="abdomen", palette=(0, 0, 255), ink="#2244cc", shade=(40, 60, 250), shade_word="blue",
        measure=Measure("abdominal_circumference", "AC", "perimeter of the fitted ellipse", fit_head),
    ),
)

BY_NAME ="""

# What a user sees of a structure that is found where it is: columns, keys, report, overlay, mask file.
SCRIPT = """
import sys, types
import numpy as np

module = types.ModuleType("famseg.anatomy")
sys.modules["famseg.anatomy"] = module
exec(compile(sys.stdin.read(), "anatomy.py", "exec"), module.__dict__)

from pathlib import Path
import torch
from PIL import Image
from famseg.cli.predict import Source, _write
from famseg.data.sample import Sample
from famseg.evaluation import evaluate
from famseg.inference import Network, Reading
from famseg.reporting.page import report
from famseg.training.config import TrainConfig

rows, columns = np.ogrid[:80, :90]
mask = (3 * (((rows - 40) / 30) ** 2 + ((columns - 45) / 35) ** 2 <= 1)).astype(np.uint8)
sample = Sample("x", "x", np.zeros_like(mask), mask, 0.5)
evaluation = evaluate([sample], [mask])
summary, row = evaluation.summary(), evaluation.images[0].row()
assert summary["iou"]["AC"] == 1 and summary["per_image"]["AC"]["found"] == 1
assert summary["abdominal_circumference_mm"]["mean_error"] == 0
assert row["AC_dice"] == 1 and row["abdominal_circumference_mm"] > 90
page = report(
    title="", subtitle="", facts="", notes=[], summary=summary, rows=[row], pictures={}, history=[], version="0"
)
for words in ("abdomen (AC)", "abdomen blue", "abdominal circumference", ".tile.AC { border-top: 4px solid #2244cc; }"):
    assert words in page, words

network = Network(torch.nn.Identity(), {}, {}, 1, 64, Path("x.ckpt"))
line = _write(Path("."), Source(Path("scan.png"), sample.image, 0.5, "given"), Reading(mask), network, False)
assert line["abdominal_circumference_mm"] == row["abdominal_circumference_mm"] and line["flags"] == ""
picture = np.asarray(Image.open("overlays/scan.png")).astype(int)
assert (picture[..., 2] - picture[..., :2].max(2) > 100).any()
assert np.asarray(Image.open("masks/scan.png").convert("RGB"))[40, 45].tolist() == [0, 0, 255]

TrainConfig(class_weights="1,2,3,4")
"""


def test_another_structure_is_one_entry(tmp_path: Path):
    source = Path(anatomy.__file__).read_text()
    assert source.count(")\n\nBY_NAME =") == 1
    command = [sys.executable, "-c", SCRIPT]
    with_abdomen = source.replace(")\n\nBY_NAME =", ENTRY)
    done = subprocess.run(command, input=with_abdomen, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
