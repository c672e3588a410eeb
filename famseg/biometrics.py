"""Head circumference and femur length in millimetres, from masks.

A mask says where pixel centres are inside a shape, so the shape's border runs between the outermost centres
inside and their neighbours outside. Both measures are corrected for that; the corrections below are measured
on rasterised shapes of known size at random positions and angles (tests/test_biometrics.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import cv2
import numpy as np

MIN_AREA = 20  # pixels; below, the pixel grid decides the shape

# How far the outermost pixel centre of a bar stops short of its tip, in pixels. Half a pixel would be right
# for a straight edge along the grid; a rounded end of radius 1.5 to 7 px loses 0.40 to 0.28 px at each tip,
# averaged over angles and positions.
_TIP_GAP = 0.33


@dataclass(frozen=True)
class Ellipse:
    """A head's border, in pixels: centre (x, y), semi-axes a ≥ b, angle of a against the image's x axis."""

    x: float
    y: float
    a: float
    b: float
    degrees: float

    @property
    def length(self) -> float:
        """The circumference, px."""
        return ellipse_circumference(self.a, self.b)

    def shortened(self, px: float) -> Ellipse:
        """The ellipse that runs inside this one at the distance that makes it `px` shorter; never below half of it."""
        inwards = min(px / (2 * math.pi), self.b / 2)
        return dataclasses.replace(self, a=self.a - inwards, b=self.b - inwards)

    def inside(self, height: int, width: int) -> np.ndarray:
        """The pixels of an image whose centres it contains; (H, W) bool."""
        rows, columns = np.ogrid[:height, :width]
        c, s = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        dx, dy = columns - self.x, rows - self.y
        return ((dx * c + dy * s) / self.a) ** 2 + ((dy * c - dx * s) / self.b) ** 2 <= 1


@dataclass(frozen=True)
class Axis:
    """A femur from tip to tip, in pixels: the ends (x, y)."""

    start: tuple[float, float]
    end: tuple[float, float]

    @property
    def length(self) -> float:
        """From tip to tip, px."""
        return math.dist(self.start, self.end)

    def shortened(self, px: float) -> Axis:
        """The axis without `px` of it, taken from both ends alike; never below half of it."""
        part = min(px / max(self.length, 1e-9), 0.5) / 2
        (x0, y0), (x1, y1) = self.start, self.end
        dx, dy = part * (x1 - x0), part * (y1 - y0)
        return Axis((x0 + dx, y0 + dy), (x1 - dx, y1 - dy))


def fit_head(mask: np.ndarray) -> Ellipse | None:
    """The ellipse of the largest component of a (H, W) mask.

    It is fitted to the midpoints between neighbouring pixels across the outer border. On rasterised
    ellipses with semi-axes from 25 to 110 px, their direct least-squares fit is unbiased (0.01 px of
    circumference, sd 0.1); through the border pixels' centres it falls 2.8 px short, and half a pixel added
    to those semi-axes overshoots by 0.3 px. Midpoints exist only inside the image: the edge of the image is
    no skull, so a head cut off by it is completed by the ellipse.

    Returns:
        None when the component is smaller than `MIN_AREA` or its border does not determine an ellipse.
    """
    head = _largest_component(mask)
    if head is None:
        return None
    border = _border_midpoints(_without_holes(head))
    if len(border) < 6:  # five would fit any ellipse
        return None
    (x, y), (width, height), degrees = cv2.fitEllipseDirect(border)
    a, b = max(width, height) / 2, min(width, height) / 2
    # A border that hardly bends (a mask that covers most of the image) fits an ellipse of any size.
    if not (np.isfinite([x, y, a, b]).all() and b > 1 and a < 2 * max(mask.shape)):
        return None
    return Ellipse(x, y, a, b, degrees if width >= height else (degrees + 90) % 180)


def fit_femur(mask: np.ndarray) -> Axis | None:
    """The principal axis, tip to tip, of the largest component of a (H, W) mask; None below `MIN_AREA`."""
    femur = _largest_component(mask)
    if femur is None:
        return None
    points = np.argwhere(femur)[:, ::-1].astype(np.float64)
    middle = points.mean(axis=0)
    points -= middle
    axis = np.linalg.eigh(points.T @ points).eigenvectors[:, -1]
    along = points @ axis
    start, end = middle + (along.min() - _TIP_GAP) * axis, middle + (along.max() + _TIP_GAP) * axis
    return Axis((float(start[0]), float(start[1])), (float(end[0]), float(end[1])))


def head_circumference(mask: np.ndarray, pixel_size: float) -> float | None:
    """Perimeter in mm of `fit_head`'s ellipse; `pixel_size` is mm per pixel, equal along both axes."""
    ellipse = fit_head(mask)
    return None if ellipse is None else ellipse.length * pixel_size


def femur_length(mask: np.ndarray, pixel_size: float) -> float | None:
    """Length in mm of `fit_femur`'s axis; `pixel_size` is mm per pixel, equal along both axes."""
    axis = fit_femur(mask)
    return None if axis is None else axis.length * pixel_size


def doubts(mask: np.ndarray, shape: Ellipse | Axis) -> list[str]:
    """Why a measurement of a (H, W) mask should be looked at before it is used; empty when nothing speaks against it.

    "cut off": the object touches the edge of the image, so part of it may be outside. "in pieces": the measured
    component holds less than 90 % of the labelled pixels. "not an ellipse": head and fitted ellipse share less than
    90 % of their union (good masks: 0.97 and more). "not a bar": the femur is less than twice as long as it is wide.
    """
    found = []
    region = np.asarray(mask) != 0
    component = _largest_component(region)
    assert component is not None  # there is a shape
    if component[[0, -1]].any() or component[:, [0, -1]].any():
        found.append("cut off")
    if component.sum() < 0.9 * region.sum():
        found.append("in pieces")
    if isinstance(shape, Ellipse):
        inside = shape.inside(*region.shape)
        filled = _without_holes(component)
        if (inside & filled).sum() < 0.9 * (inside | filled).sum():
            found.append("not an ellipse")
    elif component.sum() * 2 > shape.length**2:  # mean width = area / length
        found.append("not a bar")
    return found


def ellipse_circumference(a: float, b: float) -> float:
    """Perimeter of an ellipse with semi-axes a and b (Ramanujan's second formula; 1e-6 for any head)."""
    h = ((a - b) / (a + b)) ** 2
    return math.pi * (a + b) * (1 + 3 * h / (10 + math.sqrt(4 - 3 * h)))


def _largest_component(mask: np.ndarray) -> np.ndarray | None:
    """The largest 8-connected component of a (H, W) mask, bool; None when below `MIN_AREA`."""
    if mask.ndim != 2:
        raise ValueError(f"mask: expected shape (H, W), found {mask.shape}")
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask != 0).astype(np.uint8), connectivity=8)
    if count < 2:
        return None
    areas = stats[1:, cv2.CC_STAT_AREA]
    largest = int(areas.argmax())
    return labels == largest + 1 if areas[largest] >= MIN_AREA else None


def _without_holes(component: np.ndarray) -> np.ndarray:
    """A component with everything inside its outer contour; (H, W) bool."""
    ink = component.astype(np.uint8)
    contours, _ = cv2.findContours(ink, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(ink, contours, -1, 1, cv2.FILLED).astype(bool)


def _border_midpoints(component: np.ndarray) -> np.ndarray:
    """Midpoints (x, y) between 4-neighbours of which one is inside; (K, 2) float32."""
    y, x = np.nonzero(component[:, 1:] != component[:, :-1])
    beside = np.stack([x + 0.5, y], axis=1)
    y, x = np.nonzero(component[1:] != component[:-1])
    below = np.stack([x, y + 0.5], axis=1)
    return np.concatenate([beside, below]).astype(np.float32)
