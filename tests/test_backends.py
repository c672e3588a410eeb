"""Backends are chosen out loud."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import famseg_kernels as fk
from famseg_kernels import backends
from famseg_kernels.strip_conv import cuda

X = torch.randn(1, 4, 6, 6)
LAYER = fk.StripConv2d(4)
UNAVAILABLE = [name for name, reason in fk.available_backends().items() if reason != "ok"]


def test_every_backend_is_ok_or_has_a_reason():
    reasons = fk.available_backends()
    assert list(reasons) == list(backends.BACKENDS)
    assert reasons["reference"] == "ok" and all(reasons.values())


def test_an_unknown_backend_raises_on_entry():
    with pytest.raises(ValueError, match="expected one of auto, cuda, triton, cpu, reference, got 'gpu'"):
        fk.use_backend("gpu").__enter__()


@pytest.mark.skipif(not UNAVAILABLE, reason="every backend is available here")
def test_an_unavailable_backend_raises_on_entry_with_the_reason():
    name = UNAVAILABLE[0]
    with pytest.raises(RuntimeError, match=f"{name}.*not available"):
        fk.use_backend(name).__enter__()


def test_a_backend_that_cannot_take_the_arguments_raises_at_the_call():
    available = [name for name in ("cpu", "cuda") if fk.available_backends()[name] == "ok"]
    if not available:
        pytest.skip("no native backend is available here")
    with pytest.raises(RuntimeError, match=r"cannot run this call.*x is on meta"):
        fk.OPERATIONS[0].choose(available[0], (X.to("meta"), None, None, [], [], [], []), "forward")


def test_a_backend_leaves_a_call_to_a_faster_one_where_that_can_run_it(monkeypatch):
    operation = fk.OPERATIONS[0]
    runs = {"cuda", "triton", "cpu"}
    monkeypatch.setattr(operation, "refusal", lambda name, *_: None if name in runs else "it is not here")
    monkeypatch.setattr(backends, "TRITON_INTERPRETS", False)

    def chosen(dtype, method, square=5, strips=(7, 11, 21)):
        weight = X.new_empty(4, 1, square, square) if square else None
        rows, cols = [X.new_empty(4, 1, 1, k) for k in strips], [X.new_empty(4, 1, k, 1) for k in strips]
        args = (X.to(dtype), weight, None, rows, [None] * len(rows), cols, [None] * len(cols))
        implementation = operation.choose("auto", args, method)
        return next(name for name, other in operation.implementations.items() if other is implementation)

    assert chosen(torch.bfloat16, "forward") == chosen(torch.float32, "backward") == "cuda"
    assert chosen(torch.bfloat16, "backward") == chosen(torch.float16, "backward") == "triton"
    for untuned in ((3, ()), (0, (7, 11, 21)), (5, (7, 11)), (5, (7, 11, 23))):
        assert chosen(torch.bfloat16, "forward", *untuned) == chosen(torch.float16, "forward", *untuned) == "triton"
        assert chosen(torch.float32, "forward", *untuned) == chosen(torch.float32, "backward", *untuned) == "cuda"
    runs.remove("triton")
    assert chosen(torch.bfloat16, "backward") == chosen(torch.bfloat16, "forward", 3, ()) == "cuda"


def test_the_tuned_sizes_are_those_of_the_native_code():
    plan = (Path(__file__).parent.parent / "csrc" / "strip_conv" / "plan.h").read_text()
    square, strips = cuda.TUNED
    assert f"kSquare = {square};" in plan
    assert "kStrips[3] = {" + ", ".join(str(row) for row, column in strips if row == column) + "};" in plan


def test_use_backend_nests_and_restores():
    assert backends.requested() == "auto"
    with fk.use_backend("reference"):
        with fk.use_backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "reference"
    assert backends.requested() == "auto"


def test_the_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    operation = fk.OPERATIONS[0]
    chosen = []
    choose = operation.choose
    monkeypatch.setattr(operation, "choose", lambda name, *rest: chosen.append(name) or choose(name, *rest))
    x = X.clone().requires_grad_()
    with fk.use_backend("reference"):
        y = LAYER(x)
    y.sum().backward()
    assert set(chosen) == {"reference"}


def test_the_environment_sets_the_default():
    code = "from famseg_kernels import backends; print(backends.requested())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"FAMSEG_BACKEND": "reference", "PATH": ""}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "reference", run.stderr
    run = subprocess.run(
        [sys.executable, "-c", code], env={"FAMSEG_BACKEND": "fast", "PATH": ""}, capture_output=True, text=True
    )
    assert "FAMSEG_BACKEND: expected one of" in run.stderr


def test_a_compiled_model_follows_use_backend():
    seen = []
    operation = fk.OPERATIONS[0]
    original = operation.implementations["reference"].forward

    class Spy:
        unsupported = staticmethod(lambda *args: None)

        @staticmethod
        def forward(*args):
            seen.append("reference")
            return original(*args)

    torch._dynamo.reset()
    compiled = torch.compile(fk.StripConv2d(4), fullgraph=True, backend="aot_eager")
    operation.implementations, kept = {**operation.implementations, "reference": Spy}, operation.implementations
    try:
        with torch.no_grad():
            with fk.use_backend("reference"):
                compiled(X)
            assert seen == ["reference"]
            if fk.available_backends()["cpu"] == "ok":
                compiled(X)
                assert seen == ["reference"]
    finally:
        operation.implementations = kept


def test_the_module_prints_what_this_machine_can_do():
    run = subprocess.run([sys.executable, "-m", "famseg_kernels"], capture_output=True, text=True, check=True)
    for word in ("torch", "CPU", "GPU", *backends.BACKENDS):
        assert word in run.stdout


class Filtered(torch.utils.data.Dataset):
    """A data set that runs every kernel in its workers."""

    def __len__(self):
        return len(fk.OPERATIONS)

    def __getitem__(self, index):
        operation = fk.OPERATIONS[index]
        result = operation.packet(*operation.spec.cases[0].arguments(torch.float32), "cpu")
        return result[0] if isinstance(result, list) else result


def test_kernels_run_in_forked_data_workers_after_threads_were_used():
    if (reason := fk.available_backends()["cpu"]) != "ok":
        pytest.skip(reason)
    here = [Filtered()[i] for i in range(len(Filtered()))]  # starts the OpenMP threads that a fork does not inherit
    loader = torch.utils.data.DataLoader(Filtered(), None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for mine, theirs in zip(here, loader, strict=True):
        assert torch.equal(mine, theirs)
