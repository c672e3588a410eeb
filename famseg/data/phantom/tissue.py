"""What surrounds the anatomy: the mother's tissue, fluid, and soft things that are neither head nor femur."""

from __future__ import annotations

import numpy as np

from famseg.data.phantom.canvas import Canvas, facing_at, ramp, scalar_amplitude
from famseg.data.phantom.shapes import Array, Bar, Head
from famseg.data.phantom.texture import draw_wave, evaluate_wave, sample_strata


def paint_tissue(canvas: Canvas, texture: Array, view: float, rng: np.random.Generator) -> None:
    """Uterine wall and maternal tissue; in part placenta: brighter, finely lobulated, with dark lakes."""
    level = rng.uniform(-38.0, -27.0)
    fibrous = rng.uniform(0.5, 3.5)
    placenta_rise = rng.uniform(1.0, 6.0)
    threshold = rng.uniform(-0.6, 1.6)
    placenta = np.clip(3.0 * (texture[..., 1] - threshold), 0.0, 1.0)
    lakes = np.minimum(texture[..., 2] + 1.1, 0.0)
    strata = sample_strata(rng, canvas, texture, view)
    canvas.echo[:] = level + 3.0 * texture[..., 1] + 2.0 * texture[..., 2] + 1.5 * texture[..., 3]
    canvas.echo += placenta * (placenta_rise + 9.0 * lakes)
    canvas.echo += (1.0 - placenta) * strata * fibrous
    # Where a sheet is smooth it glints; sparse, so only the crests of the field count.
    canvas.coherent += (
        (scalar_amplitude(level + 6.0) * (fibrous / 3.5)) * np.maximum(strata - 1.1, 0.0) * (1.0 - placenta)
    )
    canvas.loss += 0.04 * texture[..., 0]


def paint_abdominal_wall(canvas: Canvas, texture: Array, rng: np.random.Generator) -> None:
    """Skin, fat, fascia and muscle of the mother: wavy layers along the probe face, with fascial echoes."""
    layers = int(rng.integers(2, 6))
    edges = np.cumsum(rng.uniform(2.0, 9.0, layers))
    levels = rng.uniform(-42.0, -23.0, layers + 1)
    levels[0] = rng.uniform(-26.0, -16.0)  # ring-down of the probe makes the first millimetres bright
    steps = rng.uniform(0.0, 0.75, layers) * rng.choice((-1.0, 1.0), layers)
    wave, height = draw_wave(rng), rng.uniform(0.5, 2.5)
    rows = int(np.clip((canvas.fan.near + edges[-1] + 8.0 - canvas.r0) / canvas.dr, 0, len(canvas.r)))
    if rows == 0:
        return
    at = (slice(0, rows), slice(None))
    lift = height * evaluate_wave(wave, 3.0 * canvas.theta.astype(np.float64)).astype(np.float32)
    depth = canvas.r[:rows] - canvas.fan.near + lift + 0.5 * texture[at][..., 1]
    knots = (edges[:, None] + np.array([-0.5, 0.5]) * canvas.soft).ravel()
    order = np.argsort(knots, kind="stable")
    values = np.repeat(levels, 2)[1:-1][order]
    stack = np.repeat(np.concatenate([[0.0], np.cumsum(steps)]), 2)[1:-1][order]
    weight = ramp(float(edges[-1]) - depth, canvas.soft)
    profile = np.interp(depth, knots[order], values).astype(np.float32)
    canvas.blend(at, weight, profile + 1.5 * texture[at][..., 2])
    canvas.impedance[at] += np.interp(depth, knots[order], stack).astype(np.float32)


def paint_fluid(
    canvas: Canvas,
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
    weight = ramp(distance, 1.5 * canvas.soft)
    # Side lobes and reverberation fill the fluid with a haze next to its walls.
    haze = level + 12.0 * np.exp(-np.maximum(distance, 0.0) * (12.0 / view))
    canvas.cover(np.s_[:, :], weight, haze, -rng.uniform(0.5, 1.0))
    canvas.loss -= weight * rng.uniform(0.02, 0.10)


def paint_blob(
    canvas: Canvas,
    texture: Array,
    centre: tuple[float, float],
    radii: tuple[float, float],
    angle: float,
    level: float,
    impedance: float,
) -> None:
    """A soft lump (limb or trunk section, cord, fibroid, cyst) with an uneven outline."""
    at = canvas.window(*centre, 1.25 * max(radii))
    p, q = Head(*centre, *radii, angle).local(canvas.x[at], canvas.y[at])
    reach = np.sqrt(p * p + q * q) - 0.16 * texture[at][..., 1] - 0.06 * texture[at][..., 2]
    weight = ramp((1.0 - reach) * min(radii), 1.5 * canvas.soft + 0.1 * min(radii))
    lobes = 2.0 * texture[at][..., 0] + 3.5 * texture[at][..., 2] + 2.0 * texture[at][..., 3]
    canvas.cover(at, weight, level + lobes, impedance)


def paint_streak(canvas: Canvas, bar: Bar, strength: float) -> None:
    """A short bright line without shadow: a smooth interface seen edge-on. The femur's main impostor."""
    at = canvas.window(bar.cx, bar.cy, 1.3 * bar.half_length)
    t, w = bar.local(canvas.x[at], canvas.y[at])
    sigma = max(bar.half_width, 0.6 * canvas.pixel)
    t2 = t * t
    profile = np.exp(-((w * (1.0 / sigma)) ** 2) - 1.5 * t2 * t2)
    canvas.coherent[at] += scalar_amplitude(strength) * facing_at(canvas, at, bar.angle) ** 3 * profile


def paint_interfaces(canvas: Canvas, texture: Array) -> None:
    """Specular echoes where the impedance changes along the beam (so hardly on walls parallel to it)."""
    step = np.diff(canvas.impedance, axis=0, append=canvas.impedance[-1:]) * (canvas.soft / canvas.dr)
    patchy = np.clip(0.45 + 0.4 * texture[..., 1] + 0.3 * texture[..., 2], 0.05, 1.2)
    canvas.coherent += scalar_amplitude(-13.0) * step * step * patchy
