"""Figures: how a training run went, how well it measures, and what the network sees."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from famseg.anatomy import BY_LABEL, BY_NAME, RGB, Structure
from famseg.files.writing import write_atomic
from famseg.metrics import SegmentationMetrics

_LOSS = {"train_loss": ("training", "#2b6cb0"), "val_loss": ("validation", "#e08a1e")}
_INK, _FAINT, _GRID = "#22262b", "#6b7280", "#e3e6ea"

_CELL = 3.0  # inches, width of one picture
_GAP, _LINE, _HEADER = 0.08, 0.19, 0.32  # inches between pictures, per line of title, above them all
_DPI = 130

OverlayItem = (
    tuple[str, np.ndarray, np.ndarray, np.ndarray]
    | tuple[str, np.ndarray, np.ndarray, np.ndarray, Mapping[str, object] | None]
)


def plot_history(
    rows: Sequence[Mapping[str, object]], path: str | os.PathLike[str], classes: Sequence[Structure] = BY_LABEL
) -> None:
    """Write loss and validation IoU over the epochs as a PNG.

    Args:
        rows: one per epoch, numbers or their text (as read from CSV): "epoch"; "train_loss", "val_loss";
            "val_iou_<class>" for any class, "val_miou"; "phase", any label, whose changes are marked. What is
            absent, empty or NaN in a row leaves a gap that the curve bridges.
        path: the file, replaced atomically.
        classes: whose inks the curves have.

    Raises:
        ValueError: there are no rows.
    """
    save(history_figure(rows, classes), path)


def history_figure(rows: Sequence[Mapping[str, object]], classes: Sequence[Structure] = BY_LABEL) -> Figure:
    """The figure of `plot_history`."""
    if not rows:
        raise ValueError("rows: expected at least one epoch, found none")
    figure = Figure(figsize=(10.5, 4.2), dpi=_DPI, layout="constrained", facecolor="white")
    loss, iou = figure.subplots(1, 2)
    for key, (label, colour) in _LOSS.items():
        _curve(loss, rows, key, label, colour)
    _finish(loss, rows, "Loss", "loss")
    values = [v for key in _LOSS for v in _series(rows, key)[1]]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        loss.set_yscale("log")  # or the later epochs, where decisions are made, are a flat line

    inks = {structure.name: structure.ink for structure in classes}
    for key in dict.fromkeys(key for row in rows for key in row if key.startswith("val_iou_")):
        name = key.removeprefix("val_iou_")
        _curve(iou, rows, key, name, inks.get(name))
    _curve(iou, rows, "val_miou", "mean", _INK, linestyle="--")
    _finish(iou, rows, "Validation IoU", "IoU")
    iou.set_ylim(-0.02, 1.02)
    return figure


def curves_figure(histories: Mapping[str, Sequence[Sequence[Mapping[str, object]]]]) -> Figure:
    """Training loss and validation IoU of several networks: a line each, the mean over its runs.

    Args:
        histories: name → runs → rows as in `plot_history`; an epoch counts where all runs of a name have it.
    """
    figure = Figure(figsize=(10.5, 4.4 + 0.07 * len(histories)), dpi=_DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("train_loss", "val_miou"), ("Training loss", "Validation mIoU"), strict=True):
        values: list[float] = []
        longest: Sequence[Mapping[str, object]] = []
        for number, (name, runs) in enumerate(histories.items()):
            shortest = min(map(len, runs), default=0)
            series = [[_number(row.get(key)) for row in run[:shortest]] for run in runs]
            mean = np.mean(series, axis=0) if shortest else np.zeros(0)
            rows = [
                {"epoch": row["epoch"], key: value} for row, value in zip(runs[0] if runs else [], mean, strict=False)
            ]
            longest = max(longest, rows, key=len)
            values += mean.tolist()
            # Ten colours are told apart; more lines begin again, dashed.
            _curve(axes, rows, key, name, f"C{number % 10}", linestyle=("-", "--", ":")[number // 10 % 3])
        _finish(axes, longest or [{"epoch": 1}], title, "loss" if key == "train_loss" else "mIoU", legend=False)
        if key == "train_loss" and values and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=5)
    return figure


def agreement_figure(title: str, name: str, true: Sequence[float], measured: Sequence[float]) -> Figure:
    """Bland–Altman plot: difference against mean, with bias and 95 % limits of agreement (mean ± 1.96 sd).

    Args:
        title: what is measured.
        name: class name, which gives the colour.
        true, measured: values in mm, in pairs.

    Raises:
        ValueError: there are no values, or not in pairs.
    """
    truth, found = np.asarray(true, float), np.asarray(measured, float)
    if not len(truth) or truth.shape != found.shape:
        raise ValueError(f"true and measured: expected pairs of values, found {len(truth)} and {len(found)}")
    difference = found - truth
    bias = float(difference.mean())
    levels = [(bias, f"bias {bias:+.1f}", "-")]
    if len(difference) > 1:
        spread = 1.96 * float(difference.std(ddof=1))
        levels += [(level, f"{level:+.1f}", "--") for level in (bias - spread, bias + spread)]

    figure, axes = _panel(f"{title}, {len(truth)} measured")
    axes.axhline(0, color=_INK, lw=0.8)
    axes.scatter((found + truth) / 2, difference, s=22, color=BY_NAME[name].ink, alpha=0.75, lw=0, zorder=3)
    for level, label, style in levels:
        axes.axhline(level, color=_FAINT, lw=1.2, ls=style)
        place = (1.01, level)
        axes.annotate(label, place, xycoords=("axes fraction", "data"), fontsize=8.5, color=_FAINT, va="center")
    # Room for the lines also where all errors are alike.
    reach = 1.12 * max(float(np.abs(difference).max()), *(abs(level) for level, _, _ in levels), 0.5)
    axes.set_ylim(-reach, reach)
    axes.set_xlabel("mean of measured and true, mm")
    axes.set_ylabel("measured − true, mm")
    return figure


def overlap_figure(dice: Mapping[str, Sequence[float]], classes: Sequence[Structure] = BY_LABEL) -> Figure:
    """Every image's Dice, sorted, one curve a class: how many images are worse than a value can be read off.

    Args:
        dice: class name → values in [0, 1], missed and invented objects as 0.

    Raises:
        ValueError: there is no class with values.
    """
    if not any(len(values) for values in dice.values()):
        raise ValueError("dice: expected at least one class with values")
    figure, axes = _panel("Dice of every image, sorted")
    structures = {structure.name: structure for structure in classes}
    for name, values in dice.items():
        if len(values):
            share = 100 * (np.arange(len(values)) + 0.5) / len(values)
            colour, title = structures[name].ink, structures[name].title
            axes.plot(share, np.sort(values), color=colour, label=title, lw=1.7, marker="o", ms=2.5)
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("images, %")
    axes.set_ylabel("Dice")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.25, 4.0), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Figure) -> bytes:
    """The figure as SVG: sharp at any zoom, text selectable; the same figure gives the same bytes."""
    content = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "famseg", "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def plot_overlays(
    items: Iterable[OverlayItem], path: str | os.PathLike[str], classes: Sequence[Structure] = BY_LABEL
) -> None:
    """Write a PNG of one row per item: image, truth, prediction.

    Args:
        items: (name, image (H, W) or (H, W, 3) uint8, truth (H, W) labels, prediction (H, W) labels) and optionally
            a dict of remarks that are shown as "key value" over the prediction, below the image's own IoU. A class
            that neither mask contains has no IoU and is left out.
        path: the file, replaced atomically.
        classes: whose labels these are.

    Raises:
        ValueError: there are no items, or the shapes of an item differ.
    """
    items = list(items)
    if not items:
        raise ValueError("items: expected at least one image, found none")
    for name, image, truth, predicted, *_ in items:
        if not image.shape[:2] == truth.shape == predicted.shape:
            raise ValueError(
                f"{name}: expected image, truth and prediction of one shape, "
                f"found {image.shape}, {truth.shape}, {predicted.shape}"
            )
    heights = [_CELL * image.shape[0] / image.shape[1] for _, image, *_ in items]
    titles = [_scores(classes, truth, predicted, *remarks) for _, _, truth, predicted, *remarks in items]
    bands = [_LINE * (title.count("\n") + 1) + _GAP for title in titles]
    width = 3 * _CELL + 4 * _GAP
    height = _HEADER + sum(heights) + sum(bands) + _GAP * len(items)
    # Agg refuses pictures of 2^16 pixels or more on a side.
    dpi = min(_DPI, int(65000 / height))
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    bottom = height - _HEADER
    for (name, image, truth, predicted, *_), score, row_height, band in zip(items, titles, heights, bands, strict=True):
        bottom -= band + row_height
        for column, mask in enumerate((None, truth, predicted)):
            left = _GAP + column * (_CELL + _GAP)
            axes = figure.add_axes((left / width, bottom / height, _CELL / width, row_height / height))
            _picture(axes, image, mask, classes)
            axes.set_title(
                (_shortened(name), "truth", score)[column],
                fontsize=9,
                loc="left",
                color=_INK,
                pad=3,
                linespacing=1.25,
                parse_math=False,  # a $ in a file's name is a $
            )
        bottom -= _GAP
    _legend(figure, classes)
    save(figure, path)


def plot_panel(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    path: str | os.PathLike[str],
    classes: Sequence[Structure] = BY_LABEL,
) -> None:
    """Write a PNG of the same images as several networks see them: a column an image, a row a network, truth on top.

    Args:
        images: (H, W) or (H, W, 3) uint8 each.
        masks: their true labels.
        predictions: name of the network → its labels of the images.
        path: the file, replaced atomically.
        classes: whose labels these are.
    """
    rows: list[tuple[str, Sequence[np.ndarray | None]]] = [("image", [None] * len(images)), ("truth", masks)]
    rows += list(predictions.items())
    cell, label = 1.6, 1.7  # inches
    tall = max(cell * image.shape[0] / image.shape[1] for image in images)
    width, height = label + len(images) * (cell + _GAP), _HEADER + len(rows) * (tall + _LINE + _GAP)
    figure = Figure(figsize=(width, height), dpi=min(_DPI, int(65000 / height)), facecolor="white")
    bottom = height - _HEADER
    for name, labels in rows:
        bottom -= tall + _LINE + _GAP
        words = "\n".join(textwrap.wrap(_shortened(name), 22))
        figure.text(_GAP / width, (bottom + tall) / height, words, fontsize=9, color=_INK, va="top", parse_math=False)
        for column, (image, truth, found) in enumerate(zip(images, masks, labels, strict=True)):
            left = label + column * (cell + _GAP)
            axes = figure.add_axes((left / width, bottom / height, cell / width, tall / height))
            _picture(axes, image, found, classes)
            if name in predictions and found is not None:
                title = _overlaps(classes, truth, found) or "nothing there"
                axes.set_title(title, fontsize=8, loc="left", color=_INK, pad=3)
    _legend(figure, classes)
    save(figure, path)


def _picture(axes: Axes, image: np.ndarray, mask: np.ndarray | None, classes: Sequence[Structure]) -> None:
    """The image; over it every class of the mask as a translucent fill with an opaque outline."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    axes.set_axis_off()
    if mask is None:
        return
    for structure in classes[1:]:
        region = np.asarray(mask) == structure.label
        if region.any():
            fill = np.zeros((*region.shape, 4), np.uint8)
            fill[region] = (*structure.shade, 70)
            axes.imshow(fill, interpolation="nearest")
            # Framed by background, so that the outline also closes along the edge of the image.
            height, width = region.shape
            axes.contour(
                np.arange(-1, width + 1),
                np.arange(-1, height + 1),
                np.pad(region, 1).astype(np.float32),
                levels=[0.5],
                colors=[_unit(structure.shade)],
                linewidths=1.3,
            )
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)


def _legend(figure: Figure, classes: Sequence[Structure]) -> None:
    """The structures' colours, above all pictures."""
    figure.legend(
        handles=[Line2D([], [], color=_unit(s.shade), lw=5, label=s.title) for s in classes[1:]],
        loc="upper right",
        ncols=max(len(classes) - 1, 2),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        borderaxespad=0.3,
    )


def _unit(rgb: RGB) -> tuple[float, float, float]:
    red, green, blue = rgb
    return red / 255, green / 255, blue / 255


def _shortened(name: str, limit: int = 42) -> str:
    name = name.encode("utf-8", "backslashreplace").decode()  # a file's name need not be UTF-8
    return name if len(name) <= limit else f"...{name[3 - limit :]}"


def _scores(
    classes: Sequence[Structure],
    truth: np.ndarray,
    predicted: np.ndarray,
    remarks: Mapping[str, object] | None = None,
) -> str:
    overlaps = _overlaps(classes, truth, predicted)
    title = "prediction" + (f", IoU  {overlaps}" if overlaps else ", nothing there")
    return title + ("\n" + "   ".join(f"{key} {value}" for key, value in remarks.items()) if remarks else "")


def _overlaps(classes: Sequence[Structure], truth: np.ndarray, predicted: np.ndarray) -> str:
    """IoU of every structure that is in one of the label maps."""
    metrics = SegmentationMetrics(len(classes))
    metrics.update(np.asarray(predicted), np.asarray(truth))
    iou = metrics.compute()["iou"]
    return "   ".join(f"{s.name} {iou[s.label]:.3f}" for s in classes[1:] if not math.isnan(iou[s.label]))


def _curve(
    axes: Axes,
    rows: Sequence[Mapping[str, object]],
    key: str,
    label: str,
    colour: str | None,
    linestyle: str = "-",
) -> None:
    epochs, values = _series(rows, key)
    if values:
        # Markers while they can be told apart; a single epoch would be invisible without.
        marker = "o" if len(values) <= 25 else None
        axes.plot(epochs, values, linestyle, color=colour, label=label, lw=1.7, marker=marker, ms=4)


def _finish(axes: Axes, rows: Sequence[Mapping[str, object]], title: str, ylabel: str, *, legend: bool = True) -> None:
    """Labels, grid, whole epochs on the axis, and a line with its name where the phase changes."""
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    epochs = [_number(row.get("epoch")) for row in rows]
    margin = 0.04 * (max(epochs) - min(epochs)) or 1
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    for before, after in pairwise(rows):
        if after.get("phase") != before.get("phase"):
            change = (_number(before.get("epoch")) + _number(after.get("epoch"))) / 2
            axes.axvline(change, color=_FAINT, lw=1, ls=":")
            axes.annotate(
                f" {after.get('phase')}",
                (change, 0.01),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                color=_FAINT,
                va="bottom",
            )
    if axes.get_legend_handles_labels()[0] and not legend:
        return
    if axes.get_legend_handles_labels()[0]:
        # Below the axes: inside, it covers a curve in one run or another.
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_FAINT)


def _series(rows: Sequence[Mapping[str, object]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the rows that have a finite value."""
    points = [(_number(row.get("epoch")), _number(row.get(key))) for row in rows]
    points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _number(value: object) -> float:
    return math.nan if value is None or value == "" else float(value)  # type: ignore[arg-type]


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as a PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomic(Path(path), content.getvalue())
