"""More than 2³¹ elements: indices are 64 bits wide in every CPU kernel, forward and backward.

The memory is not needed: a batch is one image's pages, mapped again and again one behind the other. An index that
overflowed would leave the mapping, and the results of all images are those of one.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import famseg_kernels as fk
from tests.native import needs_native

pytestmark = [
    needs_native,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is mapped as Linux does it"),
]

_MAP_FIXED = 0x10
BATCH = 2056  # of 2²⁰ results each
Mirror = Callable[[Tensor, int], Tensor]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.fixture
def mirrored() -> Iterator[Mirror]:
    """Room for a batch of tensors like `image` (1, ...), all of which are the same memory and hold its values."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    taken = []

    def make(image: Tensor, batch: int) -> Tensor:
        size = image.nbytes
        assert size % mmap.PAGESIZE == 0
        start = libc.mmap(None, batch * size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        taken.append((start, batch * size))
        file = os.memfd_create("image")
        os.ftruncate(file, size)
        for place in range(start, start + batch * size, size):
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            assert libc.mmap(place, size, protection, mmap.MAP_SHARED | _MAP_FIXED, file, 0) == place
        os.close(file)
        memory = (ctypes.c_char * (batch * size)).from_address(start)
        flat = torch.frombuffer(memory, dtype=image.dtype)
        images = flat.as_strided((batch, *image.shape[1:]), (image.numel(), *image.stride()[1:]))
        images[:1] = image
        return images

    yield make
    for start, size in taken:
        libc.munmap(start, size)


@pytest.fixture
def check(mirrored: Mirror, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Callable[..., None]:
    """Forward and backward of a batch of BATCH images, given the arguments of one and which of these are images."""

    def run(name: str, images: set[int], *one: Any) -> None:
        operation = next(op for op in fk.OPERATIONS if op.spec.name == name)
        kernel = operation.implementations["cpu"]
        needs = [t is not None for t in operation.flatten(one)]
        y = kernel.forward(*one)
        gradients = kernel.backward(y, needs, *one)

        empty, empty_like = torch.empty, torch.empty_like

        def mirrored_empty(shape: Sequence[int], **options: Any) -> Tensor:
            return mirrored(empty((1, *shape[1:]), **options), BATCH) if shape[0] == BATCH else empty(shape, **options)

        def mirrored_empty_like(t: Tensor, **options: Any) -> Tensor:
            return mirrored(empty_like(t[:1], **options), BATCH) if len(t) == BATCH else empty_like(t, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", mirrored_empty)
            patch.setattr(torch, "empty_like", mirrored_empty_like)
            batch = [mirrored(t, BATCH) if place in images else t for place, t in enumerate(one)]
            found = kernel.forward(*batch)
            assert found.numel() > 2**31
            torch.testing.assert_close(found[:1], y, rtol=0, atol=0)
            found = kernel.backward(found, needs, *batch)
        for gradient, expected in zip(found, gradients, strict=True):
            if gradient is not None and len(gradient) == BATCH:
                torch.testing.assert_close(gradient[:1], expected, rtol=0, atol=0)
            elif gradient is not None:  # a sum over the batch, rounded once
                torch.testing.assert_close(
                    gradient / BATCH, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())
                )

    return run


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strip_convolution(layout, check):
    x = rand(1, 64, 128, 128).contiguous(memory_format=layout)
    check("strip_conv2d", {0}, x, rand(64, 1, 1, 1), rand(64), [rand(64, 1, 1, 3)], [None], [rand(64, 1, 3, 1)], [None])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reassembly(layout, check):
    x, logits = (rand(1, channels, 64, 64).contiguous(memory_format=layout) for channels in (64, 36))
    check("reassemble", {0, 1}, x, logits, 3, 2, 1)


def test_scan(check):
    x, dt = rand(1, 64, 64, 4, 64), torch.rand(1, 64, 64, 1, 4)
    B, C = rand(1, 64, 64, 1, 1, 8), rand(1, 64, 64, 1, 1, 8)
    check("ssd_scan_2d", {0, 1, 3, 4}, x, dt, -torch.rand(1, 4), B, C, None, None, None, False, 0.0, math.inf)
