"""What others build on: names and signatures, op schemas, flags, and the files that the commands write.

`tests/interface.txt` is all of it. Where this test finds a difference, users will too: CONTRIBUTING.md says what to do.
`python -m tests.test_interface` writes the file anew.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import inspect
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import famseg
import famseg_kernels as fk
from famseg.cli import evaluate, export, predict, study, train
from famseg.data.phantom import Phantom
from famseg.files.images import write_image
from famseg.models import MODELS
from famseg.study.plan import flattened
from famseg.training.config import TrainConfig

WRITTEN = Path(__file__).parent / "interface.txt"
SHIPPED = Path(famseg.__file__).parent
OPTIONS = {
    train: TrainConfig,
    evaluate: evaluate.Options,
    predict: predict.Options,
    export: export.Options,
    study: study.Options,
}


def names_of(module: ModuleType) -> Iterator[str]:
    """Public names with what they take; of classes also the public methods and properties that are their own."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for name in sorted(getattr(module, "__all__", own)):
        value = getattr(module, name)
        where = f"{module.__name__}.{name}"
        if not callable(value):
            yield where
            continue
        yield f"{where}{inspect.signature(value)}"
        if inspect.isclass(value):
            yield from (f"{where}.{part}" for part in sorted(vars(value)) if not part.startswith("_"))


def flags_of(command: ModuleType, options: type) -> Iterator[str]:
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name):
        yield f"{command.PROG} --{field.name.replace('_', '-')}: {field.type} = {default(field)!r}"


def default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def written_by_the_commands(folder: Path) -> Iterator[str]:
    """The files of a run, a prediction and an evaluation, with their columns and keys."""
    image = folder / "image.png"
    write_image(image, Phantom(1, (64, 64), 0)[0].image)
    size = ["--image-size", "32", "--batch-size", "2", "--phases", "adamw:1"]
    assert train.main(["--out", f"{folder}/train", "--data", "phantom:8", "--model", "unext", *size]) == 0
    checkpoint = f"{folder}/train/checkpoints/best.ckpt"
    lengths = ["--pixel-size", "0.5", "--gestational-age"]
    assert predict.main([checkpoint, str(image), "--out", f"{folder}/predict", *lengths]) == 0
    assert evaluate.main([checkpoint, "--out", f"{folder}/evaluate"]) == 0
    for path in sorted(path for path in folder.glob("*/**/*") if path.is_file()):
        where = path.relative_to(folder)
        yield f"{where}"
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                yield from (f"{where}: {column}" for column in next(csv.reader(file)))
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            # Two levels: what is below depends on what was found.
            yield from dict.fromkeys(f"{where}: {'.'.join(key.split('.')[:2])}" for key in flattened(content))
        elif path.suffix == ".ckpt":
            keys = torch.load(path, weights_only=True)
            yield from (f"{where}: {key}" for key in sorted(keys))


def interface(folder: Path) -> str:
    lines = [*names_of(fk), *names_of(fk.flops), *names_of(famseg)]
    lines += [f"{overload._schema}" for op in fk.OPERATIONS for overload in (op.overload, op.backward_overload)]
    lines += [line for command, options in OPTIONS.items() for line in flags_of(command, options)]
    lines += [f"model {name}" for name in MODELS]
    lines += [f"{path.relative_to(SHIPPED)}" for path in sorted(SHIPPED.glob("**/*.yaml"))]
    lines += written_by_the_commands(folder)
    return "\n".join(lines) + "\n"


def test_what_others_build_on_is_as_it_is_written_down(tmp_path: Path) -> None:
    now, written = interface(tmp_path).splitlines(), WRITTEN.read_text().splitlines()
    gone = [line for line in written if line not in now]
    new = [line for line in now if line not in written]
    assert not gone and not new, 'see CONTRIBUTING.md, "Change what others build on"'
    assert now == written


def test_both_packages_have_the_version_of_the_distribution() -> None:
    assert fk.__version__ == famseg.__version__ == importlib.metadata.version("famseg")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        WRITTEN.write_text(interface(Path(folder)))
