"""When a result is right: one rule for all operations, backends and dtypes, for tests and benchmarks alike."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def violation(actual: Tensor, eager: Tensor, truth: Tensor, term_scale: float = 0.0) -> str | None:
    """None if `actual` is right, else what is wrong.

    err(actual, truth) ≤ 2 · err(eager, truth) + ε · scale, by the norm and by the maximum, where truth is the fp64
    reference, eager the reference in actual's own dtype, and scale the size of the truth. For gradients that sum
    many terms pass the root of the sum of their squares as `term_scale`; the larger one counts.
    """
    if actual.shape != truth.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if not actual.numel():
        return None
    wrong = actual.detach().double().cpu() - truth.cpu()
    allowed = eager.detach().double().cpu() - truth.cpu()
    if not torch.isfinite(wrong).all():
        return "values that are not finite"
    epsilon = EPSILON[actual.dtype]
    for measure in ("norm", "maximum"):
        size = torch.linalg.vector_norm if measure == "norm" else (lambda t: t.abs().max())
        scale = max(float(size(truth)), term_scale)
        limit = 2 * float(size(allowed)) + epsilon * scale
        if float(size(wrong)) > limit:
            return f"error by the {measure} {float(size(wrong)):.3e}, at most {limit:.3e} allowed (scale {scale:.3e})"
    return None
