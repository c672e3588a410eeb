"""`python -m benchmarks.issue.network`: a whole training step on GPUs that are not there, ours and of standard parts.

One step of FAMSeg (forward, cross-entropy, backward, AdamW) under bf16 autocast is run on tensors without data. What
this library's operations take is predicted as in the table. What torch computes takes the larger of its bytes at a
copy's bandwidth and its FLOPs at the full rate of tensor cores, of the FMA units for grouped convolutions and in fp32.
No kernel of torch is that good, and standard parts run many more of them: the ratio is a least one. Memory is the most
that is alive at any time, parameters and optimizer included.
"""

from __future__ import annotations

import argparse
import copy
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import measure, network, rivals, shapes
from benchmarks.issue import chips, report, table
from benchmarks.issue.chips import Chip
from famseg.models import create_model
from famseg_kernels.reassembly import layer as reassembly_layer
from famseg_kernels.testing.case import Case

COLUMNS = (
    *("model", "batch", "size", "dtype", "chip", "parts"),
    *("ms", "torch ms", "ours ms", "GB", "ratio", "memory %", "refusal"),
)


@dataclass
class Step:
    """What one training step asks for."""

    torch: list[tuple[int, float, bool]] = field(default_factory=list)  # bytes, FLOPs, on tensor cores
    ours: Counter[tuple[str, Case, str]] = field(default_factory=Counter)  # operation, shape, "fwd" or "bwd"
    alive: int = 0
    peak: int = 0  # bytes

    def torch_seconds(self, chip: Chip) -> float:
        every_clock = 2 * chip.processors * chip.clock
        rates = {half: every_clock * of[chip.capability] for half, of in ((False, chips.FMA), (True, chips.TENSOR))}
        return sum(max(moved / (chip.memory * chips.COPY), flops / rates[half]) for moved, flops, half in self.torch)


class _Watch(TorchDispatchMode):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.known: dict[int, Case] = {}
        self.storages: set[int] = set()

    def keep(self, tensor: torch.Tensor) -> None:
        """Count its memory from now until it is freed."""
        storage = tensor.untyped_storage()
        place, size = storage._cdata, int(storage.nbytes())
        if place in self.storages:
            return
        self.storages.add(place)
        self.step.alive += size
        self.step.peak = max(self.step.peak, self.step.alive)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self.storages.discard(place)
        self.step.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for tensor in made:
            self.keep(tensor)
        name = func.overloadpacket._qualified_op_name
        if name.startswith("famseg::"):
            operation = name.removeprefix("famseg::")
            backward = operation.endswith("_backward")
            operation = operation.removesuffix("_backward")
            case = shapes._like(operation, args[1:] if backward else args)
            same = next((known for op, known, _ in self.step.ours if (op, known.name) == (operation, case.name)), case)
            self.step.ours[operation, same, "bwd" if backward else "fwd"] += 1
        elif not (name.startswith("prim::") or measure.moves_nothing(func)):
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            different = {id(t): t for t in (*given, *made)}.values()
            moved = sum(min(t.nbytes, int(t.untyped_storage().nbytes())) for t in different)
            half = bool(given) and given[0].dtype.itemsize == 2 and not _grouped(name, args)
            self.step.torch.append((moved, measure.flops_of(func, args, kwargs, result), half))
        return result


def _grouped(name: str, args: Sequence[Any]) -> bool:
    return "convolution" in name and any(type(a) is int and a > 1 for a in args)


def step_of(model: str, batch: int, size: int, parts: AbstractContextManager[None]) -> Step:
    step = Step()
    watch = _Watch(step)
    layout = torch.channels_last
    faster = mock.patch.object(reassembly_layer, "_chain_is_faster", lambda _: False)  # it is, on a CPU
    real = create_model(model, rivals.CLASSES).to(memory_format=layout)  # type: ignore[call-overload]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        net = copy.deepcopy(real)
    for tensor in (*net.parameters(), *net.buffers()):
        watch.keep(tensor)
    with fake, watch, faster, parts:
        x = torch.empty(batch, 1, size, size).to(memory_format=layout)
        target = torch.zeros(batch, size, size, dtype=torch.int64)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        for _ in range(2):  # the first one makes the optimizer's state
            step.torch.clear()
            step.ours.clear()
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = torch.nn.functional.cross_entropy(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return step


def rows(model: str, batch: int, size: int, some: Sequence[Chip]) -> Iterator[table.Row]:
    """Two of each chip: ours, and of standard parts."""
    ours = step_of(model, batch, size, nullcontext())
    standard = step_of(model, batch, size, network.standard_parts(gpu=True))
    predicted: dict[tuple[str, str, str, str], tuple[float, str]] = {}
    for op, case in {(op, case) for op, case, _ in ours.ours}:
        for row in table.rows_of("triton", table.OPERATIONS[op], case, torch.bfloat16, some):
            key = op, case.name, row["pass"], row["chip"]
            us, refused = predicted.get(key, (0.0, ""))
            known = 0.0 if row["refusal"] else row["us"]
            predicted[key] = us + known, refused or (row["refusal"] and f"{row['kernel']}: {row['refusal']}")
        print(f"{op} {case.name} is counted", file=sys.stderr, flush=True)
    for chip in some:
        calls = [(predicted[op, case.name, what, chip.name], n) for (op, case, what), n in ours.ours.items()]
        kernels = 1e-3 * sum(n * us for (us, _), n in calls)
        refusals = "; ".join(sorted({refused for (_, refused), _ in calls if refused}))
        milliseconds = {"ours": 1e3 * ours.torch_seconds(chip), "standard": 1e3 * standard.torch_seconds(chip)}
        total = milliseconds["ours"] + kernels
        for parts, step, mine in (("ours", ours, kernels), ("standard", standard, 0.0)):
            took = milliseconds[parts] + mine
            yield {
                **{"model": model, "batch": batch, "size": size, "dtype": "bf16", "chip": chip.name, "parts": parts},
                **{"ms": took, "torch ms": milliseconds[parts], "ours ms": mine, "GB": step.peak / 1e9},
                **{"ratio": took / total, "memory %": 100 * ours.peak / step.peak},
                "refusal": refusals if parts == "ours" else "",
            }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.issue.network", description=__doc__)
    add = parser.add_argument
    names = [chip.name for chip in chips.CHIPS]
    add("--model", default="famseg_tiny")
    add("--batch", type=int, default=16)
    add("--size", type=int, default=512, help="side of the images, px")
    add("--chip", action="append", choices=names, help="default all")
    add("--out", type=Path, help="folder for network.csv")
    options = parser.parse_args(arguments)
    some = [chip for chip in chips.CHIPS if chip.name in (options.chip or names)]
    found = list(rows(options.model, options.batch, options.size, some))
    for row in found:
        times = f"{row['ms']:.1f} ms ({row['torch ms']:.1f} of torch, {row['ours ms']:.1f} of ours), {row['GB']:.1f} GB"
        print(f"{row['chip']}, {row['parts']}: {times}, ratio {row['ratio']:.2f} {row['refusal']}")
    if options.out:
        report.write_csv(options.out / "network.csv", found, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
