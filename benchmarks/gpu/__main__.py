"""`python -m benchmarks.gpu`: learn in ten minutes, offline, whether the kernels are right on this GPU and how fast.

Steps, in this order, each in processes of its own and with its share of --minutes: {steps}. Results come as they are
measured, into one folder: a CSV and a log a step, and summary.md. Called again with the same --out on the same tree,
it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu import summary
from benchmarks.gpu.folder import Folder, FolderError, tree_hash
from benchmarks.gpu.items import Options
from benchmarks.gpu.processes import run_step

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Step:
    """Module of benchmarks.gpu.steps, share of the time that is left, processes at once."""

    name: str
    share: float
    workers: int = 1
    interprets: bool = True  # in a dry run Triton's interpreter stands in for its compiler
    fixed: bool = True  # the same tree has the same items, whatever the options


STEPS = (
    Step("environment", 1),
    Step("compilation", 10, workers=CORES, interprets=False),
    Step("correctness", 10, workers=max(2, min(8, CORES // 2))),
    Step("timings", 9),
    Step("peers", 5),
    Step("network", 6, interprets=False),
    Step("sanitizer", 6, workers=max(1, min(4, CORES // 4))),
    Step("tuning", 3),
    Step("training", 3, interprets=False, fixed=False),
)
LEAST_MINUTES = 2.0
DRY_MINUTES = 30.0  # nothing is measured: only the steps' own limits count


class Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


def main() -> int:
    names = [step.name for step in STEPS]
    description = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=description[0] + "\n\n" + description[1].format(steps=", ".join(names)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, help=f"time for all steps together (default 9, at least {LEAST_MINUTES:.0f})")
    add("--out", type=Path, default=Path("gpu-results"), help="result folder (default gpu-results)")
    add("--only", nargs="+", metavar="STEP", help=f"only these steps: {', '.join(names)}")
    add("--data", default="phantom", help="what the last step trains on: phantom, hc18:DIR, planes:DIR or folder:DIR")
    add("--dry-run", action="store_true", help="without a GPU: every step once, interpreted or emulated")
    options = parser.parse_args()

    def refuse(reason: str) -> NoReturn:
        print(f"python -m benchmarks.gpu: {reason}", file=sys.stderr)
        raise SystemExit(2)

    for name in options.only or ():
        if name not in names:
            refuse(f"--only {name}: no such step; there are {', '.join(names)}")
    if options.minutes is not None and not options.minutes >= LEAST_MINUTES:
        refuse(f"--minutes {options.minutes:g}: too few; at least {LEAST_MINUTES:g}, or name steps with --only")
    minutes = options.minutes or (DRY_MINUTES if options.dry_run else 9.0)
    if not options.dry_run and (reason := _no_gpu()):
        refuse(f"{reason}; --dry-run goes through all steps without a GPU")
    try:
        folder = Folder(options.out.resolve(), identity(options.dry_run))
    except FolderError as error:
        refuse(str(error))
    if folder.news:
        print(folder.news, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    chosen = [step for step in STEPS if not options.only or step.name in options.only]
    told = Options(folder.path, options.dry_run, options.data)
    errors: dict[str, str] = {}
    end = time.monotonic() + 60 * minutes
    stopped = False
    try:
        for place, step in enumerate(chosen):
            began = time.monotonic()
            share = step.share / sum(other.share for other in chosen[place:])
            # Threads that wait for each other on a busy machine spin; a dry run has nothing for a second one to do.
            environment = {"OMP_NUM_THREADS": "1" if options.dry_run else str(max(1, CORES // step.workers))}
            if options.dry_run and step.interprets:
                environment["TRITON_INTERPRET"] = "1"
            deadline = began + max(0.0, end - began) * share  # what a step leaves over goes to those after it
            error = ""
            if not (step.fixed and step.name in folder.plans and not folder.missing(step.name)):
                error = run_step(
                    step.name, folder, told, step.workers, deadline, environment, lambda: _write(folder, errors)
                )
            if error:
                errors[step.name] = error
            print(f"{summary.line(folder, step.name, errors)}, {time.monotonic() - began:.0f} s", flush=True)
            _write(folder, errors)
    except Stopped:
        stopped = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the summary is on its way
        print("stopped", flush=True)
    _write(folder, errors)
    print(f"written: {folder.path / 'summary.md'}", flush=True)
    if stopped:
        return 130
    return 1 if summary.bad(folder, [step.name for step in chosen], errors) else 0


def _write(folder: Folder, errors: dict[str, str]) -> None:
    folder.write("summary.md", summary.page(folder, [step.name for step in STEPS], errors))


def _stop(*_: Any) -> NoReturn:
    raise Stopped


def _no_gpu() -> str:
    """Why there is no GPU to use, or nothing. (This process does not keep it: no torch here.)"""
    code = "import torch; print(torch.cuda.is_available(), torch.version.cuda)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode:
        return f"torch does not import: {found.stderr.strip().splitlines()[-1]}"
    available, cuda = found.stdout.split()
    if cuda == "None":
        return "this torch was built without CUDA"
    return "" if available == "True" else "torch sees no CUDA GPU"


def identity(dry: bool) -> dict[str, str]:
    """What results depend on: with another one they are not continued."""

    def printed(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    gpu = "none (dry run)" if dry else printed("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "tree": tree_hash(),
        "GPU": gpu.replace("\n", "; "),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "triton", "numpy")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
