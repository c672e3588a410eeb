"""The report of an evaluation: one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from famseg.anatomy import BY_LABEL, Structure, measures_of, reported
from famseg.files.images import as_rgb
from famseg.reporting.figures import agreement_figure, history_figure, overlap_figure, svg

_NONE = "–"


@dataclass(frozen=True)
class Picture:
    """One image of the report: (H, W) or (H, W, 3) as it is, (H', W', 3) with its overlay, and what is said below."""

    name: str
    image: np.ndarray
    overlay: np.ndarray
    remarks: Sequence[str] = ()
    doubts: Sequence[str] = ()


def report(
    *,
    title: str,
    subtitle: str,
    facts: str,
    notes: Sequence[str],
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Sequence[Picture]],
    history: Sequence[Mapping[str, object]],
    version: str,
    classes: Sequence[Structure] = BY_LABEL,
) -> str:
    """The page as HTML text.

    Args:
        title, subtitle, facts: the head of the page, plain text.
        notes: what the reader must know before the numbers, plain text.
        summary: the content of metrics.json (`famseg.evaluation.Evaluation.summary`).
        rows: the lines of per_image.csv (`ImageScore.row`).
        pictures: heading → pictures.
        history: epochs of the training run (`figures.plot_history`); empty: no curves.
        version: of famseg.
        classes: of the network.
    """
    measures = measures_of(classes)
    content = Template(_read("report.html")).substitute(
        tiles="\n".join(_tiles(summary, classes)),
        plots=_plots(rows, classes),
        lengths=_lengths(summary, classes),
        per_image=_per_image(summary, classes),
        pooled=_pooled(summary, classes),
        pictures="\n".join(_gallery(heading, cards) for heading, cards in pictures.items() if cards),
        history=_history(history, classes),
        shades=", ".join(f"{structure.word} {structure.shade_word}" for structure in reported(classes)),
        calipers=", calipers yellow" if measures else "",
        definitions=" ".join(f"{m.words.capitalize()}: {m.definition}." for m in measures.values()),
        version=html.escape(version),
    )
    return _page(title, subtitle, facts, notes, content, _colours(classes))


def comparison(
    *,
    title: str,
    subtitle: str,
    facts: str,
    notes: Sequence[str],
    sections: Sequence[tuple[str, str | Figure | np.ndarray, str]],
    version: str,
) -> str:
    """A page that compares networks, as HTML text; without sections' HTML, all is plain text.

    Args:
        title, subtitle, facts, notes: the head of the page.
        sections: heading; HTML of a table, a figure, or a picture (H, W, 3) RGB; and what is said below.
        version: of famseg.
    """
    parts = []
    for heading, content, words in sections:
        if isinstance(content, np.ndarray):
            content = f'<img style="max-width: 100%" alt="{html.escape(heading)}" src="{_jpeg(content)}">'
        elif isinstance(content, Figure):
            content = f'<div class="plots">\n{_figure(content, heading, "history")}\n</div>'
        parts.append(f'<h2>{html.escape(heading)}</h2>\n{content}\n<p class="faint">{html.escape(words)}</p>')
    parts.append(
        f'<p class="faint">Made by famseg-study {html.escape(version)}. Every run with every score is in runs.csv, the '
        "tables are in table.csv, table.md and table.tex. For research: not a medical device.</p>"
    )
    return _page(title, subtitle, facts, notes, "\n".join(parts))


def _page(title: str, subtitle: str, facts: str, notes: Sequence[str], content: str, styles: Sequence[str] = ()) -> str:
    """`content` is HTML, the head of the page plain text; `styles` are lines of CSS beyond those of every page."""
    return Template(_read("page.html")).substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        facts=html.escape(facts),
        notes="\n".join(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        style="\n".join((_read("style.css"), *styles)),
        content=content,
    )


def _read(name: str) -> str:
    return (importlib.resources.files("famseg.reporting") / name).read_text(encoding="utf-8")


def _tiles(summary: Mapping[str, Any], classes: Sequence[Structure]) -> list[str]:
    tiles = [_tile("all", "mean IoU, all pixels", _fixed(summary["miou"], 3), f"{summary['images']} images")]
    for structure in reported(classes):
        scores = summary["per_image"][structure.name]
        if scores["dice"] is not None:
            misses = f"{scores['missed']} missed, {scores['invented']} invented"
            mean = _fixed(scores["dice"]["mean"], 3)
            tiles.append(_tile(structure.name, f"{structure.title}: mean Dice", mean, misses))
        measure = structure.measure
        if measure is not None and (errors := summary.get(f"{measure.name}_mm")) is not None:
            value = f"{_fixed(errors['mean_absolute_error'], 1)} mm"
            bias = errors["measured_only"]["mean_error"]
            below = "none measured" if bias is None else f"bias {bias:+.1f} mm, {errors['missed']} not measured"
            tiles.append(_tile(structure.name, f"{measure.words}: mean absolute error", value, below))
    return tiles


def _colours(classes: Sequence[Structure]) -> list[str]:
    """The page's rules for what belongs to one structure: the edge of its tiles, the dot before its name."""
    objects = reported(classes)
    return [f"  .tile.{s.name} {{ border-top: 4px solid {s.ink}; }}" for s in objects] + [
        f"  .dot.{s.name} {{ background: {s.ink}; }}" for s in objects
    ]


def _tile(kind: str, words: str, value: str, below: str) -> str:
    return (
        f'<div class="tile {kind}"><span class="faint">{html.escape(words)}</span>'
        f'<b>{html.escape(value)}</b><span class="faint">{html.escape(below)}</span></div>'
    )


def _plots(rows: Sequence[Mapping[str, Any]], classes: Sequence[Structure]) -> str:
    figures = []
    for name, measure in measures_of(classes).items():
        key = measure.name
        pairs = [(row[f"{key}_truth_mm"], row[f"{key}_mm"]) for row in rows if row[f"{key}_error_mm"] is not None]
        if pairs:
            true, measured = zip(*pairs, strict=True)
            plot = agreement_figure(measure.words.capitalize(), name, true, measured)
            figures.append(_figure(plot, f"Bland–Altman: {measure.words}"))
    names = [structure.name for structure in reported(classes)]
    dice = {name: [row[f"{name}_dice"] for row in rows if row[f"{name}_dice"] is not None] for name in names}
    if any(dice.values()):
        figures.append(_figure(overlap_figure(dice, classes), "Dice of every image, sorted"))
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>" if figures else ""


def _lengths(summary: Mapping[str, Any], classes: Sequence[Structure]) -> str:
    lines, measures = [], measures_of(classes)
    if not measures:
        return "<p>Nothing is measured of what this network finds.</p>"
    for name, measure in measures.items():
        errors = summary.get(f"{measure.name}_mm")
        if errors is None:
            continue
        only = errors["measured_only"]
        limits = only["limits_of_agreement"]
        lines.append(
            [
                (name, measure.words),
                f"{errors['measured']} of {errors['images']}",
                _spread(errors["mean_error"], errors["sd_error"], 2, sign=True),
                _fixed(errors["mean_absolute_error"], 2),
                _spread(only["mean_error"], only["sd_error"], 2, sign=True),
                _fixed(only["mean_absolute_error"], 2),
                _NONE if limits is None else f"{limits[0]:+.1f} to {limits[1]:+.1f}",
            ]
        )
    if not lines:
        return "<p>No image has a pixel size, so nothing could be measured in mm.</p>"
    head = (
        "measured", "mean error ± sd, mm", "mean absolute error, mm",
        "measured only: mean error ± sd", "mean absolute error", "95 % limits of agreement",
    )  # fmt: skip
    return _table(head, lines)


def _per_image(summary: Mapping[str, Any], classes: Sequence[Structure]) -> str:
    lines = []
    for structure in reported(classes):
        scores = summary["per_image"][structure.name]
        mm = scores["hd95_mm"] is not None
        unit, digits = ("mm", 2) if mm else ("px", 1)

        def mean(key: str, digits: int, scores: Mapping[str, Any] = scores) -> str:
            values = scores[key]
            return _NONE if values is None else _spread(values["mean"], values["sd"], digits)

        rough, true = (scores[key] for key in ("jaggedness", "jaggedness_truth"))
        lines.append(
            [
                (structure.name, structure.title),
                *(str(scores[state]) for state in ("found", "missed", "invented", "absent")),
                mean("dice", 3),
                _NONE if scores["dice"] is None else _fixed(scores["dice"]["median"], 3),
                *(mean(f"{key}_{unit}", digits) + (f" {unit}" if scores["dice"] else "") for key in ("hd95", "assd")),
                " / ".join(_NONE if value is None else _fixed(value["mean"], 3) for value in (rough, true)),
            ]
        )
    head = (
        "found", "missed", "invented", "absent", "Dice ± sd", "median Dice", "HD95 ± sd", "ASSD ± sd",
        "jaggedness / true",
    )  # fmt: skip
    return _table(head, lines)


def _pooled(summary: Mapping[str, Any], classes: Sequence[Structure]) -> str:
    keys = ("iou", "dice", "class_accuracy")
    lines: list[list[Any]] = [
        [(s.name, s.title), *(_fixed(summary[key][s.name], 4) for key in keys)]
        for s in (classes[0], *reported(classes))
    ]
    lines.append([("", "mean"), _fixed(summary["miou"], 4), _fixed(summary["mdice"], 4), ""])
    means = summary["image_means"]
    an_image = ", ".join(
        f"{words} {_NONE if means[key] is None else _spread(means[key]['mean'], means[key]['sd'], 4)}"
        for key, words in (("pixel_accuracy", "pixel accuracy"), ("miou", "mIoU"), ("mdice", "mean Dice"))
    )
    accuracy = f"<p>Pixel accuracy {_fixed(summary['pixel_accuracy'], 4)}. An image, mean ± sd: {an_image}.</p>"
    return _table(("IoU", "Dice", "part of it found"), lines) + accuracy


def _gallery(heading: str, pictures: Sequence[Picture]) -> str:
    cards = []
    for picture in pictures:
        size = picture.overlay.shape[1::-1]
        plain = as_rgb(cv2.resize(picture.image, size, interpolation=cv2.INTER_CUBIC))
        remarks = "".join(f"<span>{html.escape(remark)}</span>" for remark in picture.remarks)
        doubts = "".join(f'<span class="doubt">{html.escape(doubt)}</span>' for doubt in picture.doubts)
        name = html.escape(picture.name)
        cards.append(
            f'<figure><div class="pair"><img alt="{name}" src="{_jpeg(plain)}">'
            f'<img alt="{name} with what was found" src="{_jpeg(picture.overlay)}"></div>'
            f"<figcaption><span><b>{name}</b></span>{remarks}{doubts}</figcaption></figure>"
        )
    return f'<h3>{html.escape(heading)}</h3>\n<div class="cards">\n' + "\n".join(cards) + "\n</div>"


def _history(rows: Sequence[Mapping[str, object]], classes: Sequence[Structure]) -> str:
    if not rows:
        return ""
    curves = _figure(history_figure(rows, classes), "Loss and validation IoU over the epochs", "history")
    return f'<h2>Training</h2>\n<div class="plots">\n{curves}\n</div>'


def _figure(figure: Figure, words: str, kind: str = "") -> str:
    content = base64.b64encode(svg(figure)).decode()
    return f'<img class="{kind}" alt="{html.escape(words)}" src="data:image/svg+xml;base64,{content}">'


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table whose first column holds (class name, words)."""
    cells = "".join(f"<th>{html.escape(word)}</th>" for word in ("", *head))
    body = ""
    for (name, words), *values in lines:
        dot = f'<span class="dot {name}"></span>' if name not in ("", "background") else ""
        body += f"<tr><td>{dot}{html.escape(words)}</td>" + "".join(f"<td>{html.escape(v)}</td>" for v in values)
        body += "</tr>\n"
    return f'<div class="scroll"><table>\n<tr>{cells}</tr>\n{body}</table></div>\n'


def _fixed(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _spread(mean: float | None, sd: float | None, digits: int, sign: bool = False) -> str:
    if mean is None:
        return _NONE
    return f"{mean:{'+' if sign else ''}.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _jpeg(picture: np.ndarray) -> str:
    """(H, W, 3) RGB as a data URL."""
    content = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 86])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"
