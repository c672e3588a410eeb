"""From acoustic maps to a B-mode picture: speckle, gain, log compression, scan conversion."""

from __future__ import annotations

import math

import cv2
import numpy as np

from famseg.data.phantom.canvas import Canvas, amplitude, scalar_amplitude
from famseg.data.phantom.pose import Pose
from famseg.data.phantom.shapes import Array
from famseg.data.phantom.texture import draw_wave, evaluate_wave

_ONE = np.ones(1, np.float32)  # the identity kernel of a one-dimensional filter


def acquire(canvas: Canvas, pose: Pose, rng: np.random.Generator, noise: np.random.Generator) -> Array:
    """One B-mode frame on the beam grid, grey levels as float."""
    gain = _beam_gain(canvas, pose, rng)
    lateral = _lateral_sigma(canvas, pose, rng)
    axial = max(rng.uniform(0.4, 0.85) * _wavelength_factor(pose.view) / 2.355 / canvas.dr, 0.75)
    floor_db, floor_slope = rng.uniform(-76.0, -60.0), rng.uniform(0.0, 10.0)
    looks = int(rng.integers(1, 4))
    diffuse = amplitude(canvas.echo) * gain
    coherent = canvas.coherent * gain
    # Time-gain compensation amplifies the electronic noise of late echoes.
    floor = amplitude(floor_db + floor_slope * (canvas.r - canvas.fan.near) / pose.view)
    diffuse = np.sqrt(diffuse * diffuse + floor * floor, dtype=np.float32)
    # Compounding: most machines show the mean of a few frames of independent speckle.
    envelope = sum(form_echo(diffuse, coherent, axial, lateral, noise) for _ in range(looks)) * (1.0 / looks)
    return _compress(envelope, rng)


def form_echo(
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


def _gaussian_kernel(sigma: float) -> Array:
    radius = max(1, int(np.ceil(3.0 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (kernel / kernel.sum()).astype(np.float32)


def _beam_gain(canvas: Canvas, pose: Pose, rng: np.random.Generator) -> Array:
    """Gain (dB) on the grid: shadows and enhancement, imperfect time-gain compensation, probe contact."""
    tgc, contact = draw_wave(rng, 3), draw_wave(rng, 4)
    slope = rng.normal(0.0, 0.05) - 0.02  # dB/mm that the operator's gain slider leaves uncorrected
    ripple, patch = rng.uniform(0.5, 2.5), rng.uniform(0.3, 2.0)
    edge_loss, edge_side = rng.uniform(0.0, 22.0) * (rng.random() < 0.45), float(rng.choice((-1.0, 1.0)))
    penumbra, leak = math.radians(rng.uniform(0.8, 2.0)), rng.uniform(-36.0, -17.0)

    # A slice has thickness and side lobes: some signal always leaks into a shadow ("dirty" shadow).
    shadow = np.cumsum(canvas.loss, axis=0) * (-canvas.dr)
    shadow = amplitude(shadow) + scalar_amplitude(leak)
    # The aperture sees around an obstacle: the shadow has a penumbra as wide as the aperture's angle.
    shadow = cv2.sepFilter2D(shadow, -1, _gaussian_kernel(max(penumbra / canvas.dtheta, 0.5)), _ONE)
    depth = (canvas.r - canvas.fan.near).astype(np.float64)
    middle = float(-canvas.fan.apex[1] - canvas.fan.near)
    along = slope * (depth - middle) + ripple * evaluate_wave(tgc, 3.0 * depth / pose.view)
    # Poor coupling at one end of the probe darkens the beams there.
    outer = np.clip(edge_side * canvas.theta.astype(np.float64) / canvas.fan.half_angle - 0.35, 0.0, 1.0)
    across = patch * evaluate_wave(contact, 4.0 * canvas.theta.astype(np.float64)) - edge_loss * outer
    return shadow * amplitude(along).astype(np.float32) * amplitude(across).astype(np.float32)


def _lateral_sigma(canvas: Canvas, pose: Pose, rng: np.random.Generator) -> Array:
    """Beam width in beams, for every row: a constant angle, more away from the transmit focus."""
    width = rng.uniform(1.0, 2.1) * _wavelength_factor(pose.view)  # mm FWHM at the image centre
    focus = rng.uniform(-0.2, 0.3) * pose.view - canvas.fan.apex[1]
    defocus = (canvas.r[:, 0] - focus) / pose.view
    angle = width / 2.355 / (-canvas.fan.apex[1]) * np.sqrt(1.0 + 3.0 * defocus**2)
    return np.maximum(angle / canvas.dtheta, 0.9)


def _wavelength_factor(view: float) -> float:
    """Shallow views allow higher frequencies, hence a smaller point-spread function."""
    return 0.4 + 0.6 * min(view / 130.0, 1.0)


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


def scan_convert(canvas: Canvas, polar: Array, x: Array, y: Array) -> Array:
    """Beam data to picture; black outside the fan."""
    r, theta = canvas.fan.polar(x, y)
    columns = (theta - canvas.t0) * (1.0 / canvas.dtheta)
    rows = (r - canvas.r0) * (1.0 / canvas.dr)
    picture = cv2.remap(polar, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return np.rint(picture).astype(np.uint8)
