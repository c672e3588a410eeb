"""Starting from given weights, and training a part of the network only: the strategies of arXiv 2407.20086, Fig. 2."""

from __future__ import annotations

import codecs
import datetime
import hashlib
import pathlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from famseg.anatomy import DEFAULT
from famseg.data.augment import MEAN, STD
from famseg.files.errors import DataError
from famseg.inference import PRETRAINED, expect_numbers, not_finite, read_checkpoint, trained_by, weights_of
from famseg.models import FAMSeg, SegNeXt, UNetMobileNetV2, load_mscan
from famseg.models.loading import load_all
from famseg.models.smp import SmpNetwork

# By letter: does it start from weights, and what learns.
STRATEGIES = {
    "a": (False, "decoder"),
    "b": (False, "encoder"),
    "c": (True, "encoder"),
    "d": (True, "decoder:1"),
    "e": (True, "decoder:1,2"),
    "f": (True, "decoder:1,2,3"),
    "g": (True, "decoder:3,4,5"),
    "h": (True, "decoder:5"),
    "i": (True, "decoder"),
}


def parse_trainable(text: str) -> tuple[str, tuple[int, ...]]:
    """ "decoder:1,2" → ("decoder", (1, 2)); no numbers: the whole part. Raises ValueError for anything else."""
    found = re.fullmatch(r"(all|encoder|decoder(?::(\d+(?:,\d+)*))?)", text)
    if found is None:
        raise ValueError(f"trainable: expected all, encoder, decoder, or layers of it like decoder:1,2; got {text!r}")
    return found[1].split(":")[0], tuple(int(number) for number in found[2].split(",")) if found[2] else ()


def freeze(model: nn.Module, trainable: str, head: bool = True) -> list[nn.Module]:
    """Leave gradients to the part `trainable` only; returns the modules that stay as they are.

    These belong into evaluation mode, or their batch norms would go on adapting. Decoder layers count from 1, the
    deepest. The classifier learns with any part, unless `head` is false.

    Raises:
        ValueError: the decoder has no such layer.
    """
    part, numbers = parse_trainable(trainable)
    if part == "all":
        if not head:
            model.get_submodule("classifier").requires_grad_(False)
        return []
    layers = list(model.decoder_layers)  # type: ignore[arg-type]
    if beyond := [number for number in numbers if not 1 <= number <= len(layers)]:
        raise ValueError(f"trainable: expected decoder layers from 1 to {len(layers)}, got {beyond[0]}")
    trained = [layers[number - 1] for number in numbers] or [model.get_submodule(part)]
    if head:
        trained.append(model.get_submodule("classifier"))
    kept = {parameter for module in trained for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in kept)
    inside = {module for one in trained for module in one.modules()}
    return [module for module in model.modules() if module not in inside and not any(True for _ in module.children())]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many learn, and how many there are."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)


def images_behind(path: str | Path) -> dict[str, str]:
    """Names by digest of the images that trained a checkpoint of famseg-train and what it began with; else none.

    Raises:
        DataError: the file cannot be read.
    """
    path = PRETRAINED if path == "pretrained" else Path(path)
    return trained_by(read_checkpoint(path)["images"]) if _is_checkpoint(_read(path)) else {}


def _is_checkpoint(content: object) -> bool:
    return isinstance(content, dict) and "optimizer_states" in content and "images" in content


def load_weights(model: nn.Module, path: str | Path, classes: str = DEFAULT) -> str:
    """Start from weights in a file; returns what was loaded and what was not, in words.

    Takes a checkpoint of famseg-train or the state dict of the same network, or a published encoder: MSCAN for SegNeXt
    and a FAMSeg's strip blocks, MobileNetV2 (torchvision) for U-Net; saved by torch.save, with what others wrap around
    it. "pretrained" is the network that comes with famseg.
    What ImageNet's 1000 classes, or mmseg, trained goes on seeing what it was trained on (`for_our_pixels`).

    Args:
        classes: the network's, as in `TrainConfig.classes`.

    Raises:
        DataError: the file cannot be read, does not fit, is a checkpoint of other classes, or holds what is not finite.
    """
    path = PRETRAINED if path == "pretrained" else Path(path)
    content = _read(path)
    try:
        if _is_checkpoint(content):
            content = read_checkpoint(path)  # again: with its checksums
            theirs = str(content["config"].get("classes", DEFAULT))
            if theirs.replace(" ", "") != classes.replace(" ", ""):
                raise ValueError(f"it finds {theirs}, this one {classes}; start it with --classes {theirs}")
            weights = weights_of(content)
            expect_numbers(weights, path)
            _expect_finite(weights)
            load_all(model.state_dict(), weights)
            return f"all weights of {path}"
        tensors = _tensors(content)
        expect_numbers(tensors, path)
        _expect_finite(tensors)
        own = _named_as(model.state_dict(), tensors)
        targets = model.get_submodule("encoder").state_dict()
        encoder = _named_as(targets, tensors)
        if len(own) > len(encoder):
            load_all(model.state_dict(), own, _others(tensors, own))
            return _report("the network", len(own), tensors, path)
        if isinstance(model, FAMSeg) and tensors and not encoder:
            return _report("the strip blocks", load_mscan(model, _named_as({}, tensors)), tensors, path)
        imagenet = _is_of_imagenet(tensors, model)
        tensors = for_our_pixels(tensors) if imagenet else tensors
        left = "; ImageNet's normalisation is left out" if isinstance(model, (SegNeXt, SmpNetwork)) else ""
        normalised = "; ImageNet's normalisation is in the first layer" if imagenet else left
        if isinstance(model, SegNeXt) and tensors:
            loaded = load_mscan(model, _named_as({}, tensors))
            return _report("the network", loaded, tensors, path) + normalised
        if encoder or (isinstance(model, UNetMobileNetV2) and tensors):
            whose = f"; {_origin(path)}" if isinstance(model, UNetMobileNetV2) else ""
            encoder = _named_as(targets, tensors)
            loaded = load_all(targets, encoder, _others(tensors, encoder))
            return _report("the encoder", loaded, tensors, path) + whose + normalised
    except DataError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"weights: {path} does not fit this network: {' '.join(str(error).split())}") from error
    published = {
        **dict.fromkeys((FAMSeg, SegNeXt), ", and from MSCAN"),
        UNetMobileNetV2: ", and from MobileNetV2",
    }.get(type(model), " only")
    raise DataError(
        f"weights: {path}: holds no weights for this network, which starts from checkpoints of famseg-train{published}"
    )


def _others(tensors: Mapping[str, Tensor], used: Mapping[str, Tensor]) -> list[str]:
    known = {id(value) for value in used.values()}
    return [name for name, value in tensors.items() if id(value) not in known]


def _expect_finite(tensors: Mapping[str, Tensor]) -> None:
    """ValueError for a number that is not finite in fp32."""
    if bad := not_finite({name: value.float() for name, value in tensors.items()}):
        raise ValueError(f"{bad} is not finite")


def _is_of_imagenet(tensors: Mapping[str, Tensor], model: nn.Module) -> bool:
    """A classifier of its 1000 classes, or mmseg's SegNeXt: they see colours normalised by its statistics."""
    kernel = next((value for value in tensors.values() if value.dim() == 4), None)
    if kernel is None or kernel.shape[1] != 3:
        return False
    mmseg = isinstance(model, SegNeXt) and any(name.startswith("decode_head.") for name in tensors)
    return mmseg or any(value.dim() > 1 and len(value) == 1000 for value in tensors.values())


def for_our_pixels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder for images (v − MEAN) / STD of `famseg.data.augment`, v in [0, 1], from one for ImageNet's.

    With W, m, s the first kernel and ImageNet's mean and deviation, W·(v − m)/s is (W·STD/s)·x, plus a constant a
    channel that the bias takes, or the mean of the batch norm behind. So the normalisation is part of the weights,
    wherever they go. What the first layer pads with is 0 as before: here MEAN, nearly black as outside a sector, and
    not ImageNet's mean grey, so the first row and column see another border than in the classifier.

    Raises:
        ValueError: the first kernel has neither a bias nor a batch norm behind it.
    """
    names = list(tensors)
    kernel = next(name for name in names if tensors[name].dim() == 4)
    bias = f"{kernel.removesuffix('weight')}bias"
    norm = next((name for name in names[names.index(kernel) :] if name.endswith("running_mean")), bias)
    takes = bias if bias in tensors else norm
    if takes not in tensors or len(tensors[takes]) != len(tensors[kernel]):
        raise ValueError(f"it saw images normalised as ImageNet's, and {kernel} has no bias or batch norm to take that")
    weight = tensors[kernel].double()
    mean, deviation = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in _IMAGENET)
    constant = (weight * ((MEAN - mean) / deviation)).sum((1, 2, 3)) * (1 if takes == bias else -1)
    return {
        **tensors,
        kernel: (weight * (STD / deviation)).to(tensors[kernel].dtype),
        takes: (tensors[takes].double() + constant).to(tensors[takes].dtype),
    }


def _origin(path: Path) -> str:
    """Whose weights a MobileNetV2's are, by the file's hash."""
    name, published = _TORCHVISION
    is_published = hashlib.sha256(path.read_bytes()).hexdigest() == published
    if path.name == name and not is_published:
        raise ValueError(f"its SHA-256 is not {published[:16]}…, which torchvision's {name} has; get it again")
    return "torchvision's, by its SHA-256" if is_published else "not the file that torchvision publishes"


def _report(what: str, loaded: int, tensors: Mapping[str, Tensor], path: Path) -> str:
    unused = len(tensors) - loaded
    return f"{loaded} tensors of {what} from {path}" + (f"; {unused} others in it are not used" if unused else "")


def _read(path: Path) -> Any:
    """The file's content: tensors, plain values, NumPy's, and an empty stand-in for every other object.

    No code is run that the file names: objects are left out unread, and a file in which one is made by calling
    something is refused, as that may be anything.
    """
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older format, or no such file at all, which torch.load will say
        others = []
    allowed: list[Any] = [*_NUMPY, *_HARMLESS]
    known = {f"{thing.__module__}.{thing.__qualname__}": thing for thing in (*_NUMPY, *_HARMLESS)}
    for name in others:
        unread = type("Unread", (_Unread,), {})  # one a name: the unpickler looks classes up
        allowed.append((known.get(name.replace("numpy.core", "numpy._core"), unread), name))  # before NumPy 2
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"weights: {path}: cannot be read ({error.strerror})") from error
    except Exception as error:
        if others:
            raise DataError(
                f"weights: {path}: also holds {', '.join(sorted(others)[:3])}, which only code could read; "
                "if you trust the file, save its state dict alone by torch.save"
            ) from error
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise DataError(f"weights: {path}: holds no tensors saved by torch.save ({reason})") from error


class _NoCalls(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a stand-in makes nothing")


class _Unread(metaclass=_NoCalls):
    """Takes the place of an object of an unknown class; what the file says of it is dropped."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_NUMPY: tuple[Any, ...] = (
    np.dtype,
    np.ndarray,
    np.float64(0).__reduce__()[0],  # the function that makes a scalar
    np.zeros(1).__reduce__()[0],  # and the one that makes an array
    *(type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"),
    codecs.encode,
)
_HARMLESS = (pathlib.PosixPath, pathlib.WindowsPath, datetime.datetime, datetime.date, datetime.timedelta)

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of red, green, blue
_TORCHVISION = (
    "mobilenet_v2-b0353104.pth",
    "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "params", "weights", "ema")
_PREFIXES = ("model.", "network.", "net.", "backbone.", "encoder.")


def _tensors(content: Any) -> dict[str, Tensor]:
    """Name → tensor, out of the dicts that programs wrap around it, without what DataParallel and compile add."""

    def inside(content: Mapping[Any, Any]) -> Any:
        return next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)

    for _ in _WRAPPERS:  # as deep as anybody wraps: a dict may hold itself
        if not isinstance(content, Mapping) or (inner := inside(content)) is None:
            break
        content = inner
    found: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if torch.is_tensor(value):
            plain = ".".join(part for part in str(name).split(".") if part not in ("module", "_orig_mod"))
            if plain in found:
                raise ValueError(f"{plain} is in it twice, with and without a prefix")
            found[plain] = value
    return found


def _named_as(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` that are wanted by their names, or by what is left of these behind common prefixes.

    Where nothing is wanted by name, all of them, without prefixes.
    """
    found: dict[str, Tensor] = {}
    for given, value in tensors.items():
        name = given
        while name not in wanted and (prefix := next((p for p in _PREFIXES if name.startswith(p)), "")):
            name = name.removeprefix(prefix)
        if name in found:
            raise ValueError(f"{name} is in it twice, under different prefixes")
        if name in wanted or not wanted:
            found[name] = value
    return found
