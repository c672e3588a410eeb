"""How things are measured: interleaved times, peak memory, and where that was.

Only ratios within one run mean anything on a shared or thermally limited machine, so everything that is compared takes
turns: one call of each, then the next round. Buffers are rotated, so that no call finds its arguments in the cache
because the previous call left them there.
"""

from __future__ import annotations

import csv
import ctypes
import functools
import itertools
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from famseg.memory import keep_freed_memory

Call = Callable[[int], object]  # runs on the buffers of that number


@dataclass(frozen=True)
class Time:
    """Milliseconds of one call: median, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float
    graph: bool = False  # on a GPU, replayed from a CUDA graph: without the time it takes to launch


def interleaved(
    calls: Mapping[str, Call], device: str, seconds: float, buffers: int, least: int = 5, graphs: bool = True
) -> dict[str, Time]:
    """The time of each call, all taking turns, over about `seconds` in all: at least `least` rounds; 0 seconds: one.

    On a GPU each call is a CUDA graph that goes once through all buffers: no launch overhead, and a cold L2. Without
    `graphs` it is launched as a program would do it.
    """
    if device == "cuda":
        return _interleaved_cuda(calls, seconds, buffers, least, graphs)
    keep_freed_memory()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turn = itertools.count()
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < (least if seconds else 1) or time.perf_counter() < until:
        number = next(turn) % buffers
        for name, call in calls.items():
            wake_threads()
            started = time.perf_counter()
            call(number)
            samples[name].append((time.perf_counter() - started) * 1e3)
        rounds += 1
    return {name: _summary(values) for name, values in samples.items()}


def _interleaved_cuda(
    calls: Mapping[str, Call], seconds: float, buffers: int, least: int, graphs: bool
) -> dict[str, Time]:
    replays: dict[str, Callable[[], object]] = {}
    recorded = set()
    for name, call in calls.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for number in range(buffers):
                call(number)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        replays[name] = lambda call=call: [call(number) for number in range(buffers)]
        if not graphs:
            continue
        outside = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                # All results at once: freed one by one, each would be written where the last one lies in the L2.
                kept = [call(number) for number in range(buffers)]
            del kept
            replays[name] = graph.replay
            recorded.add(name)
        except RuntimeError as error:  # the call synchronises or allocates behind torch's back: time it as it is
            print(f"{name}: timed without a CUDA graph: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.set_stream(outside)  # torch stays on the stream of a capture that went wrong
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < (least if seconds else 1) or time.perf_counter() < until:
        for name, replay in replays.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / buffers)
        rounds += 1
    return {name: _summary(values, name in recorded) for name, values in samples.items()}


def wake_threads() -> None:
    """Give every thread of torch's pool something to do, so that none has gone to sleep when a call begins.

    Between the operations of a network they do not sleep. After a peer that ends on one thread they do, and on a
    virtual machine the next call, whoever makes it, waits up to half a millisecond for them.
    """
    _something(torch.get_num_threads()).add_(1)


@functools.cache
def _something(threads: int) -> torch.Tensor:
    return torch.zeros(threads << 16)  # torch gives a thread at least half of that many elements


def moves_nothing(func: Any) -> bool:
    """Whether an operation of torch, as a dispatch mode meets it, is a view or an allocation."""
    name = func.overloadpacket._qualified_op_name.split("::")[-1]
    return bool(func.is_view or "empty" in name or name in ("detach", "_reshape_alias", "lift_fresh"))


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """FLOPs of a call as torch's FlopCounterMode counts them, 0 for what it does not count."""
    count = flop_registry.get(func.overloadpacket)
    return float(count(*args, **kwargs, out_val=result)) if count else 0.0


def _summary(values: Sequence[float], graph: bool = False) -> Time:
    ordered = sorted(values)
    low, high = (ordered[int(part * (len(ordered) - 1))] for part in (0.2, 0.8))
    return Time(statistics.median(ordered), low, high, graph)


def peak_megabytes(call: Call, device: str) -> float:
    """How much more memory than before a call needs at its worst moment, its results included, in MB (10⁶ bytes)."""
    call(0)  # what is made once (threads, compiled code) does not count
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call(0)
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    reset_peak()
    before = resident()
    kept = call(0)
    peak = peak_resident()
    del kept
    return max(peak - before, 0) / 1e6


def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most of them since `reset_peak`: the kernel sees every allocation, native scratch included."""
    return _status("VmHWM")


def reset_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back: reused, it would not show
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) * 1024 if line else 0


# --- the machine -----------------------------------------------------------------------------------


def buffers_beyond_cache(bytes_a_call: int, device: str) -> int:
    """How many argument sets to rotate so that a call's arguments have left the caches since their last use."""
    cache = 256 << 20 if device == "cuda" else 128 << 20
    return max(1, min(32, cache // max(bytes_a_call, 1)))


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def provenance(device: str) -> dict[str, str]:
    """Where and with what a figure was measured: columns of every result file."""
    from famseg_kernels import __version__
    from famseg_kernels.backends import native_module

    root = Path(__file__).parent.parent

    commit = _printed("git", "-C", str(root), "rev-parse", "--short", "HEAD") or __version__
    changes = _printed("git", "-C", str(root), "status", "--porcelain", "--", "famseg_kernels", "csrc")
    found = {
        "commit": commit + ("+changes" if changes else ""),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "torch": str(torch.__version__),  # it is a class of torch's own
        "triton": installed_version("triton"),
        "threads": str(torch.get_num_threads()),
    }
    if device == "cuda":
        query = ("--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
        gpu = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"  # its numbers are not always torch's
        driver, *clocks = _printed("nvidia-smi", gpu, *query).split(", ")
        found |= {"driver": driver, "clocks": " ".join(clocks), "cuda": torch.version.cuda or ""}
        found["tf32"] = str(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    else:
        module = native_module("_cpu")[0]
        found["isa"] = module.isa() if module is not None else ""  # type: ignore[attr-defined]
    return found


def result_path(where: Mapping[str, str], what: str) -> Path:
    """benchmarks/results/<device>-<what>.csv; each device has its own files."""
    name = where["device"].lower().replace("(r)", "").replace("(tm)", "")
    path = Path(__file__).parent / "results" / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}-{what}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """One line a row; all rows have the first one's columns."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _printed(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def installed_version(package: str) -> str:
    """Of a distribution; nothing where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
