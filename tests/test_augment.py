"""The letterbox, augmentation, and the dataset handed to the training loop."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from famseg.data.augment import (
    MEAN,
    STD,
    eval_transform,
    letterbox,
    letterbox_scale,
    normalise,
    train_transform,
    undo_letterbox,
)
from famseg.data.dataset import SegmentationDataset
from famseg.data.sample import Sample
from tests.samples import disc, iou, three_samples


@pytest.fixture
def samples() -> list[Sample]:
    return three_samples()


# --- letterbox and augmentation ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, (48, 96), (200, 120)])
def test_letterbox_keeps_circles_round_and_places(size: int | tuple[int, int]) -> None:
    height, width = 54, 80
    circle = disc(height, width, 50, 25, 20, 20)
    image, mask = eval_transform(size)(circle.astype(np.uint8) * 255, circle.astype(np.uint8) * 2)
    assert image.shape == mask.shape == ((size, size) if isinstance(size, int) else size)
    assert image.dtype == np.float32
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 2}
    scale = letterbox_scale(height, width, size)
    rows, columns = np.nonzero(mask)
    assert np.ptp(columns) + 1 == pytest.approx(40.5 * scale, abs=1.5)
    assert np.ptp(rows) + 1 == pytest.approx(40.5 * scale, abs=1.5)
    assert (mask == 2).sum() == pytest.approx(circle.sum() * scale**2, rel=0.03)
    # Image and mask lie on each other: nearest neighbour samples pixel centres.
    assert iou(image * STD + MEAN > 0.5, mask == 2) > 0.95
    assert iou(undo_letterbox(mask, height, width) == 2, circle) > 0.95


def test_letterbox_at_the_same_size_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    np.testing.assert_array_equal(letterbox(image, 32, cv2.INTER_LINEAR), image)
    np.testing.assert_array_equal(undo_letterbox(image, 32, 32), image)
    np.testing.assert_allclose(normalise(image), (image / 255 - MEAN) / STD, rtol=1e-5, atol=1e-6)


def test_augmentation_depends_on_the_seed_alone(samples: list[Sample]) -> None:
    transform, other = train_transform(64), train_transform(64)
    first = transform(samples[0].image, samples[0].mask, 7)
    different = transform(samples[0].image, samples[0].mask, 8)
    again = other(samples[0].image, samples[0].mask, 7)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], different[0])


def test_augmentation_draws_its_steps_independently() -> None:
    """Vertical flips must not be tied to horizontal ones (albumentations' set_random_seed does that)."""
    corner = np.zeros((64, 64), np.uint8)
    corner[8:20, 8:20] = 2
    transform, sides = train_transform(64), []
    for seed in range(150):
        rows, columns = np.nonzero(transform(corner, corner, seed)[1])
        sides.append((columns.mean() > 32, rows.mean() > 32))
    horizontal, vertical = np.array(sides).T
    assert 0.35 < horizontal.mean() < 0.65
    assert 0.03 < vertical.mean() < 0.25
    assert (vertical & ~horizontal).any()
    assert (vertical & horizontal).any()


def test_rotation_and_flips_alone_move_every_image_and_change_no_grey_value() -> None:
    bar = np.zeros((64, 64), np.uint8)
    bar[30:34, 12:52] = 2
    transform, angles = train_transform(64, "rotate-flip"), []
    for seed in range(60):
        image, mask = transform(bar * 100, bar, seed)
        assert image.min() == pytest.approx((0 - MEAN) / STD) and image.max() == pytest.approx((200 / 255 - MEAN) / STD)
        rows, columns = np.nonzero(mask)
        angles.append(np.degrees(np.arctan(np.polyfit(columns, rows, 1)[0])))
    assert 20 < max(angles) <= 26 and -26 <= min(angles) < -20
    assert len({round(angle, 1) for angle in angles}) > 40


@pytest.mark.parametrize(("augmentation", "least", "most"), [("full", 0.85, 1.15), ("wide", 0.7, 1.35)])
def test_scale_stays_within_its_bounds_and_reaches_them(augmentation: str, least: float, most: float) -> None:
    small = disc(64, 64, 31.5, 31.5, 12, 12).astype(np.uint8)
    transform = train_transform(64, augmentation)
    scales = [math.sqrt(transform(small, small, seed)[1].sum() / small.sum()) for seed in range(200)]
    assert least - 0.06 < min(scales) < least + 0.06
    assert most - 0.06 < max(scales) < most + 0.06


def test_no_augmentation_is_the_letterbox() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 64), np.uint8)
    for seed in range(5):
        for one, other in zip(
            train_transform(48, "none")(image, image, seed), eval_transform(48)(image, image), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_augmented_masks_follow_the_image() -> None:
    head = disc(64, 64, 30, 32, 20, 15)
    transform = train_transform(64)
    for seed in range(20):
        image, mask = transform(head.astype(np.uint8) * 200, head.astype(np.uint8) * 2, seed)
        assert set(np.unique(mask)) <= {0, 2}
        threshold = (image.max() + image.min()) / 2
        assert iou(image > threshold, mask == 2) > 0.9


def test_importing_the_data_layer_needs_no_network() -> None:
    """albumentations would ask a server for its version: sockets are made to fail before the import."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('opened a connection')\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        "import famseg.data.augment\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root, timeout=60)


# --- dataset ----------------------------------------------------------------------------------------------


def test_dataset_items(samples: list[Sample]) -> None:
    data = SegmentationDataset(samples, [0, 1], eval_transform(80))
    assert len(data) == 2
    item = data[0]
    assert item["image"].shape == (1, 80, 80)
    assert item["image"].dtype == torch.float32
    assert item["mask"].shape == (80, 80)
    assert item["mask"].dtype == torch.int64
    assert item["pixel_size"] == pytest.approx(0.125)  # 40 pixels became 80
    assert (item["femur_length"], item["head_circumference"]) == (12.5, 80.125)
    assert all(math.isnan(data[1][key]) for key in ("pixel_size", "femur_length", "head_circumference"))
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=2)))
    assert batch["image"].shape == (2, 1, 80, 80)
    assert batch["index"].tolist() == [0, 1]
    assert SegmentationDataset(samples, [2, 0], eval_transform(80))[1]["index"] == 0


class Counting(list):
    reads = 0

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("cache", "reads"), [(True, 1), (False, 3)])
def test_cache_reads_once(samples: list[Sample], cache: bool, reads: int) -> None:
    source = Counting(samples)
    data = SegmentationDataset(source, [0], eval_transform(32), cache=cache)
    for _ in range(3):
        data[0]
    assert source.reads == reads


def test_augmentation_varies_with_seed_epoch_and_index_only(samples: list[Sample]) -> None:
    data = SegmentationDataset(samples, [0, 1, 0], train_transform(64), seed=1)
    first = data[0]["image"]
    data[1]
    assert torch.equal(data[0]["image"], first)
    assert torch.equal(data[2]["image"], first)
    data.set_epoch(1)
    assert not torch.equal(data[0]["image"], first)
    data.set_epoch(0)
    assert torch.equal(data[0]["image"], first)
    assert not torch.equal(SegmentationDataset(samples, [0], train_transform(64), seed=2)[0]["image"], first)
    assert torch.equal(pickle.loads(pickle.dumps(data))[0]["image"], first)


def test_epochs_reach_persistent_workers(samples: list[Sample]) -> None:
    data = SegmentationDataset(samples, [0, 1, 2], train_transform(64), seed=1)
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        data.set_epoch(epoch)
        expected = torch.stack([data[i]["image"] for i in range(3)])
        assert torch.equal(next(iter(loader))["image"], expected)
