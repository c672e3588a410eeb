"""FAMSeg end to end: inference and a training step, beside the reference backend and standard parts; peak memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks import measure
from benchmarks.gpu.items import Item, Options, Row
from benchmarks.network import Contest, Setting
from benchmarks.timing import without_tf32

SECONDS = 6.0


def items(options: Options) -> Iterator[Item]:
    without_tf32()
    if options.dry:
        setting = Setting("cpu", "famseg_nano", 2, 32, "fp32", 0.0)
    else:
        setting = Setting("cuda", "famseg_tiny", 16, 512, "bf16", SECONDS)
    kinds = ("inference", "training step", *(() if options.dry else ("inference without CUDA graph",)))
    for kind in kinds:
        key = f"{setting.model} {setting.batch}x{setting.size} {setting.dtype} {kind}"
        yield Item(key, functools.partial(_rows, setting, kind), limit=150.0)


def _rows(setting: Setting, kind: str, _: float) -> Iterator[Row]:
    where = measure.provenance(setting.device)
    for row in _contest(setting).rows(kind):
        yield row | where
    if setting.device == "cuda":
        torch.cuda.empty_cache()


@functools.cache
def _contest(setting: Setting) -> Contest:
    return Contest(setting)
