"""A whole scene, from the mother's tissue to the anatomy in front of it, with what could be mistaken for it."""

from __future__ import annotations

import math

import numpy as np

from famseg.data.phantom.canvas import Canvas
from famseg.data.phantom.femur import paint_bone, paint_femur
from famseg.data.phantom.head import paint_head
from famseg.data.phantom.pose import Pose
from famseg.data.phantom.shapes import Array, Bar
from famseg.data.phantom.texture import draw_texture, sample_texture
from famseg.data.phantom.tissue import (
    paint_abdominal_wall,
    paint_blob,
    paint_fluid,
    paint_interfaces,
    paint_streak,
    paint_tissue,
)


def paint_scene(canvas: Canvas, pose: Pose, rng: np.random.Generator) -> None:
    texture = sample_texture(draw_texture(rng), canvas, pose.view)
    paint_tissue(canvas, texture, pose.view, rng)
    paint_abdominal_wall(canvas, texture, rng)
    if pose.head is not None:
        paint_fluid(canvas, texture, pose.view, (pose.head.cx, pose.head.cy), pose.head.a, rng)
    if pose.femur is not None:
        paint_fluid(canvas, texture, pose.view, (pose.femur.cx, pose.femur.cy), 1.3 * pose.femur.half_length, rng)
    _paint_distractors(canvas, texture, pose, rng)
    if pose.femur is not None:
        paint_femur(canvas, texture, pose.femur, pose.view, rng)
    if pose.head is not None:
        paint_head(canvas, texture, pose.head, pose.weeks, rng)
    paint_interfaces(canvas, texture)


def _paint_distractors(canvas: Canvas, texture: Array, pose: Pose, rng: np.random.Generator) -> None:
    """Lumps, cysts, interface echoes and ribs: without them "bright line" would already mean femur."""
    view = pose.view
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(-0.5, 0.5) * view, rng.uniform(-0.5, 0.5) * view
        radii = (rng.uniform(0.03, 0.16) * view, rng.uniform(0.03, 0.16) * view)
        cyst = rng.random() < 0.35
        level = rng.uniform(-66.0, -48.0) if cyst else rng.uniform(-42.0, -28.0)
        angle, step = rng.uniform(0.0, np.pi), rng.uniform(0.1, 0.7)
        if _far_from_anatomy(pose, x, y, 0.6 * max(radii)):
            paint_blob(canvas, texture, (x, y), radii, angle, level, -step if cyst else step)
    for _ in range(rng.integers(2, 9)):
        x, y = rng.uniform(-0.5, 0.5) * view, rng.uniform(-0.5, 0.5) * view
        half = rng.uniform(0.015, 0.11) * view
        width, angle = rng.uniform(0.002, 0.008) * view, rng.normal(0.0, 0.45)
        streak = Bar(x, y, half, width, angle, rng.uniform(-0.1, 0.1), 0.0)
        strength = rng.uniform(-24.0, -5.0)
        if _far_from_anatomy(pose, x, y, 0.05 * view + half):
            paint_streak(canvas, streak, strength)
    if rng.random() < 0.2:
        _paint_ribs(canvas, texture, pose, rng)


def _paint_ribs(canvas: Canvas, texture: Array, pose: Pose, rng: np.random.Generator) -> None:
    """A row of ribs cut across: bright and shadowing like the femur, but short."""
    x, y = rng.uniform(-0.4, 0.4) * pose.view, rng.uniform(-0.4, 0.4) * pose.view
    spacing, angle = rng.uniform(0.05, 0.08) * pose.view, rng.normal(0.0, 0.5)
    for k in range(int(rng.integers(3, 6))):
        cx, cy = x + k * spacing * math.cos(angle), y + k * spacing * math.sin(angle)
        half = rng.uniform(0.014, 0.024) * pose.view
        rib = Bar(cx, cy, half, 0.45 * half, rng.normal(angle, 0.2), 0.0, 0.0)
        strength = rng.uniform(-16.0, -6.0)
        if _far_from_anatomy(pose, cx, cy, 0.08 * pose.view):
            paint_bone(canvas, texture, rib, strength, 9.0, rng)


def _far_from_anatomy(pose: Pose, x: float, y: float, margin: float) -> bool:
    if pose.head is not None and pose.head.inside(x, y, 1.0 + margin / pose.head.b):
        return False
    femur = pose.femur
    return femur is None or np.hypot(x - femur.cx, y - femur.cy) > femur.half_length + margin
