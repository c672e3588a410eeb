"""Procedural B-mode phantom of the fetal head and femur.

No public data set carries femur masks, so femurs (and the joint three-class task) are learnt from this
simulator. It therefore imitates how the picture *arises* rather than how it looks:

* The scene is a map of scatterer strength in millimetres, sampled on the beams of a convex probe
  (depth x angle). Anything that travels along a beam (shadow, enhancement, depth gain) is then a cumulative
  sum down a column, and anything tied to the beam (lateral blur) is a filter along a row.
* Speckle is the interference of many sub-resolution scatterers: a circular complex Gaussian field, scaled by
  the local echogenicity, seen through the point-spread function (PSF). Its magnitude is Rayleigh distributed.
* Bone and tissue interfaces are smooth on the scale of a wavelength. They reflect coherently, so they enter
  the same sum with constant phase (Rician envelope, hardly broken up by speckle), and they reflect strongly
  only where the beam meets them near the perpendicular.
* Envelope detection, log compression and scan conversion come last, as in a scanner; so speckle follows the
  arcs and widens with depth.

All scene draws are independent of the pixel grid and precede the speckle draws: one (seed, index) shows the
same anatomy, pose and physical size at every image size. Lengths are millimetres, the origin is the image
centre, y points down (away from the probe); strengths are decibels relative to a perpendicular bone echo.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from scipy.special import ellipe

from famseg.data.sample import Sample

Array = np.ndarray

# Mean growth (mm) by gestational week, rounded from the usual charts; individual scatter is drawn on top.
_WEEKS = (12.0, 14.0, 16.0, 20.0, 24.0, 28.0, 32.0, 36.0, 40.0)
_HC_BY_WEEK = (72.0, 98.0, 124.0, 175.0, 220.0, 260.0, 293.0, 318.0, 333.0)
_FL_BY_WEEK = (8.0, 14.0, 20.0, 33.0, 44.0, 53.5, 61.5, 68.5, 73.0)


def ellipse_perimeter(a: float, b: float) -> float:
    """Exact perimeter of an ellipse with semi-axes `a` and `b`."""
    major, minor = max(a, b), min(a, b)
    return float(4.0 * major * ellipe(1.0 - (minor / major) ** 2))


def _amplitude(db: Array) -> Array:
    return np.exp(db * (math.log(10.0) / 20.0))


def _gain(db: float) -> float:
    """Scalar decibels to amplitude, as a Python float so that float32 maps stay float32."""
    return 10.0 ** (db / 20.0)


# ---------------------------------------------------------------------------------------------------------
# Geometry: probe, head, femur
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fan:
    """Field of view of a convex probe: an annular sector around the virtual apex of the beams."""

    apex: tuple[float, float]
    near: float  # radius of the probe face
    far: float  # radius of the deepest echo shown
    tilt: float  # rad, angle of the central beam to the vertical
    half_angle: float  # rad

    def polar(self, x: Array, y: Array) -> tuple[Array, Array]:
        dx, dy = x - self.apex[0], y - self.apex[1]
        return np.hypot(dx, dy), np.arctan2(dx, dy) - self.tilt

    def contains(self, x: Array, y: Array, margin: float) -> bool:
        r, theta = self.polar(x, y)
        inside = (r > self.near + margin) & (r < self.far - margin)
        return bool(np.all(inside & (r * (self.half_angle - np.abs(theta)) > margin)))


@dataclass(frozen=True)
class _Head:
    """Outer border of the skull: an ellipse, as the biometric standard measures it."""

    cx: float
    cy: float
    a: float  # semi-major axis (half the occipito-frontal diameter)
    b: float
    angle: float  # rad, major axis against the horizontal

    def local(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Coordinates along the major and minor axis, in units of the semi-axes."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        dx, dy = x - self.cx, y - self.cy
        return (dx * (c / self.a) + dy * (s / self.a)), (dy * (c / self.b) - dx * (s / self.b))

    def inside(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        p, q = self.local(x, y)
        return p * p + q * q <= scale * scale

    def outline(self, count: int = 48) -> tuple[Array, Array]:
        t = np.linspace(0.0, 2.0 * np.pi, count, endpoint=False)
        u, v = self.a * np.cos(t), self.b * np.sin(t)
        c, s = math.cos(self.angle), math.sin(self.angle)
        return self.cx + c * u - s * v, self.cy + s * u + c * v


@dataclass(frozen=True)
class _Bar:
    """A curved bar with rounded, flared ends: the ossified shaft of a long bone.

    The end-to-end distance (tip to tip, rounded ends included) is exactly `2 * half_length`: the bow lifts
    both tips alike, and the elliptical end caps make the tips the farthest pair of points.
    """

    cx: float
    cy: float
    half_length: float
    half_width: float
    angle: float  # rad, chord against the horizontal
    sagitta: float  # height of the bow over the chord, as a fraction of the length
    flare: float  # relative widening of the metaphyses

    def local(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Position along the chord (+-1 at the tips) and distance (mm) from the bowed centre line."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        dx, dy = x - self.cx, y - self.cy
        t = (dx * c + dy * s) / self.half_length
        return t, dy * c - dx * s - self._bow(t)

    def _bow(self, t: Array) -> Array:
        # Centred on the mid-height of the bow, so that (cx, cy) is the middle of the bar.
        return 2.0 * self.half_length * self.sagitta * (t * t - 0.5)

    def width(self, t: Array) -> Array:
        """Half-width (mm) at the chord position t; zero at and beyond the tips."""
        t2 = np.minimum(t * t, 1.0)
        cap = 1.3 * self.half_width / self.half_length
        into_cap = np.clip((np.sqrt(t2) - (1.0 - cap)) / cap, 0.0, 1.0)
        return self.half_width * (1.0 + self.flare * t2 * t2) * np.sqrt(1.0 - into_cap * into_cap)

    def inside(self, x: Array, y: Array) -> Array:
        t, w = self.local(x, y)
        return (np.abs(t) <= 1.0) & (np.abs(w) <= self.width(t))

    def outline(self, margin: float = 0.0) -> tuple[Array, Array]:
        t = np.linspace(-1.0, 1.0, 17)
        half = self.half_width * (1.0 + self.flare) + margin
        u = np.concatenate([t, t]) * (self.half_length + margin)
        v = np.concatenate([self._bow(t) - half, self._bow(t) + half])
        c, s = math.cos(self.angle), math.sin(self.angle)
        return self.cx + c * u - s * v, self.cy + s * u + c * v


@dataclass(frozen=True)
class _Pose:
    """What is in view and from where it is seen."""

    view: float  # mm across the shorter image side
    weeks: float
    fan: _Fan
    head: _Head | None
    femur: _Bar | None


def _draw_fan(rng: np.random.Generator, view: float, widen: float) -> _Fan:
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
    return _Fan(
        apex=(apex_x, -0.5 * view - depth),
        near=radius,
        far=depth + view * rng.uniform(0.9, 1.2),
        tilt=tilt,
        half_angle=math.radians(rng.uniform(27.0, 40.0) + 20.0 * min(widen, 1.0)),
    )


def _draw_head(rng: np.random.Generator, circumference: float, view: float) -> _Head:
    index = rng.uniform(0.70, 0.86)  # cephalic index: biparietal over occipito-frontal diameter
    a = circumference / ellipse_perimeter(1.0, index)
    # The head plane is usually presented with a horizontal midline, but not always.
    degrees = rng.normal(0.0, 16.0) if rng.random() < 0.75 else rng.uniform(-90.0, 90.0)
    room = max(0.5 * view - index * a, 0.0)
    return _Head(rng.uniform(-room, room), rng.uniform(-room, room), a, index * a, math.radians(degrees))


def _draw_femur(rng: np.random.Generator, length: float, view: float) -> _Bar:
    # The shaft is about an eighth as wide as long; blooming of the beam keeps its *echo* above 4/128 of view.
    width = max(length * rng.uniform(0.10, 0.15), 0.034 * view)
    return _Bar(
        cx=rng.uniform(-0.33, 0.33) * view,
        cy=rng.uniform(-0.33, 0.33) * view,
        half_length=0.5 * length,
        half_width=0.5 * width,
        angle=math.radians(min(max(rng.normal(0.0, 22.0), -60.0), 60.0)),
        sagitta=rng.uniform(-0.045, 0.045),
        flare=rng.uniform(0.05, 0.4),
    )


def _visible(fan: _Fan, view: float, outline: tuple[Array, Array]) -> bool:
    x, y = outline
    margin = 0.02 * view
    limit = 0.5 * view - margin
    return bool(np.all((np.abs(x) < limit) & (np.abs(y) < limit))) and fan.contains(x, y, margin)


def _draw_pose(rng: np.random.Generator) -> _Pose:
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
            return _Pose(view, weeks, fan, head, femur)
        widen += 0.02
        if kind == 0:
            view *= 1.01  # zoom out a little, as a sonographer would


# ---------------------------------------------------------------------------------------------------------
# Scene: echogenicity on the beam grid
# ---------------------------------------------------------------------------------------------------------


class _Canvas:
    """Acoustic maps on the beam grid (rows: depth, columns: beams) of the visible part of the fan."""

    def __init__(self, fan: _Fan, shape: tuple[int, int], pixel: float):
        self.fan = fan
        self.pixel = pixel
        half_h, half_w = 0.5 * shape[0] * pixel, 0.5 * shape[1] * pixel
        # Beams that never enter the image would be wasted work: bound the sector by the image border.
        edge = np.linspace(-1.0, 1.0, 33)
        one = np.ones_like(edge)
        bx = np.concatenate([edge, edge, one, -one]) * half_w
        by = np.concatenate([one, -one, edge, edge]) * half_h
        r, theta = fan.polar(bx, by)
        self.r0 = max(fan.near, -half_h - fan.apex[1])
        self.r1 = min(fan.far, float(r.max()) + pixel)
        t0 = max(-fan.half_angle, float(theta.min()))
        t1 = min(fan.half_angle, float(theta.max()))
        rows = int(np.ceil((self.r1 - self.r0) / pixel)) + 1
        beams = int(np.ceil((t1 - t0) * (fan.near + 0.75 * (self.r1 - fan.near)) / pixel)) + 1
        self.dr = (self.r1 - self.r0) / (rows - 1)
        self.dtheta = (t1 - t0) / (beams - 1)
        self.t0 = t0
        self.r = np.linspace(self.r0, self.r1, rows, dtype=np.float32)[:, None]
        self.theta = np.linspace(t0, t1, beams, dtype=np.float32)[None, :]
        self.beam_x = np.sin(self.theta + fan.tilt)
        self.beam_y = np.cos(self.theta + fan.tilt)
        self.x = fan.apex[0] + self.r * self.beam_x
        self.y = fan.apex[1] + self.r * self.beam_y
        grid = (rows, beams)
        self.echo = np.zeros(grid, np.float32)  # dB, diffuse scattering
        self.coherent = np.zeros(grid, np.float32)  # amplitude, specular reflection
        self.impedance = np.zeros(grid, np.float32)  # arbitrary units; its steps are the tissue interfaces
        self.loss = np.zeros(grid, np.float32)  # dB/mm two-way, over what the depth gain compensates

    @property
    def soft(self) -> float:
        """Width (mm) over which edges are ramped: a step between two samples would alias."""
        return max(1.5 * self.pixel, 0.5)

    def window(self, cx: float, cy: float, radius: float) -> tuple[slice, slice]:
        """The part of the grid that covers a disc (objects are painted there only, for speed)."""
        r, theta = self.fan.polar(cx, cy)
        spread = math.asin(min(radius / max(r, 1e-6), 1.0))
        rows, beams = self.echo.shape
        i0 = int(np.clip((r - radius - self.r0) / self.dr, 0, rows))
        i1 = int(np.clip((r + radius - self.r0) / self.dr + 2, 0, rows))
        j0 = int(np.clip((theta - spread - self.t0) / self.dtheta, 0, beams))
        j1 = int(np.clip((theta + spread - self.t0) / self.dtheta + 2, 0, beams))
        return slice(i0, i1), slice(j0, j1)

    def blend(self, at: tuple[slice, slice], weight: Array, level: Array | float) -> None:
        """Replace the echogenicity by `level` (dB) where `weight` is one."""
        part = self.echo[at]
        part += weight * (level - part)

    def cover(self, at: tuple[slice, slice], weight: Array, level: Array | float, impedance: float) -> None:
        """Put a body in front of all that was painted before, reflections and interfaces included."""
        self.blend(at, weight, level)
        clear = 1.0 - weight
        self.coherent[at] *= clear
        self.impedance[at] *= clear
        self.impedance[at] += weight * impedance


def _ramp(distance: Array, width: float) -> Array:
    """Zero outside (negative distance), one inside, linear over `width` around the edge."""
    return np.clip(distance * (1.0 / width) + 0.5, 0.0, 1.0)


def _draw_texture(rng: np.random.Generator) -> Array:
    """Four smooth random fields (unit variance) on one tile: lobes, patches, lobules, grain."""
    tile = 96
    channels = []
    for cells in ((4,), (7, 14), (16, 32), (48,)):
        octaves = (
            cv2.resize(rng.standard_normal((n, n)).astype(np.float32), (tile, tile), interpolation=cv2.INTER_CUBIC)
            for n in cells
        )
        field = sum(octaves)
        channels.append(field / field.std())
    return np.dstack(channels)


def _sample_texture(texture: Array, canvas: _Canvas, view: float) -> Array:
    scale = texture.shape[0] / (1.6 * view)
    offset = 0.5 * texture.shape[0]
    return cv2.remap(
        texture,
        canvas.x * scale + offset,
        canvas.y * scale + offset,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )


def _sample_strata(rng: np.random.Generator, canvas: _Canvas, texture: Array, view: float) -> Array:
    """Fibrous tissue: thin sheets that lie roughly parallel to the probe face, gently folded."""
    sheets = cv2.resize(rng.standard_normal((64, 12)).astype(np.float32), (96, 256), interpolation=cv2.INTER_CUBIC)
    tilt = rng.normal(0.0, 0.25)
    across = np.broadcast_to(canvas.theta * (160.0 / math.radians(80.0)) + 48.0, canvas.echo.shape)
    along = (canvas.r - (0.5 * view + canvas.fan.near)) * (230.0 / view) + tilt * across + 14.0 * texture[..., 1]
    return cv2.remap(sheets, across, along + 128.0, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _wave(rng: np.random.Generator, terms: int = 4) -> tuple[Array, Array, Array]:
    """Coefficients of a smooth random function of one variable: frequencies, phases, amplitudes."""
    order = np.arange(1, terms + 1)
    return (
        order * rng.uniform(0.7, 1.3, terms),
        rng.uniform(0.0, 2.0 * np.pi, terms),
        rng.normal(size=terms) / order,
    )


def _evaluate_wave(wave: tuple[Array, Array, Array], t: Array) -> Array:
    return sum((a * np.sin(f * t + p) for f, p, a in zip(*wave, strict=True)), np.zeros_like(t))


def _wave_table(wave: tuple[Array, Array, Array], t: Array, low: float, high: float) -> Array:
    """The wave at many points, through a table: sines on the whole grid would dominate the run time."""
    knots = np.linspace(low, high, 128)
    return np.interp(t, knots, _evaluate_wave(wave, knots)).astype(np.float32)


def _paint_tissue(canvas: _Canvas, texture: Array, view: float, rng: np.random.Generator) -> None:
    """Uterine wall and maternal tissue; in part placenta: brighter, finely lobulated, with dark lakes."""
    level = rng.uniform(-38.0, -27.0)
    fibrous = rng.uniform(0.5, 3.5)
    placenta_rise = rng.uniform(1.0, 6.0)
    threshold = rng.uniform(-0.6, 1.6)
    placenta = np.clip(3.0 * (texture[..., 1] - threshold), 0.0, 1.0)
    lakes = np.minimum(texture[..., 2] + 1.1, 0.0)
    strata = _sample_strata(rng, canvas, texture, view)
    canvas.echo[:] = level + 3.0 * texture[..., 1] + 2.0 * texture[..., 2] + 1.5 * texture[..., 3]
    canvas.echo += placenta * (placenta_rise + 9.0 * lakes)
    canvas.echo += (1.0 - placenta) * strata * fibrous
    # Where a sheet is smooth it glints; sparse, so only the crests of the field count.
    canvas.coherent += (_gain(level + 6.0) * (fibrous / 3.5)) * np.maximum(strata - 1.1, 0.0) * (1.0 - placenta)
    canvas.loss += 0.04 * texture[..., 0]


def _paint_abdominal_wall(canvas: _Canvas, texture: Array, rng: np.random.Generator) -> None:
    """Skin, fat, fascia and muscle of the mother: wavy layers along the probe face, with fascial echoes."""
    layers = int(rng.integers(2, 6))
    edges = np.cumsum(rng.uniform(2.0, 9.0, layers))
    levels = rng.uniform(-42.0, -23.0, layers + 1)
    levels[0] = rng.uniform(-26.0, -16.0)  # ring-down of the probe makes the first millimetres bright
    steps = rng.uniform(0.0, 0.75, layers) * rng.choice((-1.0, 1.0), layers)
    wave, height = _wave(rng), rng.uniform(0.5, 2.5)
    rows = int(np.clip((canvas.fan.near + edges[-1] + 8.0 - canvas.r0) / canvas.dr, 0, len(canvas.r)))
    if rows == 0:
        return
    at = (slice(0, rows), slice(None))
    lift = height * _evaluate_wave(wave, 3.0 * canvas.theta.astype(np.float64)).astype(np.float32)
    depth = canvas.r[:rows] - canvas.fan.near + lift + 0.5 * texture[at][..., 1]
    knots = (edges[:, None] + np.array([-0.5, 0.5]) * canvas.soft).ravel()
    order = np.argsort(knots, kind="stable")
    values = np.repeat(levels, 2)[1:-1][order]
    stack = np.repeat(np.concatenate([[0.0], np.cumsum(steps)]), 2)[1:-1][order]
    weight = _ramp(float(edges[-1]) - depth, canvas.soft)
    profile = np.interp(depth, knots[order], values).astype(np.float32)
    canvas.blend(at, weight, profile + 1.5 * texture[at][..., 2])
    canvas.impedance[at] += np.interp(depth, knots[order], stack).astype(np.float32)


def _paint_fluid(
    canvas: _Canvas,
    texture: Array,
    view: float,
    centre: tuple[float, float],
    size: float,
    rng: np.random.Generator,
) -> None:
    """Amniotic fluid: no scatterers, and little attenuation, so that tissue behind it is enhanced."""
    cx, cy = (c + rng.normal(0.0, 0.10) * view for c in centre)
    sx, sy = size * rng.uniform(1.0, 1.9), size * rng.uniform(0.85, 1.5)
    fullness = 0.0 if rng.random() < 0.8 else -0.45  # oligohydramnios leaves pockets only
    lobes = rng.uniform(0.12, 0.3)
    level = rng.uniform(-78.0, -56.0)
    reach = np.sqrt(((canvas.x - cx) / sx) ** 2 + ((canvas.y - cy) / sy) ** 2)
    distance = (1.0 + fullness - reach + lobes * texture[..., 0] + 0.05 * texture[..., 1]) * min(sx, sy)
    weight = _ramp(distance, 1.5 * canvas.soft)
    # Side lobes and reverberation fill the fluid with a haze next to its walls.
    haze = level + 12.0 * np.exp(-np.maximum(distance, 0.0) * (12.0 / view))
    canvas.cover(np.s_[:, :], weight, haze, -rng.uniform(0.5, 1.0))
    canvas.loss -= weight * rng.uniform(0.02, 0.10)


def _paint_blob(
    canvas: _Canvas,
    texture: Array,
    centre: tuple[float, float],
    radii: tuple[float, float],
    angle: float,
    level: float,
    impedance: float,
) -> None:
    """A soft lump (limb or trunk section, cord, fibroid, cyst) with an uneven outline."""
    at = canvas.window(*centre, 1.25 * max(radii))
    p, q = _Head(*centre, *radii, angle).local(canvas.x[at], canvas.y[at])
    reach = np.sqrt(p * p + q * q) - 0.16 * texture[at][..., 1] - 0.06 * texture[at][..., 2]
    weight = _ramp((1.0 - reach) * min(radii), 1.5 * canvas.soft + 0.1 * min(radii))
    lobes = 2.0 * texture[at][..., 0] + 3.5 * texture[at][..., 2] + 2.0 * texture[at][..., 3]
    canvas.cover(at, weight, level + lobes, impedance)


def _paint_streak(canvas: _Canvas, bar: _Bar, strength: float) -> None:
    """A short bright line without shadow: a smooth interface seen edge-on. The femur's main impostor."""
    at = canvas.window(bar.cx, bar.cy, 1.3 * bar.half_length)
    t, w = bar.local(canvas.x[at], canvas.y[at])
    sigma = max(bar.half_width, 0.6 * canvas.pixel)
    t2 = t * t
    profile = np.exp(-((w * (1.0 / sigma)) ** 2) - 1.5 * t2 * t2)
    canvas.coherent[at] += _gain(strength) * _facing(canvas, at, bar.angle) ** 3 * profile


def _facing(canvas: _Canvas, at: tuple[slice, slice], angle: float) -> Array:
    """|cos| of the incidence angle of each beam on a flat reflector that lies at `angle`."""
    beams = (slice(None), at[1])
    return np.abs(canvas.beam_y[beams] * math.cos(angle) - canvas.beam_x[beams] * math.sin(angle))


def _paint_bone(
    canvas: _Canvas, texture: Array, bar: _Bar, strength: float, loss: float, rng: np.random.Generator
) -> None:
    """Cortical bone: a bright specular face that falls off with obliquity, and strong absorption.

    The shadow needs no drawing: `loss` (dB across the bar) is integrated along the beams. The reflecting
    core is smaller than the bar, because the PSF and log compression make its echo bloom to the bar's size.
    """
    bar = replace(bar, half_length=bar.half_length - 0.35 * bar.half_width, half_width=0.72 * bar.half_width)
    power, floor = rng.uniform(1.0, 2.5), rng.uniform(0.2, 0.4)
    wave = _wave(rng, 6)
    at = canvas.window(bar.cx, bar.cy, 1.2 * bar.half_length + 2.0 * bar.half_width)
    t, w = bar.local(canvas.x[at], canvas.y[at])
    width = bar.width(t) * (1.0 + 0.10 * texture[at][..., 2])  # only the echo is ragged, not the bone
    weight = _ramp(width - np.abs(w), canvas.soft + 0.7 * bar.half_width) * (np.abs(t) <= 1.0)
    facing = floor + (1.0 - floor) * _facing(canvas, at, bar.angle) ** power
    # Roughness of the periosteum, and trabeculae in the metaphyses, leave the echo mottled.
    uneven = _amplitude(3.2 * _wave_table(wave, 4.0 * t, -5.0, 5.0) + 2.5 * texture[at][..., 3])
    # The face towards the probe returns most of the pulse; deeper layers only what it let through.
    layer = 1.0 - 0.35 * np.clip(w * (1.0 / bar.half_width), -1.0, 1.0)
    reflected = _gain(strength) * weight * facing * uneven * layer
    np.maximum(canvas.coherent[at], reflected, out=canvas.coherent[at])
    canvas.blend(at, weight, strength - 11.0)
    canvas.loss[at] += weight * (loss / (2.0 * bar.half_width))


def _paint_femur(canvas: _Canvas, texture: Array, femur: _Bar, view: float, rng: np.random.Generator) -> None:
    """Thigh (muscle striated along the bone, skin line) and the femoral shaft in it."""
    length = 2.0 * femur.half_length
    rise = rng.uniform(-0.12, 0.12) * length
    lean = femur.angle + rng.normal(0.0, 0.12)
    radii = (length * rng.uniform(0.65, 1.0), length * rng.uniform(0.28, 0.48))
    shift = rng.normal(0.0, 0.12) * length
    centre = (
        femur.cx + shift * math.cos(lean) - rise * math.sin(lean),
        femur.cy + shift * math.sin(lean) + rise * math.cos(lean),
    )
    level = rng.uniform(-38.0, -28.0)
    fibres, contrast = _wave(rng, 7), rng.uniform(1.5, 4.0)
    strength, loss = rng.uniform(-13.0, 1.0), rng.uniform(9.0, 22.0)

    _paint_blob(canvas, texture, centre, radii, lean, level, rng.uniform(0.3, 0.8))
    at = canvas.window(*centre, 1.25 * max(radii))
    p, q = _Head(*centre, *radii, lean).local(canvas.x[at], canvas.y[at])
    inside = _ramp(1.0 - np.sqrt(p * p + q * q), 0.15)
    striation = _wave_table(fibres, 6.0 * q + 0.5 * texture[at][..., 1], -10.0, 10.0)
    canvas.echo[at] += contrast * inside * striation
    _paint_bone(canvas, texture, femur, strength, loss, rng)


@dataclass(frozen=True)
class _HeadPart:
    """The window of the canvas around a head, in head coordinates."""

    at: tuple[slice, slice]
    p: Array  # along the midline, +-1 at the skull
    q: Array  # across it, +-1 at the skull
    grain: Array  # texture in the window
    facing: Array  # |cos| of incidence on structures parallel to the midline
    front: float  # sign of p on the side of the forehead
    early: float  # 1 before 16 weeks, 0 after 20


def _paint_head(canvas: _Canvas, texture: Array, head: _Head, weeks: float, rng: np.random.Generator) -> None:
    """Scalp, skull and brain."""
    at = canvas.window(head.cx, head.cy, 1.15 * head.a)
    p, q = head.local(canvas.x[at], canvas.y[at])
    part = _HeadPart(
        at=at,
        p=p,
        q=q,
        grain=texture[at],
        facing=_facing(canvas, at, head.angle),
        front=float(rng.choice((-1.0, 1.0))),
        early=float(np.clip((20.0 - weeks) / 4.0, 0.0, 1.0)),
    )
    _paint_brain(canvas, part, head, rng)
    _paint_skull(canvas, part, head, weeks, rng)


def _skull_geometry(canvas: _Canvas, part: _HeadPart, head: _Head) -> tuple[Array, Array]:
    """Depth (mm) under the outer ellipse, to first order, and |cos| of the incidence of the beam on it."""
    rho = np.sqrt(part.p * part.p + part.q * part.q) + 1e-4
    gu, gv = part.p * (1.0 / head.a), part.q * (1.0 / head.b)
    steep = np.sqrt(gu * gu + gv * gv) + 1e-6
    c, s = math.cos(head.angle), math.sin(head.angle)
    beams = (slice(None), part.at[1])
    along_beam = (gu * c - gv * s) * canvas.beam_x[beams] + (gu * s + gv * c) * canvas.beam_y[beams]
    return (1.0 - rho) * rho / steep, np.abs(along_beam) / steep


def _paint_skull(canvas: _Canvas, part: _HeadPart, head: _Head, weeks: float, rng: np.random.Generator) -> None:
    """A shell under the outer ellipse; bright where the beam is perpendicular, lost where it grazes.

    Grazing beams also run a long way through bone, which gives the typical edge shadows for free.
    """
    thickness = head.b * rng.uniform(0.045, 0.08) + 0.2
    uneven, bright, dent = _wave(rng, 5), _wave(rng, 5), _wave(rng, 6)
    roughness = rng.uniform(0.0, 0.012) * head.b
    strength = rng.uniform(-9.0, 4.0)
    power, floor = rng.uniform(3.0, 8.0), rng.uniform(0.0, 0.03)
    scalp, scalp_level = rng.uniform(0.02, 0.08) * head.b, rng.uniform(-50.0, -37.0)
    crossing = rng.uniform(1.0, 2.5) + 0.06 * (weeks - 12.0)  # dB; ossification grows with age
    sutures = rng.uniform(-np.pi, np.pi, 3)

    at = part.at
    distance, incidence = _skull_geometry(canvas, part, head)
    skin = _ramp(distance + scalp, canvas.soft) * (1.0 - _ramp(distance, canvas.soft))
    canvas.blend(at, skin, scalp_level)
    canvas.impedance[at] += 0.25 * _ramp(distance + scalp, canvas.soft)

    # Azimuth-dependent quantities come from a table over the angle around the head.
    azimuth = np.arctan2(part.q, part.p)
    knots = np.linspace(-np.pi, np.pi, 256)
    closed = np.minimum(2.0 * np.cos(0.5 * knots), 1.0)  # fades the waves out at +-pi, where the table wraps
    gaps = np.prod([1.0 - 0.75 * np.exp(-(((knots - s) / 0.05) ** 2)) for s in sutures], axis=0)
    gain = gaps * _amplitude(3.0 * _evaluate_wave(bright, 2.0 * knots) * closed)
    depth = thickness * (1.0 + 0.25 * _evaluate_wave(uneven, 2.0 * knots) * closed)
    inner = np.interp(azimuth, knots, np.maximum(depth, 0.5 * thickness)).astype(np.float32)
    along = np.interp(azimuth, knots, gain).astype(np.float32)
    # Moulding: the bone departs a little from the ellipse that the caliper fits to it.
    moulding = roughness * np.abs(_evaluate_wave(dent, 3.0 * knots)) * closed
    distance = distance - np.interp(azimuth, knots, moulding).astype(np.float32)

    # The echo swells and fades over the thickness of the bone rather than switching on and off. It blooms
    # through the PSF; starting it deeper puts its visible edge on the ellipse, as measured on HC18.
    shell = _ramp(distance - 0.6 * thickness, canvas.soft + 0.2 * thickness)
    shell *= _ramp(inner - distance, canvas.soft + 0.6 * thickness)
    facing = floor + (1.0 - floor) * incidence**power
    reflected = _gain(strength) * shell * along * facing
    np.maximum(canvas.coherent[at], reflected, out=canvas.coherent[at])
    canvas.blend(at, shell, 14.0 * incidence - 46.0 + 2.0 * along)
    canvas.loss[at] += shell * along * (crossing / thickness)


def _paint_brain(canvas: _Canvas, part: _HeadPart, head: _Head, rng: np.random.Generator) -> None:
    """Brain tissue, then what is seen in it."""
    bend = rng.normal(0.0, 0.03)
    level = rng.uniform(-48.0, -35.0)
    sulci = rng.uniform(2.0, 12.0) * (1.0 - part.early)
    veil = rng.uniform(0.0, 10.0)
    grain = part.grain
    rho = np.sqrt(part.p * part.p + part.q * part.q)
    tissue = level + 2.5 * grain[..., 1] + 3.0 * grain[..., 2] + 2.0 * grain[..., 3]
    # Sulci and meninges thread the cortex with echoes as it folds in the third trimester.
    folds = np.clip(1.0 - 3.0 * np.abs(grain[..., 2]), 0.0, 1.0) * np.clip(1.4 * rho - 0.3, 0.0, 1.0)
    tissue += sulci * folds
    # Reverberation in the near skull veils the upper hemisphere.
    top = float(canvas.fan.polar(head.cx, head.cy)[0]) - head.b
    tissue += veil * np.exp(np.maximum(canvas.r[part.at[0]] - top, 0.0) * (-2.5 / head.b))
    canvas.cover(part.at, _ramp(1.0 - rho, canvas.soft / head.b), tissue, 0.3)

    offset = part.q - bend * (1.0 - part.p * part.p) + 0.012 * grain[..., 2]
    for side in (-1.0, 1.0):
        _paint_ventricle(canvas, part, offset, side, rng)
    _paint_midline(canvas, part, offset, head.b, rng)


def _oval(part: _HeadPart, offset: Array, centre: tuple[float, float], radii: tuple[float, float]) -> Array:
    """Soft weight of an uneven oval in head coordinates."""
    u = (part.p - centre[0]) * (1.0 / radii[0])
    v = (offset - centre[1]) * (1.0 / radii[1])
    reach = np.sqrt(u * u + v * v) - 0.25 * part.grain[..., 1] - 0.14 * part.grain[..., 2]
    return np.clip(3.0 * (1.0 - reach), 0.0, 1.0)


def _paint_ventricle(canvas: _Canvas, part: _HeadPart, offset: Array, side: float, rng: np.random.Generator) -> None:
    """Lateral ventricle (dark cerebrospinal fluid) with choroid plexus (bright), large before 20 weeks."""
    early = part.early
    cp, cq = -part.front * rng.uniform(0.0, 0.35), side * rng.uniform(0.38, 0.48)
    rp, rq = rng.uniform(0.30, 0.40) + 0.25 * early, rng.uniform(0.10, 0.16) + 0.20 * early
    plexus_p = cp + rng.uniform(-0.2, 0.2) * rp
    plexus_radii = (rng.uniform(0.5, 0.8) * rp, rng.uniform(0.6, 0.8) * rq)
    fluid_level = rng.uniform(-70.0, -54.0)
    plexus_level = rng.uniform(-34.0, -25.0) - 3.0 * (1.0 - early)
    seen = min(rng.uniform(0.1, 1.1) + early, 1.0)  # often veiled or out of plane later in gestation
    filled = rng.random() < 0.75
    strength = rng.uniform(-24.0, -6.0)
    fluid = _oval(part, offset, (cp, cq), (rp, rq))
    canvas.blend(part.at, seen * fluid, fluid_level)
    if filled:
        plexus = _oval(part, offset, (plexus_p, cq), plexus_radii)
        canvas.blend(part.at, seen * plexus, plexus_level + 2.5 * part.grain[..., 3])
    # The long walls are specular, but patchy, and shown only where they face the beam.
    edge = np.clip(1.0 - np.abs(fluid - 0.5) * 2.5, 0.0, 1.0)
    long_side = np.clip(1.2 - np.abs(part.p - cp) * (1.0 / (0.7 * rp)), 0.0, 1.0)
    patchy = np.clip(part.grain[..., 2] + 0.2, 0.0, 1.0) * part.facing**3
    canvas.coherent[part.at] += _gain(strength) * edge * long_side * patchy


def _paint_midline(
    canvas: _Canvas, part: _HeadPart, offset: Array, half_width: float, rng: np.random.Generator
) -> None:
    """Falx: a thin specular sheet, interrupted in front by the cavum septi pellucidi and by the thalami."""
    strength = rng.uniform(-18.0, -4.0)
    wave, cut = _wave(rng, 12), rng.uniform(-0.4, 0.3)
    reach = rng.uniform(0.75, 0.92)
    cavum_p, cavum_length = part.front * rng.uniform(0.35, 0.5), rng.uniform(0.09, 0.14)
    cavum_open, cavum_level = rng.uniform(0.04, 0.09), rng.uniform(-64.0, -45.0)
    sheet = max(0.35, 0.6 * canvas.pixel) / half_width
    beside = np.abs(offset)
    along = np.abs(part.p)
    peak = _gain(strength) * part.facing**2

    shown = np.clip(2.0 * (_wave_table(wave, 4.0 * part.p, -6.0, 6.0) + (cut + part.early)), 0.0, 1.0)
    shown *= _ramp(reach - along, 0.1)
    cavum = _ramp(cavum_length - np.abs(part.p - cavum_p), 0.06) * (1.0 - part.early)
    line = np.exp(-((beside * (1.0 / sheet)) ** 2)) * shown * (1.0 - cavum)
    canvas.blend(part.at, cavum * _ramp(cavum_open - beside, 0.04), cavum_level)
    walls = np.exp(-(((beside - cavum_open) * (1.0 / sheet)) ** 2)) * cavum
    canvas.coherent[part.at] += peak * (line + 0.7 * walls)


def _far_from_anatomy(pose: _Pose, x: float, y: float, margin: float) -> bool:
    if pose.head is not None and pose.head.inside(x, y, 1.0 + margin / pose.head.b):
        return False
    femur = pose.femur
    return femur is None or np.hypot(x - femur.cx, y - femur.cy) > femur.half_length + margin


def _paint_distractors(canvas: _Canvas, texture: Array, pose: _Pose, rng: np.random.Generator) -> None:
    """Lumps, cysts, interface echoes and ribs: without them "bright line" would already mean femur."""
    view = pose.view
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(-0.5, 0.5) * view, rng.uniform(-0.5, 0.5) * view
        radii = (rng.uniform(0.03, 0.16) * view, rng.uniform(0.03, 0.16) * view)
        cyst = rng.random() < 0.35
        level = rng.uniform(-66.0, -48.0) if cyst else rng.uniform(-42.0, -28.0)
        angle, step = rng.uniform(0.0, np.pi), rng.uniform(0.1, 0.7)
        if _far_from_anatomy(pose, x, y, 0.6 * max(radii)):
            _paint_blob(canvas, texture, (x, y), radii, angle, level, -step if cyst else step)
    for _ in range(rng.integers(2, 9)):
        x, y = rng.uniform(-0.5, 0.5) * view, rng.uniform(-0.5, 0.5) * view
        half = rng.uniform(0.015, 0.11) * view
        width, angle = rng.uniform(0.002, 0.008) * view, rng.normal(0.0, 0.45)
        streak = _Bar(x, y, half, width, angle, rng.uniform(-0.1, 0.1), 0.0)
        strength = rng.uniform(-24.0, -5.0)
        if _far_from_anatomy(pose, x, y, 0.05 * view + half):
            _paint_streak(canvas, streak, strength)
    if rng.random() < 0.2:
        _paint_ribs(canvas, texture, pose, rng)


def _paint_ribs(canvas: _Canvas, texture: Array, pose: _Pose, rng: np.random.Generator) -> None:
    """A row of ribs cut across: bright and shadowing like the femur, but short."""
    x, y = rng.uniform(-0.4, 0.4) * pose.view, rng.uniform(-0.4, 0.4) * pose.view
    spacing, angle = rng.uniform(0.05, 0.08) * pose.view, rng.normal(0.0, 0.5)
    for k in range(int(rng.integers(3, 6))):
        cx, cy = x + k * spacing * math.cos(angle), y + k * spacing * math.sin(angle)
        half = rng.uniform(0.014, 0.024) * pose.view
        rib = _Bar(cx, cy, half, 0.45 * half, rng.normal(angle, 0.2), 0.0, 0.0)
        strength = rng.uniform(-16.0, -6.0)
        if _far_from_anatomy(pose, cx, cy, 0.08 * pose.view):
            _paint_bone(canvas, texture, rib, strength, 9.0, rng)


def _paint_scene(canvas: _Canvas, pose: _Pose, rng: np.random.Generator) -> None:
    texture = _sample_texture(_draw_texture(rng), canvas, pose.view)
    _paint_tissue(canvas, texture, pose.view, rng)
    _paint_abdominal_wall(canvas, texture, rng)
    if pose.head is not None:
        _paint_fluid(canvas, texture, pose.view, (pose.head.cx, pose.head.cy), pose.head.a, rng)
    if pose.femur is not None:
        _paint_fluid(canvas, texture, pose.view, (pose.femur.cx, pose.femur.cy), 1.3 * pose.femur.half_length, rng)
    _paint_distractors(canvas, texture, pose, rng)
    if pose.femur is not None:
        _paint_femur(canvas, texture, pose.femur, pose.view, rng)
    if pose.head is not None:
        _paint_head(canvas, texture, pose.head, pose.weeks, rng)
    _paint_interfaces(canvas, texture)


def _paint_interfaces(canvas: _Canvas, texture: Array) -> None:
    """Specular echoes where the impedance changes along the beam (so hardly on walls parallel to it)."""
    step = np.diff(canvas.impedance, axis=0, append=canvas.impedance[-1:]) * (canvas.soft / canvas.dr)
    patchy = np.clip(0.45 + 0.4 * texture[..., 1] + 0.3 * texture[..., 2], 0.05, 1.2)
    canvas.coherent += _gain(-13.0) * step * step * patchy


# ---------------------------------------------------------------------------------------------------------
# Image formation
# ---------------------------------------------------------------------------------------------------------


_ONE = np.ones(1, np.float32)  # the identity kernel of a one-dimensional filter


def _gaussian_kernel(sigma: float) -> Array:
    radius = max(1, int(np.ceil(3.0 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (kernel / kernel.sum()).astype(np.float32)


def _form_echo(
    diffuse: Array, coherent: Array, axial_sigma: float, lateral_sigma: Array, rng: np.random.Generator
) -> Array:
    """Envelope of the beam-formed echo on the beam grid.

    `diffuse` is the RMS amplitude of the incoherent echo, `coherent` that of the specular one. The PSF is
    separable: short along the beam (pulse length, `axial_sigma` samples), wide across (aperture,
    `lateral_sigma` beams per row). Scatterers are scaled by the PSF's noise gain so that their RMS is kept.
    """
    rows, beams = diffuse.shape
    axial = _gaussian_kernel(axial_sigma)
    # Neighbouring rows share a kernel: within a band the beam width changes by a few per cent only.
    bands = np.array_split(np.arange(rows), min(8, rows))
    laterals = [_gaussian_kernel(float(lateral_sigma[band].mean())) for band in bands]
    noise_gain = np.concatenate([np.full(len(b), np.linalg.norm(k)) for b, k in zip(bands, laterals, strict=True)])
    restore = (np.sqrt(0.5) / (np.linalg.norm(axial) * noise_gain)).astype(np.float32)
    field = rng.standard_normal((rows, beams, 2), dtype=np.float32)  # real and imaginary part
    field *= (diffuse * restore[:, None])[..., None]
    field[..., 0] += coherent
    field = cv2.sepFilter2D(field, -1, _ONE, axial)
    for band, lateral in zip(bands, laterals, strict=True):
        part = np.s_[band[0] : band[-1] + 1]
        field[part] = cv2.sepFilter2D(field[part], -1, lateral, _ONE)
    return cv2.magnitude(np.ascontiguousarray(field[..., 0]), np.ascontiguousarray(field[..., 1]))


def _beam_gain(canvas: _Canvas, pose: _Pose, rng: np.random.Generator) -> Array:
    """Gain (dB) on the grid: shadows and enhancement, imperfect time-gain compensation, probe contact."""
    tgc, contact = _wave(rng, 3), _wave(rng, 4)
    slope = rng.normal(0.0, 0.05) - 0.02  # dB/mm that the operator's gain slider leaves uncorrected
    ripple, patch = rng.uniform(0.5, 2.5), rng.uniform(0.3, 2.0)
    edge_loss, edge_side = rng.uniform(0.0, 22.0) * (rng.random() < 0.45), float(rng.choice((-1.0, 1.0)))
    penumbra, leak = math.radians(rng.uniform(0.8, 2.0)), rng.uniform(-36.0, -17.0)

    # A slice has thickness and side lobes: some signal always leaks into a shadow ("dirty" shadow).
    shadow = np.cumsum(canvas.loss, axis=0) * (-canvas.dr)
    shadow = _amplitude(shadow) + _gain(leak)
    # The aperture sees around an obstacle: the shadow has a penumbra as wide as the aperture's angle.
    shadow = cv2.sepFilter2D(shadow, -1, _gaussian_kernel(max(penumbra / canvas.dtheta, 0.5)), _ONE)
    depth = (canvas.r - canvas.fan.near).astype(np.float64)
    middle = float(-canvas.fan.apex[1] - canvas.fan.near)
    along = slope * (depth - middle) + ripple * _evaluate_wave(tgc, 3.0 * depth / pose.view)
    # Poor coupling at one end of the probe darkens the beams there.
    outer = np.clip(edge_side * canvas.theta.astype(np.float64) / canvas.fan.half_angle - 0.35, 0.0, 1.0)
    across = patch * _evaluate_wave(contact, 4.0 * canvas.theta.astype(np.float64)) - edge_loss * outer
    return shadow * _amplitude(along).astype(np.float32) * _amplitude(across).astype(np.float32)


def _wavelength_factor(view: float) -> float:
    """Shallow views allow higher frequencies, hence a smaller point-spread function."""
    return 0.4 + 0.6 * min(view / 130.0, 1.0)


def _lateral_sigma(canvas: _Canvas, pose: _Pose, rng: np.random.Generator) -> Array:
    """Beam width in beams, for every row: a constant angle, more away from the transmit focus."""
    width = rng.uniform(1.0, 2.1) * _wavelength_factor(pose.view)  # mm FWHM at the image centre
    focus = rng.uniform(-0.2, 0.3) * pose.view - canvas.fan.apex[1]
    defocus = (canvas.r[:, 0] - focus) / pose.view
    angle = width / 2.355 / (-canvas.fan.apex[1]) * np.sqrt(1.0 + 3.0 * defocus**2)
    return np.maximum(angle / canvas.dtheta, 0.9)


def _compress(envelope: Array, rng: np.random.Generator) -> Array:
    """Log compression of the envelope to grey levels 0-255 (float)."""
    dynamic_range = rng.uniform(45.0, 65.0)
    gain = rng.uniform(-11.0, 3.0)
    smoothing = rng.uniform(0.3, 1.0)
    gamma = rng.uniform(0.9, 1.5)  # the scanner's grey map
    db = np.log10(envelope + 1e-6) * 20.0
    level = np.clip((db + (gain + dynamic_range)) * (1.0 / dynamic_range), 0.0, 1.0)
    # Speckle-reduction filters of the display chain work on the compressed image.
    level = cv2.GaussianBlur(level, (5, 5), smoothing)
    return cv2.pow(level, gamma) * 255.0


def _scan_convert(canvas: _Canvas, polar: Array, x: Array, y: Array) -> Array:
    """Beam data to picture; black outside the fan."""
    r, theta = canvas.fan.polar(x, y)
    columns = (theta - canvas.t0) * (1.0 / canvas.dtheta)
    rows = (r - canvas.r0) * (1.0 / canvas.dr)
    picture = cv2.remap(polar, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return np.rint(picture).astype(np.uint8)


def _acquire(canvas: _Canvas, pose: _Pose, rng: np.random.Generator, noise: np.random.Generator) -> Array:
    """One B-mode frame on the beam grid, grey levels as float."""
    gain = _beam_gain(canvas, pose, rng)
    lateral = _lateral_sigma(canvas, pose, rng)
    axial = max(rng.uniform(0.4, 0.85) * _wavelength_factor(pose.view) / 2.355 / canvas.dr, 0.75)
    floor_db, floor_slope = rng.uniform(-76.0, -60.0), rng.uniform(0.0, 10.0)
    looks = int(rng.integers(1, 4))
    diffuse = _amplitude(canvas.echo) * gain
    coherent = canvas.coherent * gain
    # Time-gain compensation amplifies the electronic noise of late echoes.
    floor = _amplitude(floor_db + floor_slope * (canvas.r - canvas.fan.near) / pose.view)
    diffuse = np.sqrt(diffuse * diffuse + floor * floor, dtype=np.float32)
    # Compounding: most machines show the mean of a few frames of independent speckle.
    envelope = sum(_form_echo(diffuse, coherent, axial, lateral, noise) for _ in range(looks)) * (1.0 / looks)
    return _compress(envelope, rng)


def _pixel_grid(shape: tuple[int, int], pixel: float) -> tuple[Array, Array]:
    """Positions (mm) of the pixel centres, each broadcast to the full shape."""
    x = ((np.arange(shape[1]) + 0.5 - 0.5 * shape[1]) * pixel).astype(np.float32)
    y = ((np.arange(shape[0]) + 0.5 - 0.5 * shape[0]) * pixel).astype(np.float32)
    return np.broadcast_to(x[None, :], shape), np.broadcast_to(y[:, None], shape)


def _draw_mask(pose: _Pose, x: Array, y: Array) -> Array:
    mask = np.zeros(x.shape, np.uint8)
    if pose.head is not None:
        mask[pose.head.inside(x, y)] = 2
    if pose.femur is not None:
        mask[pose.femur.inside(x, y)] = 1
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

        pose = _draw_pose(scene)
        pixel = pose.view / min(self.size)
        canvas = _Canvas(pose.fan, self.size, pixel)
        _paint_scene(canvas, pose, scene)
        polar = _acquire(canvas, pose, scene, noise)
        x, y = _pixel_grid(self.size, pixel)
        image, mask = _scan_convert(canvas, polar, x, y), _draw_mask(pose, x, y)
        _blank_graphics(image, mask, scene)
        return Sample(
            name=self._name(index),
            subject=self._name(index),
            image=image,
            mask=mask,
            pixel_size=pixel,
            femur_length=None if pose.femur is None else float(2.0 * pose.femur.half_length),
            head_circumference=None if pose.head is None else ellipse_perimeter(pose.head.a, pose.head.b),
        )
