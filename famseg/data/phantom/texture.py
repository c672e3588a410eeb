"""Smooth random functions: of the place (texture, strata), and of one variable (waves)."""

from __future__ import annotations

import math

import cv2
import numpy as np

from famseg.data.phantom.canvas import Canvas
from famseg.data.phantom.shapes import Array


def draw_texture(rng: np.random.Generator) -> Array:
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


def sample_texture(texture: Array, canvas: Canvas, view: float) -> Array:
    scale = texture.shape[0] / (1.6 * view)
    offset = 0.5 * texture.shape[0]
    return cv2.remap(
        texture,
        canvas.x * scale + offset,
        canvas.y * scale + offset,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )


def sample_strata(rng: np.random.Generator, canvas: Canvas, texture: Array, view: float) -> Array:
    """Fibrous tissue: thin sheets that lie roughly parallel to the probe face, gently folded."""
    sheets = cv2.resize(rng.standard_normal((64, 12)).astype(np.float32), (96, 256), interpolation=cv2.INTER_CUBIC)
    tilt = rng.normal(0.0, 0.25)
    across = np.broadcast_to(canvas.theta * (160.0 / math.radians(80.0)) + 48.0, canvas.echo.shape)
    along = (canvas.r - (0.5 * view + canvas.fan.near)) * (230.0 / view) + tilt * across + 14.0 * texture[..., 1]
    return cv2.remap(sheets, across, along + 128.0, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def draw_wave(rng: np.random.Generator, terms: int = 4) -> tuple[Array, Array, Array]:
    """Coefficients of a smooth random function of one variable: frequencies, phases, amplitudes."""
    order = np.arange(1, terms + 1)
    return (
        order * rng.uniform(0.7, 1.3, terms),
        rng.uniform(0.0, 2.0 * np.pi, terms),
        rng.normal(size=terms) / order,
    )


def evaluate_wave(wave: tuple[Array, Array, Array], t: Array) -> Array:
    return sum((a * np.sin(f * t + p) for f, p, a in zip(*wave, strict=True)), np.zeros_like(t))


def wave_table(wave: tuple[Array, Array, Array], t: Array, low: float, high: float) -> Array:
    """The wave at many points, through a table: sines on the whole grid would dominate the run time."""
    knots = np.linspace(low, high, 128)
    return np.interp(t, knots, evaluate_wave(wave, knots)).astype(np.float32)
