"""One training run from a configuration to a folder of results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch.utils.data import DataLoader, Sampler

from famseg import biometrics
from famseg.data.augment import eval_transform, train_transform, undo_letterbox
from famseg.data.dataset import SegmentationDataset, open_data
from famseg.data.files import write_atomic
from famseg.data.sample import CLASSES, Sample
from famseg.data.split import split_by_subject
from famseg.metrics import SegmentationMetrics
from famseg.reporting.figures import plot_history, plot_overlays
from famseg.training.callbacks import AtomicCheckpointIO, EpochLine, MetricsTable
from famseg.training.config import ConfigError, TrainConfig
from famseg.training.module import SegmentationModule
from famseg_kernels import available_backends

_OVERLAYS = 6


class ShuffledByEpoch(Sampler[int]):
    """A random order that is a function of (seed, epoch) alone; Lightning calls `set_epoch`."""

    def __init__(self, dataset: SegmentationDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch, len(self.dataset)]).permutation(len(self.dataset))
        return iter(order.tolist())


def train(config: TrainConfig) -> Path:
    """Train, then write the results of the best checkpoint; returns the output folder.

    Writes config.yaml, metrics.csv (one row an epoch), metrics.json (best checkpoint on the validation split),
    checkpoints/last.ckpt and best.ckpt, figures/loss.png and figures/overlays.png. Everything is read and checked
    before anything is written.

    Raises:
        ConfigError: a setting that cannot be used here. DataError: data that cannot be used.
    """
    accelerator = _accelerator(config)
    samples = open_data(config.data, image_size=config.image_size, seed=config.seed)
    training_part, validation_part = split_by_subject(samples, config.val_fraction, config.seed)
    training = SegmentationDataset(samples, training_part, train_transform(config.image_size), seed=config.seed)
    validation = SegmentationDataset(samples, validation_part, eval_transform(config.image_size))
    out = _output_folder(config)
    for dataset in (training, validation):
        for position in range(len(dataset)):
            dataset.sample(position)  # decode and check now, not in the middle of the first epoch

    L.seed_everything(config.seed, workers=True, verbose=False)
    module = SegmentationModule(config)
    out.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_atomic(out / "config.yaml", settings.encode())

    batch_size = min(config.batch_size, len(training))
    loader_options: dict[str, Any] = {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": accelerator == "cuda",
    }
    sampler = ShuffledByEpoch(training, config.seed)
    train_loader: DataLoader[Any] = DataLoader(training, batch_size, sampler=sampler, drop_last=True, **loader_options)
    val_loader: DataLoader[Any] = DataLoader(validation, batch_size, **loader_options)
    table = MetricsTable(out / "metrics.csv")
    best = ModelCheckpoint(
        out / "checkpoints",
        filename="best",
        monitor="val_miou",
        mode="max",
        save_last=True,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    _quiet()
    trainer = L.Trainer(
        accelerator="gpu" if accelerator == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_epochs=sum(phase.epochs for phase in module.phases),
        gradient_clip_val=config.clip_norm or None,
        callbacks=[table, EpochLine(), best, RichProgressBar()],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=out,
    )
    started = time.perf_counter()
    trainer.fit(module, train_loader, val_loader)
    seconds = time.perf_counter() - started
    if trainer.interrupted:
        raise KeyboardInterrupt

    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    predictions = list(predict(module, val_loader, torch.device("cuda" if accelerator == "cuda" else "cpu")))
    results = {
        **validation_scores(validation, predictions),
        "best_epoch": checkpoint["epoch"] + 1,
        "epochs": trainer.max_epochs,
        "data": config.data,
        "model": config.model,
        "parameters": sum(p.numel() for p in module.parameters()),
        "train_images": len(training),
        "val_images": len(validation),
        "seed": config.seed,
        "train_seconds": round(seconds, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("famseg", "torch", "lightning")},
    }
    write_atomic(out / "metrics.json", (json.dumps(_without_nan(results), indent=2) + "\n").encode())
    plot_history(table.rows, out / "figures" / "loss.png")
    plot_overlays(overlay_items(validation, predictions), out / "figures" / "overlays.png")
    return out


@torch.no_grad()
def predict(module: SegmentationModule, loader: DataLoader[Any], device: torch.device) -> Iterator[np.ndarray]:
    """Label maps (h, w) uint8 at the network's size, one an image, in the loader's order."""
    module.eval().to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=module.config.precision == "bf16"):
        for batch in loader:
            yield from module(batch["image"].to(device)).argmax(1).to(torch.uint8).cpu().numpy()


def validation_scores(validation: SegmentationDataset, predictions: Sequence[np.ndarray]) -> dict[str, Any]:
    """Overlap scores at the network's size, and errors of the measurements in mm at the images' own size."""
    metrics = SegmentationMetrics(len(CLASSES))
    errors: dict[str, list[float]] = {"head_circumference": [], "femur_length": []}
    missed = dict.fromkeys(errors, 0)
    for position, labels in enumerate(predictions):
        metrics.update(labels, validation[position]["mask"])
        sample = validation.sample(position)
        if sample.pixel_size is None:
            continue
        full = undo_letterbox(labels, *sample.image.shape)
        for name, label, measure in (
            ("head_circumference", 2, biometrics.head_circumference),
            ("femur_length", 1, biometrics.femur_length),
        ):
            truth = getattr(sample, name)
            if truth is None:
                continue
            found = measure(full == label, sample.pixel_size)
            if found is None:
                missed[name] += 1
            else:
                errors[name].append(found - truth)
    scores = metrics.compute()
    results: dict[str, Any] = {
        "miou": scores["miou"],
        "iou": dict(zip(CLASSES, scores["iou"], strict=True)),
        "dice": dict(zip(CLASSES, scores["dice"], strict=True)),
        "pixel_accuracy": scores["pixel_accuracy"],
    }
    for name, values in errors.items():
        if values or missed[name]:
            results[f"{name}_mm"] = {
                "measured": len(values),
                "missed": missed[name],
                "mean_error": float(np.mean(values)) if values else math.nan,
                "sd_error": float(np.std(values)) if values else math.nan,
                "mean_absolute_error": float(np.mean(np.abs(values))) if values else math.nan,
            }
    return results


def overlay_items(
    validation: SegmentationDataset, predictions: Sequence[np.ndarray]
) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Images for the overlay figure, spread evenly from the worst to the best foreground IoU."""
    scored = []
    for position, labels in enumerate(predictions):
        metrics = SegmentationMetrics(len(CLASSES))
        metrics.update(labels, validation[position]["mask"])
        foreground = [iou for iou in metrics.compute()["iou"][1:] if not math.isnan(iou)]
        scored.append((float(np.mean(foreground)) if foreground else 1.0, position))
    scored.sort()
    chosen = np.unique(np.linspace(0, len(scored) - 1, min(_OVERLAYS, len(scored))).round().astype(int))
    items = []
    for place in chosen:
        position = scored[place][1]
        sample: Sample = validation.sample(position)
        full = undo_letterbox(predictions[position], *sample.image.shape)
        items.append((sample.name, sample.image, sample.mask, full))
    return items


def _accelerator(config: TrainConfig) -> str:
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device: cuda was asked for, but torch sees no CUDA GPU; use --device cpu or auto")
    if config.backend not in ("auto", "reference") and (reason := available_backends()[config.backend]) != "ok":
        raise ConfigError(f"backend: {config.backend} is not available: {reason}")
    return "cuda" if has_gpu and config.device != "cpu" else "cpu"


def _output_folder(config: TrainConfig) -> Path:
    if config.out is None:
        return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.model}"
    out = Path(config.out)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"out: expected a new or empty folder, {out} has files in it; choose another --out")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: expected a folder, {out} is a file")
    return out


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what has no value is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _quiet() -> None:
    """Lightning's hints about loggers, workers and hardware are not about this run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
