"""What is launched for a call, and how it is cut into programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from famseg_kernels import backends, checks, launch
from famseg_kernels.reassembly.problem import Encoded, Problem, chain, operations
from famseg_kernels.reassembly.triton.kernels import (
    Blocks,
    Image,
    Sizes,
    reassemble_forward,
    source_gradient,
    weight_gradient,
)
from famseg_kernels.reassembly.triton.upsample import Encoder, upsample_forward


class Configuration(NamedTuple):
    """What `python -m benchmarks.tune` tunes. Shapes of the kernels' tiles follow from it in `_Plan`."""

    channels: int  # of a pixel in a thread: they share what a tap's weight costs
    rows: int  # of x in a thread, in the gradient of x
    num_warps: int


# By compute capability × 10; 0 stands for every other chip and for the interpreter.
CONFIGURATIONS = {
    80: Configuration(channels=16, rows=2, num_warps=4),
    90: Configuration(channels=16, rows=2, num_warps=4),
    0: Configuration(channels=16, rows=2, num_warps=4),
}
MOST_TAPS = 225  # all of a pixel's are written out in the weights' gradient
MOST_SUMS = 50  # of those a thread of it holds
# Left alone, the compiler takes more registers than it makes use of: a multiprocessor has room for a block less.
SOURCE_REGISTERS = 168


class _Plan:
    """How one call is cut into programs, for forward and backward.

    The compiler gives lanes to pixels, unless x is channels_last: then lanes read 16 bytes of a pixel's channels each.
    """

    def __init__(self, problem: Problem) -> None:
        softmax, x, _, kernel_size, scale, groups = problem
        n, c, height, width = x.shape
        channels = c // groups
        self.sizes = Sizes(channels, groups, height, width)
        tuned = CONFIGURATIONS.get(launch.capability(x.device), CONFIGURATIONS[0])
        self.num_warps = tuned.num_warps
        self.images = n * groups
        self.rows = tuned.rows
        # Four lanes a pixel: fewer read less of a cache line at once, each of them makes all of the pixel's weights.
        self.vector = 1 if x.is_contiguous() else 16 // x.element_size()
        tile = min(4 * self.vector if self.vector > 1 else tuned.channels, triton.next_power_of_2(channels))
        lanes = max(1, tile // self.vector) if self.vector > 1 else 1
        self.pixels = 32 * tuned.num_warps // lanes
        chunks = max(1, min(tuned.channels * lanes, triton.next_power_of_2(channels)) // tile)
        self.channel_blocks = triton.cdiv(channels, tile * chunks)
        # A program takes some of a pixel's scale² results.
        self.parts = _parts(scale, 4)
        self.tile = {"P": self.pixels, "C": tile, "CHUNKS": chunks, "EVEN": channels % (tile * chunks) == 0}
        self.constants = {"K": kernel_size, "S": scale, "SOFTMAX": softmax}

    def blocks(self, rows: int = 1) -> Blocks:
        """Of pixels, `rows` of them below each other counted as one."""
        height = triton.cdiv(self.sizes.height, rows)
        return Blocks(self.channel_blocks, triton.cdiv(height * self.sizes.width, self.pixels))


def _parts(scale: int, most: int) -> int:
    """The largest divisor of scale² that is at most `most`."""
    return max(d for d in range(1, max(1, most) + 1) if scale**2 % d == 0)


def _image(tensor: Tensor) -> Image:
    return Image(tensor, *tensor.stride())


# --- the backend -------------------------------------------------------------------------------------------------


def _unsupported(problem: Problem) -> str | None:
    if problem.x.dtype == torch.float64:
        return "its kernels compute in fp32, x is float64"
    if problem.x.shape[2] * problem.x.shape[3] >= 2**30:
        return "its kernels count pixels in 32 bits, x has 2**30 a channel or more"
    if problem.kernel_size**2 > MOST_TAPS:
        return f"kernels of size {problem.kernel_size} do not fit in registers"
    return None


def _forward(problem: Problem) -> Tensor:
    x = problem.x
    y = torch.empty(problem.y_shape, dtype=x.dtype, device=x.device, memory_format=checks.image_format(x))
    if not y.numel():
        return y
    plan = _Plan(problem)
    blocks = plan.blocks()
    with launch.on(x.device):
        launch.run(
            reassemble_forward,
            (plan.images * math.prod(blocks), problem.scale**2 // plan.parts),
            launch.Config(plan.num_warps),
            x=_image(x),
            weights=_image(problem.weights),
            y=_image(y),
            sizes=plan.sizes,
            blocks=blocks,
            PARTS=plan.parts,
            **plan.tile,
            **plan.constants,
        )
    return y


def _backward(problem: Problem, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    softmax, x, weights, kernel_size, scale, groups = problem
    dx, dw = (torch.empty_like(t) if need else None for t, need in zip((x, weights), needs, strict=True))
    if not x.numel():  # weights may have elements although there are no channels to sum over
        return [dx, None if dw is None else dw.zero_()]
    n, _, h, w = x.shape
    plan = _Plan(problem)
    stats = torch.empty((n, groups, scale**2, h, w), dtype=torch.float32, device=x.device) if softmax else None
    with launch.on(x.device):
        if softmax or dw is not None:
            # A warp a program: its threads hold so many sums that a multiprocessor has room for few.
            parts = _parts(scale, min(plan.parts, MOST_SUMS // kernel_size**2))
            channels = max(plan.vector, 2)
            blocks = triton.cdiv(h * w, 32)
            launch.run(
                weight_gradient,
                (plan.images * blocks, scale**2 // parts),
                launch.Config(num_warps=1),
                dy=_image(grad),
                x=_image(x),
                weights=_image(weights),
                softmax=stats,
                dw=None if dw is None else _image(dw),
                sizes=plan.sizes,
                pixel_blocks=blocks,
                PARTS=parts,
                P=32,
                C=channels,
                CHANNEL_BLOCKS=triton.cdiv(plan.sizes.channels, channels),
                EVEN=plan.sizes.channels % channels == 0,
                **plan.constants,
            )
        if dx is not None:
            blocks = plan.blocks(plan.rows)
            launch.run(
                source_gradient,
                (plan.images * math.prod(blocks),),
                launch.Config(plan.num_warps, maxnreg=SOURCE_REGISTERS),
                dy=_image(grad),
                weights=_image(weights),
                softmax=stats,
                dx=_image(dx),
                sizes=plan.sizes,
                blocks=blocks,
                ROWS=plan.rows,
                **plan.tile,
                **plan.constants,
            )
    return [dx, dw]


# --- feature_aware_upsample --------------------------------------------------------------------------------------

MOST_COLUMNS = 128  # of a product: a pixel's logits, which a thread holds
PIXEL_BYTES = 64  # at most, of a pixel in channels_last
PROGRAMS = 256  # below which several share a pixel's channels


class _Upsampling:
    """How the forward of one call is cut into programs: a thread has 8 channels of a pixel at a time, or 16 bytes."""

    pixels = 128

    def __init__(self, call: Encoded) -> None:
        n, c, height, width = call.x.shape
        self.call = call
        self.sizes = Sizes(c // call.groups, call.groups, height, width)
        self.blocks = triton.cdiv(height * width, self.pixels)
        size = call.x.element_size()
        self.taps = triton.next_power_of_2(call.kernel_size**2)
        self.parts = _parts(call.scale, MOST_COLUMNS // self.taps)
        self.columns = self.taps * triton.next_power_of_2(self.parts)
        # Lanes of a pixel: two read 32 bytes, a sector, of channels_last; fp32 has two tiles of sums in its products.
        contiguous = call.x.is_contiguous()
        lanes = 1 if contiguous and size == 2 else 2
        self.num_warps = self.pixels * lanes // 32
        self.channels = min(lanes * (8 if contiguous else 16 // size), triton.next_power_of_2(self.sizes.channels))
        # Where pixels make few programs, several share the channels, each with the product to itself.
        chunks = triton.cdiv(self.sizes.channels, self.channels)
        programs = n * call.groups * self.blocks * (call.scale**2 // self.parts)
        # Two at least: a single pass is unrolled, and the compiler runs out of registers.
        if chunks == 1 and self.channels > 1:
            self.channels, chunks = self.channels // 2, 2
        self.chunks = max(min(chunks, 2), triton.cdiv(chunks, max(1, PROGRAMS // programs)))
        self.grid = (
            n * call.groups * self.blocks,
            call.scale**2 // self.parts,
            triton.cdiv(self.sizes.channels, self.channels * self.chunks),
        )
        # A row of what tensor cores are given: shared memory of sm_90 has room for longer ones.
        row = (128 if launch.capability(call.x.device) == 90 else 64) // size
        self.depth = max(16, min(row, triton.next_power_of_2(call.compressed.shape[1])))
        self.depths = triton.cdiv(call.compressed.shape[1], self.depth)

    def weight(self) -> Tensor:
        """The encoder's weight as `Encoder` has it."""
        call, (groups, parts) = self.call, (self.sizes.groups, self.parts)
        _, channels, size, _ = call.weight.shape
        taps, blocks = call.kernel_size**2, call.scale**2 // parts
        weight = call.weight.reshape(groups, taps, blocks, parts, channels, size**2).permute(5, 0, 2, 3, 1, 4)
        shape = (size**2, groups, blocks, self.columns // self.taps, self.taps, self.depth * self.depths)
        packed = weight.new_zeros(shape)
        packed[:, :, :, :parts, :taps, :channels] = weight
        if packed.dtype != torch.float32:
            return packed
        high = (packed.view(torch.int32) & -8192).view(torch.float32)
        return torch.stack((high, packed - high), 3)


def _fits(call: Encoded) -> bool:
    """Whether the forward is one kernel. Otherwise torch's convolution writes the logits and `reassemble` reads them.

    So it is for kernels of one tap or of 49 and more (in fp32 they do not fit in registers), without compressed
    channels, where an image's places are no numbers of 32 bits, and in channels_last for pixels of more than 64 bytes:
    there `reassemble` has four lanes a pixel, where this kernel, whose lanes all hold 100 weights, has two and reads
    half as much of a cache line.
    """
    x, compressed = call.x, call.compressed
    if call.kernel_size not in (3, 5) or not compressed.numel():
        return False
    if not x.is_contiguous() and x.shape[1] * x.element_size() > PIXEL_BYTES:
        return False
    # The copy of compressed that is read has no gaps.
    last = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return max(last, compressed[0].numel()) < 2**31


def _upsample(*arguments: Any) -> Tensor:
    call = Encoded(*arguments)
    if not call.x.numel() or not _fits(call):
        return _chain.forward(*arguments)
    x, compressed, _, bias, kernel_size, scale, _, dilation = call
    y = torch.empty(
        call.problem(compressed).y_shape, dtype=x.dtype, device=x.device, memory_format=checks.image_format(x)
    )
    plan = _Upsampling(call)
    encoder = Encoder(plan.weight(), None if bias is None else bias.contiguous(), compressed.shape[1], dilation)
    # Rows of the product are channels of a pixel. A copy costs less than loads of single numbers at odd places.
    compressed = compressed.contiguous(memory_format=torch.channels_last)
    with launch.on(x.device):
        launch.run(
            upsample_forward,
            plan.grid,
            launch.Config(plan.num_warps, num_stages=3),
            x=_image(x),
            compressed=_image(compressed),
            encoder=encoder,
            y=_image(y),
            sizes=plan.sizes,
            pixel_blocks=plan.blocks,
            K=kernel_size,
            S=scale,
            E=call.weight.shape[3],
            PARTS=plan.parts,
            TAPS=plan.taps,
            N=plan.columns,
            P=plan.pixels,
            C=plan.channels,
            CHUNKS=plan.chunks,
            EVEN=plan.sizes.channels % (plan.channels * plan.chunks) == 0,
            D=plan.depth,
            D_BLOCKS=plan.depths,
            # Triton's interpreter has no product of bf16.
            DOT=tl.float32 if backends.TRITON_INTERPRETS else getattr(tl, str(x.dtype).removeprefix("torch.")),
        )
    return y


reassemble, carafe = operations(_forward, _backward, _unsupported)
_chain = chain(_forward, _backward, _unsupported)
feature_aware_upsample = dataclasses.replace(_chain, forward=_upsample)
