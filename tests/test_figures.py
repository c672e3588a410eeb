"""The figures are written, decodable, and show the masks where they are."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from famseg.reporting.figures import plot_history, plot_overlays


def rows(count: int, first_phase: int = 10**6) -> list[dict[str, object]]:
    return [
        {
            "epoch": epoch,
            "phase": "AdamW" if epoch <= first_phase else "SGD",
            "train_loss": 1 / epoch,
            "val_loss": 1.1 / epoch,
            "val_iou_FL": 1 - 1 / epoch,
            "val_iou_FB": 1 - 0.5 / epoch,
            "val_miou": 1 - 0.7 / epoch,
        }
        for epoch in range(1, count + 1)
    ]


def read(path: Path) -> np.ndarray:
    """A written figure as (H, W, 3) RGB."""
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert picture is not None
    return picture[..., ::-1].astype(int)


def reddish(rgb: np.ndarray) -> np.ndarray:
    return rgb[..., 0] - np.maximum(rgb[..., 1], rgb[..., 2]) > 25


def greenish(rgb: np.ndarray) -> np.ndarray:
    return rgb[..., 1] - np.maximum(rgb[..., 0], rgb[..., 2]) > 25


@pytest.mark.parametrize("count", [1, 2, 60])
def test_history_of_any_length(tmp_path: Path, count: int) -> None:
    plot_history(rows(count, first_phase=40), tmp_path / "run" / "loss.png")
    picture = read(tmp_path / "run" / "loss.png")
    right = picture[:, picture.shape[1] // 2 :]
    assert reddish(right).sum() > 20  # the femur's curve
    assert greenish(right).sum() > 20  # the head's
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["loss.png"]  # no temporary file left


def test_history_takes_gaps_and_the_text_of_a_csv_file(tmp_path: Path) -> None:
    table = [
        {"epoch": "1", "phase": "AdamW", "train_loss": "0.5", "val_loss": "", "val_miou": "nan"},
        {"epoch": "2", "phase": "SGD", "train_loss": "0.4", "val_loss": "0.6", "val_iou_FL": math.nan},
        {"epoch": "3", "phase": "SGD", "train_loss": None},
    ]
    plot_history(table, tmp_path / "loss.png")
    assert read(tmp_path / "loss.png").std() > 1
    with pytest.raises(ValueError, match="rows"):
        plot_history([], tmp_path / "none.png")


def test_phase_change_is_marked(tmp_path: Path) -> None:
    plot_history(rows(20), tmp_path / "one.png")
    plot_history(rows(20, first_phase=10), tmp_path / "two.png")
    assert (read(tmp_path / "one.png") != read(tmp_path / "two.png")).any()


def cells(picture: np.ndarray) -> list[tuple[slice, slice]]:
    """Where the black images lie on the white page, in reading order."""
    dark = (picture.max(axis=2) < 60).astype(np.uint8)
    dark = cv2.morphologyEx(dark, cv2.MORPH_OPEN, np.ones((25, 25), np.uint8))
    _, _, stats, _ = cv2.connectedComponentsWithStats(dark)
    boxes = sorted((y // 20, x, y, w, h) for x, y, w, h, area in stats[1:] if w > 200)
    return [(slice(y, y + h), slice(x, x + w)) for _, x, y, w, h in boxes]


def test_overlay_colours_lie_where_the_masks_are(tmp_path: Path) -> None:
    image = np.zeros((100, 150), np.uint8)
    truth, predicted = np.zeros_like(image), np.zeros_like(image)
    truth[10:30, 10:60] = 1
    truth[40:90, 80:140] = 2
    predicted[60:80, 10:60] = 1
    predicted[5:35, 90:140] = 2
    plot_overlays([("first", image, truth, predicted)], tmp_path / "overlays.png")
    picture = read(tmp_path / "overlays.png")
    plain, left, right = (picture[cell] for cell in cells(picture))
    assert not reddish(plain).any()
    assert not greenish(plain).any()
    for panel, mask in ((left, truth), (right, predicted)):
        height, width = panel.shape[:2]
        for colour, label in ((reddish, 1), (greenish, 2)):
            region = cv2.resize((mask == label).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
            shown = colour(panel)
            inside = cv2.erode(region, np.ones((9, 9), np.uint8)).astype(bool)
            outside = ~cv2.dilate(region, np.ones((9, 9), np.uint8)).astype(bool)
            assert shown[inside].all()
            assert not shown[outside].any()
            # The outline is opaque, the fill is translucent.
            assert panel[region.astype(bool)].max() > 200
            assert panel[inside].max() < 120


def test_overlays_take_any_number_of_images_of_any_size(tmp_path: Path) -> None:
    def item(name: str, height: int, width: int, *remarks: dict[str, object] | None) -> tuple:
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 4 : width // 2] = 2
        return (name, np.zeros_like(mask), mask, np.zeros_like(mask), *remarks)

    items = [item("wide", 60, 120), item("tall", 120, 60, {"HC": "171.3 mm"}), item("x" * 90, 50, 50, None)]
    plot_overlays(items, tmp_path / "overlays.png")
    picture = read(tmp_path / "overlays.png")
    assert len(cells(picture)) == 9
    with pytest.raises(ValueError, match="items"):
        plot_overlays([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="wide: expected"):
        plot_overlays([("wide", items[0][1], items[1][2], items[0][3])], tmp_path / "none.png")


def test_an_image_without_any_class_says_so_and_does_not_fail(tmp_path: Path) -> None:
    empty = np.zeros((60, 60), np.uint8)
    plot_overlays([("empty", empty, empty, empty)], tmp_path / "overlays.png")
    assert len(cells(read(tmp_path / "overlays.png"))) == 3


@pytest.mark.parametrize("name", ["$\\x$", "a$b_{", "\udcff\udcfe", "x\ny"])
def test_any_file_name_can_stand_above_its_picture(name, tmp_path):
    image = np.zeros((8, 8), np.uint8)
    plot_overlays([(name, image, image, image)], tmp_path / "overlays.png")
    assert (tmp_path / "overlays.png").stat().st_size
