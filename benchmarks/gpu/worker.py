"""A step's process: lists the items of its step, then does one after the other, as the parent names them."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.items import Later, Options, Skipped

MESSAGE = 2000  # characters of an error that go to the journal; all of it is in the log


def die_with_parent() -> None:
    """Linux ends this process when its parent is gone, however that came about: a GPU is not held by orphans."""
    set_parent_death_signal = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def program(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a program of an item: its exit status and what it printed, which the log gets line by line."""
    process = subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def work(module: str, options: Options, connection: Connection, log: Path, environment: dict[str, str]) -> None:
    """Until the parent says None or goes away. Everything printed, by whomever, goes to `log`.

    Sends its items as a list of (key, limit), or the error that kept it from listing them as a string; then for each
    item that it is told (status, message, seconds, rows, broken): broken, if the process cannot do another one.
    """
    parent = os.getppid()
    die_with_parent()
    if os.getppid() != parent:  # gone before
        return
    os.setsid()  # a group of its own: an item's programs end with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)  # before torch and triton read it
    try:
        items = {item.key: item for item in importlib.import_module(module).items(options)}
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(traceback.format_exc(limit=-1).strip()[-MESSAGE:])
        return
    connection.send([(item.key, item.limit) for item in items.values()])
    while True:
        order = connection.recv()
        if order is None:
            sys.stdout.flush()
            os._exit(0)  # not by the interpreter's end: pools and the GPU's runtime may take their time there
        key, left = order
        started = time.monotonic()
        print(f"--- {key}", flush=True)
        rows: list[dict[str, Any]] = []
        status, message = "passed", ""
        try:
            for row in items[key].run(left):
                rows.append(row)
        except (Skipped, Later) as reason:
            status, message = "skipped" if isinstance(reason, Skipped) else "later", str(reason)
        except Exception as error:
            traceback.print_exc()
            status, message = "failed", f"{type(error).__name__}: {error}"[:MESSAGE]
        sys.stdout.flush()
        sys.stderr.flush()
        broken = status == "failed" and not _gpu_answers(options)
        connection.send((status, message, time.monotonic() - started, rows, broken))
        if broken:
            print("the CUDA context is broken: this process ends, another one goes on", flush=True)
            os._exit(0)  # its own end would ask the GPU


def _gpu_answers(options: Options) -> bool:
    """False after an error that stays: an access beyond memory, a misaligned one. Every later call would fail."""
    torch = sys.modules.get("torch")
    if options.dry or torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except Exception:
        return False
