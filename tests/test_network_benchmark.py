"""`python -m benchmarks.network`, and that what the network asks of the operations is timed on its own."""

from __future__ import annotations

import contextlib
import csv
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import famseg_kernels as fk
from benchmarks import network, timing, where
from benchmarks.rates import machine_rates
from benchmarks.shapes import SHAPES, TINY, gpu_shapes, network_shapes
from famseg_kernels.spec import Backend


@contextlib.contextmanager
def parts_that_run_out_of_memory():
    raise RuntimeError("CUDA out of memory")
    yield


def broken_models(device, seconds, say):
    row = {"model": "a model of others", "batch": 1, "size": 32, "dtype": "fp32", "kind": "inference"}
    yield [row | {"build": "accelerated", "ms": 1.0, "images_s": 1.0, "peak_mb": 1.0, "famseg_speedup": 1.0}]
    raise AssertionError("a model of others: accelerated output differs by 2.0e-01")


def test_a_failure_costs_no_figure_of_the_others(tmp_path, monkeypatch, capsys):
    written = []
    write_csv = network.measure.write_csv

    def record(path, rows):
        written.append(len(rows))
        write_csv(path, [{key: row.get(key, "") for key in rows[-1]} for row in rows])

    monkeypatch.setattr(network.measure, "write_csv", record)
    monkeypatch.setattr(network, "standard_parts", parts_that_run_out_of_memory)
    monkeypatch.setattr(network, "accelerate_rows", broken_models)
    table = tmp_path / "network.csv"
    options = ["--device", "cpu", "--model", "famseg_nano", "--shapes", "2x32", "--seconds", "0", "--csv", str(table)]
    monkeypatch.setattr(sys, "argv", ["network", *options])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert network.main() == 1
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["build"]) for row in rows] == [
        ("inference", "accelerated"),
        ("inference", "famseg"),
        ("inference", "famseg, optimised"),
        ("inference", "reference backend"),
        ("training step", "famseg"),
        ("training step", "reference backend"),
    ]
    assert written == [1, 4, 6], "written as it goes"
    printed = capsys.readouterr()
    assert "out: standard parts: RuntimeError: CUDA out of memory" in printed.out
    assert "failed, see above:" in printed.out and "differs by 2.0e-01" in printed.out
    assert not torch.backends.cudnn.allow_tf32, "outputs are held to 1e-3: TF32 is off unless it is asked for"


def test_a_wrong_output_of_ours_is_a_failure(monkeypatch):
    operation = next(op for op in fk.OPERATIONS if op.spec.name == "strip_conv2d")
    right = operation.implementations["cpu"]
    wrong = Backend(lambda *args: 1.1 * right.forward(*args), right.backward)
    monkeypatch.setitem(operation.implementations, "cpu", wrong)
    contest = network.Contest(network.Setting("cpu", "famseg_nano", 2, 32, "fp32", 0.0))
    rows = []
    with pytest.raises(RuntimeError, match="famseg: AssertionError: output differs from the reference backend's by"):
        rows += contest.rows("inference")
    contest = contest.rows("inference")
    assert {next(contest)["build"], next(contest)["build"]} == {"standard parts", "reference backend"}


def test_a_case_in_which_no_peer_agrees_with_ours_is_a_failure(monkeypatch):
    operation = next(op for op in fk.OPERATIONS if op.spec.name == "strip_conv2d")
    right = operation.implementations["cpu"]
    wrong = Backend(lambda *args: 1.1 * right.forward(*args), right.backward)
    settings = timing.Settings("cpu", 0.0, "eager", say=lambda _: None)
    speed = machine_rates("cpu", [torch.float32], 0.0)
    arguments = (operation, TINY["strip_conv2d"], torch.float32, False, settings, {None: speed, 1: speed})
    assert {row["contestant"].split()[0] for row in timing.measure_case(*arguments)} == {"famseg", "eager"}
    monkeypatch.setitem(operation.implementations, "cpu", wrong)
    with pytest.raises(RuntimeError, match="no peer agrees with ours: eager convolutions"):
        list(timing.measure_case(*arguments))


@pytest.mark.parametrize("shapes", [SHAPES, gpu_shapes(16)], ids=["cpu", "gpu"])
def test_all_kernel_sizes_of_the_network_are_timed(shapes):
    def sizes(cases):
        found = set()
        for case in cases:
            _, square, _, rows, _, cols, _ = case.make(lambda *shape: torch.empty(shape, device="meta"))
            strips = tuple((row.shape[3], col.shape[2]) for row, col in zip(rows, cols, strict=True))
            found.add((square.shape[-1], strips))
        return found

    asked = sizes(network_shapes("famseg_tiny", 16, 512)["strip_conv2d"])
    assert asked == {(5, ((7, 7), (11, 11), (21, 21))), (3, ())}
    assert asked <= sizes(shapes["strip_conv2d"])


# --- where the time goes ------------------------------------------------------------------------------


def test_where_counts_what_torch_counts(capsys):
    assert where.main(["--size", "64", "--batch", "2", "--train", "--steps", "1", "--lines", "1000"]) == 0
    printed = capsys.readouterr().out
    model, x = where.create_model("famseg_nano", 3), torch.randn(2, 1, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    line = next(line for line in printed.splitlines() if line.startswith("all "))
    assert float(line.split()[4]) == pytest.approx(counter.get_total_flops() / 1e9, abs=1e-3)
    assert "famseg::" in printed and "this library's" in printed


def test_where_finds_copies_that_only_change_the_order_and_casts():
    x = torch.randn(2, 3, 4, 5)

    def run():
        last = x.contiguous(memory_format=torch.channels_last)
        return last.clone(), last.to(torch.bfloat16), last + 1

    assert [o.kind for o in where.watched(run, 2)] == ["order", "", "cast", ""]


def test_where_refuses_a_step_that_is_not_the_same_twice():
    steps = iter([torch.neg, torch.neg, torch.exp])
    with pytest.raises(RuntimeError, match="different operations"):
        where.watched(lambda: next(steps)(torch.ones(2)), 2)
