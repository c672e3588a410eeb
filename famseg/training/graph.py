"""A training step that is recorded once and then launched as a whole.

A GPU needs less time for each part of a small batch than Python does to launch it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Steps before the recorded one: cuDNN chooses its algorithms, Triton compiles, the optimizer makes its state.
WARM_UP = 3

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RecordedStep:
    """
    Args:
        step: takes a batch's images and masks, always of the same shape, trains on them and returns tensors. What it
            reads and writes besides must stay where it is in memory; numbers of Python are those of the recording.
        optimizer: the one that takes the step, fused; its learning rate becomes a tensor.
        device: a GPU.

    The tensors returned are overwritten by the next call.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._step, self._optimizer, self._device = step, optimizer, device
        self._calls = 0
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            rate.fill_(group["lr"])
        self._calls += 1
        if self._calls <= WARM_UP:
            return beside(self._device, lambda: self._step(image, mask))
        if self._calls == WARM_UP + 1:
            self._image, self._mask = image.clone(memory_format=torch.preserve_format), mask.clone()
            self._results, self._replay = self._record()
        else:
            self._image.copy_(image, non_blocking=True)
            self._mask.copy_(mask, non_blocking=True)
        self._replay()
        return self._results

    def _record(self) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
            group["capturable"] = True  # asked for by torch; what is fused is
        try:
            return record(lambda: self._step(self._image, self._mask))
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number
                group["capturable"] = False


def beside(device: torch.device, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Do `work` on a stream of its own, as recording will."""
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        results = work()
    current.wait_stream(stream)
    return results


def record(work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
    """The tensors that `work` will have written, and what does it."""
    graph = torch.cuda.CUDAGraph()
    # The loader's threads go on pinning memory while this one records.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = work()
    return results, graph.replay
