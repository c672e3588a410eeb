"""famseg-study: train several networks or settings on the same images and budget, and write their table.

Killed or interrupted, the same command continues. On several machines that share --out, --shard 1/N to N/N divide the
runs. NAME is a shipped study (--list) or a YAML file.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from famseg.cli.command import build_parser, parse, required, run
from famseg.data import DATA_HELP
from famseg.options import ConfigError, option

PROG = "famseg-study"


@dataclass(frozen=True)
class Options:
    study: str | None = option(None, "a shipped study or a YAML file")
    out: str | None = option(None, "folder of the study, new or to be continued", path=True)
    budget: str | None = option(None, "one of the study's budgets (shipped: cpu, gpu); default: its first")
    data: str | None = option(None, f"images instead of the budget's: {DATA_HELP}")
    weights: str | None = option(None, "file for the cells that start from given weights", path=True)
    shard: str = option("1/1", "I/N: do every N-th run from the I-th on; others do the rest in the same --out")
    smoke: bool = option(
        False, "one step of every cell, on tiny phantoms if they have its classes, to see that all works"
    )
    list: bool = option(False, "print the shipped studies and stop")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a run diverged or failed, 2 bad usage or input, 130 interrupted."""
    parser = build_parser(PROG, __doc__, Options, positional=("study",))
    words = "interrupted; the same command continues"
    return run(PROG, lambda: _study(Options(**parse(parser, Options, arguments))), words)


def _study(options: Options) -> int:
    # Imported late: --help and usage errors need none of it.
    from famseg.study.plan import listing, read_study
    from famseg.study.run import DIVERGED, DONE, FAILED, OPEN, check_folder, part_of, run_all

    if options.list:
        print(listing())
        return 0
    required("study", options.study, f"{PROG} table3 --out DIR ({PROG} --list names the shipped ones)")
    required("out", options.out, "--out DIR")
    assert options.study is not None and options.out is not None
    shard = _shard(options.shard)
    study = read_study(options.study, options.budget, options.data, options.weights, options.smoke)
    out = Path(options.out)
    check_folder(study, out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a study as Ctrl-C does
    print(f"{study.title}: {len(study.cells)} cells, {len(study.runs)} runs, {study.runs[0].config.data}", flush=True)
    total = len(part_of(study, shard))
    for number, (done, outcome) in enumerate(run_all(study, out, shard), 1):
        words = f"mIoU {outcome['miou']:.3f}" if outcome["state"] == DONE else outcome["reason"] or outcome["state"]
        print(f"[{number}/{total}] {done.cell}, {done.repeat}: {words}", flush=True)
        _write(study, out, pictures=False)
    states = _write(study, out, pictures=True)
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    print(", ".join(f"{count} {state}" for state, count in counts.items()) + f"; tables and report.html in {out}")
    if OPEN in counts and shard == (1, 1):
        print("the rest is another process's, or was interrupted; the same command continues")
    return 1 if {DIVERGED, FAILED} & counts.keys() else 0


def _write(study: Any, out: Path, *, pictures: bool) -> list[str]:
    """Write what is there of all shards, one process at a time; the state of every run."""
    import yaml

    from famseg.files.lock import Busy, locked
    from famseg.files.writing import write_atomic
    from famseg.study.report import write_report
    from famseg.study.run import results
    from famseg.study.tables import rows_of, write_numbers

    while True:
        try:
            with locked(out, fresh=False):
                rows = rows_of(study, results(study, out))
                write_atomic(out / "study.yaml", yaml.safe_dump(dict(study.source), sort_keys=False).encode())
                tables = write_numbers(study, rows, out)
                if pictures:
                    write_report(study, rows, tables, out)
                return [row["state"] for row in rows]
        except Busy:
            time.sleep(0.1)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"shard: expected I/N with I from 1 to N, like 1/4, got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
