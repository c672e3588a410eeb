"""`python -m benchmarks`: is it right, how fast is it, beside the best alternatives, on this machine.

Correctness comes first (`--gate` stops there); then our backends and all peers take turns in one run. A row tells
milliseconds, GFLOP/s, GB/s, the part of the roofline (matrix rate and copy bandwidth measured in the same run on as
many threads), peak memory, and how many times faster ours is than the best peer. Figures go to benchmarks/results/ as
CSV with commit, device and versions.

On a GPU `python -m benchmarks.gpu` comes first: it needs ten minutes where this takes an hour, for torch.compile.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import famseg_kernels as fk
from benchmarks import measure
from benchmarks.compare import compare
from benchmarks.rates import machine_rates
from benchmarks.shapes import shapes_for
from benchmarks.timing import DTYPES, PASSES, Settings, measure_case, name_of, threads, without_tf32
from famseg_kernels.testing import gate
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation


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
    without_tf32(options.tf32)

    failures = list(run_gate(console, operations, options.device, dtypes, quick=options.quick))
    if failures:
        console.print("[red]gate failed; no figure counts:[/red]", *failures, sep="\n  ")
        return 1
    if options.gate:
        return 0

    seconds = (0.5 if options.quick else 2.0) if options.seconds is None else options.seconds
    # By the contestants' threads: None stands for all that torch has.
    rates = {None: machine_rates(options.device, dtypes, seconds)}
    if options.device == "cpu":
        with threads(1):
            rates[1] = machine_rates(options.device, dtypes, seconds)
    where = measure.provenance(options.device)
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    for number, rate in rates.items():
        figures = [f"matrix product {name_of(dtype)} {flops / 1e9:.0f} GFLOP/s" for dtype, flops in rate.matrix.items()]
        figures += [f"copy {rate.copy / 1e9:.1f} GB/s", *(["one thread"] if number else [])]
        console.print(", ".join(figures))
    path = None
    if not options.no_csv:
        path = options.csv or measure.result_path(where, f"torch{torch.__version__.split('+')[0]}")
    peers = "none" if options.only_ours else "eager" if options.quick else "compiled"
    say = functools.partial(console.print, markup=False)
    settings = Settings(options.device, seconds, peers, options.tf32, say)
    rows: list[dict[str, Any]] = []
    broken = []
    for operation, case, dtype, label, backward in timed(operations, dtypes, options):
        title = f"{operation.spec.name} {case.name} {name_of(dtype)} {label}"
        group: list[dict[str, Any]] = []
        try:
            for row in measure_case(operation, case, dtype, backward, settings, rates):
                group.append(row)
        except Exception:  # one case must not cost the hour of all others: told at the end
            console.print(f"[red]{title}: failed[/red]", traceback.format_exc(), markup=False)
            broken.append(title)
        if not group:
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
        _, *cases = shapes_for(operation.spec.name, options.device)
        cases = cases[:1] if options.quick else cases
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


if __name__ == "__main__":
    sys.exit(main())
