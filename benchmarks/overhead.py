"""`python -m benchmarks.overhead`: what a call costs before any arithmetic, in µs, beside a torch operation."""

from __future__ import annotations

import timeit

import torch

import famseg_kernels as fk


def microseconds(call, number: int = 3000) -> float:
    return min(timeit.repeat(call, number=number, repeat=5)) / number * 1e6


def main() -> None:
    x = torch.randn(1, 1, 1, 1)
    leaf = x.clone().requires_grad_()
    operation = fk.OPERATIONS[0]
    empty = (None, None, [], [], [], [])
    rows = {
        "torch.mul": lambda t: t * t,
        "op (torch.ops.famseg.strip_conv2d)": lambda t: operation(t, *empty),
        "function (fk.strip_conv2d, with checks)": lambda t: fk.strip_conv2d(t, None, None, [], None, [], None),
    }
    print(f"{'':42}{'no grad':>10}{'grad':>10}   µs a call, torch {torch.__version__}")
    for name, call in rows.items():
        plain, recorded = microseconds(lambda call=call: call(x)), microseconds(lambda call=call: call(leaf))
        print(f"{name:42}{plain:10.1f}{recorded:10.1f}")


if __name__ == "__main__":
    main()
