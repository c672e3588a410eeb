"""Which anatomy of which age is in view, and from where: drawn until all that is to be measured lies in the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from famseg.data.phantom.shapes import Array, Bar, Fan, Head, ellipse_perimeter

# Mean growth (mm) by gestational week, rounded from the usual charts; individual scatter is drawn on top.
_WEEKS = (12.0, 14.0, 16.0, 20.0, 24.0, 28.0, 32.0, 36.0, 40.0)
_HC_BY_WEEK = (72.0, 98.0, 124.0, 175.0, 220.0, 260.0, 293.0, 318.0, 333.0)
_FL_BY_WEEK = (8.0, 14.0, 20.0, 33.0, 44.0, 53.5, 61.5, 68.5, 73.0)


@dataclass(frozen=True)
class Pose:
    """What is in view and from where it is seen."""

    view: float  # mm across the shorter image side
    weeks: float
    fan: Fan
    head: Head | None
    femur: Bar | None


def draw_pose(rng: np.random.Generator) -> Pose:
    """Draw anatomy, then probe and position until all that is to be measured lies inside the picture."""
    kind = rng.choice(3, p=(0.4, 0.4, 0.2))
    with_head, with_femur = kind != 1, kind != 0
    weeks = rng.uniform(*((12.0, 40.0), (14.0, 40.0), (17.0, 28.0))[kind])
    hc = float(np.clip(np.interp(weeks, _WEEKS, _HC_BY_WEEK) * rng.normal(1.0, 0.04), 70.0, 330.0))
    length = float(np.clip(np.interp(weeks, _WEEKS, _FL_BY_WEEK) * rng.normal(1.0, 0.05), 12.0, 75.0))
    if kind == 0:
        view = min(max(hc / 2.79 / rng.uniform(0.45, 0.86), 45.0), 210.0)
    elif kind == 1:
        view = min(max(length / rng.uniform(0.22, 0.44), 48.0), 190.0)
    else:
        view = min(hc / 2.79 / rng.uniform(0.42, 0.50), length / 0.205)

    widen = 0.0
    while True:
        fan = _draw_fan(rng, view, widen)
        head = _draw_head(rng, hc, view) if with_head else None
        femur = _draw_femur(rng, length, view) if with_femur else None
        fits = (head is None or _visible(fan, view, head.outline())) and (
            femur is None or _visible(fan, view, femur.outline())
        )
        apart = head is None or femur is None or not np.any(head.inside(*femur.outline(0.03 * view), 1.1))
        if fits and apart:
            return Pose(view, weeks, fan, head, femur)
        widen += 0.02
        if kind == 0:
            view *= 1.01  # zoom out a little, as a sonographer would


def _draw_fan(rng: np.random.Generator, view: float, widen: float) -> Fan:
    """A convex probe above the image; `widen` > 0 opens and withdraws it until the anatomy fits."""
    radius = rng.uniform(38.0, 62.0)
    if view > 90.0 and rng.random() < 0.55:
        top = -rng.uniform(0.0, 0.07) * view  # the whole fan is shown, with the probe face
    else:
        top = rng.uniform(0.05, 0.6) * view  # zoomed in: the image border crops the fan
    top += widen * view
    tilt = math.radians(rng.normal(0.0, 4.0))
    depth = radius + top
    apex_x = rng.uniform(-0.16, 0.16) * view - (depth + 0.5 * view) * math.tan(tilt)
    return Fan(
        apex=(apex_x, -0.5 * view - depth),
        near=radius,
        far=depth + view * rng.uniform(0.9, 1.2),
        tilt=tilt,
        half_angle=math.radians(rng.uniform(27.0, 40.0) + 20.0 * min(widen, 1.0)),
    )


def _draw_head(rng: np.random.Generator, circumference: float, view: float) -> Head:
    index = rng.uniform(0.70, 0.86)  # cephalic index: biparietal over occipito-frontal diameter
    a = circumference / ellipse_perimeter(1.0, index)
    # The head plane is usually presented with a horizontal midline, but not always.
    degrees = rng.normal(0.0, 16.0) if rng.random() < 0.75 else rng.uniform(-90.0, 90.0)
    room = max(0.5 * view - index * a, 0.0)
    return Head(rng.uniform(-room, room), rng.uniform(-room, room), a, index * a, math.radians(degrees))


def _draw_femur(rng: np.random.Generator, length: float, view: float) -> Bar:
    # The shaft is about an eighth as wide as long; blooming of the beam keeps its *echo* above 4/128 of view.
    width = max(length * rng.uniform(0.10, 0.15), 0.034 * view)
    return Bar(
        cx=rng.uniform(-0.33, 0.33) * view,
        cy=rng.uniform(-0.33, 0.33) * view,
        half_length=0.5 * length,
        half_width=0.5 * width,
        angle=math.radians(min(max(rng.normal(0.0, 22.0), -60.0), 60.0)),
        sagitta=rng.uniform(-0.045, 0.045),
        flare=rng.uniform(0.05, 0.4),
    )


def _visible(fan: Fan, view: float, outline: tuple[Array, Array]) -> bool:
    x, y = outline
    margin = 0.02 * view
    limit = 0.5 * view - margin
    return bool(np.all((np.abs(x) < limit) & (np.abs(y) < limit))) and fan.contains(x, y, margin)
