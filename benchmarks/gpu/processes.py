"""Runs a step in processes of its own, so that a crash, a hang or a broken CUDA context ends one item only."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.gpu.folder import Folder, Outcome
from benchmarks.gpu.items import Options
from benchmarks.gpu.worker import work

START_LIMIT = 180.0  # seconds until a process has listed its items: it imports torch and Triton
PROGRESS = 10.0  # seconds
STARTS = 3  # processes that may end without a word before an item is begun


@dataclass
class _Worker:
    process: Any
    connection: Connection
    begun: float = field(default_factory=time.monotonic)
    limit: float = START_LIMIT
    item: str | None = None
    ready: bool = False  # has listed its items

    def end(self) -> None:
        """With everything that it has started; it does not get to say a word."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_step(
    step: str,
    folder: Folder,
    options: Options,
    workers: int,
    deadline: float,
    environment: Mapping[str, str],
    progress: Callable[[], None] = lambda: None,
    package: str = "benchmarks.gpu.steps",
) -> str:
    """Do what is missing of a step, a module of `package`, until `deadline` (of time.monotonic), in up to `workers`
    processes. `progress` is called now and then.

    An item that raises, whose process ends or that outlasts its own limit has failed; one that the deadline cuts off
    is not in the folder afterwards: it was not reached. What is returned is why the step did not come up, or "".
    """
    context = multiprocessing.get_context("spawn")
    todo: deque[tuple[str, float]] | None = None  # None: nobody has listed the items yet
    team: list[_Worker] = []
    lost = 0

    def start() -> None:
        ours, theirs = context.Pipe()
        arguments = (f"{package}.{step}", options, theirs, folder.log(step), dict(environment))
        process = context.Process(target=work, args=arguments, daemon=False)
        process.start()
        theirs.close()
        team.append(_Worker(process, ours))

    def fail(key: str, why: str, seconds: float) -> None:
        folder.add(Outcome(step, key, "failed", why, seconds))

    def hand_out(worker: _Worker) -> None:
        worker.item, worker.limit, worker.begun = None, START_LIMIT, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has ended: it says so by its end of the pipe
            if not todo:
                worker.connection.send(None)
                return
            key, limit = todo[0]
            worker.connection.send((key, deadline - worker.begun))
            worker.item, worker.limit = key, limit
            todo.popleft()

    told = time.monotonic()
    try:
        for _ in range(workers):  # at once: to list the items takes each of them seconds
            start()
        while team:
            now = time.monotonic()
            if now >= deadline:
                break
            if now > told + PROGRESS:
                progress()
                told = now
            until = min(deadline, told + PROGRESS, *(worker.begun + worker.limit for worker in team))
            for connection in wait([worker.connection for worker in team], max(0.0, until - now)):
                worker = next(w for w in team if w.connection is connection)
                spent = time.monotonic() - worker.begun
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):  # it has ended: by itself, or in the middle of something
                    team.remove(worker)
                    worker.process.join(5.0)  # its own end, not the one that it is given
                    worker.end()
                    if worker.item is not None:
                        fail(worker.item, f"its process ended ({_ending(worker.process.exitcode)})", spent)
                    lost += not worker.ready
                    if lost >= STARTS and todo is None:
                        return f"its processes end ({_ending(worker.process.exitcode)})"
                    if lost < STARTS and (todo is None or len(todo) > len(team)):
                        start()
                    continue
                if isinstance(message, str):
                    if todo is None:
                        return message
                    continue
                if isinstance(message, list):
                    worker.ready = True
                    if todo is None:
                        folder.plan(step, [key for key, _ in message])
                        missing = set(folder.missing(step))
                        todo = deque((key, limit) for key, limit in message if key in missing)
                else:
                    assert worker.item is not None
                    status, why, seconds, rows, broken = message
                    if status != "later":
                        folder.add(Outcome(step, worker.item, status, why, round(seconds, 3), rows))
                    worker.item = None
                    if broken:
                        continue
                hand_out(worker)
            for worker in [w for w in team if time.monotonic() > w.begun + w.limit]:
                team.remove(worker)
                worker.end()
                if not worker.ready and todo is None:
                    return f"its process did not start within {worker.limit:.0f} s"
                if worker.item is not None:
                    fail(worker.item, f"no answer within {worker.limit:.0f} s: its process was ended", worker.limit)
                if todo:
                    start()
    finally:
        for worker in team:
            worker.end()
        folder.write_csv(step)
    return ""


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {signal.Signals(-exitcode).name}"
    return f"exit status {exitcode}"
