"""famseg-study: what it writes, that it goes on after anything, and one clear line for what it cannot use."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from scipy import stats

from famseg.cli.study import main
from famseg.files.lock import locked
from famseg.options import ConfigError
from famseg.reporting.figures import curves_figure, plot_panel, svg
from famseg.study.plan import SHIPPED, read_study
from famseg.study.tables import Score, Table, as_html, as_latex, as_markdown, difference, notes_of
from tests.isic import write_isic
from tests.samples import three_samples

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "famseg.study.run"])

STUDY: dict[str, Any] = {
    "title": "Two networks & a loss",
    "scores": {"FB": "iou.FB", "mIoU": "miou", "HD95, px": "per_image.FB.hd95_px.mean"},
    "reference": "B",
    "budgets": {"tiny": {"seeds": 2, "data": "phantom:10", "image_size": 32, "epochs": 2, "batch_size": 4}},
    "options": {"phases": "adamw:1", "model": "unext", "device": "cpu"},
    "cells": {"A": {"published": [95.0, None, None]}, "B": {"loss": "ce+dice+edge"}},
}


def changed(**sections: Any) -> dict[str, Any]:
    return {**STUDY, **sections}


def written(path: Path, study: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return str(path)


def rows(out: Path, name: str = "runs.csv") -> list[dict[str, str]]:
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def but_times(out: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "train_seconds"} for row in rows(out)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("study") / "own.yaml", STUDY)


@pytest.fixture(scope="module")
def undisturbed(file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main([file, "--out", str(out)]) == 0
    return out


def test_a_study_writes_everything(undisturbed: Path) -> None:
    files = {path.name for path in undisturbed.iterdir()}
    tables = {"runs.csv", "table.csv", "table.md", "table.tex"}
    assert files == {"cells", "study.yaml", "loss.png", "panel.png", "report.html"} | tables
    table = rows(undisturbed)
    assert [(row["cell"], row["repeat"], row["state"]) for row in table] == [
        (cell, f"seed {seed}", "done") for cell in "AB" for seed in (0, 1)
    ]
    for row in table:
        run = undisturbed / "cells" / row["cell"].lower() / row["repeat"].replace(" ", "-") / "run"
        metrics = json.loads((run / "metrics.json").read_text())
        assert float(row["miou"]) == pytest.approx(metrics["miou"], rel=1e-5)
        hd95 = metrics["per_image"]["FB"]["hd95_px"]["mean"]
        assert float(row["per_image.FB.hd95_px.mean"]) == pytest.approx(hd95, rel=1e-5)
        assert int(row["parameters"]) == metrics["parameters"] and int(row["macs_256"]) > 10**7
        assert row["seed"] == row["repeat"][-1] and row["versions.torch"]
    page = (undisturbed / "report.html").read_text()
    assert (
        "Two networks &amp; a loss" in page and page.count("data:image/") == 2 and "http" not in page.split("<svg")[0]
    )


def test_the_table_is_what_a_hand_computes_from_the_runs(undisturbed: Path) -> None:
    values = {
        cell: np.array([100 * float(row["iou.FB"]) for row in rows(undisturbed) if row["cell"] == cell])
        for cell in "AB"
    }
    line = rows(undisturbed, "table.csv")[0]
    mean, sd = values["A"].mean(), values["A"].std(ddof=1)
    pairs = values["A"] - values["B"]
    half = 12.7062 * pairs.std(ddof=1) / math.sqrt(2)  # t of 97.5 % with one degree of freedom
    expected = [95.0, mean, sd, pairs.mean(), pairs.mean() - half, pairs.mean() + half]
    names = ("published", "mean", "sd", "difference", "difference_low", "difference_high")
    assert [float(line[f"FB {name}"]) for name in names] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert line["mIoU published"] == ""
    text = (undisturbed / "table.md").read_text()
    assert f"{mean:.2f} ± {sd:.2f}" in text and "Student's t" in text
    assert "\\toprule" in (undisturbed / "table.tex").read_text()


def test_a_difference_is_paired_and_has_an_interval_from_two_pairs_on() -> None:
    ours, reference = (
        {"seed 0": 3.0, "seed 1": 5.0, "seed 2": 7.0, "seed 3": 100.0},
        {f"seed {i}": 2.0 for i in range(3)},
    )
    mean, low, high = difference(ours, reference) or (0, 0, 0)
    assert mean == 3 and (low, high) == pytest.approx(stats.t.interval(0.95, 2, 3, 2 / math.sqrt(3)))
    assert difference({"seed 0": 3.0}, reference) == (1, None, None)
    assert difference({"seed 9": 3.0}, reference) is None


@pytest.mark.parametrize(
    ("key", "scale", "values", "best"),
    [
        ("iou.FL", 100, [0.5, 0.7], 0.7),
        ("image_means.pixel_accuracy.mean", 100, [0.5, 0.7], 0.7),
        ("per_image.FB.hd95_mm.mean", 1, [3.0, 5.0], 3.0),
        ("per_image.FB.dice.count", 1, [3, 5], None),
        ("per_image.FB.dice.sd", 100, [0.3, 0.5], None),
        ("per_image.FB.missed", 1, [3, 5], 3),
        ("per_image.FB.found", 1, [3, 5], None),
        ("per_image.FB.jaggedness.mean", 1, [1.1, 1.3], 1.1),
        ("head_circumference_mm.mean_error", 1, [-85.0, 0.07], 0.07),
        ("head_circumference_mm.measured_only.mean_absolute_error", 1, [2.0, 3.0], 2.0),
        ("head_circumference_mm.measured", 1, [2, 3], None),
    ],
)
def test_a_score_is_shown_in_its_unit_and_the_best_is_the_best(
    key: str, scale: float, values: list[float], best: float | None
) -> None:
    score = Score("column", key)
    assert score.scale == scale
    assert (None if score.best is None else score.best(values)) == best


def test_runs_of_other_images_are_no_pair_and_what_has_no_value_is_told(file: str, tmp_path: Path) -> None:
    study = read_study(file)
    first, second = study.cells[:2]
    key = next(iter(study.scores.values()))
    rows = []
    for run in study.runs:
        digest = "other" if (run.cell, run.repeat) == (second, "seed 0") else "same"
        row = {"cell": run.cell, "repeat": run.repeat, "state": "done", "reason": "", "val_digest": digest, key: 0.5}
        rows.append(row | ({} if run.cell == first else {key: 0.75}))
    rows[0] = {**rows[0], key: None}
    notes = "\n".join(notes_of(study, rows))
    assert "seed 0: the data changed between its runs" in notes and "seed 1" not in notes
    assert f"{first}, {next(iter(study.scores))}: of 1 of its 2 runs" in notes


def test_a_table_in_each_language_escapes_its_own_signs() -> None:
    table = Table("T", ["cell", "IoU"], [["a|b & <c>_1", "90.1 ± 0.2"], ["d", "−1"]], frozenset({(0, 1)}))
    assert "| a\\|b & <c>_1 | **90.1 ± 0.2** |" in as_markdown(table)
    assert "a|b \\& <c>\\_1 & \\textbf{90.1 $\\pm$ 0.2} \\\\" in as_latex(table) and "d & $-$1" in as_latex(table)
    assert "<td>a|b &amp; &lt;c&gt;_1</td><td><b>90.1 ± 0.2</b></td>" in as_html(table)


# --- going on -----------------------------------------------------------------------------------------


def sitting(arguments: list[str]) -> None:
    os.setpgrp()  # a Ctrl-C of the tests is not its own
    raise SystemExit(main(arguments))


@pytest.mark.parametrize("moment", ["cells/a/seed-0/run/config.yaml", "cells/a/seed-1/run/checkpoints/last.ckpt"])
def test_a_killed_study_continues_where_it_stopped(moment: str, file: str, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = CONTEXT.Process(target=sitting, args=([file, "--out", str(out)],))
    process.start()
    deadline = time.monotonic() + 120
    while not (out / moment).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    done = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert (out / moment).exists() and len(done) < 3
    assert main([file, "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done  # not run again
    assert but_times(out) == but_times(undisturbed)


def test_an_interrupted_study_continues(file: str, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = CONTEXT.Process(target=sitting, args=([file, "--out", str(out)],))
    process.start()
    while not (out / "cells/a/seed-0/run/config.yaml").exists():
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 130
    assert main([file, "--out", str(out)]) == 0
    assert but_times(out) == but_times(undisturbed)


def test_shards_together_are_the_whole(file: str, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([file, "--out", str(out), "--shard", "1/2"]) == 0
    assert [row["state"] for row in rows(out)] == ["done", "open"] * 2
    assert main([file, "--out", str(out), "--shard", "2/2"]) == 0
    assert but_times(out) == but_times(undisturbed)


def test_a_run_that_another_process_is_at_work_on_is_left_to_it(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out / "cells" / "b" / "seed-0"):
        assert main([file, "--out", str(out)]) == 0
    assert [row["state"] for row in rows(out)] == ["done", "done", "open", "done"]


def test_runs_that_fail_are_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.pth").write_bytes(b"noise")
    wild = {"learning_rate": 1e30, "lr_limit_max": 1e30, "clip_norm": 0, "epochs": 40}
    study = changed(cells={"wild": wild, "B": {}, "no weights": {"weights": str(tmp_path / "noise.pth")}})
    file, out = written(tmp_path / "own.yaml", study), tmp_path / "out"
    assert main([file, "--out", str(out)]) == 1
    states = {row["cell"]: (row["state"], row["reason"]) for row in rows(out)}
    assert states["B"] == ("done", "")
    assert states["wild"][0] == "diverged" and "learning rate" in states["wild"][1]
    assert states["no weights"][0] == "failed" and "noise.pth" in states["no weights"][1]
    for text in (capsys.readouterr().out, (out / "table.md").read_text(), (out / "report.html").read_text()):
        assert "noise.pth" in text and "no weights, seed 1: " in text
    assert "| wild | – | – | – |" in (out / "table.md").read_text().replace("| – | – | – | – |", "| – | – | – |")
    diverged = (out / "cells" / "wild" / "seed-0" / "result.json").stat().st_mtime_ns
    assert main([file, "--out", str(out)]) == 1
    assert (out / "cells" / "wild" / "seed-0" / "result.json").stat().st_mtime_ns == diverged


def test_a_cell_whose_options_changed_is_refused(undisturbed: Path, tmp_path: Path, capsys: Any) -> None:
    cells = {**STUDY["cells"], "A": {"weight_decay": 0.5}}
    assert main([written(tmp_path / "own.yaml", changed(cells=cells)), "--out", str(undisturbed)]) == 2
    error = capsys.readouterr().err
    assert "cell 'A', seed 0: was begun with weight_decay 0.01, has 0.5 now" in error and error.count("\n") == 1


# --- search -------------------------------------------------------------------------------------------

TINY = {**STUDY["budgets"]["tiny"], "lr_limit_max": 1e30, "clip_norm": 0}
SEARCH = changed(
    budgets={"tiny": {**TINY, "search": {"learning_rate": [1e30, 0.04, 0.01]}}},
    cells={"A": {}, "B": {"loss": "ce"}, "own": {"learning_rate": 0.02}},
)


def test_a_search_gives_every_cell_the_best_of_the_values(tmp_path: Path) -> None:
    file, out = written(tmp_path / "own.yaml", SEARCH), tmp_path / "out"
    assert main([file, "--out", str(out), "--shard", "1/2"]) == 1  # the wild value diverged
    assert [row["state"] for row in rows(out) if row["cell"] == "B"] == ["open"] * 3 + ["waiting"] * 2
    assert main([file, "--out", str(out), "--shard", "2/2"]) == 1
    for cell in "AB":
        tried = {row["repeat"]: row for row in rows(out) if row["cell"] == cell}
        assert list(tried) == ["search 1e+30", "search 0.04", "search 0.01", "seed 0", "seed 1"]
        assert tried["search 1e+30"]["state"] == "diverged"
        assert {row["seed"] for name, row in tried.items() if "search" in name and row["seed"]} == {"2"}
        best = max(("0.04", "0.01"), key=lambda value: float(tried[f"search {value}"]["miou"]))
        assert [tried[f"seed {i}"]["learning_rate"] for i in range(2)] == [best] * 2
        for i in range(2):
            config = yaml.safe_load((out / "cells" / cell.lower() / f"seed-{i}" / "run" / "config.yaml").read_text())
            assert str(config["learning_rate"]) == best
    lines = {row["cell"]: row for row in rows(out, "table.csv")}
    mean = np.mean([100 * float(row["miou"]) for row in rows(out) if row["cell"] == "A" and "seed" in row["repeat"]])
    assert float(lines["A"]["mIoU mean"]) == pytest.approx(mean, rel=1e-4) and lines["A"]["runs"] == "2"
    assert lines["own"]["learning_rate"] == "0.02" and len([r for r in rows(out) if r["cell"] == "own"]) == 2
    assert "in one run each with 1e+30, 0.04, 0.01" in (out / "table.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert main([file, "--out", str(out)]) == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before  # not run again


def test_a_cell_that_diverges_with_every_value_is_told(tmp_path: Path) -> None:
    wild = {"learning_rate": [1e30, 1e29]}
    cells = {"A": {}, "B": {"learning_rate": 0.04}}
    study = changed(budgets={"tiny": {**TINY, "search": wild}}, cells=cells)
    file, out = written(tmp_path / "own.yaml", study), tmp_path / "out"
    assert main([file, "--out", str(out)]) == 1
    states = {(row["cell"], row["repeat"]): (row["state"], row["reason"]) for row in rows(out)}
    assert states["A", "seed 0"] == ("diverged", "its cell diverged with every learning_rate of the search")
    assert states["B", "seed 0"] == ("done", "")


# --- shipped studies ----------------------------------------------------------------------------------


def test_smoke_runs_every_cell_for_a_step(tmp_path: Path) -> None:
    file = written(tmp_path / "own.yaml", changed(cells={**STUDY["cells"], "C": {"phases": "adamw:3,sgd:1"}}))
    assert main([file, "--smoke", "--out", str(tmp_path / "out")]) == 0
    assert [(row["cell"], row["state"]) for row in rows(tmp_path / "out")] == [(cell, "done") for cell in "ABC"]
    assert [row["train_images"] for row in rows(tmp_path / "out")] == ["8"] * 3
    assert "mean nothing" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_are_valid(name: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    content = yaml.safe_load(SHIPPED[name].read_text())
    weights = str(tmp_path / "weights.pth") if "weights: given" in SHIPPED[name].read_text() else None
    for budget in ("cpu", "gpu"):
        study = read_study(name, budget, "phantom:10", weights)
        assert study.repeats >= 3 and len(study.runs) >= 3 * len(content["cells"])
    assert len(read_study(name, smoke=True).runs) == len(content["cells"])


@pytest.mark.parametrize("name", SHIPPED)
def test_published_figures_agree_with_each_other(name: str) -> None:
    """A slip of the pen would show: a mean IoU is the classes' mean, and IoU follows nearly from Dice."""
    content = yaml.safe_load(SHIPPED[name].read_text())
    compared = 0
    for cell in content["cells"].values():
        figures = dict(zip(content["scores"], cell.get("published", []), strict=False))
        if figures.get("BG"):
            mean = (figures["BG"] + figures["FL"] + figures["FB"]) / 3
            assert figures["mIoU"] == pytest.approx(mean, abs=0.02), cell
            compared += 1
        dice, iou = figures.get("Dice"), figures.get("mIoU", figures.get("IoU"))
        if dice and iou:
            assert iou == pytest.approx(100 * dice / (200 - dice), abs=3.0), cell
            compared += 1
    assert compared >= 3 or name == "scunext"  # whose table has Dice alone


def test_sc_unexts_study_runs_on_its_own_images(tmp_path: Path) -> None:
    """As docs/papers/sc-unext.md makes it of the shipped file."""
    write_isic(tmp_path / "isic")
    text = SHIPPED["scunext"].read_text().replace("FB", "lesion")
    (tmp_path / "isic.yaml").write_text(text.replace("classes: lesion", "classes: lesion, in_channels: 3"))
    study = read_study(str(tmp_path / "isic.yaml"), "gpu", f"isic:{tmp_path / 'isic'}")
    assert len(study.runs) == 40 and study.runs[0].config.in_channels == 3
    assert study.scores["DSC"] == "per_image.lesion.dice.mean"


def test_the_list_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SHIPPED)


# --- bad input ----------------------------------------------------------------------------------------

BAD = {
    "unknown study": (["nothing"], {}, "expected a file or one of"),
    "no study": ([], {}, "study: is missing"),
    "unknown key": ([], {"cell": {}}, "study key: expected one of title, about, scores"),
    "unknown score": ([], {"scores": {"x": "iou.XX"}}, "'iou.XX'"),
    "unknown reference": ([], {"reference": "C"}, "reference: expected one of A, B, got 'C'"),
    "unknown budget": (["--budget", "gpu"], {}, "budget: expected one of tiny, got 'gpu'"),
    "unknown option": ([], {"cells": {"B": {"colour": 1}}}, "cell 'B': option: expected one of data, model"),
    "unknown model": ([], {"cells": {"B": {"model": "vnet"}}}, "cell 'B': model: expected one of"),
    "void option": ([], {"cells": {"B": {"fusion": False}}}, "cell 'B': fusion: is an option of FAMSeg"),
    "wrong type": ([], {"cells": {"B": {"epochs": "ten"}}}, "cell 'B': epochs:"),
    "own images": ([], {"cells": {"B": {"seed": 3}}}, "cell 'B': seed: is the same for all cells"),
    "against": ([], {"cells": {"B": {"against": "Z"}}}, "cell 'B': against: expected one of B, got 'Z'"),
    "figures": ([], {"cells": {"B": {"published": [1.0]}}}, "cell 'B': published: expected 3 figures"),
    "no mapping": ([], {"cells": {"B": 3}}, "cell 'B': expected a mapping"),
    "no cells": ([], {"cells": {}}, "cells: the study has none"),
    "twice": ([], {"cells": {"B": {}, "b!": {}}}, "two names differ only in signs"),
    "no repeats": ([], {"budgets": {"x": {"data": "phantom:10"}}}, "budget x: expected `seeds: N`"),
    "no data": ([], {"budgets": {"x": {"seeds": 1}}}, "give them like"),
    "bad data": (["--data", "hc18:/nowhere"], {}, "/nowhere"),
    "weights missing": ([], {"cells": {"B": {"weights": "given"}}}, "cell 'B': starts from given weights"),
    "weights idle": (["--weights", "/dev/null"], {}, "no cell of"),
    "search": ([], {"budgets": {"x": {**TINY, "search": {"learning_rate": [1]}}}}, "search: expected one option"),
    "searched": ([], {"budgets": {"x": {**TINY, "search": {"seed": [1, 2]}}}}, "search: expected one option"),
    "search word": ([], {"budgets": {"x": {**TINY, "search": {"colour": [1, 2]}}}}, "search: option: expected one of"),
    "search value": ([], {"budgets": {"x": {**TINY, "search": {"patience": [1, "a"]}}}}, "cell 'A': patience:"),
    "search twice": ([], {"budgets": {"x": {**TINY, "search": {"epochs": [1, 2]}}}}, "epochs has a value already"),
    "shard": (["--shard", "3/2"], {}, "shard: expected I/N"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_runs(case: str, tmp_path: Path, capsys: Any) -> None:
    flags, sections, words = BAD[case]
    file = [] if case in ("unknown study", "no study") else [written(tmp_path / "own.yaml", changed(**sections))]
    assert main([*file, *flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_refused(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").touch()
    assert main([file, "--out", str(tmp_path)]) == 2
    assert "expected a new or empty folder or that of a study" in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    file = written(tmp_path / "own.yaml", changed(cells={"B": {"model": "unet_mobilenetv2"}}))
    with pytest.raises(ConfigError, match=r"cell 'B': .*pip install"):
        read_study(file)


# --- pictures -----------------------------------------------------------------------------------------


def test_curves_of_many_networks_and_of_none() -> None:
    run = [{"epoch": i + 1, "train_loss": 1 / (i + 1), "val_miou": i / 10} for i in range(5)]
    figure = curves_figure({**{f"cell {i}": [run, run[:3]] for i in range(12)}, "none": []})
    lines = figure.axes[0].get_lines()
    assert len(lines) == 12 and list(lines[0].get_xdata()) == [1, 2, 3]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
    assert b"cell 11" in svg(figure)
    svg(curves_figure({"none": []}))


def test_a_panel_has_a_row_a_network(tmp_path: Path) -> None:
    samples = three_samples()
    heights = []
    for names in (["a"], ["a", "a name that is much longer than the margin is wide"]):
        masks = [sample.mask for sample in samples]
        plot_panel([s.image for s in samples], masks, {name: masks for name in names}, tmp_path / "panel.png")
        picture = cv2.imread(str(tmp_path / "panel.png"))
        assert picture is not None
        heights.append(len(picture))
    assert heights[1] > heights[0]
