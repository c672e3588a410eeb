"""What a study is: cells (a name and options of TrainConfig), repeated over seeds or folds, as a YAML file.

    title: one line
    about: a sentence or more for the page (optional)
    scores: {COLUMN: KEY of metrics.json, dots between levels}
    reference: the cell that the others are compared with
    options: {of every cell} (optional)
    budgets: {NAME: {seeds: N or folds: N, search: {OPTION: [values]} (optional), and any options of TrainConfig}}
    cells: {NAME: {any options of TrainConfig, published: [a figure a column, or null], against: CELL}}

Options of a cell go over its budget's, those over the study's. The images and the classes are the study's: a cell
cannot change them. `against` names another cell than the reference to compare this one with. With `search` every cell
is first trained once with each of the values, with a seed that none of its runs has, and then has the one of the best
mIoU; a cell that gives the option itself is not searched.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jsonargparse import ArgumentParser

from famseg.anatomy import BY_LABEL, CLASSES, DEFAULT, Structure, names_of, parse_classes
from famseg.data.dataset import open_data
from famseg.data.sample import Sample
from famseg.evaluation import evaluate
from famseg.models import create_model
from famseg.models.summary import cost
from famseg.options import ConfigError, expect_no_references
from famseg.training.config import TrainConfig
from famseg.training.finetune import STRATEGIES, count_parameters, freeze

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "studies").glob("*.yaml"))}
_MOST = 1000  # runs of a cell
_KEYS = ("title", "about", "scores", "reference", "options", "budgets", "cells")
_OF_THE_STUDY = (
    *("data", "classes", "in_channels", "image_size", "val_fraction"),
    *("seed", "folds", "fold", "out", "resume"),
)
_OPTIONS = tuple(field.name for field in dataclasses.fields(TrainConfig))
# One step of every cell: as many images to train on as a batch has.
_SMOKE = {"data": "phantom:10", "image_size": 64, "batch_size": 8, "patience": 0, "precision": "fp32", "devices": 1}


@dataclass(frozen=True)
class Run:
    """One training of a cell."""

    cell: str
    repeat: str  # "seed 0" or "fold 0": runs of two cells with the same repeat are a pair; or "search VALUE"
    config: TrainConfig
    folder: Path  # in the study's folder
    searches: bool = False  # tries a value for the cell's other runs, and is in no table but runs.csv


class Sizes(NamedTuple):
    """Of a cell's network; columns of runs.csv."""

    parameters: int
    trained: int  # parameters that learn
    macs_256: int  # multiply–adds of an image of 256 × 256


@dataclass(frozen=True)
class Study:
    """A study with one of its budgets: all that is to be run, checked."""

    name: str
    title: str
    about: str
    budget: str
    scores: Mapping[str, str]  # column → key of metrics.json
    references: Mapping[str, str]  # cell → the one that it is compared with
    published: Mapping[str, Mapping[str, float]]  # cell → column → the paper's figure, as printed
    runs: Sequence[Run]
    search: str | None  # the option of which every cell's searching runs choose a value for its others
    sizes: Mapping[str, Sizes]
    smoke: bool
    source: Mapping[str, Any]  # the file's content with this budget alone

    @property
    def cells(self) -> list[str]:
        return list(self.published)

    @property
    def counted(self) -> list[Run]:
        """The runs that tables and pictures are of: those that do not search."""
        return [run for run in self.runs if not run.searches]

    @property
    def repeats(self) -> int:
        """Runs of a cell that count."""
        return len(self.counted) // len(self.cells)


def read_study(
    name: str, budget: str | None = None, data: str | None = None, weights: str | None = None, smoke: bool = False
) -> Study:
    """A shipped study by its name, or a file's. Nothing is trained yet, but every network has been built once.

    Args:
        budget: one of the study's; default: its first.
        data: instead of the budget's.
        weights: the file for cells that say `weights: given`.
        smoke: one step of every cell with the first seed or fold, on tiny phantoms where these have its classes.

    Raises:
        ConfigError: no such study or budget, an unknown key, or a cell that cannot be run; the message names it.
        DataError: the data cannot be opened.
    """
    content = _content(name)
    title = _section(content, "title", str)
    cells = _section(content, "cells", dict)
    budgets = _section(content, "budgets", dict)
    scores = _section(content, "scores", dict)
    _expect("reference", [content.get("reference")], cells)
    _expect("budget", [budget] if budget else [], budgets)
    budget = budget or next(iter(budgets))
    repeats, shared = _repeats(f"budget {budget}", _mapping(budgets[budget], f"budget {budget}"), smoke)
    search, values = _search(f"budget {budget}", shared.pop("search", None))
    shared = _mapping(content.get("options") or {}, "options") | shared | ({"data": data} if data else {})
    try:
        classes = parse_classes(str(shared.get("classes", DEFAULT)))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _expect("score", scores.values(), known_scores(classes))
    phantoms = smoke and set(names_of(classes)) <= set(CLASSES)
    if not phantoms and "data" not in shared:
        raise ConfigError(f"data: this study is of your own images; give them like {name} --data hc18:DIR")
    if search in shared:
        raise ConfigError(f"budget {budget}: search: {search} has a value already; leave one of the two out")
    runs, references, published, sizes = [], {}, {}, {}
    for cell, options in cells.items():
        cell, where = str(cell), f"cell '{cell}'"
        options = dict(_mapping(options or {}, where))
        figures, references[cell] = options.pop("published", []), options.pop("against", content["reference"])
        _expect(f"{where}: against", [references[cell]], cells)
        if not isinstance(figures, list) or len(figures) not in (0, len(scores)) or not all(map(_is_figure, figures)):
            names = ", ".join(map(str, scores))
            raise ConfigError(f"{where}: published: expected {len(scores)} figures ({names}) or none")
        published[cell] = {column: float(f) for column, f in zip(scores, figures, strict=False) if f is not None}
        own = list(options)
        if common := [key for key in _OF_THE_STUDY if key in own]:
            raise ConfigError(f"{where}: {common[0]}: is the same for all cells; put it into the budget")
        options = shared | options | (_smoke(shared | options, phantoms) if smoke else {})
        if options.get("weights") == "given":
            if weights is None and not smoke:
                raise ConfigError(f"{where}: starts from given weights; name their file with --weights FILE")
            options["weights"] = weights
            if weights is None and options.get("strategy") in STRATEGIES:  # which would not start without
                options["trainable"] = STRATEGIES[options.pop("strategy")][1]
        try:
            config = _config(options)
            if config.weights and not Path(config.weights).is_file():
                raise ConfigError(f"weights: {config.weights} is no file")
            network = {"num_classes": len(classes), "in_channels": config.in_channels, **config.model_options()}
            sizes[cell] = _sizes(config.model, frozenset(network.items()), config.learning_part(), config.train_head)
            for value in [] if smoke or search in own else values:
                repeat = f"search {value}"
                tried = _config({**options, **_unused(repeats), str(search): value})
                runs.append(Run(cell, repeat, tried, Path(_slug(cell), _slug(repeat)), searches=True))
            for repeat, setting in repeats.items():
                folder = Path(_slug(cell), _slug(repeat))
                runs.append(Run(cell, repeat, dataclasses.replace(config, **setting), folder))
        except ValueError as error:  # ConfigError, and what a network says itself
            raise ConfigError(f"{where}: {error}") from None
    if len({run.folder for run in runs}) < len(runs):
        raise ConfigError("cells: two names differ only in signs; rename one")
    first = runs[0].config
    open_data(first.data, image_size=first.image_size, seed=first.seed, classes=classes, in_channels=first.in_channels)
    if weights is not None and not any(run.config.weights == weights for run in runs):
        raise ConfigError(f"weights: no cell of {name} starts from given weights; leave them out")
    source = {**content, "budgets": {budget: {**budgets[budget], "data": first.data}}}
    about = str(content.get("about", ""))
    return Study(name, title, about, budget, scores, references, published, runs, search, sizes, smoke, source)


def listing() -> str:
    """The shipped studies, a line each."""
    lines = []
    for name in SHIPPED:
        content = _content(name)
        budgets = []
        for budget, options in content["budgets"].items():
            repeats, options = _repeats(budget, options, False)
            search, values = _search(budget, options.get("search"))
            searched = sum(search not in (cell or {}) for cell in content["cells"].values()) * len(values)
            budgets.append(f"{budget} {len(content['cells']) * len(repeats) + searched} runs")
        lines.append(f"{name:16}{len(content['cells']):3} cells, {', '.join(budgets):28} {content['title']}")
    return "\n".join(lines)


def known_scores(classes: Sequence[Structure] = BY_LABEL) -> set[str]:
    """Keys of a row of runs.csv that are scores."""
    rows, columns = np.ogrid[:32, :32]
    disc = (rows - 16) ** 2 + (columns - 16) ** 2 < 100
    masks = [disc * np.uint8(structure.label) for structure in classes[1:] for _ in range(2)]  # two have a spread
    samples = [Sample("", "", mask, mask, pixel_size=1.0) for mask in masks]
    return set(flattened(evaluate(samples, masks, classes).summary()))


def flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings and pairs as one level, with dots between: {"iou": {"FL": 1}} → {"iou.FL": 1}."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, list):
            value = dict(zip(("low", "high"), value, strict=True))
        inner = {f"{key}.{name}": v for name, v in flattened(value).items()} if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else inner
    return flat


def _content(name: str) -> dict[str, Any]:
    path = SHIPPED.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(f"study: expected a file or one of {', '.join(SHIPPED)}, got {name!r}")
    try:
        text = path.read_text(encoding="utf-8")
        expect_no_references(text)
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # 2001-99-99 is a ValueError
        raise ConfigError(f"study: {path} cannot be read: {' '.join(str(error).split())}") from None
    content = _mapping(content, str(path))
    _expect("study key", content, _KEYS)
    return content


def _section(content: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(value := content.get(key), kind) or not value:
        raise ConfigError(f"{key}: the study has none, or not as {'text' if kind is str else 'a mapping'}")
    return value


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping of names to values, got {value!r}")
    return value


def _expect(what: str, given: Any, known: Any) -> None:
    known = list(known)  # YAML has names that cannot be hashed
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f"{what}: expected one of {', '.join(map(str, known))}, got {unknown[0]!r}")


def _is_figure(value: object) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))  # type: ignore[arg-type]


def _repeats(where: str, budget: Mapping[str, Any], smoke: bool) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What differs from run to run of a cell, by its name; and the budget's options."""
    options = {name: value for name, value in budget.items() if name not in ("seeds", "folds")}
    given = [name for name in ("seeds", "folds") if name in budget]
    if len(given) != 1 or type(count := budget[given[0]]) is not int or not 1 <= count <= _MOST:
        raise ConfigError(f"{where}: expected `seeds: N` or `folds: N` with a whole number from 1 to {_MOST}")
    numbers = range(1 if smoke else count)
    if given == ["seeds"]:
        return {f"seed {i}": {"seed": i} for i in numbers}, options
    return {f"fold {i}": {"folds": count, "fold": i} for i in numbers}, options


def _search(where: str, given: object) -> tuple[str | None, list[Any]]:
    """The option and its values; (None, []) without a search."""
    if given is None:
        return None, []
    (option, values), *others = _mapping(given, f"{where}: search").items() or [(None, None)]
    if others or option in _OF_THE_STUDY or not isinstance(values, list) or len(set(map(str, values))) < 2:
        raise ConfigError(
            f"{where}: search: expected one option of a cell with two values or more, "
            f"like {{learning_rate: [0.04, 0.01]}}, got {given!r}"
        )
    _expect(f"{where}: search: option", [option], _OPTIONS)
    return option, values


def _unused(repeats: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """What a searching run has for a repeat: a seed that no other run has; of folds the first."""
    first = next(iter(repeats.values()))
    return first if "fold" in first else {"seed": len(repeats)}


def _smoke(options: Mapping[str, Any], phantoms: bool) -> dict[str, Any]:
    """One epoch of one step; with several optimizers in turn, an epoch of each.

    Args:
        phantoms: instead of the study's images, whose classes they do not have otherwise.
    """
    phases = len(str(options.get("phases", TrainConfig.phases)).split(","))
    few = {"train_images": _SMOKE["batch_size"]} if "train_images" in options or not phantoms else {}
    data = {} if phantoms else {"data": options["data"]}
    return {**_SMOKE, **few, **data, "epochs": max(phases, 2 if options.get("decay") == "adadelta" else 1)}


def _config(options: Mapping[str, Any]) -> TrainConfig:
    _expect("option", options, _OPTIONS)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, as_group=False)
    try:
        return TrainConfig(**parser.parse_object(dict(options)).as_dict())
    except argparse.ArgumentError as error:
        words = re.sub(r'^Parser key "(\w+)":', r"\1:", " ".join(str(error).split()))
        raise ConfigError(words) from None


@functools.cache
def _sizes(model: str, options: frozenset[tuple[str, Any]], part: str, head: bool) -> Sizes:
    """Raises ValueError for a model or part that cannot be, or a package that is missing."""
    parameters, macs = cost(model, **dict(options))
    network = create_model(model, **dict(options))
    freeze(network, part, head)
    return Sizes(parameters, count_parameters(network)[0], macs)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")
