"""No operation on the CPU backend may fall far behind what it was measured to gain over eager PyTorch.

A floor is at most a third of the ratio measured with AVX-512 (one thread, fp32, NCHW, the first shape of the
benchmarks, against the fastest eager form in benchmarks/peers.py). Both sides take turns in one run and the shortest
call of each counts, so that a slow or busy machine slows down both; below the floor the run is repeated.
`pytest tests/test_speed.py -s` prints the ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

import famseg_kernels as fk
from benchmarks.peers import PEERS
from benchmarks.shapes import SHAPES
from famseg_kernels.testing.gate import with_gradients

# (forward, forward and backward)
FLOORS = {
    "strip_conv2d": (1.5, 1.5),
    "ssd_scan_2d": (1.5, 1.5),
    "ssd_scan": (1.5, 1.3),
    "reassemble": (3.0, 4.0),
    "carafe": (3.0, 4.0),
    "feature_aware_upsample": (1.5, 1.5),
}


def shortest(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, taking turns."""
    times = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - started)
    return times


@pytest.mark.skipif(fk.available_backends()["cpu"] != "ok", reason=fk.available_backends()["cpu"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("operation", fk.OPERATIONS, ids=lambda operation: operation.spec.name)
def test_is_faster_than_eager(operation, backward, one_thread):
    name = operation.spec.name
    args, leaves = with_gradients(operation, SHAPES[name][1].arguments(torch.float32), backward)
    runs = {peer.name: peer.run for peer in PEERS[name] if not peer.cuda_only}
    runs["ours"] = lambda *args: operation.packet(*args, "cpu")

    def call(run):
        result = run(*args)
        result = result[0] if isinstance(result, list) else result
        if backward:
            torch.autograd.grad(result, leaves, torch.ones_like(result), allow_unused=True)

    calls = {peer: lambda run=run: call(run) for peer, run in runs.items()}
    floor = FLOORS[name][backward]
    for _ in range(3):
        times = shortest(calls, rounds=3)
        ours = times.pop("ours")
        ratio = min(times.values()) / ours
        print(f"{name}: {ratio:.2f} times the fastest eager form, {1e3 * ours:.2f} ms; floor {floor}")
        if ratio >= floor:
            return
    raise AssertionError(f"{name} is {ratio:.2f} times as fast as the fastest eager form; it should be {floor} times")
