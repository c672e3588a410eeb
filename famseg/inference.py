"""A trained network from its checkpoint, and label maps of images of any size.

The network sees every image letterboxed to its own square size. Its *logits*, not its labels, are brought back to the
image's pixels before the class is chosen: enlarged labels would show the teeth of the network's grid.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg.anatomy import DEFAULT, Structure, parse_classes
from famseg.biometrics import Axis, Ellipse
from famseg.data.augment import channels_first, letterbox, letterbox_scale, letterbox_window, normalise
from famseg.data.sample import Sample
from famseg.files.errors import DataError
from famseg.models import create_model, optimize_for_inference, option_names
from famseg.uncertainty import Expectation, signs_of
from famseg_kernels.backends import requesting

PRETRAINED = Path(__file__).parent / "pretrained" / "famseg.ckpt"
_ANOTHER = "use another checkpoint of famseg-train, like RUN/checkpoints/best.ckpt"
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Network:
    """A trained model and what must be known to use it."""

    model: nn.Module  # (N, in_channels, h, w) normalised → logits (N, classes, h, w); in evaluation mode
    config: dict[str, Any]  # the training run's settings
    images: dict[str, dict[str, str]]  # "trained", "held_out", "unused" where a run left some: names by digests
    epoch: int  # epochs trained
    image_size: int  # side of the square input, px
    path: Path
    excess: Mapping[str, float] = field(default_factory=dict)  # median `mask_excess` of what trained it, by measure
    expectations: Mapping[str, Expectation] = field(default_factory=dict)  # of its errors, by measure

    @functools.cached_property
    def classes(self) -> tuple[Structure, ...]:
        """By label: the channels of the logits. A checkpoint that says nothing of them is of the default ones.

        Their measures are of masks as the network draws them, and take off what its training masks measure too much.
        """
        return tuple(self._calibrated(structure) for structure in parse_classes(self.config.get("classes", DEFAULT)))

    def _calibrated(self, structure: Structure) -> Structure:
        measure = structure.measure
        if measure is None or not (excess := self.excess.get(measure.name)):
            return structure

        def fit(mask: np.ndarray) -> Ellipse | Axis | None:
            shape, (height, width) = measure.fit(mask), mask.shape
            scale = letterbox_scale(height, width, self.image_size)
            return None if shape is None else shape.shortened(excess / scale)

        return dataclasses.replace(structure, measure=dataclasses.replace(measure, fit=fit))

    @property
    def in_channels(self) -> int:
        """1: grey, 3: colour."""
        return int(self.config.get("in_channels", 1))

    def views(self, flips: bool) -> int:
        """How many views of an image are averaged: 1, 2 with its mirror image, or 4 (`readings`)."""
        return 4 if self.expectations else 2 if flips else 1

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class Reading:
    """What a network found in one image."""

    labels: np.ndarray  # (H, W) uint8, at the image's own size
    signs: Mapping[str, np.ndarray] = field(default_factory=dict)  # `signs_of` an error, by measure
    expected_error: Mapping[str, float] = field(default_factory=dict)  # absolute, px of the image, by measure
    doubtful: Mapping[str, float] = field(default_factory=dict)  # mm; what is expected to be off by more is uncertain

    def doubts(self, measure: str, pixel_size: float | None) -> list[str]:
        """Beside those of `famseg.biometrics.doubts`; none without a pixel size, mm."""
        if pixel_size is None or (error := self.expected_error.get(measure)) is None:
            return []
        return ["uncertain"] if error * pixel_size > self.doubtful[measure] else []


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of famseg-train, on the CPU. Tensors and plain values only: no code in it is run.

    Raises:
        DataError: there is no such file, it is damaged, or something else wrote it.
    """
    try:
        # torch.load does not compare the archive's checksums: a flipped bit would be a wrong weight.
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {broken}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_ANOTHER}") from error
    except Exception as error:  # damaged bytes raise nearly anything from inside zipfile, pickle and torch
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise DataError(f"{path}: is damaged or no checkpoint ({reason}); {_ANOTHER}") from error
    if not _as_written(checkpoint):
        raise DataError(f"{path}: was not written by this version of famseg-train; {_ANOTHER}")
    return checkpoint


def _as_written(checkpoint: Any) -> bool:
    """Whether what famseg-train writes has the types that it writes."""
    keys = {"config": dict, "state_dict": dict, "epoch": int, "images": dict, "optimizer_states": list}
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(k), kind) for k, kind in keys.items()):
        return False
    excess = checkpoint.get("excess", {})
    return (
        checkpoint["epoch"] >= 0
        and all(_maps_to(Tensor, part) for part in (checkpoint["state_dict"], checkpoint.get("ema") or {}))
        and _maps_to(dict, checkpoint["images"])
        and all(_maps_to(str, names) for names in checkpoint["images"].values())
        and _maps_to(float, excess)
        and all(map(math.isfinite, excess.values()))
    )


def _maps_to(kind: type, value: object) -> bool:
    """Whether `value` is a dict of names to values of one kind."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())


def expect_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """ValueError for a tensor that is none of real numbers, or has more than the file: one may stand for many."""
    size = path.stat().st_size
    for name, value in tensors.items():
        if value.is_complex() or value.is_quantized or value.is_meta or value.layout is not torch.strided:
            raise ValueError(f"{name}: expected real numbers, found {value.dtype}, {value.layout}, {value.device}")
        if value.numel() * value.element_size() > size:
            raise ValueError(f"{name}: claims {value.numel()} numbers in a file of {size} bytes")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a number that is not finite."""
    return next((name for name, value in tensors.items() if not value.isfinite().all()), None)


def trained_by(images: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Of a checkpoint's images those that trained it or the weights it began with: names by digest."""
    return {**images.get("trained", {}), **images.get("before", {})}


def weights_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The network's weights in a checkpoint of famseg-train: the averaged ones where the run kept them."""
    states = checkpoint["state_dict"]
    return checkpoint.get("ema") or {
        name.removeprefix("model."): value for name, value in states.items() if name.startswith("model.")
    }


def load_pretrained() -> Network:
    """The network that comes with the package, on the CPU: fetal heads and femurs (docs/model-card.md).

    Raises:
        DataError: its file is missing or damaged.
    """
    try:
        return load_network(PRETRAINED)
    except DataError as error:
        reason = str(error).removesuffix(f"; {_ANOTHER}")
        raise DataError(f"{reason}; install famseg again, or name a checkpoint") from error


def load_network(path: str | Path) -> Network:
    """The network of a famseg-train checkpoint, on the CPU; averaged weights where the run kept them.

    Raises:
        DataError: as `read_checkpoint`, or the weights are those of another network, or not finite.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    try:
        names = option_names(config["model"])
        options = {name: value for name, value in config.items() if name in names and value is not None}
        classes = parse_classes(config.get("classes", DEFAULT))
        weights = weights_of(checkpoint)
        expect_numbers(weights, path)
        network = (config["model"], len(classes), config.get("in_channels", 1))
        with torch.device("meta"):  # no memory yet, whatever size the settings ask for
            outline = create_model(*network, **options)
        if sum(t.numel() for t in outline.state_dict().values()) > sum(t.numel() for t in weights.values()):
            raise ValueError("its settings are those of a larger network")
        model = create_model(*network, **options)
        model.load_state_dict(weights)
        size = config["image_size"]
        if type(size) is not int or not 16 <= size <= 8192 or network[2] not in (1, 3):
            raise ValueError(f"image_size {size!r}, in_channels {network[2]!r}")
        expectations = {n: Expectation(**values) for n, values in checkpoint.get("expectations", {}).items()}
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()
        raise DataError(f"{path}: was made by another version of this network ({reason[0]})") from error
    if bad := not_finite(model.state_dict()):
        raise DataError(f"{path}: {bad} is not finite, its training diverged; use another checkpoint")
    return Network(
        model.eval(),
        config,
        checkpoint["images"],
        checkpoint["epoch"] + 1,
        size,
        path,
        checkpoint.get("excess", {}),
        expectations,
    )


def mask_excess(sample: Sample, classes: Sequence[Structure], image_size: int) -> dict[str, float]:
    """How much longer lengths are in a sample's mask than the data say, by measure; in px of the network's input.

    An annotator's outline is as wide as the pen: masks that include it, as HC18's do, are too large, and a network that
    learned to draw such masks measures too much. Empty where no length is given, and for a simulated sample, whose mask
    is exact.
    """
    found: dict[str, float] = {}
    height, width = sample.mask.shape
    if sample.pixel_size is None or sample.simulated:
        return found
    for structure in classes:
        if (measure := structure.measure) is None or (given := sample.true_length(measure.name)) is None:
            continue
        if (shape := measure.fit(sample.mask == structure.label)) is not None:
            scale = letterbox_scale(height, width, image_size)
            found[measure.name] = (shape.length - given / sample.pixel_size) * scale
    return found


def predict(network: Network, images: Iterable[np.ndarray], **options: Any) -> Iterator[np.ndarray]:
    """The label maps of `readings`, whose options it takes: (H, W) uint8, in order."""
    return (reading.labels for reading in readings(network, images, **options))


def readings(
    network: Network,
    images: Iterable[np.ndarray],
    *,
    batch_size: int = 8,
    flips: bool = False,
    precision: str = "fp32",
    device: str = "cpu",
    backend: str = "auto",
) -> Iterator[Reading]:
    """What is found in images, each at its own size, in order.

    Only one batch of images is held at a time. In fp32 the labels are the same on every device, up to rounding,
    whatever the network was trained in. A network that knows its errors (`Network.expectations`) looks at every image
    four times, at two sizes and mirrored, and averages the logits.

    Args:
        images: (H, W) uint8, for a network of colour (H, W, 3) uint8 RGB.
        flips: average the logits of the image and its mirror image (left–right), at twice the cost.
        precision: of weights and maps, "fp32" or "bf16".
        device: "cpu" or "cuda".
        backend: of famseg_kernels.

    Raises:
        ValueError: batch_size is below 1, another precision, or an image has another shape or dtype.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: expected {' or '.join(_PRECISIONS)}, got {precision!r}")
    dtype = _PRECISIONS[precision]
    model = optimize_for_inference(network.model).to(device, dtype)
    if device == "cuda":  # convolutions want channels-last there, of all networks
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sizes = [network.image_size]
    if network.expectations:
        flips, sizes = True, [*sizes, _larger(network.image_size)]
    images, shape = iter(images), () if network.in_channels == 1 else (network.in_channels,)
    while batch := list(itertools.islice(images, batch_size)):
        for image in batch:
            if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] != shape or not image.size:
                expected = ", ".join(("H", "W", *map(str, shape)))
                raise ValueError(f"images: expected ({expected}) uint8, got {image.shape} {image.dtype}")
        views: list[Tensor] = []  # each of the whole batch
        with torch.inference_mode(), requesting(backend):
            for size in sizes:
                boxed = [normalise(letterbox(image, size, cv2.INTER_LINEAR)) for image in batch]
                x = torch.from_numpy(np.stack([channels_first(image) for image in boxed])).to(device, dtype)
                views.append(model(x).float())
                if flips:
                    views.append(model(x.flip(3)).flip(3).float())
            if not network.expectations:
                views = [torch.stack(views).mean(0)]
            for image, *own in zip(batch, *views, strict=True):
                yield _read(network, [logits_at(logits, *image.shape[:2]) for logits in own])


def _read(network: Network, views: Sequence[Tensor]) -> Reading:
    """From the logits (classes, H, W) of each view of an image."""
    mean = torch.stack(list(views)).mean(0) if len(views) > 1 else views[0]
    labels = _classes(mean)
    if not network.expectations:
        return Reading(labels)
    signs: dict[str, np.ndarray] = {}
    probability = mean.softmax(0).cpu().numpy()
    alone = [_classes(view) for view in views]
    for structure in network.classes:
        measure, mask = structure.measure, labels == structure.label
        if measure is None or measure.name not in network.expectations or (shape := measure.fit(mask)) is None:
            continue
        shapes = [measure.fit(one == structure.label) for one in alone]
        lengths = [0.0 if one is None else one.length for one in shapes]
        signs[measure.name] = signs_of(shape, mask, probability[structure.label], lengths)
    expected = {name: network.expectations[name].error(found) for name, found in signs.items()}
    return Reading(labels, signs, expected, {name: network.expectations[name].doubtful for name in signs})


def _classes(logits: Tensor) -> np.ndarray:
    """The class of every pixel, (classes, H, W) → (H, W) uint8: argmax, in a tenth of its time on a CPU."""
    best, labels = logits[0], torch.zeros(logits.shape[1:], dtype=torch.uint8, device=logits.device)
    for label in range(1, len(logits)):
        labels.masked_fill_(logits[label] > best, label)
        best = torch.maximum(best, logits[label])
    return labels.cpu().numpy()


def _larger(size: int) -> int:
    """The second size of a network with input `size`: a sixth more, in steps that every network takes."""
    return max(round(size * 7 / 6 / 32) * 32, size + 32)


def logits_at(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits (classes, h, w) of a letterboxed image as (classes, height, width) of that image."""
    top, left, inner_height, inner_width = letterbox_window(height, width, logits.shape[1:])
    inner = logits[None, :, top : top + inner_height, left : left + inner_width]
    return F.interpolate(inner, (height, width), mode="bilinear", align_corners=False)[0]
