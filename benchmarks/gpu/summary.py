"""summary.md: what passed, what failed and how, the figures, and what was not reached; made from the journal alone."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.folder import Folder, Outcome

CHECKED = "correctness"
MESSAGE = 300  # characters of a failure
COMMAND = "python -m benchmarks.gpu"


def line(folder: Folder, step: str, errors: Mapping[str, str]) -> str:
    """`step: 40 passed, 2 failed, 3 skipped, 7 not reached`, leaving out what is none."""
    done = folder.of(step)
    counts = Counter(outcome.status for outcome in done.values())
    parts = [f"{counts['passed']} passed"]
    parts += [f"{counts[status]} {status}" for status in ("failed", "skipped") if counts[status]]
    if missing := len(unreached(folder, step)):
        parts.append(f"{missing} not reached")
    if step in errors:
        parts.append(f"did not start: {errors[step].splitlines()[-1]}")
    return f"{step}: {', '.join(parts)}"


def unreached(folder: Folder, step: str) -> list[str]:
    done = folder.of(step)
    return [key for key in folder.plans.get(step, ()) if key not in done]


def bad(folder: Folder, steps: Sequence[str], errors: Mapping[str, str]) -> bool:
    """Whether something of `steps` failed, or correctness, without which no figure counts, is not through."""
    failed = any(outcome.status == "failed" for step in steps for outcome in folder.of(step).values())
    unchecked = CHECKED in steps and (unreached(folder, CHECKED) or not all(_ran(folder).values()))
    return failed or bool(errors) or bool(unchecked)


def _ran(folder: Folder) -> dict[str, int]:
    """How many cases of each backend have passed."""
    passed = Counter(key.split()[1] for key, outcome in folder.of(CHECKED).items() if outcome.status == "passed")
    return {backend: passed[backend] for backend in ("cuda", "triton")}


def page(folder: Folder, steps: Sequence[str], errors: Mapping[str, str]) -> str:
    parts = ["# GPU check", _head(folder), _verdict(folder, steps, errors), _steps(folder, steps, errors)]
    parts += [_failures(folder, steps, errors), _correctness(folder), _timings(folder), _peers(folder)]
    parts += [_network(folder), _sanitizer(folder), _tuning(folder), _training(folder), _skips(folder, steps)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) if len(lines) > 2 else ""


def _section(title: str, *parts: str) -> str:
    parts = tuple(part for part in parts if part)
    return "\n\n".join((f"## {title}", *parts)) if parts else ""


def _head(folder: Folder) -> str:
    facts = [f"`{COMMAND}`, {time.strftime('%Y-%m-%d')}."]
    for key, outcome in folder.of("environment").items():
        if " for " not in key:  # what a step wants is told where it was skipped
            facts += [f"{row['what']}: {row['value']}." for row in outcome.rows]
    if "dry run" in folder.identity["GPU"]:
        facts.insert(1, "**Dry run: an interpreter and an emulation stand in for a GPU. Times say nothing.**")
    return "\n\n".join(facts)


def _verdict(folder: Folder, steps: Sequence[str], errors: Mapping[str, str]) -> str:
    failed = [outcome for step in steps for outcome in folder.of(step).values() if outcome.status == "failed"]
    checks = folder.of(CHECKED)
    missing = len(unreached(folder, CHECKED))
    if not checks:
        return "**Correctness was not checked: no figure counts.**"
    wrong = sum(outcome.status == "failed" for outcome in checks.values())
    if wrong or missing or CHECKED in errors:
        return f"**Correctness: {wrong} of {len(checks)} cases failed, {missing} were not reached.**"
    if idle := [backend for backend, passed in _ran(folder).items() if not passed]:
        return f"**Correctness: no case ran on {' and '.join(idle)}; the reason is below.**"
    others = len(failed)
    ran = ", ".join(f"{backend} {passed}" for backend, passed in _ran(folder).items())
    text = f"**Correctness: all cases passed that can run here: {ran}.**"
    return text + (f" Elsewhere {others} items failed." if others else "")


def _steps(folder: Folder, steps: Sequence[str], errors: Mapping[str, str]) -> str:
    rows = []
    for step in steps:
        done = folder.of(step)
        counts = Counter(outcome.status for outcome in done.values())
        seconds = sum(outcome.seconds for outcome in done.values())
        state = [counts[status] for status in ("passed", "failed", "skipped")]
        known = step in folder.plans
        missing: Any = len(unreached(folder, step)) if known else "did not start" if step in errors else "all"
        rows.append((step, *state, missing, f"{seconds:.0f}"))
    return table(("step", "passed", "failed", "skipped", "not reached", "work (s)"), rows)


def _failures(folder: Folder, steps: Sequence[str], errors: Mapping[str, str]) -> str:
    """The first of each step and cause in full, the others by name."""
    lines = [f"- **{step}** did not start: {_short(error)}" for step, error in errors.items()]
    for step in steps:
        failed = [outcome for outcome in folder.of(step).values() if outcome.status == "failed"]
        if failed:
            lines.append(f"- **{step}**, first of {len(failed)}: `{failed[0].key}`: {_short(failed[0].message)}")
            lines += [f"  - `{outcome.key}`: {_short(outcome.message, 120)}" for outcome in failed[1:40]]
            if len(failed) > 40:
                lines.append(f"  - and {len(failed) - 40} more, in journal.jsonl")
    return _section("Failed", "\n".join(lines))


def _short(text: str, most: int = MESSAGE) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _correctness(folder: Folder) -> str:
    cells: dict[tuple[str, str, str], Counter[bool]] = {}
    for row in folder.rows(CHECKED):
        cells.setdefault((row["op"], row["backend"], row["dtype"]), Counter())[row["result"] == "passed"] += 1
    rows = [(*key, count[True], count[False]) for key, count in sorted(cells.items())]
    note = "Forward and all gradients against the fp64 reference; the same bits twice; channels_last; odd addresses."
    return _section("Correctness", note, table(("op", "backend", "dtype", "passed", "failed"), rows))


def gate_of(folder: Folder) -> Mapping[tuple[str, str, str], str]:
    """(op, backend, dtype) → "" where every check passed, else why its figures do not count."""
    found: dict[tuple[str, str, str], str] = {}
    for outcome in folder.of(CHECKED).values():
        op, backend, dtype = outcome.key.split()[:3]
        if outcome.status != "skipped":
            found.setdefault((op, backend, dtype), "")
        if outcome.status == "failed":
            found[op, backend, dtype] = "wrong"
    for key in unreached(folder, CHECKED):
        op, backend, dtype = key.split()[:3]
        found[op, backend, dtype] = found.get((op, backend, dtype)) or "not all checked"
    return found


def _verified(row: Mapping[str, Any], gate: Mapping[tuple[str, str, str], str]) -> str:
    contestant = row["contestant"].split()
    if contestant[0] != "famseg" or contestant[1].rstrip(",") == "cpu":
        return ""
    return gate.get((row["op"], contestant[1], row["dtype"]), "not checked") or "yes"


def _graph(row: Mapping[str, Any]) -> str:
    return "no graph" if row["graph"] is False else ""  # "": not on a GPU


def _timings(folder: Folder) -> str:
    gate = gate_of(folder)
    rows, rates = [], ""
    for row in folder.rows("timings"):
        fma = row["fma_gflops"]
        over = f"{100 * row['gflops'] / fma:.0f}" if fma else ""
        figures = (f"{row['ms']:.4g}", f"{row['gb_s']:.0f}", f"{row['gflops'] / 1e3:.3g}")
        where = (row["op"], row["case"], row["dtype"], row["pass"], row["contestant"].removeprefix("famseg "))
        bound = (f"{row['roofline_percent']:.0f}", row["bound"], over)
        rows.append((*where, *figures, *bound, f"{row['peak_mb']:.0f}", _verified(row, gate), _graph(row)))
        rates = f"copy {row['copy_gb_s']:.0f} GB/s" + (f", fp32 FMA {fma / 1e3:.1f} TFLOP/s" if fma else "")
    matrix = {row["dtype"]: row["matrix_gflops"] for row in folder.rows("timings")}
    rates += "".join(f", matrix product {dtype} {rate / 1e3:.0f} TFLOP/s" for dtype, rate in matrix.items())
    headings = ("op", "case", "dtype", "pass", "backend", "ms", "GB/s", "TFLOP/s", "% of bound", "bound by")
    note = f"Measured in the same process: {rates}. Bytes are those that any implementation must move." if rows else ""
    return _section("Our kernels", note, table((*headings, "% of FMA", "peak MB", "verified", ""), rows))


def _peers(folder: Folder) -> str:
    gate = gate_of(folder)
    rows = []
    for row in folder.rows("peers"):
        where = (row["op"], row["case"], row["dtype"], row["pass"], row["contestant"])
        rows.append(
            (*where, f"{row['ms']:.4g}", row["speedup"], f"{row['peak_mb']:.0f}", _verified(row, gate), _graph(row))
        )
    headings = ("op", "case", "dtype", "pass", "contestant", "ms", "× best peer", "peak MB", "verified", "")
    return _section("Beside peers", table(headings, rows))


def _network(folder: Folder) -> str:
    columns = {
        "model": "model",
        "batch": "batch",
        "size": "px",
        "dtype": "dtype",
        "kind": "kind",
        "build": "build",
        "ms": "ms",
        "images_s": "images/s",
        "peak_mb": "peak MB",
        "famseg_speedup": "× famseg's time",
    }
    rows = [[row[column] for column in columns] for row in folder.rows("network")]
    return _section("The network", table(tuple(columns.values()), rows))


def _sanitizer(folder: Folder) -> str:
    columns = ("tool", "backend", "dtype", "cases", "verdict")
    rows = ([row[column] for column in columns] for row in folder.rows("sanitizer"))
    return _section("compute-sanitizer", table(columns, rows))


def _tuning(folder: Folder) -> str:
    rows = list(folder.rows("tuning"))
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        found = best(mine)
        if found is not None:
            cases = len({row["case"] for row in mine})
            lines.append((op, f"`{found[0]}`", f"{found[1]:.3f}", cases))
    return _section("Tuning", table(("op", "best configuration", "× the table's", "shapes"), lines))


def best(rows: Sequence[Mapping[str, Any]]) -> tuple[str, float] | None:
    """Of an operation's rows: the configuration with the smallest geometric mean of time over the shapes.

    Only those that ran at every shape count. Beside it, how many times faster than the first one it is.
    """
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["configuration"], {})[row["case"]] = max(float(row["ms"]), 1e-9)
    cases = {row["case"] for row in rows}
    means = {
        key: math.exp(sum(map(math.log, ms.values())) / len(cases)) for key, ms in times.items() if ms.keys() == cases
    }
    if not means:
        return None
    winner = min(means, key=means.__getitem__)
    return winner, means.get(rows[0]["configuration"], math.nan) / means[winner]


def _training(folder: Folder) -> str:
    rows = list(folder.rows("training"))
    return _section("Training", table(tuple(rows[0]), (row.values() for row in rows))) if rows else ""


def _skips(folder: Folder, steps: Sequence[str]) -> str:
    reasons: dict[tuple[str, str], list[Outcome]] = {}
    for step in steps:
        for outcome in folder.of(step).values():
            if outcome.status == "skipped":
                reasons.setdefault((step, _short(outcome.message)), []).append(outcome)
    lines = [f"- {step}, {len(them)} ×: {reason}" for (step, reason), them in reasons.items()]
    missing = [(step, unreached(folder, step)) for step in steps]
    lines += [f"- {step}: {len(keys)} not reached, first `{keys[0]}`" for step, keys in missing if keys]
    lines += [f"- {step}: not begun" for step in steps if step not in folder.plans]
    again = "The same command with the same --out on the same tree goes on with what was not reached."
    return _section("Skipped, and not reached", "\n".join(lines), again if any(keys for _, keys in missing) else "")
