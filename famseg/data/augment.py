"""From a source image to the network's input: letterbox, random changes, normalisation.

The letterbox keeps the aspect ratio (a head stays an ellipse of the same eccentricity, one pixel size holds
along both axes) and pads with black, the colour outside an ultrasound sector.
"""

from __future__ import annotations

import os
import random

import cv2
import numpy as np

# albumentations asks a server for its newest version when imported; training must not need a network.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import albumentations as A

# Grey values in [0, 1]; rounded from the 0.158 and 0.173 of all pixels of 798 HC18 images.
MEAN = 0.16
STD = 0.17


class Transform:
    """Letterbox, optional augmentation, normalisation; made by `train_transform` or `eval_transform`."""

    def __init__(self, image_size: int | tuple[int, int], augmentation: A.Compose | None) -> None:
        self.size = _height_width(image_size)
        self._augmentation = augmentation

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(H, W) uint8 image and labels to ((h, w) float32, normalised, and (h, w) uint8); a colour image has (…, 3).

        The same `seed` gives the same augmentation, whatever was transformed before.
        """
        image = letterbox(image, self.size, cv2.INTER_LINEAR)
        # INTER_NEAREST would sample the corner of each pixel, not its centre as the image does.
        mask = letterbox(mask, self.size, cv2.INTER_NEAREST_EXACT)
        if self._augmentation is not None:
            # Not set_random_seed: that gives every step its own generator with the *same* seed, so that, for
            # one, the vertical flip could only happen together with the horizontal one.
            self._augmentation.set_random_state(np.random.default_rng(seed), random.Random(seed))
            changed = self._augmentation(image=image, mask=mask)
            image, mask = changed["image"], changed["mask"]
        return normalise(image), mask


def train_transform(image_size: int | tuple[int, int], augmentation: str = "full") -> Transform:
    """Letterbox to `image_size` (side, or height and width) and augment; masks follow by nearest neighbour.

    Args:
        augmentation: "full": as a probe and its settings vary, that is mirroring, pose (rotation within 25 degrees,
            scale 0.85 to 1.15, small shifts), mild elastic deformation, gain and dynamic range (brightness, contrast,
            gamma), and noise or blur. "wide": the same with scale 0.7 to 1.35 and larger shifts, for objects of other
            sizes and images of other machines than those that train. "rotate-flip": of the fine-tuning study (arXiv
            2307.09067), that is every image rotated within 25 degrees, half of them mirrored, a tenth upside down.
            "none".
    """
    height, width = _height_width(image_size)
    side = min(height, width)
    if augmentation == "none":
        return eval_transform(image_size)
    if augmentation == "rotate-flip":
        few = [A.Rotate(limit=25, p=1.0), A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.1)]
        return Transform((height, width), A.Compose(few))
    scale, shift = ((0.7, 1.35), 0.08) if augmentation == "wide" else ((0.85, 1.15), 0.05)
    sigma = 0.08 * side
    steps = [
        A.HorizontalFlip(p=0.5),
        A.VerticalFlip(p=0.1),
        A.Affine(scale=scale, keep_ratio=True, rotate=(-25, 25), translate_percent=(-shift, shift), p=0.8),
        # Displacements are unit white noise blurred by sigma and scaled by alpha, which leaves a standard
        # deviation of alpha / (2 sqrt(pi) sigma) pixels: here 0.8 % of the side, varying over 8 % of it.
        A.ElasticTransform(alpha=0.008 * side * 3.545 * sigma, sigma=sigma, p=0.2),
        A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.2, p=0.5),
        A.RandomGamma(gamma_limit=(70, 140), p=0.5),
        A.OneOf([A.GaussNoise(std_range=(0.01, 0.04)), A.GaussianBlur(sigma_limit=(0.3, 1.0))], p=0.3),
    ]
    return Transform((height, width), A.Compose(steps))


def eval_transform(image_size: int | tuple[int, int]) -> Transform:
    """Letterbox to `image_size` (side, or height and width) and nothing else."""
    return Transform(image_size, None)


def letterbox_scale(height: int, width: int, image_size: int | tuple[int, int]) -> float:
    """Network pixels per source pixel of a letterboxed (height, width) image."""
    target_height, target_width = _height_width(image_size)
    return min(target_height / height, target_width / width)


def letterbox(image: np.ndarray, image_size: int | tuple[int, int], interpolation: int) -> np.ndarray:
    """Scale (H, W) or (H, W, C) to fit `image_size`, centred on black; shrinking with INTER_LINEAR averages areas."""
    (height, width), (target_height, target_width) = image.shape[:2], _height_width(image_size)
    top, left, inner_height, inner_width = letterbox_window(height, width, (target_height, target_width))
    if interpolation == cv2.INTER_LINEAR and inner_height < height:
        interpolation = cv2.INTER_AREA  # linear would skip source pixels: speckle would alias
    canvas = np.zeros((target_height, target_width, *image.shape[2:]), image.dtype)
    inner = cv2.resize(image, (inner_width, inner_height), interpolation=interpolation)
    canvas[top : top + inner_height, left : left + inner_width] = inner
    return canvas


def undo_letterbox(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels (h, w) of the network's picture back on the (height, width) source image (nearest neighbour)."""
    top, left, inner_height, inner_width = letterbox_window(height, width, mask.shape)
    inner = np.ascontiguousarray(mask[top : top + inner_height, left : left + inner_width])
    return cv2.resize(inner, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def normalise(image: np.ndarray) -> np.ndarray:
    """uint8 to float32, for ultrasound of about zero mean and unit variance: (v / 255 - MEAN) / STD, every channel."""
    return (image.astype(np.float32) * np.float32(1 / 255) - np.float32(MEAN)) * np.float32(1 / STD)


def channels_first(image: np.ndarray) -> np.ndarray:
    """(h, w) as (1, h, w), and (h, w, C) as (C, h, w)."""
    return image[None] if image.ndim == 2 else np.ascontiguousarray(image.transpose(2, 0, 1))


def letterbox_window(height: int, width: int, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Where a letterboxed (height, width) image lies: top, left, height, width."""
    target_height, target_width = size[0], size[1]
    scale = letterbox_scale(height, width, (target_height, target_width))
    inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    return (target_height - inner_height) // 2, (target_width - inner_width) // 2, inner_height, inner_width


def _height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width
