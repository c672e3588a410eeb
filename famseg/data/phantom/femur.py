"""Bone with its shadow, and the femur in its thigh."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from famseg.data.phantom.canvas import Canvas, amplitude, facing_at, ramp, scalar_amplitude
from famseg.data.phantom.shapes import Array, Bar, Head
from famseg.data.phantom.texture import draw_wave, wave_table
from famseg.data.phantom.tissue import paint_blob


def paint_bone(
    canvas: Canvas, texture: Array, bar: Bar, strength: float, loss: float, rng: np.random.Generator
) -> None:
    """Cortical bone: a bright specular face that falls off with obliquity, and strong absorption.

    The shadow needs no drawing: `loss` (dB across the bar) is integrated along the beams. The reflecting
    core is smaller than the bar, because the PSF and log compression make its echo bloom to the bar's size.
    """
    bar = replace(bar, half_length=bar.half_length - 0.35 * bar.half_width, half_width=0.72 * bar.half_width)
    power, floor = rng.uniform(1.0, 2.5), rng.uniform(0.2, 0.4)
    wave = draw_wave(rng, 6)
    at = canvas.window(bar.cx, bar.cy, 1.2 * bar.half_length + 2.0 * bar.half_width)
    t, w = bar.local(canvas.x[at], canvas.y[at])
    width = bar.width(t) * (1.0 + 0.10 * texture[at][..., 2])  # only the echo is ragged, not the bone
    weight = ramp(width - np.abs(w), canvas.soft + 0.7 * bar.half_width) * (np.abs(t) <= 1.0)
    facing = floor + (1.0 - floor) * facing_at(canvas, at, bar.angle) ** power
    # Roughness of the periosteum, and trabeculae in the metaphyses, leave the echo mottled.
    uneven = amplitude(3.2 * wave_table(wave, 4.0 * t, -5.0, 5.0) + 2.5 * texture[at][..., 3])
    # The face towards the probe returns most of the pulse; deeper layers only what it let through.
    layer = 1.0 - 0.35 * np.clip(w * (1.0 / bar.half_width), -1.0, 1.0)
    reflected = scalar_amplitude(strength) * weight * facing * uneven * layer
    np.maximum(canvas.coherent[at], reflected, out=canvas.coherent[at])
    canvas.blend(at, weight, strength - 11.0)
    canvas.loss[at] += weight * (loss / (2.0 * bar.half_width))


def paint_femur(canvas: Canvas, texture: Array, femur: Bar, view: float, rng: np.random.Generator) -> None:
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
    fibres, contrast = draw_wave(rng, 7), rng.uniform(1.5, 4.0)
    strength, loss = rng.uniform(-13.0, 1.0), rng.uniform(9.0, 22.0)

    paint_blob(canvas, texture, centre, radii, lean, level, rng.uniform(0.3, 0.8))
    at = canvas.window(*centre, 1.25 * max(radii))
    p, q = Head(*centre, *radii, lean).local(canvas.x[at], canvas.y[at])
    inside = ramp(1.0 - np.sqrt(p * p + q * q), 0.15)
    striation = wave_table(fibres, 6.0 * q + 0.5 * texture[at][..., 1], -10.0, 10.0)
    canvas.echo[at] += contrast * inside * striation
    paint_bone(canvas, texture, femur, strength, loss, rng)
