"""A study's pictures, and the page with everything on it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from famseg.data.dataset import open_data
from famseg.data.sample import Sample
from famseg.files.writing import write_atomic
from famseg.inference import Network, load_network, predict
from famseg.options import device_for
from famseg.reporting.figures import curves_figure, plot_panel, save
from famseg.reporting.page import comparison
from famseg.results import read_history
from famseg.study.plan import Study
from famseg.study.run import DONE, checkpoint_of
from famseg.study.tables import INTERVAL, Table, as_html, notes_of

_SHOWN = 5  # images of the panel


def write_report(study: Study, rows: Sequence[Mapping[str, Any]], tables: Sequence[Table], out: Path) -> None:
    """Write loss.png, panel.png (of the first repeat that is done) and report.html."""
    runs = study.counted
    histories = {
        cell: [history for run in runs if run.cell == cell and (history := read_history(checkpoint_of(run, out)))]
        for cell in study.cells
    }
    curves = curves_figure(histories)
    save(curves, out / "loss.png")
    words = f"Lines are means over {'folds' if study.runs[0].config.folds else 'seeds'}."
    sections: list[tuple[str, Any, str]] = [(table.title, as_html(table), "") for table in tables]
    sections[1] = (*sections[1][:2], INTERVAL)
    sections.append(("Curves", curves, words))
    if shown := _panel(study, rows, out):
        picture = cv2.imread(str(out / "panel.png"))
        assert picture is not None
        sections.append(("The same images", picture[..., ::-1], shown))
    config = study.runs[0].config
    page = comparison(
        title=study.title,
        subtitle=study.about,
        facts=(
            f"Budget {study.budget}: {config.data}, {config.image_size} px, batches of {config.batch_size}; "
            f"{study.repeats} {'fold' if config.folds else 'seed'}(s) a cell."
        ),
        notes=notes_of(study, rows),
        sections=sections,
        version=importlib.metadata.version("famseg"),
    )
    write_atomic(out / "report.html", page.encode())


def _panel(study: Study, rows: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Write panel.png; what is to be said of it, or "" where no run is done."""
    done = [run for run, row in zip(study.runs, rows, strict=True) if row["state"] == DONE and not run.searches]
    if not done:
        return ""
    repeat = done[0].repeat
    networks = {run.cell: load_network(checkpoint_of(run, out)) for run in done if run.repeat == repeat}
    samples = _held_out(next(iter(networks.values())))
    config = done[0].config
    found = {
        cell: list(predict(network, (s.image for s in samples), device=device_for(config.device, config.backend)))
        for cell, network in networks.items()
    }
    classes = config.structures()
    plot_panel([s.image for s in samples], [s.mask for s in samples], found, out / "panel.png", classes)
    return f"Held-out images of {repeat}, evenly chosen, with each network's IoU."


def _held_out(network: Network) -> list[Sample]:
    """Some of the images that all cells are validated on."""
    config = network.config
    samples = open_data(
        config["data"],
        image_size=network.image_size,
        seed=config["seed"],
        classes=network.classes,
        in_channels=network.in_channels,
    )
    held_out = [i for i in range(len(samples)) if samples[i].digest in network.images["held_out"]]
    places = np.linspace(0, len(held_out) - 1, min(_SHOWN, len(held_out))).round().astype(int)
    return [samples[held_out[place]] for place in places]
