"""A kernel of nothing but fp32 FMAs: the rate of a GPU's FMA units, which no operation of torch shows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks import measure

BLOCK, WARPS = 2048, 8  # 8 independent sums a thread, two warps a scheduler and program: no FMA waits for another
STEPS, UNROLLED = 4096, 16
PROGRAMS = 16  # of a multiprocessor, so that the last ones to end cost little


@triton.jit
def _multiply_add(numbers, BLOCK: tl.constexpr, STEPS: tl.constexpr, UNROLLED: tl.constexpr):
    place = tl.arange(0, BLOCK)
    # Loaded, so that the compiler cannot know them: 0.5 and 1, under which every sum tends to 2.
    factor = tl.load(numbers)
    term = tl.load(numbers + 1)
    value = place.to(tl.float32)
    for _ in range(0, STEPS // UNROLLED):
        for _ in tl.static_range(UNROLLED):
            value = value * factor + term
    tl.store(numbers + 2 + tl.program_id(0) * BLOCK + place, value)


def call(device: torch.device, steps: int = STEPS) -> tuple[int, measure.Call]:
    """How many multiply–adds a call makes, and the call."""
    programs = PROGRAMS * (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    numbers = torch.empty(2 + programs * BLOCK, device=device)
    numbers[0], numbers[1] = 0.5, 1.0

    def run(_: int) -> None:
        _multiply_add[(programs,)](numbers, BLOCK, steps, UNROLLED, num_warps=WARPS)

    return programs * BLOCK * steps, run
