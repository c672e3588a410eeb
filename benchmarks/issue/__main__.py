"""`python -m benchmarks.issue`: how fast each kernel would be on GPUs that are not there, and what binds it.

Every kernel's SASS is run for some of its blocks, integers only, so that what is issued and what memory is touched is
counted and not guessed. No GPU is needed. The first run takes long (compilation, and seconds a launch); what it counted
is kept in ~/.cache/famseg-issue. Printed: a table of the operations. Files: kernels.csv, operations.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.issue import chips, cuda, report, table
from benchmarks.issue.sass import Refusal
from benchmarks.shapes import GPU_SHAPES
from benchmarks.timing import DTYPES


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.issue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [chip.name for chip in chips.CHIPS]
    add("--op", action="append", choices=sorted(table.OPERATIONS), help="only this operation (may be repeated)")
    add("--case", action="append", help="only shapes of this name (may be repeated)")
    add("--dtype", action="append", choices=sorted(DTYPES), help="default bf16 and fp32")
    add("--backend", action="append", choices=table.BACKENDS, help="default both")
    add("--chip", action="append", choices=names, help="default all")
    add("--measured", type=Path, nargs="+", default=[], help="result files of a GPU, to be put beside the predictions")
    add("--out", type=Path, help="folder for kernels.csv and operations.csv")
    add("--plot", type=Path, help="picture of what binds each kernel (of the last chip)")
    options = parser.parse_args()
    some = [chip for chip in chips.CHIPS if chip.name in (options.chip or names)]
    backends = options.backend or list(table.BACKENDS)
    failures = 0
    if "cuda" in backends and (reason := cuda.missing()) is not None:
        print(f"CUDA kernels are left out: {reason}", file=sys.stderr)
        backends.remove("cuda")
    rows: list[table.Row] = []
    for name in options.op or list(table.OPERATIONS):
        for case in GPU_SHAPES[name][1:]:  # the first is the smoke test
            if options.case and case.name not in options.case:
                continue
            for dtype in options.dtype or ("bf16", "fp32"):
                for backend in backends:
                    if backend not in table.OPERATIONS[name].implementations:
                        continue
                    begin = time.monotonic()
                    try:
                        rows += table.rows_of(backend, table.OPERATIONS[name], case, DTYPES[dtype], some)
                    except Refusal as refusal:
                        failures += 1
                        print(f"{name} {case.name} {dtype} {backend}: {refusal}", file=sys.stderr)
                    print(
                        f"{name} {case.name} {dtype} {backend}: {time.monotonic() - begin:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    if not rows:
        parser.error("nothing was asked for: no such case")
    for row in rows:
        if row["refusal"]:
            failures += 1
            print(
                f"{row['op']} {row['case']} {row['dtype']} {row['kernel']} on {row['chip']}: {row['refusal']}",
                file=sys.stderr,
            )
    sums = table.summed(rows)
    if options.measured:
        factors = report.join(sums, options.measured)
        measured = sum("measured us" in row for row in sums)
        print(f"{measured} of {len(sums)} rows have a measurement", file=sys.stderr)
        for binds, factor in factors.items():
            print(f"what {binds} binds takes {factor:.2f} of its prediction", file=sys.stderr)
    print(report.markdown(sums, [chip.name for chip in some]))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report.write_csv(options.out / "kernels.csv", rows, report.KERNEL_COLUMNS)
        report.write_csv(options.out / "operations.csv", sums, (*report.OPERATION_COLUMNS, *report.MEASURED_COLUMNS))
    if options.plot:
        report.plot(options.plot, rows, table.UNITS, some[-1].name)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
