"""`python -m benchmarks`: is it right, how fast is it, beside the best alternatives, on this machine.

Correctness comes first (`--gate` stops there); then our backends and all peers take turns in one run. A row tells
milliseconds, GFLOP/s, GB/s, the part of the roofline (matrix rate and copy bandwidth measured in the same run on as
many threads), peak memory, and how many times faster ours is than the best peer. Figures go to benchmarks/results/ as
CSV with commit, device and versions.

Under TRITON_INTERPRET=1 it is a dry run of the GPU command: Triton's interpreter stands in for the GPU, every step is
taken once, on the smallest cases and shapes, and nothing is written unless --csv says where.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import famseg_kernels as fk
from benchmarks import gate, measure
from benchmarks.compare import compare
from benchmarks.peers import PEERS
from benchmarks.shapes import shapes_for
from famseg_kernels import backends
from famseg_kernels.registry import Case, Operation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = {"fwd": False, "fwd+bwd": True}


@dataclass
class Contestant:
    """One way to run the case: one of our backends, or a peer."""

    name: str
    ours: bool
    run: Callable[..., Any]
    layout: torch.memory_format = torch.contiguous_format
    threads: int | None = None  # None: as many as torch has


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--op",
        action="append",
        choices=sorted(op.spec.name for op in fk.OPERATIONS),
        help="only this operation (may be repeated)",
    )
    add("--dtype", action="append", choices=sorted(DTYPES), help="default fp32 and bf16")
    add("--quick", action="store_true", help="one shape an operation, eager peers only, a short time each")
    add("--gate", action="store_true", help="check correctness of every operation, dtype and case, and stop there")
    add("--seconds", type=float, help="measuring time a row group (default 2, quick 0.5)")
    add("--csv", type=Path, help="result file (default benchmarks/results/<device>-torch<version>.csv)")
    add("--no-csv", action="store_true", help="print only")
    add("--only-ours", action="store_true", help="time our backends only, without peers")
    add("--tf32", action="store_true", help="let torch's own fp32 products use TF32 (ours never do; default off)")
    add("--compare", metavar="REV", help="build git revision REV too and report what became slower since")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.compare is not None:
        names = ("--device", options.device, *(f"--op={op}" for op in options.op or ()))
        dtypes = [f"--dtype={dtype}" for dtype in options.dtype or ()]
        return compare(options.compare, [*names, *dtypes, *(["--quick"] if options.quick else [])], console)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU; use --device cpu")
    operations = [op for op in fk.OPERATIONS if not options.op or op.spec.name in options.op]
    dtypes = [DTYPES[name] for name in options.dtype or ("fp32", "bf16")]
    # torch lets cuDNN round fp32 to TF32 by default: no peer of fp32 kernels, and no measure for their tolerance.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    if backends.TRITON_INTERPRETS:
        console.print("dry run: Triton's interpreter stands in for a GPU; times say nothing")
        options.quick, options.seconds = True, 0.0

    failures = list(run_gate(console, operations, options.device, dtypes, quick=options.quick))
    if failures:
        console.print("[red]gate failed; no figure counts:[/red]", *failures, sep="\n  ")
        return 1
    if options.gate:
        return 0

    seconds = (0.5 if options.quick else 2.0) if options.seconds is None else options.seconds
    # By the contestants' threads: None stands for all that torch has.
    rates = {None: measure.machine_rates(options.device, dtypes, seconds)}
    if options.device == "cpu":
        with threads(1):
            rates[1] = measure.machine_rates(options.device, dtypes, seconds)
    where = measure.provenance(options.device)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    for number, rate in rates.items():
        figures = [f"matrix product {name_of(dtype)} {flops / 1e9:.0f} GFLOP/s" for dtype, flops in rate.matrix.items()]
        figures += [f"copy {rate.copy / 1e9:.1f} GB/s", *(["one thread"] if number else [])]
        console.print(", ".join(figures))
    path = None
    if not options.no_csv and (options.csv or not backends.TRITON_INTERPRETS):
        path = options.csv or measure.result_path(where, f"torch{torch.__version__.split('+')[0]}")
    rows: list[dict[str, Any]] = []
    broken = []
    for operation, case, dtype, label, backward in timed(operations, dtypes, options):
        title = f"{operation.spec.name} {case.name} {name_of(dtype)} {label}"
        try:
            group = list(measure_case(operation, case, dtype, backward, options, rates, seconds, console))
        except Exception:  # one case must not cost the hour of all others: told at the end
            console.print(f"[red]{title}: failed[/red]", traceback.format_exc(), markup=False)
            broken.append(title)
            continue
        print_group(console, title, group)
        rows += [row | where for row in group]
        if path is not None:
            # As they come: a run that is cut off leaves what it has measured.
            measure.write_csv(path, rows)
        gc.collect()
    if path is not None and rows:
        console.print(f"written: {path}")
    if broken:
        console.print("[red]not measured, see above:[/red]", *broken, sep="\n  ")
    return 1 if broken else 0


def timed(
    operations: list[Operation], dtypes: list[torch.dtype], options: Any
) -> Iterator[tuple[Operation, Case, torch.dtype, str, bool]]:
    """What is measured side by side: operation, case, dtype, and the pass as a word and whether it has a backward."""
    for operation in operations:
        small, *cases = shapes_for(operation.spec.name, options.device)
        cases = [small] if backends.TRITON_INTERPRETS else cases[:1] if options.quick else cases
        for case in cases:
            for dtype in dtypes:
                for label, backward in PASSES.items():
                    yield operation, case, dtype, label, backward


def run_gate(
    console: Console, operations: list[Operation], device: str, dtypes: list[Any], quick: bool
) -> Iterator[str]:
    """Failures of every kernel backend × dtype × contract case (quick: the first case) on this device."""
    checked, skipped = 0, set()
    for operation in operations:
        for backend in operation.implementations:
            if backend == "reference":
                continue
            for case in operation.spec.cases[: 1 if quick else None]:
                for dtype in dtypes:
                    args = case.arguments(dtype, device)
                    if (reason := gate.refusal(operation, backend, args, backward=True)) is not None:
                        skipped.add(f"{operation.spec.name} on {backend}: {reason}")
                        continue
                    checked += 1
                    try:
                        gate.check(operation, args, backend)
                    except AssertionError as error:
                        yield f"{case.name}, {name_of(dtype)}: {error}"
                    except Exception as error:  # a launch that fails, a kernel that does not fit: on with the next
                        what = f"{operation.spec.name}, {backend}, {case.name}, {name_of(dtype)}"
                        yield f"{what}: {type(error).__name__}: {error}"
    for line in sorted(skipped):
        console.print(f"not here: {line}")
    console.print(f"gate: {checked} checks of forward and gradients against the fp64 reference")


def measure_case(
    operation: Operation,
    case: Case,
    dtype: torch.dtype,
    backward: bool,
    options: Any,
    rates: dict[int | None, measure.Rates],
    seconds: float,
    console: Console,
) -> Iterator[dict[str, Any]]:
    """One row for each of our backends and each peer that can run this case."""
    device = options.device
    args = case.arguments(dtype, device)
    flops = operation.spec.flops(*args) * (3 if backward else 1)
    results = operation.spec.fake(*args)
    out = sum(t.nbytes for t in (results if isinstance(results, list) else [results]))
    # Forward: arguments in, results out. Backward: arguments and the result's gradient in, gradients out.
    moved = operation.spec.moved_bytes(*args)
    moved += (2 * (moved - out) + out) if backward else 0
    buffers = measure.buffers_beyond_cache(moved, device)

    truth = None
    calls: dict[str, measure.Call] = {}
    chosen: dict[str, Contestant] = {}
    for contestant in contestants(operation, args, dtype, backward, options, console):
        try:
            call, result = prepare(operation, contestant, case, dtype, device, backward, buffers)
        except Exception as error:
            if contestant.ours:
                raise
            # A peer that cannot run a case (a shape that mamba_ssm has no kernel for) is no contestant there.
            console.print(f"peer {contestant.name} left out: {type(error).__name__}: {error}", markup=False)
            continue
        result = result.float()
        truth = result if truth is None else truth
        wrong = float((result - truth).norm() / truth.norm())
        if wrong > (0.05 if dtype.itemsize < 4 or options.tf32 else 1e-3):
            raise AssertionError(f"{operation.spec.name}: peer {contestant.name} differs from ours by {wrong:.1e}")
        calls[contestant.name], chosen[contestant.name] = call, contestant
    times = measure.interleaved(calls, device, seconds, buffers)
    best = min((times[name].median for name in calls if not chosen[name].ours), default=float("nan"))
    for name, call in calls.items():
        ms, rate = times[name].median, rates[chosen[name].threads]
        yield {
            "op": operation.spec.name,
            "case": case.name,
            "dtype": name_of(dtype),
            "pass": "fwd+bwd" if backward else "fwd",
            "contestant": name,
            "ms": round(ms, 4),
            "ms_p20": round(times[name].low, 4),
            "ms_p80": round(times[name].high, 4),
            "gflops": round(flops / ms / 1e6, 1),
            "gb_s": round(moved / ms / 1e6, 2),
            "roofline_percent": round(100 * rate.bound_ms(flops, moved, dtype) / ms, 1),
            "peak_mb": round(measure.peak_megabytes(call, device), 2),
            "result_mb": round(out / 1e6, 2),
            "best_peer_ms": round(best, 4),
            "speedup": round(best / ms, 2) if chosen[name].ours else "",
            "matrix_gflops": round(rate.matrix[dtype] / 1e9, 1),
            "copy_gb_s": round(rate.copy / 1e9, 2),
        }


def contestants(
    operation: Operation, args: Any, dtype: torch.dtype, backward: bool, options: Any, console: Console
) -> Iterator[Contestant]:
    """Ours first: their result is what the peers are compared with."""
    images = args[0].dim() == 4 and operation.spec.name in ("strip_conv2d", "reassemble", "carafe")
    layouts = (torch.contiguous_format, torch.channels_last) if images else (torch.contiguous_format,)
    for backend in operation.implementations:
        if backend == "reference" or gate.refusal(operation, backend, args, backward) is not None:
            continue
        for layout in layouts:
            run = functools.partial(run_backend, operation, backend)
            yield Contestant(f"famseg {backend}{suffix(layout)}", True, run, layout)
        if backend == "cpu" and torch.get_num_threads() > 1:
            run = functools.partial(run_backend, operation, backend)
            yield Contestant("famseg cpu, one thread", True, run, threads=1)
    # The peers' code objects are shared by all cases, and dynamo limits how often each is compiled. Not once a
    # contestant: that would throw away what the one before has just compiled.
    torch._dynamo.reset()
    for peer in () if options.only_ours else PEERS[operation.spec.name]:
        if (reason := peer.missing(options.device)) is not None:
            if options.device == "cuda":
                console.print(f"peer {peer.name} left out: {reason}")
            continue
        for layout in peer.layouts:
            yield Contestant(f"eager {peer.name}{suffix(layout)}", False, peer.run, layout)
            # On a CPU each takes 10 to 20 s to compile, and what is asked of bf16 there is to beat our own fp32.
            if peer.compiles and not options.quick and (options.device == "cuda" or dtype == torch.float32):
                run = torch.compile(peer.run, dynamic=False)
                yield Contestant(f"compiled {peer.name}{suffix(layout)}", False, run, layout)


def run_backend(operation: Operation, backend: str, *args: Any) -> Any:
    return operation.packet(*args, backend)


def prepare(
    operation: Operation,
    contestant: Contestant,
    case: Case,
    dtype: torch.dtype,
    device: str,
    backward: bool,
    buffers: int,
) -> tuple[measure.Call, Tensor]:
    """A call on the buffers of a number, warmed up, and the first result."""
    sets = []
    for number in range(buffers):
        args = case.arguments(dtype, device) if number == 0 else [copied(a) for a in sets[0][0]]
        flat = (
            [
                t.to(memory_format=contestant.layout) if t is not None and t.dim() == 4 else t
                for t in operation.flatten(args)
            ]
            if contestant.layout == torch.channels_last
            else operation.flatten(args)
        )
        sets.append(gate.with_gradients(operation, operation.replace(args, flat), backward))
    with torch.set_grad_enabled(backward):  # as it is timed: the other mode would be compiled apart
        first = contestant.run(*sets[0][0])
    first = first[0] if isinstance(first, (list, tuple)) else first
    grad = torch.ones_like(first)

    def call(number: int) -> Any:
        args, leaves = sets[number]
        if not backward:
            with torch.no_grad():
                return contestant.run(*args)
        result = contestant.run(*args)
        result = result[0] if isinstance(result, (list, tuple)) else result
        return torch.autograd.grad(result, leaves, grad, allow_unused=True)

    def call_on_threads(number: int) -> Any:
        with threads(contestant.threads):
            return call(number)

    chosen = call if contestant.threads is None else call_on_threads
    chosen(0)
    return chosen, first.detach()


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copied(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [copied(v) for v in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def print_group(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    columns = {"ms": "ms", "gflops": "GFLOP/s", "gb_s": "GB/s", "roofline_percent": "% roofline", "peak_mb": "peak MB"}
    table.add_column("", min_width=36)
    for heading in (*columns.values(), "× best peer"):
        table.add_column(heading, justify="right")
    for row in rows:
        style = "bold" if row["speedup"] != "" else None
        table.add_row(row["contestant"], *(str(row[c]) for c in columns), str(row["speedup"]), style=style)
    console.print(table)


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def suffix(layout: torch.memory_format) -> str:
    return " channels_last" if layout == torch.channels_last else ""


if __name__ == "__main__":
    sys.exit(main())
