"""famseg-evaluate: score a trained network on labelled images; writes metrics.json, per_image.csv and report.html.

Without a checkpoint it takes the network that comes with famseg, without --data the data of the training run. Images
that the network was trained on are known by their pixels and scored only when --split all says so.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from famseg.anatomy import Structure, reported
from famseg.cli.command import build_parser, chosen_network, parse, progress, required, run
from famseg.data import DATA_HELP
from famseg.data.classes import left_out_of
from famseg.data.dataset import open_data
from famseg.data.sample import Sample
from famseg.evaluation import Evaluation, ImageScore
from famseg.files.errors import DataError
from famseg.files.lock import folder_for, locked
from famseg.files.tables import write_table
from famseg.files.writing import write_atomic
from famseg.inference import Network, readings, trained_by
from famseg.options import (
    CHECKPOINT_HELP,
    LARGEST_SEED,
    OR_PRETRAINED,
    InferenceOptions,
    device_for,
    expect_number,
    option,
    warn_of_slow_bf16,
)
from famseg.reporting.overlay import draw_overlay
from famseg.reporting.page import Picture, report
from famseg.results import read_history, write_metrics

PROG = "famseg-evaluate"
_WORST, _TYPICAL, _BEST = 6, 4, 4  # pictures in the report


@dataclass(frozen=True)
class Options(InferenceOptions):
    checkpoint: str | None = option(None, CHECKPOINT_HELP + OR_PRETRAINED, path=True)
    data: str | None = option(None, f"{DATA_HELP}; default: the data that trained the checkpoint")
    out: str | None = option(
        None,
        "new or empty folder for metrics.json, per_image.csv and report.html; default: runs/TIME-evaluate",
        path=True,
    )
    split: Literal["held-out", "all"] = option(
        "held-out", "held-out: the images of subjects that the network was not trained on; all: every image"
    )
    data_seed: int | None = option(None, "seed of phantom images; default: the training run's, that is, its own images")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_seed is not None:
            expect_number("data_seed", self.data_seed, 0, LARGEST_SEED)


@dataclass(frozen=True)
class Selection:
    """Which images are scored, and in words."""

    samples: Sequence[Sample]
    indices: list[int]
    spec: str
    split: str
    trained: int  # images among them that trained the network
    words: str
    notes: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad usage or input with one clear line, 130 interrupted."""
    parser = build_parser(PROG, __doc__, Options, positional=("checkpoint",))
    return run(PROG, lambda: _evaluate(Options(**parse(parser, Options, arguments))))


def _evaluate(options: Options) -> int:
    if options.checkpoint is None:
        required("data", options.data, f"{PROG} --data hc18:DIR, or name a checkpoint to score on its own data")
    device = device_for(options.device, options.backend)
    warn_of_slow_bf16(options.precision, device)
    network = chosen_network(options.checkpoint)
    with locked(folder_for(options.out, "evaluate")) as out:
        return _score(network, options, device, out)


def _score(network: Network, options: Options, device: str, out: Path) -> int:
    selection = select(network, options.data, options.split, options.data_seed)
    print(f"scoring {selection.words}", *selection.notes, sep="\n", flush=True)

    evaluation = Evaluation(network.classes)
    pending: deque[Sample] = deque()

    def images() -> Iterator[np.ndarray]:
        for index in progress(selection.indices, "scoring"):
            pending.append(selection.samples[index])
            yield pending[-1].image

    found = readings(
        network,
        images(),
        batch_size=options.batch_size,
        flips=options.flips,
        precision=options.precision,
        device=device,
        backend=options.backend,
    )
    for reading in found:
        evaluation.add(pending.popleft(), reading)

    views = network.views(options.flips)
    facts = {
        "data": selection.spec,
        "split": selection.split,
        "trained_on": selection.trained,
        "checkpoint": str(network.path),
        "model": network.config["model"],
        "parameters": network.parameters,
        "epoch": network.epoch,
        "image_size": network.image_size,
        "views": views,
    }
    summary = write_metrics(out, evaluation, facts)
    rows = [image.row() for image in evaluation.images]
    write_table(out / "per_image.csv", rows)
    page = report(
        title=f"{network.config['model']}: {selection.spec}",
        subtitle=f"Scored {selection.words}.",
        facts=(
            f"{network.path}, {network.parameters / 1e6:.2f} M parameters, epoch {network.epoch}, "
            f"network input {network.image_size} px" + (f", averaged over {views} views" if views > 1 else "")
        ),
        notes=selection.notes,
        summary=summary,
        rows=rows,
        pictures=_pictures(selection, evaluation),
        history=read_history(network.path),
        version=summary["versions"]["famseg"],
        classes=network.classes,
    )
    write_atomic(out / "report.html", page.encode("utf-8", "backslashreplace"))  # names need not be UTF-8
    print(_line(summary, network.classes))
    print(f"report: {out / 'report.html'}")
    return 0


def select(network: Network, spec: str | None, split: str, data_seed: int | None) -> Selection:
    """The images to score: all, or those that the network was not trained on, by the digests in the checkpoint.

    Other images of a subject that it was trained on are not held out either, nor are those that --train-images left
    unused: however few images trained, the same ones are scored.

    Raises:
        DataError: the data cannot be opened, or no image is left.
    """
    spec = spec or network.config["data"]
    seed = network.config["seed"] if data_seed is None else data_seed
    samples = open_data(
        spec, image_size=network.image_size, seed=seed, classes=network.classes, in_channels=network.in_channels
    )
    digests = trained_by(network.images)
    names = {*digests.values()}
    subjects, trained, unused, alike = [], [], [], []
    for index in progress(range(len(samples)), "reading"):
        sample = samples[index]
        subjects.append(sample.subject)
        trained.append(sample.digest in digests)
        alike.append(sample.name in names and not sample.simulated)
        unused.append(sample.digest in network.images.get("unused", ()))
    known = {subject for subject, *seen in zip(subjects, trained, unused, strict=True) if any(seen)}
    indices = [i for i, subject in enumerate(subjects) if split == "all" or subject not in known]
    if not indices:
        raise DataError(
            f"data '{spec}': the network was trained on all {len(samples)} images; give --data with others, or --split "
            "all to score them all the same"
        )
    words = f"{len(indices)} images of {len({subjects[i] for i in indices})} subjects"
    words += f", all of {spec}" if len(indices) == len(samples) else f", held out of {len(samples)} ({spec})"
    scored_trained = sum(trained[i] for i in indices)
    notes = []
    if scored_trained:
        notes.append(
            f"{scored_trained} of these {len(indices)} images trained the network: their numbers are too good."
        )
    elif known:
        which = "trained the network" + (" or were set aside by --train-images" if any(unused) else "")
        notes.append(f"{len(samples) - len(indices)} images of subjects that {which} are left out.")
    if resized := sum(alike[i] and not trained[i] for i in indices):
        notes.append(
            f"{resized} of these {len(indices)} images have the names of images that trained the network, and other "
            "pixels: if they are the same ones at another size, their numbers are too good."
        )
    if left_out := left_out_of(samples):
        notes.append(f"{', '.join(left_out)} in the masks: no class of the network, counted as background.")
    if any(part.strip().split(":")[0] == "phantom" for part in spec.split(",")):
        notes.append(
            "Synthetic images: the phantom is a simulation. Its numbers compare networks and say nothing of a clinic."
        )
    return Selection(samples, indices, spec, split, scored_trained, words, notes)


def _pictures(selection: Selection, evaluation: Evaluation) -> dict[str, list[Picture]]:
    """The worst, typical and best images; all of them where they are few."""
    order = evaluation.ranking()
    if len(order) <= _WORST + _TYPICAL + _BEST:
        groups = {"All, worst first": order}
    else:
        middle = (len(order) - _TYPICAL) // 2
        groups = {
            "Worst": order[:_WORST],
            "Typical": order[middle : middle + _TYPICAL],
            "Best": order[: -_BEST - 1 : -1],
        }
    return {
        heading: [_picture(selection.samples[selection.indices[i]], evaluation, i) for i in positions]
        for heading, positions in groups.items()
    }


def _picture(sample: Sample, evaluation: Evaluation, position: int) -> Picture:
    labels, score, classes = evaluation.labels(position), evaluation.images[position], evaluation.classes
    shapes = {s.name: s.measure.fit(labels == s.label) for s in reported(classes) if s.measure is not None}
    overlay = draw_overlay(sample.image, labels, shapes, truth=sample.mask, classes=classes)
    doubts = [f"{name}: {doubt}" for name, length in score.lengths.items() for doubt in length.doubts]
    return Picture(sample.name, sample.image, overlay, _remarks(score, classes), doubts)


def _remarks(score: ImageScore, classes: Sequence[Structure]) -> list[str]:
    remarks = []
    for structure in reported(classes):
        found = score.objects[structure.name]
        if found.state == "absent":
            continue
        words = f"Dice {found.dice:.3f}" if found.state == "found" else found.state
        length = score.lengths.get(structure.name)
        if length is not None and length.measured is not None:
            words += f", {length.measured:.1f} mm"
            if length.truth is not None:
                words += f" (true {length.truth:.1f}, {length.error:+.1f})"
        remarks.append(f"{structure.title}: {words}")
    return remarks or ["nothing there, nothing found"]


def _line(summary: dict[str, Any], classes: Sequence[Structure]) -> str:
    parts = [f"mIoU {summary['miou']:.3f}"]
    for structure in reported(classes):
        scores, measure = summary["per_image"][structure.name], structure.measure
        if scores["dice"] is not None:
            parts.append(
                f"{structure.title} Dice {scores['dice']['mean']:.3f} "
                f"({scores['missed']} missed, {scores['invented']} invented)"
            )
        if measure is not None and (errors := summary.get(f"{measure.name}_mm")) is not None:
            parts.append(f"{measure.words} mean absolute error {errors['mean_absolute_error']:.2f} mm")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
