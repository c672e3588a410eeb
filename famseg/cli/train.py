"""famseg-train: train a FAMSeg on ultrasound; without arguments, famseg_nano on the synthetic phantom."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from famseg.cli.command import build_parser, parse, run
from famseg.options import ConfigError
from famseg.training.config import TrainConfig
from famseg.training.schedule import format_phases

PROG = "famseg-train"
_CONFIGS = Path(__file__).parent.parent / "configs"


def parser() -> ArgumentParser:
    """One flag per field of TrainConfig, and three that train nothing."""
    shipped = ", ".join(sorted(path.stem for path in _CONFIGS.glob("*.yaml")))
    parser = build_parser(
        PROG,
        __doc__,
        TrainConfig,
        config_help=f"YAML file with any of the settings below, or one of those shipped: {shipped}",
    )
    parser.add_argument("--summary", action="store_true", help="print parameters and FLOPs of the model and stop")
    parser.add_argument("--list-models", action="store_true", help="print every model with its size and cost and stop")
    parser.add_argument("--profile", action="store_true", help="print where the time of a training step goes and stop")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad usage or input, 3 diverged, 130 interrupted, 1 anything else."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run(PROG, lambda: _train(_parse(given)), "interrupted; --resume auto with the same --out continues")


def _train(options: dict[str, Any]) -> int:
    summary, listing, profiling = (options.pop(name) for name in ("summary", "list_models", "profile"))
    config = TrainConfig(**options)
    # Imported late: --help and usage errors need none of it.
    if listing:
        from famseg.models.summary import list_models

        for line in list_models(len(config.structures()), config.in_channels):  # each takes about a second
            print(line, flush=True)
        return 0
    if summary:
        from famseg.models.summary import summarise

        network = {"num_classes": len(config.structures()), "in_channels": config.in_channels}
        print(summarise(config.model, config.image_size, **network, **config.model_options()))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    if profiling:
        from famseg.training.profile import profile

        print(profile(config))
        return 0
    from famseg.training.run import train

    out = train(config)
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
    options = parse(parser(), TrainConfig, arguments)
    if options["resume"] is None:
        return options
    from famseg.training.checkpoint import checkpoint_to_resume, stored_config

    path = checkpoint_to_resume(options["resume"], options["out"])
    written = (Path(options["out"]) if path is None else path.parent.parent) / "config.yaml"
    if not written.exists():
        return options
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
    return parse(again, TrainConfig, arguments)


if __name__ == "__main__":
    sys.exit(main())
