"""famseg-train: train a FAMSeg on ultrasound; without arguments, famseg_nano on the synthetic phantom."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from famseg.training.config import ConfigError, TrainConfig


def parser() -> ArgumentParser:
    """One flag per field of TrainConfig, and `--config` for a YAML file with the same names."""
    parser = ArgumentParser(prog="famseg-train", description=__doc__)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the settings below")
    parser.add_argument("--summary", action="store_true", help="print parameters and FLOPs of the model and stop")
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=_HINTS[field.name], default=field.default, help=field.metadata["help"])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad usage or input with one clear line, 130 interrupted."""
    options = vars(parser().parse_args(arguments)).copy()
    summary = options.pop("summary")
    options.pop("config")
    # Imported late: --help and usage errors answer at once.
    from famseg.data.errors import DataError

    try:
        config = TrainConfig(**options)
        if summary:
            from famseg.models.summary import summarise

            print(summarise(config.model, config.image_size, **config.model_options()))
            return 0
        from famseg.training.run import train

        out = train(config)
    except (ConfigError, DataError) as error:
        print(f"famseg-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("famseg-train: interrupted", file=sys.stderr)
        return 130
    results = json.loads((out / "metrics.json").read_text())
    scores = ", ".join(f"{name} {iou:.3f}" for name, iou in results["iou"].items() if iou is not None)
    print(f"best epoch {results['best_epoch']}: mIoU {results['miou']:.3f} ({scores}); results in {out}")
    return 0


def _hints() -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(TrainConfig)


_HINTS = _hints()

if __name__ == "__main__":
    sys.exit(main())
