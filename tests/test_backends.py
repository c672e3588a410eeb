"""Backends are chosen out loud."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import famseg_kernels as fk
from famseg_kernels import backends, choice
from famseg_kernels.spec import Backend
from famseg_kernels.torch_op import Operation

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

    def chosen(method):
        args = (X, None, None, [], [], [], [])
        implementation = operation.choose("auto", args, method)
        return next(name for name, other in operation.implementations.items() if other is implementation)

    assert chosen("forward") == chosen("backward") == "triton"
    runs.remove("triton")
    assert chosen("forward") == chosen("backward") == "cuda"


@dataclass
class Machine:
    """GPUs by compute capability, a driver, and a native module with code for some of them; CUDA versions as 13000."""

    gpus: tuple[str, ...]
    driver: int = 13000
    runtime: int = 13000
    codes: tuple[str, ...] = ("80", "90")

    def driver_version(self):
        return self.driver, ""

    def runtime_version(self):
        return self.runtime

    def archs(self):
        return list(self.codes)

    def strip_conv2d_max_branches(self):
        return 3

    def properties(self, index):
        major, minor = self.gpus[index].split(".")
        return SimpleNamespace(name=f"card {index}", major=int(major), minor=int(minor))


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine look like another one, whose Triton runs on GPUs."""
    kept = (backends.installed, backends.availability, Operation._refusal_on)
    modules = backends.native_module

    def become(*gpus, **versions):
        here = Machine(gpus, **versions)
        monkeypatch.setattr(backends, "native_module", lambda n: (here, "ok") if n == "_cuda" else modules(n))
        monkeypatch.setattr(backends, "TRITON_INTERPRETS", False)
        monkeypatch.setitem(choice.DEVICE, "triton", "cuda")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", here.properties)
        implementations = fk.OPERATIONS[0].implementations
        monkeypatch.setitem(implementations, "cuda", dataclasses.replace(implementations["cuda"], faster=None))
        for function in kept:
            function.cache_clear()

    yield become
    monkeypatch.undo()
    for function in kept:
        function.cache_clear()


def chosen_on(index, caplog):
    """The backend of an automatic choice for x on this GPU, and what was said about those skipped."""
    operation, x = fk.OPERATIONS[0], SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32)
    caplog.clear()
    with caplog.at_level("DEBUG", "famseg_kernels"):
        implementation = operation.choose("auto", (x, None, None, [], [], [], []), "forward")
    return next(name for name, other in operation.implementations.items() if other is implementation), caplog.text


@pytest.mark.parametrize(
    ("gpu", "versions", "reason"),
    [
        ("8.0", {}, "ok"),
        ("8.6", {}, "ok"),
        ("9.0", {}, "ok"),
        ("9.0", {"codes": ("80", "90a")}, "ok"),
        ("12.0", {}, "ok"),  # from PTX
        ("12.0", {"driver": 13020}, "ok"),
        ("12.0", {"runtime": 13010, "codes": ("80", "90", "120")}, "ok"),
        ("12.1", {"runtime": 13010, "codes": ("120",)}, "ok"),
        (
            "12.0",
            {"runtime": 13010},
            "card 0 has compute capability 12.0, famseg_kernels._cuda has code for 8.0, 9.0 and newer with a driver "
            "for CUDA 13.1, this one is for 13.0: install a newer driver, or "
            'FAMSEG_CUDA_ARCHS="80;90;120" pip install -e .',
        ),
        (
            "8.0",
            {"codes": ("86", "90")},
            "card 0 has compute capability 8.0, famseg_kernels._cuda has code for 8.6, 9.0: "
            'FAMSEG_CUDA_ARCHS="80;86;90" pip install -e .',
        ),
        ("7.5", {}, "card 0 has compute capability 7.5, the kernels need 8.0"),
        (
            "9.0",
            {"driver": 12080},
            "the NVIDIA driver is for CUDA 12.8, famseg_kernels._cuda was built with 13.0: install a newer driver, or "
            "reinstall with an older CUDA toolkit: pip install -e .",
        ),
    ],
)
def test_cuda_needs_a_driver_and_code_for_the_gpu(machine, caplog, gpu, versions, reason):
    machine(gpu, **versions)
    assert fk.available_backends()["cuda"] == reason
    name, said = chosen_on(0, caplog)
    assert name == ("cuda" if reason == "ok" else "reference" if gpu == "7.5" else "triton")
    if reason != "ok":
        assert reason in said
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            fk.use_backend("cuda").__enter__()


def test_each_gpu_is_judged_by_itself(machine, caplog):
    machine("7.5", "8.0", "12.0", runtime=13010)
    assert fk.available_backends()["cuda"] == fk.available_backends()["triton"] == "ok"
    name, said = chosen_on(0, caplog)
    assert name == "reference"
    assert said.count("card 0 has compute capability 7.5, the kernels need 8.0") == 2
    assert chosen_on(1, caplog)[0] == "cuda"
    name, said = chosen_on(2, caplog)
    assert name == "triton" and "card 2 has compute capability 12.0, famseg_kernels._cuda has code for" in said


def test_no_gpu_of_several_can_be_used(machine):
    machine("6.1", "7.5")
    reason = "; ".join(
        f"card {i} has compute capability {gpu}, the kernels need 8.0" for i, gpu in enumerate(("6.1", "7.5"))
    )
    assert fk.available_backends()["cuda"] == fk.available_backends()["triton"] == reason


def test_a_tensor_on_the_cpu_does_not_start_cuda(machine, monkeypatch):
    machine("8.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: pytest.fail("a GPU was looked at"))
    operation = fk.OPERATIONS[0]
    assert operation.choose("auto", (X, None, None, [], [], [], []), "forward") in operation.implementations.values()


def test_a_fork_of_a_process_that_used_cuda_says_so(machine, monkeypatch):
    machine("8.0")
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert "use the start method 'spawn'" in fk.available_backends()["cuda"]
    assert fk.available_backends()["cpu"] == backends.installed("cpu")


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

    def forward(*args):
        seen.append("reference")
        return original(*args)

    torch._dynamo.reset()
    compiled = torch.compile(fk.StripConv2d(4), fullgraph=True, backend="aot_eager")
    spy = Backend(forward)
    operation.implementations, kept = {**operation.implementations, "reference": spy}, operation.implementations
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


@pytest.mark.parametrize(("found", "usable"), [("3.2.0", False), ("3.3.1", True), ("3.10.0+git1", True), ("4.0", True)])
def test_a_triton_without_gather_is_too_old(monkeypatch, found, usable):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "version", lambda _: found)
    monkeypatch.setattr(backends, "gpu_reason", lambda: "ok")
    reason = backends._triton_reason()
    assert reason == "ok" if usable else reason.startswith(f"triton {found} is too old, the kernels need 3.3")
