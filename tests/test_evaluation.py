"""The scores of an evaluation against independent ones, and the policy for what is missed, invented or absent."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, MeanIoU

from famseg.anatomy import BY_LABEL, BY_NAME
from famseg.biometrics import fit_head
from famseg.data.phantom import Phantom
from famseg.data.sample import Sample
from famseg.evaluation import Evaluation, evaluate, score_image
from famseg.inference import Reading
from famseg.metrics import SegmentationMetrics


def disc(shape: tuple[int, int], radius: float, label: int = 2) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    inside = np.hypot(rows - shape[0] / 2, columns - shape[1] / 2) <= radius
    return np.where(inside, label, 0).astype(np.uint8)


def sample(mask: np.ndarray, pixel_size: float | None = 0.5, **lengths: Any) -> Sample:
    return Sample("one", "s", np.zeros_like(mask), mask, pixel_size, **lengths)


def shifted(mask: np.ndarray, rows: int) -> np.ndarray:
    return np.roll(mask, rows, axis=0)


def test_a_perfect_prediction_is_perfect() -> None:
    samples = [Phantom(6, (96, 96), seed=1)[i] for i in range(6)]
    summary = evaluate(samples, [s.mask for s in samples]).summary()
    assert summary["miou"] == summary["mdice"] == summary["pixel_accuracy"] == 1
    for scores in summary["per_image"].values():
        assert scores["missed"] == scores["invented"] == 0
        assert scores["found"] + scores["absent"] == 6
        assert scores["iou"]["mean"] == scores["dice"]["mean"] == 1
        assert scores["hd95_px"]["mean"] == scores["assd_px"]["mean"] == 0
        assert scores["jaggedness"] == scores["jaggedness_truth"]


def test_overlap_agrees_with_monai_image_by_image_and_with_the_confusion_matrix_over_all() -> None:
    samples = [Phantom(5, (64, 64), seed=2)[i] for i in range(5)]
    predictions = [shifted(s.mask, 3) for s in samples]
    evaluation, pooled = evaluate(samples, predictions), SegmentationMetrics(3)
    for score, s, labels in zip(evaluation.images, samples, predictions, strict=True):
        pooled.update(labels, s.mask)
        one_hot = [
            torch.nn.functional.one_hot(torch.from_numpy(m.astype(np.int64)), 3).movedim(-1, 0)[None]
            for m in (labels, s.mask)
        ]
        dice = DiceMetric(include_background=False, reduction="none")(*one_hot)[0]
        iou = MeanIoU(include_background=False, reduction="none")(*one_hot)[0]
        for place, name in enumerate(("FL", "FB")):
            if score.objects[name].state == "found":
                assert score.objects[name].dice == pytest.approx(float(dice[place]), abs=1e-6)
                assert score.objects[name].iou == pytest.approx(float(iou[place]), abs=1e-6)
        alone = SegmentationMetrics(3)
        alone.update(labels, s.mask)
        assert score.pixel_accuracy == (labels == s.mask).mean() == score.row()["pixel_accuracy"]
        assert (score.miou, score.mdice) == (alone.compute()["miou"], alone.compute()["mdice"])
    for name, found in evaluation.summary()["image_means"].items():
        values = [score.row()[name] for score in evaluation.images]
        assert found["count"] == 5 and found["mean"] == pytest.approx(np.mean(values))
        assert found["sd"] == pytest.approx(np.std(values, ddof=1))
    assert evaluation.summary()["miou"] == pooled.compute()["miou"]


def test_missed_and_invented_objects_cost_and_absent_ones_do_not_count() -> None:
    head, nothing = disc((60, 80), 20), np.zeros((60, 80), np.uint8)
    for truth, found, state in ((head, nothing, "missed"), (nothing, head, "invented")):
        score = score_image(sample(truth), Reading(found)).objects["FB"]
        assert (score.state, score.iou, score.dice) == (state, 0, 0)
        assert score.hd95 == score.assd == 100  # the diagonal of 60 x 80
    absent = score_image(sample(nothing), Reading(nothing)).objects["FB"]
    assert absent.state == "absent"
    assert absent.iou is absent.hd95 is None


def test_a_miss_never_improves_a_mean() -> None:
    head, nothing = disc((60, 80), 20), np.zeros((60, 80), np.uint8)
    good = evaluate([sample(head)] * 2, [shifted(head, 1)] * 2).summary()
    missed = evaluate([sample(head)] * 3, [shifted(head, 1)] * 2 + [nothing]).summary()
    invented = evaluate([*[sample(head)] * 2, sample(nothing)], [shifted(head, 1)] * 2 + [head]).summary()
    absent = evaluate([*[sample(head)] * 2, sample(nothing)], [shifted(head, 1)] * 2 + [nothing]).summary()
    for worse in (missed, invented):
        for key in ("iou", "dice"):
            assert worse["per_image"]["FB"][key]["mean"] == pytest.approx(2 / 3 * good["per_image"]["FB"][key]["mean"])
        for key in ("hd95_px", "assd_px", "hd95_mm", "assd_mm"):
            assert worse["per_image"]["FB"][key]["mean"] > 10 * good["per_image"]["FB"][key]["mean"]
    assert absent["per_image"]["FB"]["dice"] == good["per_image"]["FB"]["dice"]
    error = "mean_absolute_error"
    assert missed["head_circumference_mm"][error] > 10 * good["head_circumference_mm"][error]
    assert missed["head_circumference_mm"]["measured_only"] == good["head_circumference_mm"]["measured_only"]
    assert (missed["head_circumference_mm"]["missed"], invented["head_circumference_mm"]["invented"]) == (1, 1)


def test_millimetres_and_their_errors() -> None:
    truths, radii = (200.0, 210.0, 190.0), (60, 66, 62)
    heads = [disc((160, 160), r) for r in radii]
    evaluation = evaluate([sample(head, head_circumference=t) for head, t in zip(heads, truths, strict=True)], heads)
    errors = np.array([2 * math.pi * (r) * 0.5 - t for r, t in zip(radii, truths, strict=True)])
    found = evaluation.summary()["head_circumference_mm"]
    assert found["mean_error"] == pytest.approx(errors.mean(), abs=0.5)
    assert found["mean_absolute_error"] == pytest.approx(np.abs(errors).mean(), abs=0.5)
    only = found["measured_only"]
    own = np.array([image.lengths["FB"].error for image in evaluation.images])
    assert only["limits_of_agreement"] == pytest.approx(
        [own.mean() - 1.96 * own.std(ddof=1), own.mean() + 1.96 * own.std(ddof=1)]
    )
    assert "femur_length_mm" not in evaluation.summary()


def test_a_length_not_given_is_measured_on_the_true_mask() -> None:
    head = disc((160, 160), 60)
    length = score_image(sample(head), Reading(head)).lengths["FB"]
    assert (length.truth_from, length.error) == ("mask", 0)
    given = score_image(sample(head, head_circumference=180.0), Reading(head)).lengths["FB"]
    assert (given.truth_from, given.truth) == ("given", 180)
    assert score_image(sample(head, pixel_size=None), Reading(head)).lengths == {}


def test_a_length_measured_on_the_true_mask_is_the_same_for_every_network() -> None:
    """One whose measures take off what annotators add to masks would take it off the truth as well."""
    head = disc((160, 160), 60)
    shorter = dataclasses.replace(BY_NAME["FB"].measure, fit=lambda mask: fit_head(mask).shortened(8))  # type: ignore[union-attr, type-var]
    classes = tuple(dataclasses.replace(s, measure=shorter) if s.name == "FB" else s for s in BY_LABEL)
    own, other = (score_image(sample(head), Reading(head), c).lengths["FB"] for c in (BY_LABEL, classes))
    assert own.truth == other.truth and own.error == 0
    assert other.error == pytest.approx(-8 * 0.5)


def test_what_a_sample_does_not_label_is_neither_right_nor_wrong() -> None:
    head = disc((60, 60), 15)
    found = head.copy()
    found[2:4, 2:30] = 1
    blind, seeing = (
        evaluate([dataclasses.replace(sample(head), unlabelled=names)], [found]) for names in (("FL",), ())
    )
    perfect = evaluate([sample(head)], [head])
    assert blind.summary() == perfect.summary()
    assert seeing.summary()["per_image"]["FL"]["invented"] == 1 and seeing.summary()["miou"] < 0.7
    assert (blind.labels(0) == found).all()  # as it is drawn
    hidden = np.where(head == 2, np.uint8(1), head)  # in the place of what is labelled it is wrong
    wrong = evaluate([dataclasses.replace(sample(head), unlabelled=("FL",))], [hidden])
    assert wrong.summary()["per_image"]["FB"]["missed"] == 1 and wrong.summary()["iou"]["FL"] == 0


def test_the_summary_is_json_and_rows_have_one_shape() -> None:
    head, nothing = disc((40, 40), 12), np.zeros((40, 40), np.uint8)
    evaluation = evaluate([sample(head), sample(nothing, pixel_size=None)], [nothing, nothing])
    json.dumps(evaluation.summary(), allow_nan=False)
    first, second = (image.row() for image in evaluation.images)
    assert first.keys() == second.keys()
    assert (first["FB_state"], second["FB_state"], second["head_circumference_truth_mm"]) == ("missed", "absent", None)


def test_label_maps_are_kept_and_ranked() -> None:
    head = disc((40, 40), 12)
    predictions = [head, shifted(head, 8), shifted(head, 2), np.zeros_like(head)]
    evaluation = evaluate([sample(head)] * 4, predictions)
    assert evaluation.ranking() == [3, 1, 2, 0]
    for position, labels in enumerate(predictions):
        np.testing.assert_array_equal(evaluation.labels(position), labels)
    assert Evaluation().summary()["images"] == 0
