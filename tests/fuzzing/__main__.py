"""Every reader of files that somebody else may have made, fed what libFuzzer makes of small ones (the promise: judge.py
holds it). Needs `pip install atheris`, which has wheels for Linux.

    python -m tests.fuzzing images --runs 100000 --seed 1                    # or several targets, or `all`
    python -m tests.fuzzing images --runs 10000000 --corpus runs/fuzz        # a long run; again, it goes on from there
    python -m tests.fuzzing images --file FINDING                            # what a reader does with one file

A finding is kept once a fault, in its smallest file so far, and does not end a run. A crash of the process does.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import io
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("images", "masks", "dicom", "tables", "options", "study", "checkpoint", "weights", "binding")
STUCK = 60  # seconds of the clock after which an input that never comes back from C ends the run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.split("\n\n")[0])
    parser.add_argument("target", nargs="+", help=f"{', '.join(NAMES)}, or all")
    parser.add_argument("--runs", type=int, default=10_000, help="executions of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="folder that keeps the files that reached new code, by target")
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz-findings"), help="folder that gets findings")
    parser.add_argument("--file", type=Path, help="judge this file and nothing else")
    options = parser.parse_args(arguments)
    names = list(NAMES) if options.target == ["all"] else options.target
    if options.file is not None:
        return _judge_file(names[0], options.file)
    targets = _instrumented(names)
    return max([_fuzz(name, targets[name], options) for name in names])


def _judge_file(name: str, file: Path) -> int:
    from tests.fuzzing.judge import Broken, judge
    from tests.fuzzing.targets import TARGETS

    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        warm(target, target.seeds(Path(folder)), Path(folder))
        try:
            print(judge(target.reader, file.read_bytes(), Path(folder)) or "read without a word")
        except Broken as error:
            print(error)
            return 1
    return 0


def _instrumented(names: Sequence[str]) -> dict[str, Any]:
    """The targets, imported so that libFuzzer sees which branches are taken."""
    import atheris
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # as the commands do
    modules = {"famseg", *(module for name in names for module in COUNTED.get(name, ()))}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # a line a module
        stack.enter_context(atheris.instrument_imports(include=sorted(modules)))
        return importlib.import_module("tests.fuzzing.targets").TARGETS


# Beside famseg's, modules in which libFuzzer sees the branches.
COUNTED = {
    **dict.fromkeys(("images", "masks"), ("PIL",)),
    **dict.fromkeys(("options", "study"), ("yaml",)),
    "dicom": ("pydicom",),
    "binding": ("famseg_kernels",),
}


def _fuzz(name: str, target: Any, options: argparse.Namespace) -> int:
    """In a child: libFuzzer ends the process that it runs in."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        findings = root / "findings"
        findings.mkdir()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                with (root / "log").open("wb") as file:
                    os.dup2(file.fileno(), 2)
                _child(name, target, options, root)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        _, status, used = os.wait4(child, 0)
        log = (root / "log").read_text(errors="replace")
        done = max([0, *map(int, re.findall(r"^#(\d+)\s", log, re.MULTILINE))])
        seconds = used.ru_utime + used.ru_stime
        found = sorted(findings.glob("*.txt"))
        rate = done / max(seconds, 0.01)
        print(f"{name}: {done} executions, {rate:.0f} a second of the processor, {len(found)} findings", flush=True)
        for path in found:
            print(f"  {path.stem}: {path.read_text().strip()}")
        if files := sorted(findings.iterdir()):
            options.findings.mkdir(parents=True, exist_ok=True)
            for path in files:
                shutil.copy(path, options.findings)
            print(f"  in {options.findings}")
        if code := os.waitstatus_to_exitcode(status):
            print(f"  the process ended with {code}\n{log[-3000:]}", flush=True)
        return int(bool(found or code))


def _child(name: str, target: Any, options: argparse.Namespace, root: Path) -> None:
    import atheris

    from tests.fuzzing.judge import Broken, judge

    faulthandler.enable()
    seeds = target.seeds(root)
    begin, work = root / "seeds", root / "work"
    begin.mkdir()
    work.mkdir()
    corpus = begin if options.corpus is None else options.corpus / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (corpus / f"{zlib.crc32(seed):08x}").write_bytes(seed)
    change = target.mutator(seeds)
    smallest: dict[str, int] = {}

    def one(content: bytes) -> None:
        try:
            judge(target.reader, content, work)
        except Broken as error:
            if len(content) < smallest.get(error.fault, sys.maxsize):
                smallest[error.fault] = len(content)
                kept = root / "findings" / f"{name}-{zlib.crc32(error.fault.encode()):08x}"
                kept.write_bytes(content)
                kept.with_suffix(".txt").write_text(f"{error}\n")

    def mutated(content: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        return change(content, draw, lambda part: bytes(atheris.Mutate(part, len(part) + 64)))[:most]

    warm(target, seeds, work)
    flags = [
        f"-runs={options.runs}",
        f"-seed={options.seed}",
        f"-max_len={target.largest}",
        f"-timeout={STUCK}",
        "-rss_limit_mb=0",
        "-reload=0",
        f"-artifact_prefix={root}/findings/{name}-",
    ]
    atheris.Setup(["fuzz", *flags, str(corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


def warm(target: Any, seeds: Sequence[bytes], folder: Path) -> None:
    """What is imported late is not the first file's fault."""
    from tests.fuzzing.judge import Broken, judge

    for seed in seeds:
        with contextlib.suppress(Broken):
            judge(target.reader, seed, folder)


if __name__ == "__main__":
    sys.exit(main())
