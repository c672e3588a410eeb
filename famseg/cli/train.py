"""famseg-train: train a FAMSeg on ultrasound; without arguments, famseg_nano on the synthetic phantom."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from famseg.training.config import ConfigError, TrainConfig
from famseg.training.schedule import format_phases

_CONFIGS = Path(__file__).parent.parent / "configs"


def parser() -> ArgumentParser:
    """One flag per field of TrainConfig, and `--config` for a YAML file with the same names."""
    shipped = ", ".join(sorted(path.stem for path in _CONFIGS.glob("*.yaml")))
    parser = ArgumentParser(prog="famseg-train", description=__doc__)
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help=f"YAML file with any of the settings below, or one of those shipped: {shipped}",
    )
    parser.add_argument("--summary", action="store_true", help="print parameters and FLOPs of the model and stop")
    parser.add_argument("--profile", action="store_true", help="print where the time of a training step goes and stop")
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        switch: dict[str, Any] = {"nargs": "?", "const": True} if hints[field.name] is bool else {}
        parser.add_argument(flag, type=hints[field.name], default=field.default, help=field.metadata["help"], **switch)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad usage or input with one clear line, 130 interrupted, 1 anything else."""
    # Imported late: --help and usage errors answer at once.
    from famseg.data.errors import DataError

    try:
        options = _parse(sys.argv[1:] if arguments is None else list(arguments))
        summary, profiling = options.pop("summary"), options.pop("profile")
        options.pop("config")
        config = TrainConfig(**options)
        if summary:
            from famseg.models.summary import summarise

            print(summarise(config.model, config.image_size, **config.model_options()))
            return 0
        _terminate_like_ctrl_c()
        if profiling:
            from famseg.training.profile import profile

            print(profile(config))
            return 0
        from famseg.training.run import train

        out = train(config)
    except (ConfigError, DataError) as error:
        print(f"famseg-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("famseg-train: interrupted; --resume auto with the same --out continues", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"famseg-train: {error}", file=sys.stderr)
        return 1
    if out is None:  # the first process of a data-parallel run reports
        return 0
    results = json.loads((out / "metrics.json").read_text())
    scores = ", ".join(f"{name} {iou:.3f}" for name, iou in results["iou"].items() if iou is not None)
    print(f"best epoch {results['best_epoch']}: mIoU {results['miou']:.3f} ({scores}); results in {out}")
    return 0


def _parse(arguments: list[str]) -> dict[str, Any]:
    """The settings: flags over `--config` over those of the run to resume over the defaults."""
    for i, argument in enumerate(arguments):  # `--config adamw-cos` for a shipped file
        name = argument.removeprefix("--config=")
        given = name != argument or arguments[i - 1 : i] == ["--config"]
        if given and not Path(name).exists() and (_CONFIGS / f"{name}.yaml").exists():
            arguments[i] = argument.removesuffix(name) + str(_CONFIGS / f"{name}.yaml")
    options = parser().parse_args(arguments)
    if options.resume is None:
        return vars(options).copy()
    from famseg.training.checkpoint import checkpoint_to_resume, stored_config

    path = checkpoint_to_resume(options.resume, options.out)
    written = (Path(options.out) if path is None else path.parent.parent) / "config.yaml"
    if not written.exists():
        return vars(options).copy()
    try:
        settings = yaml.safe_load(written.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"resume: {written} is damaged; put the run's settings back or start anew in another --out")
    stored = stored_config(settings, written)
    again = parser()
    # Phases spelled out: `--epochs` then means how long the run is to be, not how it had been stretched.
    defaults = dataclasses.asdict(stored) | {"phases": format_phases(stored.plan()), "epochs": None}
    again.set_defaults({name: value for name, value in defaults.items() if name not in ("out", "resume")})
    return vars(again.parse_args(arguments)).copy()


def _terminate_like_ctrl_c() -> None:
    from famseg.training.callbacks import interrupt

    signal.signal(signal.SIGTERM, interrupt)


if __name__ == "__main__":
    sys.exit(main())
