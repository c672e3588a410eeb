"""The ISIC challenges' layout with made-up photographs: a dark spot on skin."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

INPUT, TRUTH = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"


def photograph(number: int, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 RGB, and (H, W) uint8 of 0 and 255."""
    generator = np.random.default_rng(number)
    centre = (int(generator.integers(24, 40)), int(generator.integers(18, 30)))
    mask = cv2.ellipse(np.zeros((height, width), np.uint8), centre, (14, 10), 30.0 * number, 0, 360, 255, cv2.FILLED)
    image = np.where(mask[..., None] > 0, np.uint8([110, 60, 45]), np.uint8([225, 170, 150]))
    return np.clip(image + generator.normal(0, 4, image.shape), 0, 255).astype(np.uint8), mask


def write_isic(root: Path, count: int = 6, suffix: str = "_segmentation") -> Path:
    """`count` photographs and masks below `root`, with the other files that the archives hold."""
    for name in (INPUT, TRUTH):
        (root / name).mkdir(parents=True)
        (root / name / "LICENSE.txt").write_text("CC-0")
    for number in range(count):
        image, mask = photograph(number)
        name = f"ISIC_{number:07}"
        cv2.imwrite(str(root / INPUT / f"{name}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        cv2.imwrite(str(root / TRUTH / f"{name}{suffix}.png"), mask)
    return root
