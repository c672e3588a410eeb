"""The acoustic maps that a scene is painted on: a grid of depth by beam."""

from __future__ import annotations

import math

import numpy as np

from famseg.data.phantom.shapes import Array, Fan


class Canvas:
    """Acoustic maps on the beam grid (rows: depth, columns: beams) of the visible part of the fan."""

    def __init__(self, fan: Fan, shape: tuple[int, int], pixel: float):
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


def ramp(distance: Array, width: float) -> Array:
    """Zero outside (negative distance), one inside, linear over `width` around the edge."""
    return np.clip(distance * (1.0 / width) + 0.5, 0.0, 1.0)


def facing_at(canvas: Canvas, at: tuple[slice, slice], angle: float) -> Array:
    """|cos| of the incidence angle of each beam on a flat reflector that lies at `angle`."""
    beams = (slice(None), at[1])
    return np.abs(canvas.beam_y[beams] * math.cos(angle) - canvas.beam_x[beams] * math.sin(angle))


def amplitude(db: Array) -> Array:
    return np.exp(db * (math.log(10.0) / 20.0))


def scalar_amplitude(db: float) -> float:
    """Scalar decibels to amplitude, as a Python float so that float32 maps stay float32."""
    return 10.0 ** (db / 20.0)
