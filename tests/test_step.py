"""What a training step does around the kernels: no copy for a layout, no fp32 round trip, no wait of the host."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from famseg.models import create_model
from famseg.models.blocks import DropPath
from famseg.training import graph
from famseg.training.config import ConfigError, TrainConfig
from famseg.training.distributed import ALONE
from famseg.training.loop import Loop
from famseg.training.loss import SegmentationLoss
from famseg.training.module import SegmentationModule
from famseg.training.run import prepare

IMAGES = 5  # no weight has so many of anything in front


class Watch(TorchDispatchMode):
    """Counts the copies of features, and what waits for a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        self.waits += name in ("_local_scalar_dense", "nonzero", "_unique2")
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        if name in ("_to_copy", "clone", "copy_") and all(t.dim() > 1 and len(t) == IMAGES for t in tensors):
            source, copy = tensors[0], tensors[-1]
            what = f"{name} {source.dtype} {copy.dtype} {tuple(copy.shape)}"
            (self.copies if source.dtype == copy.dtype else self.casts)[what] += 1
        return result


def on_a_gpu_without_data(model: nn.Module) -> None:
    """Inside a FakeTensorMode: parameters and buffers of `model` become tensors of a GPU that is not there."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    empty = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                    tensors[name] = nn.Parameter(empty) if isinstance(t, nn.Parameter) else empty


@pytest.mark.parametrize("name", ["famseg_nano", "famseg_tiny"])
def test_bf16_features_stay_bf16(name):
    """By the casts that autocast makes for CUDA: the image, NMF (fp32 by definition) and the loss alone."""
    model, loss = create_model(name, 3).train(), SegmentationLoss()
    context = model.config.context_channels
    with FakeTensorMode(), Watch() as watch:
        on_a_gpu_without_data(model)
        image = torch.empty(IMAGES, 1, 64, 64, device="cuda")
        mask = torch.zeros(IMAGES, 64, 64, dtype=torch.int64, device="cuda")
        try:  # torch.autocast itself refuses without a GPU
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.set_autocast_cache_enabled(False)
            loss(model(image), mask)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_cache_enabled(True)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert watch.casts == {
        f"_to_copy {fp32} {bf16} {(IMAGES, 1, 64, 64)}": 1,
        f"_to_copy {bf16} {fp32} {(IMAGES, context, 2, 2)}": 1,
        f"_to_copy {fp32} {bf16} {(IMAGES, context, 2, 2)}": 1,
        f"_to_copy {bf16} {fp32} {(IMAGES, 3, 64, 64)}": 1,
        f"_to_copy {torch.bool} {fp32} {(IMAGES, 3, 64, 64)}": 1,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_in_channels_last_copies_nothing_and_waits_for_nothing(precision):
    config = TrainConfig(data="phantom:16", batch_size=IMAGES, channels_last=True, precision=precision, device="cpu")
    run = prepare(config, ALONE)
    loop = Loop(run.module, run.train_loader, run.val_loader, device=run.device)
    loop._watch = lambda loss, norm: None  # it reads both, on a GPU every tenth step
    loop.begin(0)
    batches = iter(run.train_loader)
    loop.step(0, next(batches))
    batch = next(batches)
    with Watch() as watch:
        loop.step(1, batch)
    assert not watch.copies and not watch.waits


class Recording(TorchDispatchMode):
    """Stands for a CUDA graph: the operations on tensors, to be done again on the same memory with the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.kept: list[Any] = []  # so that no memory gets the identity of another
        self.mine: set[int] = set()
        self.random = torch.get_rng_state()
        self.before: dict[int, tuple[Any, Any]] = {}  # memory that was there, and what it held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not func.overloadpacket._qualified_op_name.endswith("_local_scalar_dense"), "a capture cannot wait"
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor) and (memory := t.untyped_storage())._cdata not in self.mine:
                self.mine.add(memory._cdata)
                self.before[memory._cdata] = memory, memory.clone()
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.mine |= {memory._cdata for memory in made}
        self.kept += made
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def undo(self) -> None:
        """A capture computes nothing."""
        for memory, held in self.before.values():
            memory.copy_(held)
        torch.set_rng_state(self.random)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                if func.is_view:
                    continue
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.detach().copy_(new)


def record_on_a_cpu(work):
    recording = Recording()
    with recording:
        results = work()
    recording.undo()
    return results, recording.replay


def test_a_recorded_step_trains_as_one_that_is_not(monkeypatch):
    """Through two optimizers, a learning rate that moves, stochastic depth, clipping and averaged weights."""
    recordings = []

    def record(work):
        results, replay = record_on_a_cpu(work)
        recordings.append(replay)
        return results, replay

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "beside", lambda device, work: work())
    rate = SegmentationModule.rate  # a GPU keeps it in fp32
    monkeypatch.setattr(SegmentationModule, "rate", lambda *given: float(np.float32(rate(*given))))
    ends = []
    for cuda_graph in (False, True):
        config = TrainConfig(
            data="phantom:24", image_size=32, batch_size=3, phases="adamw:1,sgd:1", ema=0.9, device="cpu", seed=3
        )
        run = prepare(config, ALONE)
        run.module.config = dataclasses.replace(config, cuda_graph=cuda_graph)
        for module in run.module.modules():
            if isinstance(module, DropPath):
                module.rate = 0.5
        loop = Loop(run.module, run.train_loader, run.val_loader, device=run.device)
        losses = [loop.train_epoch(epoch) for epoch in range(2)]
        ends.append((losses, loop.live_iou(), loop.state()))
    assert len(recordings) == 2  # one an optimizer
    torch.testing.assert_close(ends[1][:2], ends[0][:2], rtol=0, atol=0)
    for key in ("state_dict", "ema", "global_step"):
        torch.testing.assert_close(ends[1][2][key], ends[0][2][key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"precision": "fp16"}, "cuda_graph: fp16's loss scale"), ({}, "cuda_graph: is for one process with a GPU")],
)
def test_a_cuda_graph_is_refused_where_there_can_be_none(changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(TrainConfig(data="phantom:8", cuda_graph=True, device="cpu", **changes), ALONE)
