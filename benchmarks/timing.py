"""One case, timed: each of our backends and each peer that can run it, in turns, as rows of a result file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.peers import PEERS
from benchmarks.rates import Rates
from famseg_kernels.testing import gate
from famseg_kernels.testing.case import Case
from famseg_kernels.torch_op import Operation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = {"fwd": False, "fwd+bwd": True}


@dataclass(frozen=True)
class Settings:
    """How to measure: `seconds` a case for all contestants together, 0 for one round (a dry run)."""

    device: str
    seconds: float
    peers: Literal["none", "eager", "compiled"]  # compiled: eager ones too
    tf32: bool = False
    say: Callable[[str], None] = print


@dataclass
class Contestant:
    """One way to run the case: one of our backends, or a peer."""

    name: str
    ours: bool
    run: Callable[..., Any]
    layout: torch.memory_format = torch.contiguous_format
    threads: int | None = None  # None: as many as torch has


def without_tf32(tf32: bool = False) -> None:
    """torch lets cuDNN round fp32 to TF32 by default: no peer of fp32 kernels, and no measure for their tolerance."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def measure_case(
    operation: Operation,
    case: Case,
    dtype: torch.dtype,
    backward: bool,
    settings: Settings,
    rates: Mapping[int | None, Rates],
) -> Iterator[dict[str, Any]]:
    """One row for each of our backends and each peer that can run this case.

    A contestant that fails, or whose result differs from the first one's, is left out.

    Raises:
        RuntimeError: after the rows of all others: one of our backends failed, none can run the case, or no peer's
            result is ours.
    """
    device = settings.device
    args = arguments(case, dtype, device)
    flops = operation.spec.flops(*args) * (3 if backward else 1)
    results = operation.spec.fake(*args)
    out = sum(t.nbytes for t in (results if isinstance(results, list) else [results]))
    # Forward: arguments in, results out. Backward: arguments and the result's gradient in, gradients out.
    moved = operation.spec.moved_bytes(*args)
    moved += (2 * (moved - out) + out) if backward else 0
    buffers = measure.buffers_beyond_cache(moved, device)

    truth: list[Tensor] = []
    calls: dict[str, measure.Call] = {}
    chosen: dict[str, Contestant] = {}
    failed: list[str] = []
    doubts: list[str] = []  # peers whose result is not ours
    for contestant in contestants(operation, args, dtype, backward, settings):
        try:
            call, results = prepare(operation, contestant, case, dtype, device, backward, buffers)
            truth = truth or results
            # Gradients of ours only: peers sum them in x's dtype.
            for mine, first in zip(results, truth if contestant.ours else truth[:1], strict=False):
                wrong = float((mine.float() - first.float()).norm() / first.float().norm().clamp(min=1e-30))
                if not wrong <= (0.05 if dtype.itemsize < 4 or settings.tf32 else 1e-3):
                    doubts += [] if contestant.ours else [contestant.name]
                    raise AssertionError(f"it differs from the first contestant by {wrong:.1e}")
        except Exception as error:
            # A peer that cannot run a case (a shape that mamba_ssm has no kernel for) is no contestant there.
            settings.say(f"{contestant.name} left out: {type(error).__name__}: {error}")
            if contestant.ours:
                failed.append(f"{contestant.name}: {type(error).__name__}: {error}")
            continue
        calls[contestant.name], chosen[contestant.name] = call, contestant
    times = measure.interleaved(calls, device, settings.seconds, buffers)
    best = min((times[name].median for name in calls if not chosen[name].ours), default=float("nan"))
    for name, call in calls.items():
        ms, rate = times[name].median, rates[chosen[name].threads]
        bound, unit = rate.bound(flops, moved, dtype)
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
            "roofline_percent": round(100 * bound / ms, 1),
            "bound": unit,
            "graph": times[name].graph if device == "cuda" else "",
            "peak_mb": round(measure.peak_megabytes(call, device), 2),
            "result_mb": round(out / 1e6, 2),
            "best_peer_ms": round(best, 4),
            "speedup": round(best / ms, 2) if chosen[name].ours else "",
            **rate.columns(dtype),
        }
    if doubts and all(contestant.ours for contestant in chosen.values()):
        failed.append(f"no peer agrees with ours: {', '.join(doubts)}")
    if failed:
        raise RuntimeError("; ".join(failed))
    if not any(contestant.ours for contestant in chosen.values()):
        raise RuntimeError(f"{operation.spec.name}: none of our backends can run this case here")


def contestants(
    operation: Operation, args: Any, dtype: torch.dtype, backward: bool, settings: Settings
) -> Iterator[Contestant]:
    """Ours first: their result is what the peers are compared with."""
    images = args[0].dim() == 4 and not operation.spec.name.startswith("ssd_scan")
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
    if settings.peers == "none":
        return
    if settings.peers == "compiled":
        # The peers' code objects are shared by all cases, and dynamo limits how often each is compiled. Not once a
        # contestant: that would throw away what the one before has just compiled.
        torch._dynamo.reset()
    for peer in PEERS[operation.spec.name]:
        if backward and peer.forward_only:
            continue
        if (reason := peer.missing(settings.device)) is not None:
            if settings.device == "cuda":
                settings.say(f"peer {peer.name} left out: {reason}")
            continue
        for layout in peer.layouts:
            yield Contestant(f"eager {peer.name}{suffix(layout)}", False, peer.run, layout)
            # On a CPU each takes 10 to 20 s to compile, and what is asked of bf16 there is to beat our own fp32.
            if peer.compiles and settings.peers == "compiled" and (settings.device == "cuda" or dtype == torch.float32):
                run = torch.compile(peer.run, dynamic=False)
                yield Contestant(f"compiled {peer.name}{suffix(layout)}", False, run, layout)


def arguments(case: Case, dtype: torch.dtype, device: str) -> Any:
    """The case's arguments, the same at every call; on a GPU drawn there: a CPU takes a second for a large tensor."""
    if device == "cpu":
        return case.arguments(dtype)
    generator = torch.Generator(device).manual_seed(case.seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    return dataclasses.replace(case, make=lambda _: case.make(rand)).arguments(dtype, device)


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
) -> tuple[measure.Call, list[Tensor]]:
    """A call on the buffers of a number, warmed up; the first result and, with `backward`, the gradients."""
    sets = []
    for number in range(buffers):
        args = arguments(case, dtype, device) if number == 0 else [copied(a) for a in sets[0][0]]
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
    grad = torch.full_like(first, 2.0**-6)  # of ones a bias's gradient, their number, is infinite in fp16

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
    gradients = chosen(0)
    found = [g.detach() for g in gradients if g is not None] if backward else []
    return chosen, [first.detach(), *found]


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


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def suffix(layout: torch.memory_format) -> str:
    return " channels_last" if layout == torch.channels_last else ""
