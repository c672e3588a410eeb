"""`python -m benchmarks.where`: where the time of one inference, or of one training step, goes.

Every operation that torch or this library runs, forward and backward, with its time, FLOPs, bytes and how near it comes
to what the machine could do with these: a matrix product's rate, or a copy's. Copies that change only the order in
memory, and casts, are added up by themselves. Bytes are those of the operation's tensors, read or written once each.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import measure
from benchmarks.network import infer, train_step
from benchmarks.rates import Rates, machine_rates
from benchmarks.rivals import CLASSES
from famseg.models import create_model

_COPIES = ("copy_", "clone", "_to_copy", "contiguous")


@dataclass
class Operation:
    """One call."""

    name: str
    shapes: str
    ms: float
    flops: float
    moved: int  # bytes
    kind: str  # "cast", "order" (a copy into another order in memory), or ""


class Watch(TorchDispatchMode):
    """Notes every operation but views and allocations, which move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        begin = time.perf_counter()
        result = func(*args, **kwargs)
        ms = 1e3 * (time.perf_counter() - begin)
        if measure.moves_nothing(func):
            return result
        name = func.overloadpacket._qualified_op_name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        different = {id(t): t for t in (*tensors, *made)}.values()
        flops = measure.flops_of(func, args, kwargs, result)
        shapes = " ".join("×".join(map(str, t.shape)) for t in tensors[:3] if t.dim())
        moved = sum(t.nbytes for t in different)
        kind = _kind(name.split("::")[-1], [*tensors, *made])
        self.found.append(Operation(name.removeprefix("aten::"), shapes, ms, flops, moved, kind))
        return result


def _kind(name: str, tensors: Sequence[Tensor]) -> str:
    if name not in _COPIES or len(tensors) < 2:
        return ""
    here, there = tensors[0], tensors[-1] if name != "copy_" else tensors[1]
    if here.dtype != there.dtype:
        return "cast"
    return "order" if here.shape == there.shape and here.stride() != there.stride() else ""


def watched(run: Callable[[], object], steps: int) -> list[Operation]:
    """The operations of one `run`, each with the shortest of its times in `steps` runs."""
    run()
    best: list[Operation] = []
    for _ in range(steps):
        with Watch() as watch:
            run()
        if not best:
            best = watch.found
        if [o.name for o in best] != [o.name for o in watch.found]:
            raise RuntimeError("two runs of the same step made different operations")
        for known, found in zip(best, watch.found, strict=True):
            known.ms = min(known.ms, found.ms)
    return best


def table(found: Sequence[Operation], rates: Rates, dtype: torch.dtype, lines: int) -> str:
    """The operations that take most, alike ones together, and sums."""
    groups: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for operation in found:
        groups[operation.name, operation.shapes].append(operation)
    total = sum(o.ms for o in found)
    head = f"{'operation':34} {'shapes':46} {'calls':>5} {'ms':>8} {'%':>5} {'GFLOP':>8} {'MB':>8} {'% of bound':>10}"
    text = [head]

    def line(name: str, shapes: str, some: Sequence[Operation]) -> str:
        ms, flops, moved = sum(o.ms for o in some), sum(o.flops for o in some), sum(o.moved for o in some)
        reached = 100 * sum(rates.bound(o.flops, o.moved, dtype)[0] for o in some) / ms if ms else 0.0
        return (
            f"{name[:34]:34} {shapes[:46]:46} {len(some):5} {ms:8.2f} {100 * ms / total:5.1f} "
            f"{flops / 1e9:8.3f} {moved / 1e6:8.2f} {reached:10.0f}"
        )

    ordered = sorted(groups.items(), key=lambda item: -sum(o.ms for o in item[1]))
    text += [line(name, shapes, some) for (name, shapes), some in ordered[:lines]]
    text.append("")
    ours = [o for o in found if o.name.startswith("famseg::")]
    products = [o for o in found if o.flops and o not in ours]
    text.append(line("all", "", found))
    text.append(line("this library's", "", ours))
    text.append(line("torch's convolutions and products", "", products))
    text.append(line("copies into another order", "", [o for o in found if o.kind == "order"]))
    text.append(line("casts", "", [o for o in found if o.kind == "cast"]))
    text.append(line("below 20 µs each", "", [o for o in found if o.ms < 0.02]))
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where", description=__doc__)
    add = parser.add_argument
    add("--model", default="famseg_nano")
    add("--batch", type=int, default=1)
    add("--size", type=int, default=256, help="side of the images, px")
    add("--train", action="store_true", help="a training step (AdamW, cross-entropy) instead of an inference")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    add("--channels-last", action="store_true")
    add("--steps", type=int, default=5, help="of each operation the shortest time among so many runs is taken")
    add("--lines", type=int, default=30)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model = create_model(options.model, CLASSES).train(options.train).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(options.batch, 1, options.size, options.size).to(memory_format=layout)
    run: Callable[[], object] = functools.partial(infer, model, x)
    if options.train:
        target = torch.randint(CLASSES, (options.batch, options.size, options.size))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        run = functools.partial(train_step, model, optimizer, x, target)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    rates = machine_rates("cpu", [dtype], 1.0 if options.steps > 1 else 0.0)
    what = "training step" if options.train else "inference"
    print(
        f"{options.model}, {what}, batch {options.batch}, {options.size} px, {options.dtype}, {str(layout)[6:]}, "
        f"{torch.get_num_threads()} threads; {rates.matrix[dtype] / 1e9:.0f} GFLOP/s, {rates.copy / 1e9:.1f} GB/s"
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        print(table(watched(run, options.steps), rates, dtype, options.lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
