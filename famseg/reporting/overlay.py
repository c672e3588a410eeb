"""One image with what was found in it drawn on top: outlines, and the calipers of the measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from famseg.anatomy import BY_LABEL, Structure
from famseg.biometrics import Axis, Ellipse
from famseg.files.images import as_rgb

_WIDTH = 720  # px; images are drawn about this wide, so that lines and text stay thin beside the anatomy
_HEIGHT = 4 * _WIDTH  # px; a narrow strip is enlarged no further
_CALIPER = (255, 221, 51)  # yellow, the colour of calipers on most scanners
_TRUTH = (255, 255, 255)
_LINE = 30  # px, height of a line of text


def draw_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    shapes: Mapping[str, Ellipse | Axis | None],
    *,
    truth: np.ndarray | None = None,
    caption: Sequence[str] = (),
    classes: Sequence[Structure] = BY_LABEL,
) -> np.ndarray:
    """The image with objects filled lightly and outlined, calipers dotted in yellow.

    Args:
        image: (H, W) or (H, W, 3) uint8.
        labels: (H, W), the network's labels.
        shapes: class name → the fitted ellipse or axis, in the image's pixels.
        truth: (H, W) true labels, outlined in white below the others.
        caption: lines written on a black strip below the image.
        classes: whose labels these are.

    Returns:
        (H', W', 3) uint8 RGB, enlarged by a whole number: to about 720 px wide and at most 2880 px high.
    """
    scale = max(1, min(round(_WIDTH / image.shape[1]), _HEIGHT // image.shape[0]))
    height, width = image.shape[0] * scale, image.shape[1] * scale
    picture = as_rgb(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC))
    for structure in classes[1:]:
        if truth is not None:
            cv2.drawContours(picture, _contours(truth == structure.label, scale), -1, _TRUTH, 1, cv2.LINE_AA)
        contours = _contours(labels == structure.label, scale)
        fill = picture.copy()
        cv2.drawContours(fill, contours, -1, structure.shade, cv2.FILLED)
        picture = cv2.addWeighted(fill, 0.16, picture, 0.84, 0)
        cv2.drawContours(picture, contours, -1, structure.shade, 2, cv2.LINE_AA)
    for shape in shapes.values():
        if isinstance(shape, Ellipse):
            _dotted(picture, _outline(shape, scale))
            _cross(picture, *_ends(shape, scale))
        elif shape is not None:
            start, end = (_place(point, scale) for point in (shape.start, shape.end))
            _dotted(picture, np.linspace(start, end, 200))
            _cross(picture, start, end)
    if caption:
        strip = np.zeros((_LINE * len(caption) + 10, width, 3), np.uint8)
        for number, line in enumerate(caption):
            at = (10, _LINE * (number + 1) - 6)
            cv2.putText(strip, line, at, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (235, 235, 235), 1, cv2.LINE_AA)
        picture = np.concatenate([picture, strip])
    return picture


def _contours(region: np.ndarray, scale: int) -> Sequence[np.ndarray]:
    """Outlines of a mask in the enlarged picture, between the pixels and not along their corners."""
    framed = np.pad(region, 1).astype(np.float32)
    size = (framed.shape[1] * scale, framed.shape[0] * scale)
    large = cv2.resize(framed, size, interpolation=cv2.INTER_LINEAR)[scale:-scale, scale:-scale]
    return cv2.findContours((large >= 0.5).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]


def _place(point: tuple[float, float], scale: int) -> np.ndarray:
    """A point in the image's pixels (centres at whole numbers) to the enlarged picture's."""
    return (np.asarray(point) + 0.5) * scale - 0.5


def _outline(ellipse: Ellipse, scale: int) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 720)
    c, s = math.cos(math.radians(ellipse.degrees)), math.sin(math.radians(ellipse.degrees))
    u, v = ellipse.a * np.cos(t), ellipse.b * np.sin(t)
    points = np.stack([ellipse.x + c * u - s * v, ellipse.y + s * u + c * v], axis=1)
    return (points + 0.5) * scale - 0.5


def _ends(ellipse: Ellipse, scale: int) -> tuple[np.ndarray, np.ndarray]:
    c, s = math.cos(math.radians(ellipse.degrees)), math.sin(math.radians(ellipse.degrees))
    dx, dy = ellipse.a * c, ellipse.a * s
    return _place((ellipse.x - dx, ellipse.y - dy), scale), _place((ellipse.x + dx, ellipse.y + dy), scale)


def _dotted(picture: np.ndarray, points: np.ndarray) -> None:
    """Dots every 7 px along a line of points (K, 2)."""
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    for at in np.arange(0, arc[-1], 7.0):
        x, y = np.interp(at, arc, points[:, 0]), np.interp(at, arc, points[:, 1])
        cv2.circle(picture, (round(float(x)), round(float(y))), 1, _CALIPER, cv2.FILLED, cv2.LINE_AA)


def _cross(picture: np.ndarray, *points: np.ndarray) -> None:
    for x, y in points:
        centre = (round(float(x)), round(float(y)))
        cv2.drawMarker(picture, centre, _CALIPER, cv2.MARKER_CROSS, 15, 2, cv2.LINE_AA)
