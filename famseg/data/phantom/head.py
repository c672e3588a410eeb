"""The fetal head: scalp, skull, brain and what is seen in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from famseg.data.phantom.canvas import Canvas, amplitude, facing_at, ramp, scalar_amplitude
from famseg.data.phantom.shapes import Array, Head
from famseg.data.phantom.texture import draw_wave, evaluate_wave, wave_table


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


def paint_head(canvas: Canvas, texture: Array, head: Head, weeks: float, rng: np.random.Generator) -> None:
    """Scalp, skull and brain."""
    at = canvas.window(head.cx, head.cy, 1.15 * head.a)
    p, q = head.local(canvas.x[at], canvas.y[at])
    part = _HeadPart(
        at=at,
        p=p,
        q=q,
        grain=texture[at],
        facing=facing_at(canvas, at, head.angle),
        front=float(rng.choice((-1.0, 1.0))),
        early=float(np.clip((20.0 - weeks) / 4.0, 0.0, 1.0)),
    )
    _paint_brain(canvas, part, head, rng)
    _paint_skull(canvas, part, head, weeks, rng)


def _skull_geometry(canvas: Canvas, part: _HeadPart, head: Head) -> tuple[Array, Array]:
    """Depth (mm) under the outer ellipse, to first order, and |cos| of the incidence of the beam on it."""
    rho = np.sqrt(part.p * part.p + part.q * part.q) + 1e-4
    gu, gv = part.p * (1.0 / head.a), part.q * (1.0 / head.b)
    steep = np.sqrt(gu * gu + gv * gv) + 1e-6
    c, s = math.cos(head.angle), math.sin(head.angle)
    beams = (slice(None), part.at[1])
    along_beam = (gu * c - gv * s) * canvas.beam_x[beams] + (gu * s + gv * c) * canvas.beam_y[beams]
    return (1.0 - rho) * rho / steep, np.abs(along_beam) / steep


def _paint_skull(canvas: Canvas, part: _HeadPart, head: Head, weeks: float, rng: np.random.Generator) -> None:
    """A shell under the outer ellipse; bright where the beam is perpendicular, lost where it grazes.

    Grazing beams also run a long way through bone, which gives the typical edge shadows for free.
    """
    thickness = head.b * rng.uniform(0.045, 0.08) + 0.2
    uneven, bright, dent = draw_wave(rng, 5), draw_wave(rng, 5), draw_wave(rng, 6)
    roughness = rng.uniform(0.0, 0.012) * head.b
    strength = rng.uniform(-9.0, 4.0)
    power, floor = rng.uniform(3.0, 8.0), rng.uniform(0.0, 0.03)
    scalp, scalp_level = rng.uniform(0.02, 0.08) * head.b, rng.uniform(-50.0, -37.0)
    crossing = rng.uniform(1.0, 2.5) + 0.06 * (weeks - 12.0)  # dB; ossification grows with age
    sutures = rng.uniform(-np.pi, np.pi, 3)

    at = part.at
    distance, incidence = _skull_geometry(canvas, part, head)
    skin = ramp(distance + scalp, canvas.soft) * (1.0 - ramp(distance, canvas.soft))
    canvas.blend(at, skin, scalp_level)
    canvas.impedance[at] += 0.25 * ramp(distance + scalp, canvas.soft)

    # Azimuth-dependent quantities come from a table over the angle around the head.
    azimuth = np.arctan2(part.q, part.p)
    knots = np.linspace(-np.pi, np.pi, 256)
    closed = np.minimum(2.0 * np.cos(0.5 * knots), 1.0)  # fades the waves out at +-pi, where the table wraps
    gaps = np.prod([1.0 - 0.75 * np.exp(-(((knots - s) / 0.05) ** 2)) for s in sutures], axis=0)
    gain = gaps * amplitude(3.0 * evaluate_wave(bright, 2.0 * knots) * closed)
    depth = thickness * (1.0 + 0.25 * evaluate_wave(uneven, 2.0 * knots) * closed)
    inner = np.interp(azimuth, knots, np.maximum(depth, 0.5 * thickness)).astype(np.float32)
    along = np.interp(azimuth, knots, gain).astype(np.float32)
    # Moulding: the bone departs a little from the ellipse that the caliper fits to it.
    moulding = roughness * np.abs(evaluate_wave(dent, 3.0 * knots)) * closed
    distance = distance - np.interp(azimuth, knots, moulding).astype(np.float32)

    # The echo swells and fades over the thickness of the bone rather than switching on and off. It blooms
    # through the PSF; starting it deeper puts its visible edge on the ellipse, as measured on HC18.
    shell = ramp(distance - 0.6 * thickness, canvas.soft + 0.2 * thickness)
    shell *= ramp(inner - distance, canvas.soft + 0.6 * thickness)
    facing = floor + (1.0 - floor) * incidence**power
    reflected = scalar_amplitude(strength) * shell * along * facing
    np.maximum(canvas.coherent[at], reflected, out=canvas.coherent[at])
    canvas.blend(at, shell, 14.0 * incidence - 46.0 + 2.0 * along)
    canvas.loss[at] += shell * along * (crossing / thickness)


def _paint_brain(canvas: Canvas, part: _HeadPart, head: Head, rng: np.random.Generator) -> None:
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
    canvas.cover(part.at, ramp(1.0 - rho, canvas.soft / head.b), tissue, 0.3)

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


def _paint_ventricle(canvas: Canvas, part: _HeadPart, offset: Array, side: float, rng: np.random.Generator) -> None:
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
    canvas.coherent[part.at] += scalar_amplitude(strength) * edge * long_side * patchy


def _paint_midline(canvas: Canvas, part: _HeadPart, offset: Array, half_width: float, rng: np.random.Generator) -> None:
    """Falx: a thin specular sheet, interrupted in front by the cavum septi pellucidi and by the thalami."""
    strength = rng.uniform(-18.0, -4.0)
    wave, cut = draw_wave(rng, 12), rng.uniform(-0.4, 0.3)
    reach = rng.uniform(0.75, 0.92)
    cavum_p, cavum_length = part.front * rng.uniform(0.35, 0.5), rng.uniform(0.09, 0.14)
    cavum_open, cavum_level = rng.uniform(0.04, 0.09), rng.uniform(-64.0, -45.0)
    sheet = max(0.35, 0.6 * canvas.pixel) / half_width
    beside = np.abs(offset)
    along = np.abs(part.p)
    peak = scalar_amplitude(strength) * part.facing**2

    shown = np.clip(2.0 * (wave_table(wave, 4.0 * part.p, -6.0, 6.0) + (cut + part.early)), 0.0, 1.0)
    shown *= ramp(reach - along, 0.1)
    cavum = ramp(cavum_length - np.abs(part.p - cavum_p), 0.06) * (1.0 - part.early)
    line = np.exp(-((beside * (1.0 / sheet)) ** 2)) * shown * (1.0 - cavum)
    canvas.blend(part.at, cavum * ramp(cavum_open - beside, 0.04), cavum_level)
    walls = np.exp(-(((beside - cavum_open) * (1.0 / sheet)) ** 2)) * cavum
    canvas.coherent[part.at] += peak * (line + 0.7 * walls)
