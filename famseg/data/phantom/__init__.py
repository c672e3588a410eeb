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

`shapes` and `pose` say what is in view, `tissue`, `femur` and `head` paint it on a `canvas`, `scene` in which order,
`scanner` makes the picture, `samples` the data set.
"""

from famseg.data.phantom.samples import Phantom
from famseg.data.phantom.shapes import ellipse_perimeter

__all__ = ["Phantom", "ellipse_perimeter"]
