"""What has a place and a size in the picture: the fan of beams, the head, a bar of bone. Millimetres."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ellipe

Array = np.ndarray


def ellipse_perimeter(a: float, b: float) -> float:
    """Exact perimeter of an ellipse with semi-axes `a` and `b`."""
    major, minor = max(a, b), min(a, b)
    return float(4.0 * major * ellipe(1.0 - (minor / major) ** 2))


@dataclass(frozen=True)
class Fan:
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
class Head:
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
class Bar:
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
