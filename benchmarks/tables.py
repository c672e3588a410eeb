"""`python -m benchmarks.tables`: writes the tables of the pages in PAGES, from benchmarks/results/.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is one of TABLES. What a document says
is then what was measured: tests/test_docs.py fails where the two differ.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OPERATIONS = RESULTS / "amd-epyc-torch2.11.0.csv"
NETWORKS = RESULTS / "intel-xeon-processor-network.csv"
RIVALS = RESULTS / "amd-epyc-rivals.csv"
PRETRAINED = RESULTS / "pretrained.csv"
FACTORS = RESULTS / "head_factors.csv"
LONG_RUNS = RESULTS / "long_runs.csv"
STUDIES = RESULTS / "studies"
WITH_TABLES = ("cpu", "model-card", "promises", "papers/famseg", "papers/fine-tuning", "papers/sc-unext")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in WITH_TABLES))
MARKED = re.compile(r"(<!-- table: (?P<name>.*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

# The rows, in the order of the tables. A case of benchmarks/shapes.py → what it is.
SHAPES = {
    ("strip_conv2d", "mscan_s_stage1"): "strip 5+(7,11,21), (2,64,128,128)",
    ("strip_conv2d", "mscan_s_stage2"): "strip 5+(7,11,21), (2,128,64,64)",
    ("strip_conv2d", "mscan_s_stage3"): "strip 5+(7,11,21), (2,320,32,32)",
    ("strip_conv2d", "mscan_s_stage4"): "strip 5+(7,11,21), (2,512,16,16)",
    ("ssd_scan_2d", "heads5_32x32"): "scan 2D, N 2, 32×32, h 5, p 64, n 64",
    ("ssd_scan_2d", "heads5_32x32_shared"): "the same, B and C shared",
    ("ssd_scan_2d", "vmamba_56x56"): "scan 2D, N 1, 56×56, h 6, p 16, n 64",
    ("ssd_scan", "mamba2_1024"): "scan 1D, (2,1024), h 8, p 64, n 64",
    ("reassemble", "carafe_64x64"): "reassemble k 5 s 2, (1,64,64,64)",
    ("reassemble", "famseg_32x32"): "reassemble k 5 s 2, (2,128,32,32)",
    ("carafe", "carafe_64x64"): "carafe k 5 s 2, (1,64,64,64)",
}
GROSS = 5.0  # mm
OURS, ONE_THREAD, CHANNELS_LAST = "famseg cpu", "famseg cpu, one thread", "famseg cpu channels_last"
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with the first column to the left and numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def digits(value: float) -> str:
    """Three of them: 0.58, 3.44, 11.6, 107."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}" if value >= 1 else f"{value:.2f}"


def ratio(value: float) -> str:
    return f"{value:.1f}"


class Measured:
    """The rows of one shape, dtype and pass."""

    def __init__(self, shape: tuple[str, str], dtype: str, kind: str) -> None:
        key = (*shape, dtype, kind)
        rows = [row for row in read(OPERATIONS) if (row["op"], row["case"], row["dtype"], row["pass"]) == key]
        self.by = {row["contestant"]: row for row in rows}
        self.best_peer = float(self.by[OURS]["best_peer_ms"])
        self.eager_mb = min(float(row["peak_mb"]) for row in rows if row["contestant"].startswith("eager"))

    def ms(self, contestant: str = OURS) -> float:
        return float(self.by[contestant]["ms"])


def summary() -> str:
    """README: a shape of every kind, against the best peer."""
    head = ("fp32", "fwd, ms", "best peer, ms", "times faster", "fwd+bwd, ms", "best peer, ms", "times faster")
    rows = []
    for shape, label in SHAPES.items():
        if shape[1] in ("mscan_s_stage1", "mscan_s_stage3", "heads5_32x32", "vmamba_56x56") or shape[0] == "reassemble":
            passes = [Measured(shape, "fp32", kind) for kind in ("fwd", "fwd+bwd")]
            rows.append([label, *(cell for one in passes for cell in against_best(one))])
    return markdown(head, rows)


def against_best(one: Measured) -> tuple[str, str, str]:
    return digits(one.ms()), digits(one.best_peer), ratio(one.best_peer / one.ms())


def ranges() -> str:
    """docs/cpu.md, first of all: the least and the most that each kind of operation gains on the best peer."""
    head = ("fp32, times faster than the best peer", "fwd, least", "fwd, most", "fwd+bwd, least", "fwd+bwd, most")
    rows = []
    for label, operations in {
        "strip convolution": ("strip_conv2d",),
        "scans": ("ssd_scan_2d", "ssd_scan"),
        "reassembly": ("reassemble", "carafe"),
    }.items():
        cells = []
        for kind in ("fwd", "fwd+bwd"):
            mine = [Measured(shape, "fp32", kind) for shape in SHAPES if shape[0] in operations]
            gains = [one.best_peer / one.ms() for one in mine]
            cells += [ratio(min(gains)), ratio(max(gains))]
        rows.append([label, *cells])
    return markdown(head, rows)


def passes(dtype: str, kind: str) -> Callable[[], str]:
    """All that a result file says of one pass."""
    peer = "best peer, ms" if dtype == "fp32" else "best eager peer, ms"
    head = (
        f"{dtype}, {kind}",
        "ours, ms",
        peer,
        "times faster",
        "ours channels_last, ms",
        "ours on one thread, ms",
        "% of roofline",
        "% of roofline, one thread",
        "peak, MB",
        "least eager peak, MB",
    )

    def table() -> str:
        rows = []
        for shape, label in SHAPES.items():
            one = Measured(shape, dtype, kind)
            last = digits(one.ms(CHANNELS_LAST)) if CHANNELS_LAST in one.by else "–"
            roofline = [f"{float(one.by[who]['roofline_percent']):.0f}" for who in (OURS, ONE_THREAD)]
            memory = [f"{float(value):.0f}" for value in (one.by[OURS]["peak_mb"], one.eager_mb)]
            rows.append([label, *against_best(one), last, digits(one.ms(ONE_THREAD)), *roofline, *memory])
        return markdown(head, rows)

    return table


def bf16_and_threads() -> str:
    """What bf16 and a second thread are worth: quotients of times in one run."""
    head = (
        "times faster",
        "bf16 over fp32, fwd",
        "bf16 over fp32, fwd, one thread",
        "two threads over one, fp32 fwd",
        "two threads over one, fp32 fwd+bwd",
    )
    rows = []
    for shape, label in SHAPES.items():
        full, half = Measured(shape, "fp32", "fwd"), Measured(shape, "bf16", "fwd")
        both = Measured(shape, "fp32", "fwd+bwd")
        values = (
            full.ms() / half.ms(),
            full.ms(ONE_THREAD) / half.ms(ONE_THREAD),
            full.ms(ONE_THREAD) / full.ms(),
            both.ms(ONE_THREAD) / both.ms(),
        )
        rows.append([label, *(f"{value:.2f}" for value in values)])
    return markdown(head, rows)


def network() -> str:
    """FAMSeg in three sizes beside other builds of it, and a U-Net."""
    builds = ("famseg", "famseg, channels_last", "reference backend", "standard parts", "U-Net (ResNet-34)")
    head = (
        "ms",
        "`cpu`",
        "`cpu`, channels_last",
        "`reference`",
        "standard parts",
        "U-Net",
        "`reference` / `cpu`",
        "standard parts / `cpu`",
        "`cpu`, peak MB",
        "`reference`, peak MB",
    )
    rows: list[list[str]] = []
    measured: dict[tuple[str, str], dict[str, Row]] = {}
    model = ""
    for row in read(NETWORKS):
        if row["model"].startswith("famseg_"):
            model = row["model"]
        elif row["model"] != "unet_resnet34":  # which is measured beside each size of FAMSeg, and stands after it
            continue
        # Of standard parts the layout that is faster counts.
        build = "standard parts" if row["build"].startswith("standard parts") else row["build"]
        best = measured.setdefault((model, row["kind"]), {}).setdefault(build, row)
        if float(row["ms"]) < float(best["ms"]):
            measured[model, row["kind"]][build] = row
    for (model, kind), by in measured.items():
        ms = [float(by[build]["ms"]) for build in builds]
        memory = [f"{float(by[build]['peak_mb']):.0f}" for build in ("famseg", "reference backend")]
        cells = [f"{value:.0f}" for value in ms]
        rows.append([f"{model}, {kind}", *cells, ratio(ms[2] / ms[0]), ratio(ms[3] / ms[0]), *memory])
    return markdown(head, rows)


def accelerated() -> str:
    """Published modules before and after `fk.accelerate`."""
    pairs: dict[tuple[str, str], dict[str, float]] = {}
    for row in read(NETWORKS):
        if row["build"] in ("as published", "accelerated"):
            pairs.setdefault((row["model"], row["kind"]), {})[row["build"]] = float(row["ms"])
    rows = []
    for (model, kind), ms in pairs.items():
        before, after = ms["as published"], ms["accelerated"]
        rows.append([f"{model}, {kind}", digits(before), digits(after), f"{before / after:.2f}"])
    return markdown(("module", "as published, ms", "accelerated, ms", "times faster"), rows)


def rivals(column: str, batch: int) -> Callable[[], str]:
    """FAMSeg beside what one would take instead, in every runtime."""

    def table() -> str:
        cells: dict[str, dict[str, str]] = {}
        for row in read(RIVALS):
            if row["batch"] == str(batch):
                cells.setdefault(row["model"], {})[row["build"]] = f"{float(row[column]):.0f}"
        builds = list(dict.fromkeys(build for by in cells.values() for build in by))
        unit = {"ms": "ms", "peak_mb": "MB"}[column]
        rows = [[f"`{model}`", *(by.get(build, "–") for build in builds)] for model, by in cells.items()]
        return markdown((f"{unit}, batch {batch}", *builds), rows)

    return table


class Errors:
    """Objects of the held-out images of the network that ships."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.mm = [float(row["error_mm"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def mean(self, column: str) -> float:
        return statistics.fmean(float(row[column]) for row in self.rows)

    def absolute(self) -> float:
        return statistics.fmean(abs(mm) for mm in self.mm)

    def gross(self) -> int:
        return sum(abs(mm) > GROSS for mm in self.mm)

    def cells(self) -> list[str]:
        return [
            str(len(self)),
            f"{100 * self.mean('dice'):.2f}",
            f"{self.absolute():.2f}",
            f"{statistics.fmean(self.mm):+.2f}",
            f"{statistics.stdev(self.mm):.2f}",
            f"{statistics.median(abs(mm) for mm in self.mm):.2f}",
            str(sum(float(row["iou"]) < 0.5 for row in self.rows)),
        ]


def held_out(measure: str, simulated: bool) -> list[Row]:
    return [row for row in read(PRETRAINED) if (row["measure"], row["simulated"]) == (measure, str(int(simulated)))]


ERRORS = (
    "Dice, %",
    "mean absolute error, mm",
    "mean error, mm",
    "sd of the error, mm",
    "median absolute error, mm",
    "lost",
)


def pretrained_heads() -> str:
    """By true circumference: below 100 mm are HC18's first trimester, above 250 mm its third."""
    rows, found = [], held_out("head_circumference", simulated=False)
    for label, low, high in (
        ("all", 0.0, math.inf),
        ("below 100 mm", 0.0, 100.0),
        ("100 to 250 mm", 100.0, 250.0),
        ("above 250 mm", 250.0, math.inf),
    ):
        rows.append([label, *Errors(row for row in found if low <= float(row["truth_mm"]) < high).cells()])
    return markdown(("heads of HC18", "images", *ERRORS), rows)


def pretrained_phantoms() -> str:
    names = {"head_circumference": "head", "femur_length": "femur"}
    rows = [[name, *Errors(held_out(measure, simulated=True)).cells()] for measure, name in names.items()]
    return markdown(("held-out phantoms", "objects", *ERRORS), rows)


def pretrained_doubts() -> str:
    rows, found = [], held_out("head_circumference", simulated=False)
    gross = Errors(found).gross()
    for label, flag in (("not flagged", "0"), ("uncertain", "1")):
        errors = Errors(row for row in found if row["uncertain"] == flag)
        mine = errors.gross()
        expected = statistics.fmean(float(row["expected_error_mm"]) for row in errors.rows if row["expected_error_mm"])
        cells = [
            str(len(errors)),
            f"{expected:.2f}",
            f"{errors.absolute():.2f}",
            str(mine),
            f"{100 * mine / gross:.0f}",
        ]
        rows.append([label, *cells])
    head = (
        "heads of HC18",
        "images",
        "expected error, mm",
        "mean absolute error, mm",
        f"off by more than {GROSS:g} mm",
    )
    return markdown((*head, "% of those"), rows)


def head_factors() -> str:
    head = ("recipe", *ERRORS[:4], "lost", "training, min")
    columns = ("dice", "mae_mm", "bias_mm", "sd_mm", "lost", "minutes")
    return markdown(head, [[row["recipe"], *(row[column] for column in columns)] for row in read(FACTORS)])


def study(name: str, reference: str, scores: Sequence[str], differences: Sequence[str] = ()) -> Callable[[], str]:
    """A table of famseg-study: scores in %, each beside the published one; differences from the cell `reference`."""

    def table() -> str:
        rows = read(STUDIES / name / "table.csv")
        searched = "learning_rate" in rows[0]
        head = [
            "",
            *(text for score in scores for text in (f"{score} published, %", f"{score} here, %")),
            *(f"{score} minus {reference}" for score in differences),
            "parameters, M",
            *(["learning rate found"] if searched else []),
        ]
        lines = []
        for row in rows:
            cells = [
                text
                for score in scores
                for text in (row[f"{score} published"] or "–", spread(row[f"{score} mean"], row[f"{score} sd"]))
            ]
            cells += [
                bracketed(*(row[f"{score} {part}"] for part in ("difference", "difference_low", "difference_high")))
                for score in differences
            ]
            found = [row["learning_rate"] or "–"] if searched else []
            lines.append([row["cell"], *cells, f"{int(row['parameters']) / 1e6:.2f}", *found])
        return markdown(head, lines)

    return table


def long_runs() -> str:
    lines = [
        [f"`{row['command']}`", f"{int(row['cases']):,}", row["findings"], row["commit"], row["date"]]
        for row in read(LONG_RUNS)
    ]
    return markdown(("command", "cases", "faults found", "commit", "date"), lines)


def spread(mean: str, sd: str) -> str:
    if not mean:  # not run
        return "–"
    return f"{float(mean):.1f} ± {float(sd):.1f}"


def bracketed(mean: str, low: str, high: str) -> str:
    """With its 95 % interval; a dash for the reference itself, and for what has not been run."""
    if not low or float(low) == float(high):
        return "–"
    return f"{float(mean):+.1f} ({float(low):+.1f} to {float(high):+.1f})".replace("-", "−")


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "ranges": ranges,
    "fp32 fwd": passes("fp32", "fwd"),
    "fp32 fwd+bwd": passes("fp32", "fwd+bwd"),
    "bf16 fwd": passes("bf16", "fwd"),
    "bf16 fwd+bwd": passes("bf16", "fwd+bwd"),
    "bf16 and threads": bf16_and_threads,
    "network": network,
    "accelerate": accelerated,
    "rivals, one image": rivals("ms", 1),
    "rivals, eight images": rivals("ms", 8),
    "rivals, memory": rivals("peak_mb", 8),
    "pretrained heads": pretrained_heads,
    "pretrained phantoms": pretrained_phantoms,
    "pretrained doubts": pretrained_doubts,
    "head factors": head_factors,
    "long runs": long_runs,
    "study table1": study("table1", "fusion to stride 2", ("FL", "FB", "mIoU"), ("FL",)),
    "study table3": study("table3", "ours", ("FL", "FB", "mIoU"), ("FL", "mIoU")),
    "study scunext": study("scunext", "UNeXt", ("DSC",), ("DSC",)),
    "study finetune": study("finetune", "baseline", ("PA", "Dice", "mIoU"), ("Dice",)),
}


def filled(text: str) -> str:
    """A page with every table between its markers made anew."""
    return MARKED.sub(lambda found: found[1] + "\n" + TABLES[found["name"]]() + "\n" + found[3], text)


def main() -> int:
    for page in PAGES:
        page.write_text(filled(page.read_text()))
        print(f"written: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
