"""How good label maps are: per image, over a set, in pixels and in millimetres.

What a miss costs is decided here, once, and never by leaving something out:

- *missed* (there, not found) and *invented* (found, not there) objects have IoU and Dice 0, and HD95 and ASSD the
  image's diagonal, the largest distance there is. They count in every mean over images.
- *absent* (neither there nor found) is right; it has no overlap and no distance, and is counted, not averaged.
- A head or femur that cannot be measured counts as measured 0 mm in the mean errors. The same errors over the measured
  ones alone stand beside them, with their number, because bias and limits of agreement describe an instrument.
- A value that exists for no image is null, and no mean contains it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from famseg.anatomy import BY_LABEL, MEASURES, Measure, Structure, measures_of, names_of
from famseg.biometrics import doubts
from famseg.data.sample import Sample
from famseg.inference import Reading
from famseg.metrics import SegmentationMetrics, boundary_distances, jaggedness


@dataclass(frozen=True)
class ObjectScore:
    """One object in one image; lengths in pixels; None where there is nothing to say (see the policy above)."""

    state: Literal["found", "missed", "invented", "absent"]
    iou: float | None = None
    dice: float | None = None
    hd95: float | None = None
    assd: float | None = None
    jaggedness: float | None = None
    jaggedness_truth: float | None = None


@dataclass(frozen=True)
class LengthScore:
    """One measurement in one image, in mm."""

    truth: float | None = None  # None: the object is not there
    truth_from: str = ""  # "given" with the data, or measured on the true "mask"
    measured: float | None = None  # None: not found, or it cannot be measured
    doubts: tuple[str, ...] = ()
    expected_error: float | None = None  # absolute, by a network that knows its errors

    @property
    def error(self) -> float | None:
        return None if self.truth is None or self.measured is None else self.measured - self.truth


@dataclass(frozen=True)
class ImageScore:
    """Everything about one image."""

    name: str
    subject: str
    height: int
    width: int
    pixel_size: float | None  # mm
    pixel_accuracy: float
    miou: float  # over the classes that are there or were found, background included
    mdice: float  # over the same
    objects: Mapping[str, ObjectScore]
    lengths: Mapping[str, LengthScore]  # by object; empty without a pixel size
    measures: Mapping[str, Measure]  # by object: what there is to measure

    @property
    def mean_iou(self) -> float:
        """Over the objects that are there or were found; 1 where rightly nothing was found."""
        values = [score.iou for score in self.objects.values() if score.iou is not None]
        return sum(values) / len(values) if values else 1.0

    def row(self) -> dict[str, Any]:
        """A line of per_image.csv."""
        line: dict[str, Any] = {
            "name": self.name,
            "subject": self.subject,
            "height": self.height,
            "width": self.width,
            "pixel_size_mm": self.pixel_size,
            "mean_iou": self.mean_iou,
            "pixel_accuracy": self.pixel_accuracy,
            "miou": self.miou,
            "mdice": self.mdice,
        }
        for name, score in self.objects.items():
            line |= {
                f"{name}_state": score.state,
                f"{name}_iou": score.iou,
                f"{name}_dice": score.dice,
                f"{name}_hd95_px": score.hd95,
                f"{name}_assd_px": score.assd,
                f"{name}_hd95_mm": _times(score.hd95, self.pixel_size),
                f"{name}_assd_mm": _times(score.assd, self.pixel_size),
                f"{name}_jaggedness": score.jaggedness,
                f"{name}_jaggedness_truth": score.jaggedness_truth,
            }
        for name, measure in self.measures.items():
            length = self.lengths.get(name, LengthScore())
            line |= {
                f"{measure.name}_mm": length.measured,
                f"{measure.name}_truth_mm": length.truth,
                f"{measure.name}_truth_from": length.truth_from,
                f"{measure.name}_error_mm": length.error,
                f"{measure.name}_expected_error_mm": length.expected_error,
                f"{measure.name}_doubts": "; ".join(length.doubts),
            }
        return line


class Evaluation:
    """Scores of label maps, gathered image by image; keeps the label maps (as PNG, a few kB each) for pictures.

    Args:
        classes: whose labels the maps and the masks have.
    """

    def __init__(self, classes: Sequence[Structure] = BY_LABEL) -> None:
        self.classes = classes
        self.images: list[ImageScore] = []
        self._overlap = SegmentationMetrics(len(classes))
        self._labels: list[np.ndarray] = []

    def add(self, sample: Sample, reading: Reading) -> None:
        """Score what was found in a sample, at its own size, against its mask.

        A structure that the sample does not label is neither right nor wrong: where the mask is background it counts as
        not found.
        """
        self._labels.append(cv2.imencode(".png", reading.labels)[1])
        if unlabelled := [s.label for s in self.classes if s.name in sample.unlabelled]:
            unknown = np.isin(reading.labels, unlabelled) & (sample.mask == 0)
            reading = dataclasses.replace(reading, labels=np.where(unknown, np.uint8(0), reading.labels))
        self._overlap.update(reading.labels, sample.mask)
        self.images.append(score_image(sample, reading, self.classes))

    def labels(self, position: int) -> np.ndarray:
        """The label map of the image added as number `position`."""
        labels = cv2.imdecode(self._labels[position], cv2.IMREAD_UNCHANGED)
        assert labels is not None  # encoded by `add`
        return labels

    def ranking(self) -> list[int]:
        """Positions from the worst to the best image, by `mean_iou`; the order of ties is that of their names."""
        return sorted(range(len(self.images)), key=lambda i: (self.images[i].mean_iou, self.images[i].name))

    def summary(self) -> dict[str, Any]:
        """The content of metrics.json, ready for JSON: what has no value is None.

        `miou`, `iou`, `dice`, `class_accuracy`, `pixel_accuracy` are of all pixels of all images taken together, as in
        the paper's tables; `per_image` are statistics over images, as in HC18's, and `image_means` are those of pixel
        accuracy, mIoU and mean Dice an image; `head_circumference_mm`, `femur_length_mm` are errors, measured minus
        true, of classes that are measured.
        """
        pooled, names = self._overlap.compute(), names_of(self.classes)
        results: dict[str, Any] = {
            "images": len(self.images),
            "subjects": len({image.subject for image in self.images}),
            "miou": pooled["miou"],
            "mdice": pooled["mdice"],
            "iou": dict(zip(names, pooled["iou"], strict=True)),
            "dice": dict(zip(names, pooled["dice"], strict=True)),
            "class_accuracy": dict(zip(names, pooled["accuracy"], strict=True)),
            "pixel_accuracy": pooled["pixel_accuracy"],
            "per_image": {name: self._over_images(name) for name in names[1:]},
            "image_means": {
                name: _statistics(getattr(image, name) for image in self.images)
                for name in ("pixel_accuracy", "miou", "mdice")
            },
        }
        for name, measure in measures_of(self.classes).items():
            lengths = [image.lengths[name] for image in self.images if name in image.lengths]
            if any(length.truth is not None for length in lengths):
                results[f"{measure.name}_mm"] = _length_errors(lengths)
        return _without_nan(results)

    def _over_images(self, name: str) -> dict[str, Any]:
        scores = [image.objects[name] for image in self.images]
        states = [score.state for score in scores]
        mm = [
            {
                "hd95": _times(image.objects[name].hd95, image.pixel_size),
                "assd": _times(image.objects[name].assd, image.pixel_size),
            }
            for image in self.images
        ]
        return {
            **{state: states.count(state) for state in ("found", "missed", "invented", "absent")},
            "iou": _statistics(score.iou for score in scores),
            "dice": _statistics(score.dice for score in scores),
            "hd95_px": _statistics(score.hd95 for score in scores),
            "assd_px": _statistics(score.assd for score in scores),
            "hd95_mm": _statistics(values["hd95"] for values in mm),
            "assd_mm": _statistics(values["assd"] for values in mm),
            "jaggedness": _statistics(score.jaggedness for score in scores),
            "jaggedness_truth": _statistics(score.jaggedness_truth for score in scores),
        }


def evaluate(
    samples: Iterable[Sample], predictions: Iterable[np.ndarray], classes: Sequence[Structure] = BY_LABEL
) -> Evaluation:
    """Score label maps, each at its sample's own size, against the samples' masks; both are labelled as `classes`."""
    evaluation = Evaluation(classes)
    for sample, labels in zip(samples, predictions, strict=True):
        evaluation.add(sample, Reading(labels))
    return evaluation


def score_image(sample: Sample, reading: Reading, classes: Sequence[Structure] = BY_LABEL) -> ImageScore:
    """Everything about what was found in one sample, at its own size."""
    labels, objects, lengths = reading.labels, {}, {}
    for structure in classes[1:]:
        truth, found = sample.mask == structure.label, labels == structure.label
        objects[structure.name] = _score_object(truth, found)
        measure = structure.measure
        if measure is not None and sample.pixel_size is not None:
            given = sample.true_length(measure.name)
            source = "given"
            # The structure's own fit: a network's takes off what annotators add to masks, and would do so here as well.
            if given is None and (shape := MEASURES[structure.name].fit(truth)) is not None:
                given, source = shape.length * sample.pixel_size, "mask"
            lengths[structure.name] = _score_length(measure, given, source, found, sample.pixel_size, reading)
    height, width = sample.mask.shape
    overlap = SegmentationMetrics(len(classes))
    overlap.update(labels, sample.mask)
    scores = overlap.compute()
    return ImageScore(
        sample.name,
        sample.subject,
        height,
        width,
        sample.pixel_size,
        scores["pixel_accuracy"],
        scores["miou"],
        scores["mdice"],
        objects,
        lengths,
        measures_of(classes),
    )


def _score_object(truth: np.ndarray, found: np.ndarray) -> ObjectScore:
    there, predicted = bool(truth.any()), bool(found.any())
    if not (there or predicted):
        return ObjectScore("absent")
    rough = _value(jaggedness(found)) if predicted else None
    rough_truth = _value(jaggedness(truth)) if there else None
    if not (there and predicted):
        worst = math.hypot(*truth.shape)
        return ObjectScore("missed" if there else "invented", 0.0, 0.0, worst, worst, rough, rough_truth)
    both, either = int((truth & found).sum()), int((truth | found).sum())
    distances = boundary_distances(found, truth)
    return ObjectScore(
        "found", both / either, 2 * both / (both + either), distances.hd95, distances.assd, rough, rough_truth
    )


def _score_length(
    measure: Measure, given: float | None, source: str, found: np.ndarray, pixel_size: float, reading: Reading
) -> LengthScore:
    shape = measure.fit(found)
    return LengthScore(
        truth=given,
        truth_from="" if given is None else source,
        measured=None if shape is None else shape.length * pixel_size,
        doubts=() if shape is None else (*doubts(found, shape), *reading.doubts(measure.name, pixel_size)),
        expected_error=_times(reading.expected_error.get(measure.name), pixel_size),
    )


def _length_errors(lengths: Sequence[LengthScore]) -> dict[str, Any]:
    """Errors measured − true in mm: DF (mean), its spread, ADF (mean absolute); a miss counts as measured 0 mm."""
    there = [length for length in lengths if length.truth is not None]
    every = np.array([(length.measured or 0.0) - (length.truth or 0.0) for length in there])
    errors = np.array([length.error for length in there if length.error is not None], float)
    return {
        "images": len(there),
        "measured": len(errors),
        "missed": len(there) - len(errors),
        "invented": sum(length.truth is None and length.measured is not None for length in lengths),
        "truth_from_mask": sum(length.truth_from == "mask" for length in there),
        **_errors(every),
        "measured_only": _errors(errors) | {"limits_of_agreement": _limits(errors)},
    }


def _errors(errors: np.ndarray) -> dict[str, Any]:
    return {
        "mean_error": float(errors.mean()) if len(errors) else None,
        "sd_error": float(errors.std(ddof=1)) if len(errors) > 1 else None,
        "mean_absolute_error": float(np.abs(errors).mean()) if len(errors) else None,
        "median_absolute_error": float(np.median(np.abs(errors))) if len(errors) else None,
    }


def _limits(errors: np.ndarray) -> list[float] | None:
    """Bland and Altman's 95 % limits of agreement: mean ± 1.96 sample standard deviations."""
    if len(errors) < 2:
        return None
    mean, spread = errors.mean(), 1.96 * errors.std(ddof=1)
    return [float(mean - spread), float(mean + spread)]


def _statistics(values: Iterable[float | None]) -> dict[str, Any] | None:
    present = np.array([value for value in values if value is not None])
    if not len(present):
        return None
    return {
        "count": len(present),
        "mean": float(present.mean()),
        "sd": float(present.std(ddof=1)) if len(present) > 1 else None,
        "median": float(np.median(present)),
    }


def _times(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def _value(number: float) -> float | None:
    return None if math.isnan(number) else number


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what has no value is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
