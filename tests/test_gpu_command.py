"""`python -m benchmarks.gpu` on a machine without a GPU: what goes wrong ends one item, what is killed is continued."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import summary
from benchmarks.gpu.folder import JOURNAL, Folder, FolderError, Outcome
from benchmarks.gpu.items import Options
from benchmarks.gpu.processes import run_step

ROOT = Path(__file__).parent.parent
IDENTITY = {"tree": "a", "GPU": "none (dry run)"}
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


def start(out: Path, *options: str) -> subprocess.Popen:
    everything = [*COMMAND, "--dry-run", "--out", str(out), *options]
    return subprocess.Popen(everything, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def journal(out: Path) -> list[dict]:
    """What is in the journal so far; a line that is being written is none yet."""
    path = out / JOURNAL
    lines = path.read_text().split("\n")[1:-1] if path.exists() else []
    return [line for line in map(json.loads, lines) if "key" in line]


def run(folder: Folder, step: str, workers: int = 1, seconds: float = 60.0) -> str:
    deadline = time.monotonic() + seconds
    options = Options(folder.path, True, "")
    return run_step(step, folder, options, workers, deadline, {}, package="tests.gpu_steps")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- faults ---------------------------------------------------------------------------------------------


def test_a_fault_ends_one_item_only(tmp_path):
    folder = Folder(tmp_path / "out", IDENTITY)
    assert run(folder, "faulty") == ""
    done = folder.of("faulty")
    assert {key: outcome.status for key, outcome in done.items()} == {
        "passes": "passed",
        "fails": "failed",
        "skips": "skipped",
        "exits": "failed",
        "crashes": "failed",
        "hangs": "failed",
        "before": "passed",
        "breaks the context": "failed",
        "after": "passed",
    }
    assert done["fails"].message == "AssertionError: the second answer is wrong"
    assert done["fails"].rows == [{"answer": 1}]  # what came before the failure is kept
    assert "exit status 3" in done["exits"].message
    assert "SIGSEGV" in done["crashes"].message
    assert "no answer within 2 s" in done["hangs"].message
    assert not is_alive(int((tmp_path / "out" / "child").read_text())), "what an item started goes with it"
    assert done["before"].rows != done["after"].rows, "after a broken context another process goes on"
    page = summary.page(folder, ["faulty"], {})
    assert "`fails`: AssertionError: the second answer is wrong" in page
    assert summary.bad(folder, ["faulty"], {})


def test_a_step_that_does_not_come_up_says_why(tmp_path):
    folder = Folder(tmp_path / "out", IDENTITY)
    error = run(folder, "broken")
    assert "cuda_of_tomorrow" in error
    page = summary.page(folder, ["broken"], {"broken": error})
    assert "**broken** did not start: " in page and "cuda_of_tomorrow" in page
    assert summary.bad(folder, ["broken"], {"broken": error})


def test_the_deadline_leaves_the_rest_for_the_next_call(tmp_path):
    folder = Folder(tmp_path / "out", IDENTITY)
    assert run(folder, "slow", seconds=5.0) == ""
    some = len(folder.of("slow"))
    assert 0 < some < 60 and len(summary.unreached(folder, "slow")) == 60 - some
    assert f"slow: {some} passed, {60 - some} not reached" == summary.line(folder, "slow", {})
    assert run(folder, "slow", workers=2) == ""
    assert Counter(outcome.key for outcome in folder.outcomes) == Counter(f"item {n}" for n in range(60))
    assert len((folder.path / "slow.csv").read_text().splitlines()) == 61


def test_what_was_skipped_is_asked_again(tmp_path):
    folder = Folder(tmp_path / "out", IDENTITY)
    folder.plan("step", ["one", "two", "three"])
    folder.add(Outcome("step", "one", "passed", rows=[{"n": 1}]))
    folder.add(Outcome("step", "two", "skipped", "a package is missing", rows=[{"n": 0}]))
    assert folder.missing("step") == ["two", "three"] and summary.unreached(folder, "step") == ["three"]
    folder.add(Outcome("step", "two", "passed", rows=[{"n": 2}]))
    assert folder.missing("step") == ["three"]
    assert list(folder.rows("step")) == [{"n": 1}, {"n": 2}]


def test_no_verdict_without_a_case_on_each_backend(tmp_path):
    folder = Folder(tmp_path / "out", IDENTITY)
    assert "Correctness was not checked" in summary.page(folder, ["correctness"], {})
    assert summary.bad(folder, ["correctness"], {})
    keys = ["strip_conv2d triton fp32 contract a", "strip_conv2d cuda fp32 contract a"]
    folder.plan("correctness", keys)
    folder.add(Outcome("correctness", keys[0], "passed"))
    folder.add(Outcome("correctness", keys[1], "skipped", "this GPU has no code"))
    assert "no case ran on cuda" in summary.page(folder, ["correctness"], {})
    assert summary.bad(folder, ["correctness"], {})
    folder.add(Outcome("correctness", keys[1], "passed"))
    assert "all cases passed that can run here: cuda 1, triton 1" in summary.page(folder, ["correctness"], {})
    assert not summary.bad(folder, ["correctness"], {})


def test_figures_count_behind_their_own_gate_only(tmp_path):
    folder = Folder(tmp_path / "out", IDENTITY)
    folder.plan(
        "correctness", [f"strip_conv2d cuda {dtype} contract {case}" for dtype in ("fp32", "bf16") for case in "ab"]
    )
    folder.add(Outcome("correctness", "strip_conv2d cuda fp32 contract a", "passed"))
    folder.add(Outcome("correctness", "strip_conv2d cuda fp32 contract b", "failed", "AssertionError: gradient 1"))
    folder.add(Outcome("correctness", "strip_conv2d cuda bf16 contract a", "passed"))
    gate = summary.gate_of(folder)
    assert gate == {("strip_conv2d", "cuda", "fp32"): "wrong", ("strip_conv2d", "cuda", "bf16"): "not all checked"}


RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at strips+0x1a0 and Read access at strips+0x2b0 [16 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_the_sanitizers_verdict_is_read_off_its_summary():
    from benchmarks.gpu.steps.sanitizer import first_finding, verdict_of

    assert verdict_of(RACES) == "1 hazard displayed (1 error, 0 warnings)"
    assert first_finding(RACES).startswith("Error: Race reported between Write access at strips")
    assert verdict_of("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == "0 errors"
    assert verdict_of("killed") == "no summary"


# --- the folder -----------------------------------------------------------------------------------------


def closed(folder: Folder) -> None:
    os.close(folder._journal)


def test_another_tree_starts_anew_and_loses_nothing(tmp_path):
    first = Folder(tmp_path / "out", IDENTITY)
    first.add(Outcome("step", "item", "passed"))
    closed(first)
    again = Folder(tmp_path / "out", IDENTITY)
    assert [outcome.key for outcome in again.outcomes] == ["item"] and "1 items are done" in again.news
    closed(again)
    other = Folder(tmp_path / "out", IDENTITY | {"tree": "b"})
    assert other.outcomes == [] and "starts anew" in other.news and "(tree)" in other.news
    (aside,) = tmp_path.glob("out-*-before")
    assert "item" in (aside / JOURNAL).read_text()


def test_half_a_line_is_measured_again(tmp_path):
    first = Folder(tmp_path / "out", IDENTITY)
    first.add(Outcome("step", "one", "passed"))
    closed(first)
    with (tmp_path / "out" / JOURNAL).open("a") as file:
        file.write('{"step": "step", "key": "two", "sta')
    second = Folder(tmp_path / "out", IDENTITY)
    assert [outcome.key for outcome in second.outcomes] == ["one"]
    second.add(Outcome("step", "two", "passed"))
    closed(second)
    assert [outcome.key for outcome in Folder(tmp_path / "out", IDENTITY).outcomes] == ["one", "two"]


def test_two_runs_never_write_into_one_folder(tmp_path):
    first = Folder(tmp_path / "out", IDENTITY)
    with pytest.raises(FolderError, match="another run is writing there"):
        Folder(tmp_path / "out", IDENTITY)
    closed(first)


def test_the_hash_of_the_tree_sees_a_changed_kernel(tmp_path, monkeypatch):
    from benchmarks.gpu import folder

    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "kernel.cuh"
    kernel.write_text("a")
    monkeypatch.setattr(folder, "ROOT", tmp_path)
    before = folder.tree_hash()
    assert folder.tree_hash() == before
    kernel.write_text("b")
    assert folder.tree_hash() != before


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dry-run", "--only", "compile"), "--only compile: no such step; there are environment, compilation"),
        (("--dry-run", "--minutes", "0.5"), "--minutes 0.5: too few; at least 2"),
        (("--dry-run", "--out", "{file}/results"), "cannot be written"),
        (("--dry-run", "--out", "{full}"), "holds precious.txt, which is no result"),
        pytest.param(
            (),
            "torch .*; --dry-run goes through all steps without a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, options, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("kept")
    monkeypatch.chdir(tmp_path)
    filled = [option.format(file=tmp_path / "file", full=tmp_path / "full") for option in options]
    monkeypatch.setattr(sys, "argv", ["gpu", *filled])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"python -m benchmarks.gpu: .*{message}.*\n", error), error
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["precious.txt"]


def test_ctrl_c_leaves_the_summary_of_what_is_done(tmp_path):
    out = tmp_path / "out"
    process = start(out, "--only", "environment", "correctness")
    while process.poll() is None and len(journal(out)) < 5:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "stopped" in printed and "summary.md" in printed
    page = (out / "summary.md").read_text()
    assert "| environment |" in page and "Dry run" in page


KILLS = 10


def test_a_dry_run_killed_ten_times_completes_with_nothing_measured_twice(tmp_path):
    out, chance = tmp_path / "out", random.Random(0)
    for kill in range(KILLS):
        before = len(journal(out))
        process = start(out)
        # Some items later, at any moment of the next: at its start, while it is written down, between two steps.
        while process.poll() is None and len(journal(out)) < before + chance.randint(1, 6):
            time.sleep(0.02)
        time.sleep(chance.random())
        assert process.poll() is None, f"it ended before kill {kill}: {process.communicate()[0]}"
        process.kill()
        process.communicate()
    process = start(out)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert f"going on with {out}" in printed
    done = Counter((line["step"], line["key"]) for line in journal(out))
    assert max(done.values()) == 1 and {line["status"] for line in journal(out)} == {"passed"}
    statuses = {(line["step"], line["key"]): (line["status"], line["message"]) for line in journal(out)}
    assert not [key for key, (status, _) in statuses.items() if status == "failed"], statuses
    assert {step for step, _ in done} == {step.name for step in command.STEPS}
    page = (out / "summary.md").read_text()
    assert "**Correctness: all cases passed that can run here: cuda 4, triton 6.**" in page, page
    assert "not reached, first" not in page and "not begun" not in page
    for step in ("correctness", "timings", "peers", "network", "tuning"):
        assert (out / f"{step}.csv").stat().st_size and (out / f"{step}.log").exists()
    backends = {line["key"].split()[1] for line in journal(out) if line["step"] == "correctness"}
    assert backends == {"cuda", "triton"}
