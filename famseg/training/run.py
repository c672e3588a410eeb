"""One training run from a configuration to a folder of results."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from famseg.anatomy import names_of
from famseg.data.augment import eval_transform, train_transform
from famseg.data.classes import left_out_of
from famseg.data.dataset import SegmentationDataset, open_data
from famseg.data.split import first_images, k_folds, split_by_subject
from famseg.evaluation import evaluate
from famseg.files.errors import DataError
from famseg.files.lock import folder_for, locked
from famseg.files.writing import write_atomic
from famseg.inference import load_network, mask_excess, predict, read_checkpoint
from famseg.memory import keep_freed_memory
from famseg.models import POOLED_TO_A_PIXEL
from famseg.options import warn_of_slow_bf16
from famseg.reporting.figures import plot_history, plot_overlays
from famseg.results import write_metrics
from famseg.training.checkpoint import (
    Checkpoints,
    checkpoint_to_resume,
    continued,
    stored_config,
    write_checkpoint,
)
from famseg.training.config import ConfigError, Diverged, TrainConfig, device_for
from famseg.training.distributed import (
    Processes,
    RankBatches,
    join_processes,
    run_processes,
    synchronise_batch_norm,
    this_process,
)
from famseg.training.finetune import count_parameters, images_behind, load_weights
from famseg.training.log import MetricsTable, ProgressBar, TimeLeft, epoch_line
from famseg.training.loop import Loop
from famseg.training.loss import parse_class_weights
from famseg.training.module import SegmentationModule
from famseg.training.schedule import phase_at, total_epochs

_OVERLAYS = 6
_ONE_PIXEL = 32  # px: an image up to this size is one pixel in the deepest stage of every network


class ShuffledByEpoch(Sampler[int]):
    """A random order that is a function of (seed, epoch) alone."""

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


@dataclass
class Prepared:
    """What a run iterates over and trains, read and checked, with nothing written yet."""

    device: torch.device
    training: SegmentationDataset
    validation: SegmentationDataset
    train_loader: DataLoader[Any]
    val_loader: DataLoader[Any]
    module: SegmentationModule
    # "trained", "held_out", and with train_images "unused": the name of every image under its digest.
    images: dict[str, dict[str, str]]
    excess: dict[str, float]  # the median `mask_excess` of the images to train on, by measure


def prepare(config: TrainConfig, processes: Processes) -> Prepared:
    """Open the data and make the network.

    Raises:
        ConfigError: a setting that cannot be used here. DataError: data that cannot be used.
    """
    keep_freed_memory()
    accelerator = _accelerator(config, processes)
    classes = config.structures()
    samples = open_data(
        config.data, image_size=config.image_size, seed=config.seed, classes=classes, in_channels=config.in_channels
    )
    if (left_out := left_out_of(samples)) and processes.rank == 0:
        print(f"data '{config.data}': {', '.join(left_out)} counted as background: --classes has {config.classes}")
    if config.folds:
        parts = k_folds(samples, config.folds, config.fold, config.seed)
    else:
        parts = split_by_subject(samples, config.val_fraction, config.seed)
    images: dict[str, dict[str, str]] = {"trained": {}, "held_out": {}}
    if config.train_images is not None:
        kept = first_images(samples, parts[0], config.train_images, config.seed)
        unused = (samples[i] for i in sorted({*parts[0]} - {*kept}))
        images["unused"] = {sample.digest: sample.name for sample in unused}
        parts = kept, parts[1]
    size = config.image_size
    transform = train_transform(size, config.augmentation)
    training = SegmentationDataset(samples, parts[0], transform, seed=config.seed, cache=config.cache)
    validation = SegmentationDataset(samples, parts[1], eval_transform(size), cache=config.cache)
    labelled, unlabelled = set[str](), set[str]()
    pixels, excess = np.zeros(len(classes)), dict[str, list[float]]()
    for dataset, seen in ((training, images["trained"]), (validation, images["held_out"])):
        for position in range(len(dataset)):
            sample = dataset.sample(position)  # decode and check now, not in the middle of the first epoch
            seen[sample.digest] = sample.name
            if dataset is training:
                pixels += np.bincount(sample.mask.ravel(), minlength=len(classes)) / sample.mask.size
                for measure, px in mask_excess(sample, classes, size).items():
                    excess.setdefault(measure, []).append(px)
                labelled |= {*names_of(classes)} - {*sample.unlabelled}
                unlabelled |= {*sample.unlabelled}
    training.partly = {c.name: c.label for c in classes if c.name in labelled & unlabelled}
    validation.partly = {c.name: c.label for c in classes if c.name in unlabelled}
    if training.partly and processes.rank == 0:
        print(f"images whose masks do not have {', '.join(training.partly)} say nothing of it in the loss")
    for name, dataset in (("training", training), ("validation", validation)):
        if len(dataset) < processes.count:
            raise DataError(
                f"data '{config.data}': expected an image for each of {processes.count} processes, "
                f"found {len(dataset)} for {name}"
            )

    batch_size = min(config.batch_size, len(training) // processes.count)
    pooled = config.model in POOLED_TO_A_PIXEL
    if batch_size * processes.count == 1 and (size <= _ONE_PIXEL or pooled):
        remedy = "" if pooled else f", or an image_size above {_ONE_PIXEL}"
        raise ConfigError(
            f"batch_size: one image of {size} px a step ({len(training)} to train on) leaves batch norms of "
            f"{config.model} one value a channel; expected 2 images or more{remedy}"
        )
    if batch_size < config.batch_size and processes.rank == 0:
        print(
            f"batch_size: {config.batch_size} are more than the {len(training)} images to train on; taking {batch_size}"
        )

    torch.manual_seed(config.seed)
    weights = (
        _balanced(pixels)
        if config.class_weights == "balanced"
        else parse_class_weights(config.class_weights, names_of(classes))
    )
    try:
        module = SegmentationModule(
            config,
            processes=processes.count,
            class_weights=weights,
            partly=bool(training.partly),
            channels_last=accelerator == "cuda" if config.channels_last is None else config.channels_last,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if processes.count > 1:
        module.model = synchronise_batch_norm(module.model, accelerator)
    if config.compile:
        module.compiled = torch.compile(module.model.forward)

    workers = config.workers
    if workers is None:
        # Augmenting takes 2 to 3 ms an image: 3 % of a step on a CPU, which needs its cores itself, longer than the
        # step on a GPU.
        workers = min((os.cpu_count() or 1) // processes.local, 8) if accelerator == "cuda" else 0
    options: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": accelerator == "cuda",
    }
    order = ShuffledByEpoch(training, config.seed)
    train_batches = RankBatches(order, batch_size, processes, drop_last=True)
    val_batches = RankBatches(SequentialSampler(validation), batch_size, processes, drop_last=False)
    return Prepared(
        processes.device(accelerator),
        training,
        validation,
        DataLoader(training, batch_sampler=train_batches, **options),
        DataLoader(validation, batch_sampler=val_batches, **options),
        module,
        images,
        {name: float(np.median(values)) for name, values in excess.items()},
    )


def train(config: TrainConfig) -> Path | None:
    """Train, then write the results of the best checkpoint; returns the output folder.

    Writes config.yaml, metrics.csv (one row an epoch), metrics.json (best checkpoint on the validation split),
    checkpoints/last.ckpt and best.ckpt, figures/loss.png and figures/overlays.png. Everything is read and checked
    before anything is written. In a data-parallel run the first process does so; the others return None.

    With `config.resume`, the run continues after its last whole epoch. On a CPU in fp32 it ends bitwise equal to a run
    that was never interrupted.

    Raises:
        ConfigError: a setting that cannot be used here. DataError: data that cannot be used, or another process is at
            work in the output folder.
        Diverged: a loss, gradient or weight is not finite; checkpoints/last.ckpt is from before.
        CheckpointWriteError: the disk is full; the previous checkpoint is whole.
        KeyboardInterrupt: Ctrl-C or SIGTERM; checkpoints/last.ckpt is the last whole epoch's.
    """
    try:
        processes = this_process(config.devices)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with _output_folder(config, processes) as out:
        if processes.count > 1 and not dist.is_torchelastic_launched():
            run_processes(processes.count, _train, config, out)
        else:
            _train(processes, config, out)
    return out if processes.rank == 0 else None


def _train(processes: Processes, config: TrainConfig, out: Path) -> None:
    """This process's part of the run; the first one writes."""
    config, checkpoint_path = _resumed(config, processes)
    config = dataclasses.replace(config, resume=None)  # a run's settings, whether or not it was interrupted
    run = prepare(config, processes)
    checkpoint = None if checkpoint_path is None else _checkpoint(checkpoint_path)
    if checkpoint is not None:
        if before := checkpoint["images"].get("before"):
            run.images["before"] = before
        if checkpoint["images"] != run.images:
            raise ConfigError(
                f"resume: the images of '{config.data}' are not those that the run began with; put them back as they "
                "were, or start anew in another --out"
            )
        try:
            run.module.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ConfigError(f"resume: the weights in {checkpoint_path} do not fit {config.model}: {reason}") from None
    elif config.weights:
        loaded = load_weights(run.module.model, config.weights, config.classes)
        if processes.rank == 0:
            print(f"starting from {loaded}")
        if before := images_behind(config.weights):
            run.images["before"] = before
            if (seen := len(before.keys() & run.images["held_out"].keys())) and processes.rank == 0:
                print(f"{seen} of {len(run.images['held_out'])} held-out images trained it: their scores are too good")
    if processes.rank == 0:
        print("training {:,} of {:,} parameters".format(*count_parameters(run.module.model)))
    join_processes(processes, run.device)
    loop = Loop(run.module, run.train_loader, run.val_loader, device=run.device, processes=processes)
    table = MetricsTable(out / "metrics.csv", out / "tensorboard" if config.tensorboard else None)
    checkpoints = Checkpoints(out / "checkpoints", config.patience)
    done = 0
    if checkpoint is not None:
        loop.resume(checkpoint)
        table.load_state(checkpoint["callbacks"]["MetricsTable"])
        checkpoints.load_state(checkpoint["callbacks"]["Checkpoints"])
        done = checkpoint["epoch"] + 1
    if processes.rank == 0:
        settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
        write_atomic(out / "config.yaml", settings.encode())
    try:
        done = _epochs(loop, {"images": run.images, "excess": run.excess}, table, checkpoints, done)
    except Diverged as error:
        raise Diverged(f"{error}; {_after_divergence(config, checkpoints.last)}") from None
    if dist.is_initialized():
        # DistributedDataParallel first: the last to hold the group waits for its threads, and this one would do so
        # with Python's lock, for which they may be waiting.
        loop.network = loop.module
        dist.destroy_process_group()
    if processes.rank == 0:
        _write_results(out, run, done, table, checkpoints.best)


def _epochs(loop: Loop, facts: dict[str, Any], table: MetricsTable, checkpoints: Checkpoints, done: int) -> int:
    """Train after the `done` epochs to the last one, or until the score is stale; returns the epochs done then.

    Args:
        facts: of the data, for every checkpoint.
    """
    total = total_epochs(loop.module.phases)
    time_left = TimeLeft(done, total)
    first = loop.processes.rank == 0
    with ProgressBar(loop, time_left, disable=not (first and sys.stdout.isatty())) as bar:
        for epoch in range(done, total):
            if checkpoints.stale(epoch - 1):
                break
            train_loss = loop.train_epoch(epoch, bar.trained)
            scores = loop.validate(bar.validated)
            row = {
                "epoch": epoch + 1,
                "phase": phase_at(loop.module.phases, epoch).optimizer,
                "learning_rate": loop.optimizer.param_groups[0]["lr"],
                "train_loss": train_loss,
                **{name: scores[name] for name in ("val_loss", "val_miou", *sorted(scores))},
            }
            best = checkpoints.better(epoch, scores["val_miou"])
            done = epoch + 1
            if not first:
                continue
            table.add(row)
            # Under the names that checkpoints have had from the beginning.
            states = {"MetricsTable": table.state(), "Checkpoints": checkpoints.state()}
            checkpoint = {**loop.state(), **facts, "callbacks": states}
            for path in (checkpoints.best, checkpoints.last) if best else (checkpoints.last,):
                write_checkpoint(checkpoint, path)
            # After the checkpoint, which must not depend on who reads the output.
            print(epoch_line(row, time_left, loop.classes[1:]), flush=True)
            bar.scores = row
    table.close()
    return done


def _write_results(out: Path, run: Prepared, epochs: int, table: MetricsTable, best: Path) -> None:
    """What the best checkpoint finds in the held-out images, as numbers and figures."""
    config = run.module.config
    table.write()  # where the last sitting ended between its checkpoint and the table
    network = load_network(best)
    held_out = [run.validation.sample(position) for position in range(len(run.validation))]
    labels = predict(network, (s.image for s in held_out), device=run.device.type, backend=config.backend)
    evaluation = evaluate(held_out, labels, network.classes)
    facts = {
        "best_epoch": network.epoch,
        "epochs": epochs,
        "data": config.data,
        "model": config.model,
        "parameters": network.parameters,
        "train_images": len(run.training),
        "val_images": len(run.validation),
        "val_digest": hashlib.blake2b("".join(sorted(run.images["held_out"])).encode(), digest_size=8).hexdigest(),
        "seed": config.seed,
        "train_seconds": round(table.seconds, 1),
    }
    write_metrics(out, evaluation, facts)
    plot_history(table.rows, out / "figures" / "loss.png", network.classes)
    worst_to_best = evaluation.ranking()
    spread = np.linspace(0, len(held_out) - 1, min(_OVERLAYS, len(held_out))).round().astype(int)
    shown = [(held_out[i], evaluation.labels(i)) for i in (worst_to_best[place] for place in spread)]
    items = [(s.name, s.image, s.mask, found) for s, found in shown]
    plot_overlays(items, out / "figures" / "overlays.png", network.classes)


def _resumed(config: TrainConfig, processes: Processes) -> tuple[TrainConfig, Path | None]:
    """The run's configuration (with its own folder as `out`), and the checkpoint it continues from, if any."""
    if config.resume is None:
        return config, None
    path = checkpoint_to_resume(config.resume, config.out)
    if path is not None:
        checkpoint = _checkpoint(path)
        stored = stored_config(checkpoint["config"], path)
        config = continued(config, stored, checkpoint["epoch"] + 1, processes.count, checkpoint.get("processes", 1))
        return dataclasses.replace(config, out=config.out or str(path.parent.parent), resume="auto"), path
    assert config.out is not None
    written = Path(config.out) / "config.yaml"
    if written.exists():  # interrupted before its first checkpoint
        stored = stored_config(yaml.safe_load(written.read_text()), written)
        config = continued(config, stored, 0, processes.count, processes.count)
    return config, None


def _checkpoint(path: Path) -> dict[str, Any]:
    try:
        return read_checkpoint(path)
    except DataError as error:
        raise ConfigError(f"resume: {error}") from error


def _accelerator(config: TrainConfig, processes: Processes) -> str:
    accelerator = device_for(config.device, config.backend)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard: the package is not installed; pip install tensorboard, or leave the flag away")
    if accelerator == "cuda" and processes.local > torch.cuda.device_count():
        raise ConfigError(f"devices: expected at most the {torch.cuda.device_count()} GPUs here, got {processes.local}")
    if accelerator == "cpu" and config.precision == "fp16":
        raise ConfigError("precision: fp16 is for GPUs; use bf16 or fp32 on a CPU")
    warn_of_slow_bf16(config.precision, accelerator)
    if config.cuda_graph and (accelerator == "cpu" or processes.count > 1):
        here = f"{processes.count} processes" if accelerator == "cuda" else "a CPU"
        raise ConfigError(f"cuda_graph: is for one process with a GPU, this run is of {here}; leave it out")
    return accelerator


def _output_folder(config: TrainConfig, processes: Processes) -> AbstractContextManager[Path]:
    """The run's folder, locked by the first process."""
    out = folder_for(config.out, config.model)
    if config.resume is None:
        fresh, remedy = True, "choose another --out, or continue the run in it with --resume auto"
    else:
        path = checkpoint_to_resume(config.resume, config.out)
        out = out if path is None else path.parent.parent
        fresh, remedy = not (out / "config.yaml").exists(), "but no run to continue; choose another --out"
        if path is not None and not path.exists():
            return nullcontext(out)  # reading it will say so
    return locked(out, remedy, fresh=fresh) if processes.rank == 0 else nullcontext(out)


def _after_divergence(config: TrainConfig, last: Path) -> str:
    """What to do about it."""
    own = [phase.rates is not None for phase in config.plan()]
    lower = "a lower " + " and ".join(
        name for name, used in (("--learning-rate", not all(own)), ("lr in --phases", any(own))) if used
    )
    if config.precision == "fp16":
        lower += ", or --precision bf16"
    if config.clip_norm == 0:
        lower += ", or --clip-norm 1"
    if not last.exists():
        return f"no epoch was finished; start anew with {lower}"
    return f"{last} is from the epoch before and whole: start from it with --weights, another --out and {lower}"


def _balanced(frequency: np.ndarray) -> list[float]:
    """Median-frequency balancing (Eigen and Fergus 2015): a class that never occurs in training counts as the rest."""
    present = frequency > 0
    weights = np.ones(len(frequency))
    weights[present] = np.median(frequency[present]) / frequency[present]
    return weights.tolist()
