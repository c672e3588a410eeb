"""`python -m benchmarks --compare REV`: our kernels of the working tree beside those of another revision.

The other revision is built from a temporary git worktree; both then take turns, three runs each of this revision's
benchmarks. A row is a regression when it is slower by more than 10 % and slower in every run than in any of the other
revision's: what two identical builds differ by is not reported.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RUNS = 3
SLOWER = 1.10
Key = tuple[str, ...]


def compare(revision: str, arguments: list[str], console: Console) -> int:
    """Print the ratios of all rows; exit code 1 when something became slower, 2 when `revision` cannot be built."""
    with tempfile.TemporaryDirectory() as folder:
        tree, site = Path(folder) / "tree", Path(folder) / "site"
        made = subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), revision])
        if made.returncode:
            console.print(f"--compare: git knows no revision {revision!r}")
            return 2
        try:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(tree)]
            if subprocess.run(install).returncode:
                console.print(f"--compare: revision {revision} does not build here")
                return 2
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)])
        shutil.copytree(ROOT / "benchmarks", site / "benchmarks")  # today's cases, on both revisions' kernels
        times: dict[Path, dict[Key, list[float]]] = {ROOT: defaultdict(list), site: defaultdict(list)}
        for _ in range(RUNS):
            for place, found in times.items():
                result = Path(folder) / "rows.csv"
                command = [sys.executable, "-m", "benchmarks", "--only-ours", "--csv", str(result), *arguments]
                # The folder a module is run from comes first on the path: each run finds its own famseg_kernels.
                environment = os.environ | {"PYTHONPATH": str(place)}
                subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
                with result.open() as file:
                    for row in csv.DictReader(file):
                        key = tuple(row[c] for c in ("op", "case", "dtype", "pass", "contestant"))
                        found[key].append(float(row["ms"]))
    now, before = times[ROOT], times[site]
    table = Table(title=f"working tree against {revision}, median of {RUNS} runs in turns")
    for heading in ("row", f"{revision} ms", "now ms", "now / before", ""):
        table.add_column(heading)
    slower = 0
    for key in sorted(now.keys() & before.keys()):
        a, b = median(before[key]), median(now[key])
        worse = b > SLOWER * a and min(now[key]) > max(before[key])
        better = a > SLOWER * b and min(before[key]) > max(now[key])
        slower += worse
        verdict = "[red]slower[/red]" if worse else "[green]faster[/green]" if better else ""
        table.add_row(" ".join(key), f"{a:.3f}", f"{b:.3f}", f"{b / a:.2f}", verdict)
    console.print(table)
    for key in sorted(now.keys() ^ before.keys()):
        console.print(f"only in one of them: {' '.join(key)}")
    console.print(f"{slower} of {len(now.keys() & before.keys())} rows became slower")
    return 1 if slower else 0
