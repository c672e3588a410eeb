"""One shape an op beside what one would use without this library: eager torch, cuDNN, upstream kernels if installed.

torch.compile is left to `python -m benchmarks --device cuda`: compiling the peers takes most of an hour.
"""

from __future__ import annotations

from collections.abc import Iterator

import famseg_kernels as fk
from benchmarks.gpu.dry import emulate
from benchmarks.gpu.items import Item, Options
from benchmarks.gpu.steps.timings import timed
from benchmarks.shapes import TINY, shapes_for
from benchmarks.timing import DTYPES, without_tf32

SECONDS = 0.5


def items(options: Options) -> Iterator[Item]:
    emulate(options)
    without_tf32()
    for name in ("fp32",) if options.dry else ("bf16", "fp32"):
        for operation in fk.OPERATIONS:
            case = TINY[operation.spec.name] if options.dry else shapes_for(operation.spec.name, "cuda")[1]
            yield from timed(operation, case, DTYPES[name], options, "eager", SECONDS)
