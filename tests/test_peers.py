"""What our kernels are timed against must be right too, and must be what it says it is."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ahead, peers
from benchmarks.gpu.summary import best
from famseg_kernels import backends

ROOT = Path(__file__).parent.parent
interpreted = pytest.mark.skipif(not backends.TRITON_INTERPRETS, reason="runs in the interpreter's process")


def test_kernels_of_the_peers_are_right_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "cross or fma"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "4 passed" in run.stdout, run.stdout + run.stderr


@interpreted
@pytest.mark.parametrize("directions", [1, 2, 4])
def test_a_fused_cross_scan_is_flips_and_copies(directions):
    from benchmarks.cross_scan import cross_merge, cross_scan

    generator = torch.Generator().manual_seed(0)

    def same(fused, plain, *shape, exact):
        argument = torch.randn(shape, generator=generator, requires_grad=True)
        actual, right = fused(argument), plain(argument)
        assert torch.equal(actual, right) or not exact
        torch.testing.assert_close(actual, right)
        grad = torch.randn(right.shape, generator=generator)
        mine, other = (torch.autograd.grad(y, argument, grad)[0] for y in (actual, right))
        torch.testing.assert_close(mine, other)

    def scans(each):
        return (lambda t: cross_scan(t, directions, each)), (lambda t: peers._cross_scan(t, directions, each))

    same(*scans(False), 2, 3, 5, 6, 7, exact=True)
    same(*scans(True), 2, 3, 5, directions, 6, exact=True)
    merges = (lambda t: cross_merge(t, 3, 5)), (lambda t: peers._cross_merge(t, 3, 5))
    same(*merges, 2, 15, directions, 6, 7, exact=False)


@interpreted
def test_the_fma_kernel_does_the_multiply_adds_it_counts():
    from benchmarks import fma

    count, call = fma.call(torch.device("cpu"), steps=32)
    call(0)
    assert count == fma.PROGRAMS * fma.BLOCK * 32


def test_the_fma_kernel_is_nothing_but_fmas():
    triton = pytest.importorskip("triton")
    if backends.TRITON_INTERPRETS:
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks import fma

    constants = {"BLOCK": fma.BLOCK, "STEPS": fma.STEPS, "UNROLLED": fma.UNROLLED}
    source = ASTSource(fma._multiply_add, {"numbers": "*fp32", **dict.fromkeys(constants, "constexpr")}, constants)
    options = {"num_warps": fma.WARPS}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    loop = ptx[ptx.index("$L__BB") :]
    numbers_of_a_thread = fma.BLOCK // (32 * fma.WARPS)
    assert loop.count("fma.rn.f32") == numbers_of_a_thread * fma.UNROLLED
    assert "mul" not in loop.split("bra")[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'mmcv_like'"),
        # mmcv-lite: the package is there, the operations' code is not.
        ("from mmcv_like import _ext", "ImportError: cannot import name '_ext'"),
        # Built for another torch.
        ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol"),
    ],
)
def test_a_peer_is_missing_if_what_it_calls_cannot_be_imported(tmp_path, monkeypatch, content, reason):
    if content is not None:
        (tmp_path / "mmcv_like").mkdir()
        (tmp_path / "mmcv_like" / "__init__.py").write_text("")
        (tmp_path / "mmcv_like" / "ops.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mmcv_like", "mmcv_like.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    peers.missing_module.cache_clear()
    peer = peers.Peer("mmcv", peers.carafe_mmcv, cuda_only=True, needs="mmcv_like.ops")
    assert reason in peer.missing("cuda")
    assert peer.missing("cpu") == "runs on CUDA only"
    peers.missing_module.cache_clear()


def test_peers_need_the_modules_that_they_call():
    needs = {peer.name: peer.needs for of_op in peers.PEERS.values() for peer in of_op if peer.needs}
    assert needs == {"mamba_ssm": "mamba_ssm.ops.triton.ssd_combined", "mmcv": "mmcv.ops"}


def test_what_is_compiled_ahead_travels_to_other_processes():
    pytest.importorskip("triton")
    jobs = list(ahead.jobs(list(ahead.OPERATIONS), [90], [torch.bfloat16]))
    again = pickle.loads(pickle.dumps(jobs))
    assert again == jobs and [str(job) for job in again] == [str(job) for job in jobs]
    assert len({str(job) for job in jobs}) == len(jobs)
    tuned = list(ahead.tuning_jobs(["reassemble"], [90]))
    assert pickle.loads(pickle.dumps(tuned)) == tuned
    if not backends.TRITON_INTERPRETS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            job, kernels, error = pool.apply(ahead.run, (ahead.Job("carafe", "tiny", 0, torch.bfloat16, 90),))
        assert job.case.name == "tiny" and kernels and not error


def test_the_sanitizer_looks_at_every_triton_kernel_that_is_launched():
    pytest.importorskip("triton")
    from benchmarks.gpu.steps.sanitizer import kernels

    launched = "convolve_square convolve_strips square_gradients row_gradients col_gradients running_sums chunk_states"
    launched += " mix_direction mix_axis mix_image pair_gradients matrix_gradients step_gradients"
    launched += " reassemble_forward weight_gradient source_gradient"
    assert {f"kne={name}" for name in launched.split()} <= set(kernels("triton"))


def test_the_best_configuration_is_the_fastest_over_all_shapes():
    def row(configuration, case, ms):
        return {"op": "o", "configuration": configuration, "case": case, "ms": ms}

    rows = [row("table", "a", 4.0), row("table", "b", 1.0), row("other", "a", 1.0), row("other", "b", 1.0)]
    assert best(rows) == ("other", pytest.approx(2.0))
    assert best([*rows, row("one shape", "a", 0.1)])[0] == "other"
    assert best([row("x", "a", 1.0), row("y", "b", 1.0)]) is None


def test_a_cache_made_elsewhere_says_what_differs(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert ahead.complaint(90) == ""  # nobody has made one
    ahead.stamp([80, 90])
    assert ahead.complaint(80) is None and ahead.complaint(90) is None
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    assert "another Python cpython-3" in ahead.complaint(90) and "here cpython-399" in ahead.complaint(90)
    monkeypatch.undo()
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "moved"))
    assert "another path of the cache" in ahead.complaint(90)
