"""A step of `python -m benchmarks.gpu` in which everything goes wrong that can go wrong on a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest import mock

from benchmarks.gpu import worker
from benchmarks.gpu.items import Item, Options, Row, Skipped


def items(options: Options) -> Iterator[Item]:
    def passes(_: float) -> Iterator[Row]:
        yield {"answer": 42}

    def fails(_: float) -> Iterator[Row]:
        yield {"answer": 1}
        raise AssertionError("the second answer is wrong")

    def skips(_: float) -> Iterator[Row]:
        raise Skipped("not here")
        yield {}

    def exits(_: float) -> Iterator[Row]:
        os._exit(3)

    def crashes(_: float) -> Iterator[Row]:
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)
        yield {}

    def hangs(_: float) -> Iterator[Row]:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (options.out / "child").write_text(str(child.pid))
        time.sleep(600)
        yield {}

    def breaks_the_context(_: float) -> Iterator[Row]:
        mock.patch.object(worker, "_gpu_answers", lambda _: False).start()
        raise RuntimeError("CUDA error: misaligned address")
        yield {}

    def same_process(_: float) -> Iterator[Row]:
        yield {"answer": os.getpid()}

    yield Item("passes", passes)
    yield Item("fails", fails)
    yield Item("skips", skips)
    yield Item("exits", exits)
    yield Item("crashes", crashes)
    yield Item("hangs", hangs, limit=1.5)
    yield Item("before", same_process)
    yield Item("breaks the context", breaks_the_context)
    yield Item("after", same_process)
