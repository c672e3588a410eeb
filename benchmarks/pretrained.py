"""`python -m benchmarks.pretrained --folds RUN... --final RUN`: the network that comes with famseg, out of its runs.

Every run of `--folds` (famseg-train --folds N, the same recipe) measures the images that it did not see; what is known
of the network's errors is fitted to these. `--final` is the run that ships. Writes famseg/pretrained/famseg.ckpt, and
benchmarks/results/pretrained.csv: a row for each held-out object that has a known length. Whether a measurement is
expected to be wrong was judged there by the errors of the other folds.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from famseg.anatomy import measures_of
from famseg.cli.command import progress
from famseg.cli.evaluate import select
from famseg.data.sample import Sample
from famseg.evaluation import score_image
from famseg.files.tables import write_table
from famseg.inference import PRETRAINED, Network, load_network, read_checkpoint, readings, weights_of
from famseg.training.checkpoint import write_checkpoint
from famseg.uncertainty import Expectation, fit_expectation

RESULTS = Path(__file__).parent / "results" / "pretrained.csv"
_UNKNOWN = Expectation((0.0, 0.0, 0.0), math.inf)


@dataclass(frozen=True)
class Measurement:
    """An object of a held-out image whose length is known."""

    fold: int
    measure: str
    sample: Sample
    dice: float
    iou: float
    measured: float | None  # mm
    signs: np.ndarray | None  # mm; None where nothing was measured

    @property
    def truth(self) -> float:
        known = self.sample.true_length(self.measure)
        assert known is not None
        return known

    @property
    def error(self) -> float:
        """mm; what was not found is measured as 0."""
        return (self.measured or 0.0) - self.truth


def measurements(network: Network) -> Iterator[Measurement]:
    """Of the images that the run of a fold did not see."""
    names = {structure: measure.name for structure, measure in measures_of(network.classes).items()}
    watched = dataclasses.replace(network, expectations=dict.fromkeys(names.values(), _UNKNOWN))
    selection = select(network, None, "held-out", None)
    samples = [selection.samples[i] for i in progress(selection.indices, "reading")]
    for sample, reading in zip(samples, readings(watched, (s.image for s in samples)), strict=True):
        score = score_image(sample, reading, watched.classes)
        for structure, name in names.items():
            if sample.pixel_size is None or sample.true_length(name) is None:
                continue
            found = score.objects[structure]
            signs = reading.signs.get(name)
            dice, iou = found.dice or 0.0, found.iou or 0.0
            measured = score.lengths[structure].measured
            mm = None if signs is None else signs * sample.pixel_size
            yield Measurement(network.config["fold"], name, sample, dice, iou, measured, mm)


def fitted(found: Sequence[Measurement]) -> dict[str, Expectation]:
    """What is to be expected of each measure, from those that were measured."""
    expectations = {}
    for name in dict.fromkeys(one.measure for one in found):
        mine = [one for one in found if one.measure == name and one.signs is not None]
        signs = np.stack([one.signs for one in mine if one.signs is not None])
        expectations[name] = fit_expectation(signs, np.array([abs(one.error) for one in mine]))
    return expectations


def rows(found: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The lines of the result file."""
    folds = {one.fold for one in found}
    by_others = {fold: fitted([one for one in found if one.fold != fold]) for fold in folds}
    table = []
    for one in found:
        expectation = by_others[one.fold][one.measure]
        expected = None if one.signs is None else expectation.error(one.signs)
        table.append(
            {
                "fold": one.fold,
                "image": one.sample.name,
                "simulated": int(one.sample.simulated),
                "measure": one.measure,
                "truth_mm": one.truth,
                "measured_mm": one.measured,
                "error_mm": one.error,
                "expected_error_mm": expected,
                "uncertain": int(expected is not None and expected > expectation.doubtful),
                "dice": one.dice,
                "iou": one.iou,
                "pixel_size_mm": one.sample.pixel_size,
            }
        )
    return table


def pack(final: Path, expectations: dict[str, Expectation]) -> dict[str, Any]:
    """The checkpoint that ships: weights, settings, what is known of the errors; nothing that only training needs."""
    checkpoint = read_checkpoint(final)
    config = checkpoint["config"] | {"out": None}
    parts = (part.split(":", 1) for part in config["data"].split(","))
    config["data"] = ",".join(f"{scheme}:{Path(where).name}" for scheme, where in parts)
    return {
        "config": config,
        "state_dict": {f"model.{name}": value for name, value in weights_of(checkpoint).items()},
        "epoch": checkpoint["epoch"],
        "images": checkpoint["images"],
        "optimizer_states": [],
        "excess": checkpoint["excess"],
        "expectations": {name: dataclasses.asdict(expectation) for name, expectation in expectations.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrained", description=__doc__)
    parser.add_argument("--folds", nargs="+", required=True, type=Path, help="folders of runs, one a fold")
    parser.add_argument("--final", type=Path, help="folder of the run that ships; without it only the results")
    options = parser.parse_args()
    found = []
    for run in options.folds:
        network = load_network(run / "checkpoints" / "last.ckpt")
        mine = list(measurements(network))
        found += mine
        print(f"{run}: {len(mine)} objects", flush=True)
    write_table(RESULTS, rows(found))
    print(f"written: {RESULTS}")
    if options.final:
        last = options.final / "checkpoints" / "last.ckpt"
        write_checkpoint(pack(last, fitted(found)), PRETRAINED)
        load_network(PRETRAINED)
        print(f"written: {PRETRAINED}, {PRETRAINED.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
