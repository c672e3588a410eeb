"""Phantoms as samples of a data set: picture, mask and true measures."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from famseg.anatomy import CLASSES
from famseg.data.phantom.canvas import Canvas
from famseg.data.phantom.pose import Pose, draw_pose
from famseg.data.phantom.scanner import acquire, scan_convert
from famseg.data.phantom.scene import paint_scene
from famseg.data.phantom.shapes import Array, ellipse_perimeter
from famseg.data.sample import Sample

_FEMUR, _HEAD = CLASSES.index("FL"), CLASSES.index("FB")


class Phantom(Sequence[Sample]):
    """`length` independent phantom images of `size` (height, width), fixed by `seed`."""

    def __init__(self, length: int = 256, size: tuple[int, int] = (256, 256), seed: int = 0):
        self.length = length
        self.size = size
        self.seed = seed

    @property
    def subjects(self) -> list[str]:
        """Every image is a subject of its own; known without generating it."""
        return [self._name(index) for index in range(self.length)]

    def _name(self, index: int) -> str:
        return f"phantom_{self.seed}_{index:06d}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        index = operator.index(index)
        if not -self.length <= index < self.length:
            raise IndexError(f"phantom index {index} out of range for length {self.length}")
        index %= self.length
        children = np.random.SeedSequence([self.seed, index]).spawn(2)
        scene, noise = (np.random.Generator(np.random.PCG64(child)) for child in children)

        pose = draw_pose(scene)
        pixel = pose.view / min(self.size)
        canvas = Canvas(pose.fan, self.size, pixel)
        paint_scene(canvas, pose, scene)
        polar = acquire(canvas, pose, scene, noise)
        x, y = pixel_grid(self.size, pixel)
        image, mask = scan_convert(canvas, polar, x, y), draw_mask(pose, x, y)
        _blank_graphics(image, mask, scene)
        return Sample(
            name=self._name(index),
            subject=self._name(index),
            image=image,
            mask=mask,
            pixel_size=pixel,
            femur_length=None if pose.femur is None else float(2.0 * pose.femur.half_length),
            head_circumference=None if pose.head is None else ellipse_perimeter(pose.head.a, pose.head.b),
            simulated=True,
        )


def pixel_grid(shape: tuple[int, int], pixel: float) -> tuple[Array, Array]:
    """Positions (mm) of the pixel centres, each broadcast to the full shape."""
    x = ((np.arange(shape[1]) + 0.5 - 0.5 * shape[1]) * pixel).astype(np.float32)
    y = ((np.arange(shape[0]) + 0.5 - 0.5 * shape[0]) * pixel).astype(np.float32)
    return np.broadcast_to(x[None, :], shape), np.broadcast_to(y[:, None], shape)


def draw_mask(pose: Pose, x: Array, y: Array) -> Array:
    mask = np.zeros(x.shape, np.uint8)
    if pose.head is not None:
        mask[pose.head.inside(x, y)] = _HEAD
    if pose.femur is not None:
        mask[pose.femur.inside(x, y)] = _FEMUR
    return mask


def _blank_graphics(image: Array, mask: Array, rng: np.random.Generator) -> None:
    """Clinical frames carry text panels (blanked for privacy) and a grey scale; never over the anatomy."""
    panel, scale = rng.random() < 0.3, rng.random() < 0.35
    h, w = image.shape
    top, left = int(h * rng.uniform(0.72, 0.9)), int(w * rng.uniform(0.65, 0.85))
    if panel and not mask[top:, left:].any():
        image[top : int(0.97 * h), left:] = 0
    first, last, right = int(0.04 * h), int(0.42 * h), max(1, round(0.012 * w))
    if scale and not mask[first:last, :right].any():
        image[first:last, :right] = np.linspace(255, 0, last - first).astype(np.uint8)[:, None]
