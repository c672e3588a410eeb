"""Head circumference and femur length in millimetres, from masks.

A mask says where pixel centres are inside a shape, so the shape's border runs between the outermost centres
inside and their neighbours outside. Both measures are corrected for that; the corrections below are measured
on rasterised shapes of known size at random positions and angles (tests/test_biometrics.py).
"""

from __future__ import annotations

import math

import cv2
import numpy as np

MIN_AREA = 20  # pixels; below, the pixel grid decides the shape

# How far the outermost pixel centre of a bar stops short of its tip, in pixels. Half a pixel would be right
# for a straight edge along the grid; a rounded end of radius 1.5 to 7 px loses 0.40 to 0.28 px at each tip,
# averaged over angles and positions.
_TIP_GAP = 0.33


def head_circumference(mask: np.ndarray, pixel_size: float) -> float | None:
    """Perimeter in mm of the ellipse fitted to the largest component of a (H, W) mask.

    The ellipse is fitted to the midpoints between neighbouring pixels across the outer border. On rasterised
    ellipses with semi-axes from 25 to 110 px, their direct least-squares fit is unbiased (0.01 px of
    circumference, sd 0.1); through the border pixels' centres it falls 2.8 px short, and half a pixel added
    to those semi-axes overshoots by 0.3 px. Midpoints exist only inside the image: the edge of the image is
    no skull, so a head cut off by it is completed by the ellipse.

    Args:
        mask: non-zero inside the head.
        pixel_size: mm per pixel, equal along both axes.

    Returns:
        None when the component is smaller than `MIN_AREA` or its border does not determine an ellipse.
    """
    head = _largest_component(mask)
    if head is None:
        return None
    border = _border_midpoints(_without_holes(head))
    if len(border) < 6:  # five would fit any ellipse
        return None
    (x, y), axes, _ = cv2.fitEllipseDirect(border)
    a, b = max(axes) / 2, min(axes) / 2
    # A border that hardly bends (a mask that covers most of the image) fits an ellipse of any size.
    if not (np.isfinite([x, y, a, b]).all() and b > 1 and a < 2 * max(mask.shape)):
        return None
    return ellipse_circumference(a, b) * pixel_size


def femur_length(mask: np.ndarray, pixel_size: float) -> float | None:
    """Length in mm, tip to tip along the principal axis, of the largest component of a (H, W) mask.

    Args:
        mask: non-zero inside the femur.
        pixel_size: mm per pixel, equal along both axes.

    Returns:
        None when the component is smaller than `MIN_AREA`.
    """
    femur = _largest_component(mask)
    if femur is None:
        return None
    centres = np.argwhere(femur).astype(np.float64)
    centres -= centres.mean(axis=0)
    axis = np.linalg.eigh(centres.T @ centres).eigenvectors[:, -1]
    return float(np.ptp(centres @ axis) + 2 * _TIP_GAP) * pixel_size


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
