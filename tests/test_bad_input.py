"""Every wrong argument is named, with what was expected and what came, before any kernel runs."""

from __future__ import annotations

import re

import pytest
import torch

import famseg_kernels as fk


def strips(**changes):
    c = 4
    args = {
        "x": torch.randn(1, c, 8, 8),
        "square_weight": torch.randn(c, 1, 5, 5),
        "square_bias": torch.randn(c),
        "row_weights": [torch.randn(c, 1, 1, 7)],
        "row_biases": [torch.randn(c)],
        "col_weights": [torch.randn(c, 1, 7, 1)],
        "col_biases": [torch.randn(c)],
    }
    return fk.strip_conv2d(**{**args, **changes})


def scan2d(**changes):
    n, h, w, k, heads, p, g, s = 1, 3, 4, 4, 2, 5, 1, 6
    args = {
        "x": torch.randn(n, h, w, heads, p),
        "dt": torch.rand(n, h, w, k, heads),
        "A": -torch.rand(k, heads),
        "B": torch.randn(n, h, w, k, g, s),
        "C": torch.randn(n, h, w, k, g, s),
    }
    return fk.ssd_scan_2d(**{**args, **changes})


def scan(**changes):
    b, length, heads, p, g, s = 2, 7, 2, 3, 1, 4
    args = {
        "x": torch.randn(b, length, heads, p),
        "dt": torch.rand(b, length, heads),
        "A": -torch.rand(heads),
        "B": torch.randn(b, length, g, s),
        "C": torch.randn(b, length, g, s),
        "chunk_size": 4,
    }
    return fk.ssd_scan(**{**args, **changes})


def reassemble(**changes):
    args = {
        "x": torch.randn(1, 4, 3, 3),
        "logits": torch.randn(1, 100, 3, 3),
        "kernel_size": 5,
        "scale": 2,
        "groups": 1,
    }
    return fk.reassemble(**{**args, **changes})


def carafe(**changes):
    args = {
        "features": torch.randn(1, 4, 3, 3),
        "masks": torch.rand(1, 25, 6, 6),
        "kernel_size": 5,
        "group_size": 1,
        "scale_factor": 2,
    }
    return fk.carafe(**{**args, **changes})


def upsample(**changes):
    args = {
        "x": torch.randn(1, 4, 3, 3),
        "compressed": torch.randn(1, 6, 3, 3),
        "weight": torch.randn(100, 6, 3, 3),
        "bias": torch.randn(100),
    }
    return fk.feature_aware_upsample(**{**args, **changes})


F64, I64, HALF = torch.float64, torch.int64, torch.float16
META = torch.randn(4, device="meta")
BAD = [
    (strips, {"x": "image"}, TypeError, "x: expected a tensor, got str"),
    (strips, {"x": torch.randn(4, 8, 8)}, ValueError, "x: expected 4 dimensions, got shape (4, 8, 8)"),
    (strips, {"x": torch.zeros(1, 4, 8, 8, dtype=I64)}, TypeError, "x: expected float32"),
    (strips, {"square_weight": torch.randn(4, 1, 4, 4)}, ValueError, "square_weight: expected an odd kernel size, got 4"),
    (strips, {"square_weight": torch.randn(4, 1, 5, 3)}, ValueError, "square_weight: expected shape (4, 1, 5, 5)"),
    (strips, {"square_weight": torch.randn(3, 1, 5, 5)}, ValueError, "square_weight: expected shape (4, 1, 5, 5)"),
    (strips, {"square_weight": None}, ValueError, "square_bias: expected None without a square_weight"),
    (strips, {"square_bias": META}, ValueError, "square_bias: expected device cpu"),
    (strips, {"row_weights": [torch.randn(4, 1, 7, 1)]}, ValueError, "row_weights[0]: expected shape (4, 1, 1, 7)"),
    (strips, {"row_weights": [torch.randn(4, 1, 1, 65)]}, ValueError, "row_weights[0]: expected a kernel size of at most 63, got 65"),
    (strips, {"col_weights": []}, ValueError, "col_weights: expected 1 like row_weights, got 0"),
    (strips, {"col_weights": [torch.randn(4, 1, 7, 1, dtype=F64)]}, TypeError, "col_weights[0]: expected torch.float32 like x"),
    (strips, {"row_biases": []}, ValueError, "row_biases: expected 1 like row_weights, got 0"),
    (strips, {"col_biases": [torch.randn(5)]}, ValueError, "col_biases[0]: expected shape (4,) (channels,), got (5,)"),
    (scan2d, {"x": torch.randn(1, 3, 4, 10)}, ValueError, "x: expected 5 dimensions"),
    (scan2d, {"dt": torch.rand(1, 3, 4, 3, 2)}, ValueError, "dt: expected 1, 2 or 4 directions"),
    (scan2d, {"dt": torch.rand(1, 3, 4, 4, 2, dtype=HALF)}, TypeError, "dt: expected torch.float32 like x, got torch.float16"),
    (scan2d, {"A": -torch.rand(2)}, ValueError, "A: expected shape (4, 2) (directions, heads), got (2,)"),
    (scan2d, {"B": torch.randn(1, 3, 4, 2, 1, 6)}, ValueError, "B: expected shape (1, 3, 4, 4, 1, 6)"),
    (scan2d, {"C": torch.randn(1, 3, 4, 1, 1, 6)}, ValueError, "C: expected shape (1, 3, 4, 4, 1, 6)"),
    (scan2d, {"D": torch.randn(3)}, ValueError, "D: expected shape (2,)"),
    (scan2d, {"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
    (scan2d, {"chunk_size": 2.0}, TypeError, "chunk_size: expected an int, got float"),
    (scan2d, {"dt_limit": (1.0, 0.5)}, ValueError, "dt_limit: expected (low, high)"),
    (scan2d, {"dt_limit": (0.0, 10**400)}, ValueError, "dt_limit: expected numbers that a float can hold, got a larger one"),
    (scan, {"B": torch.randn(2, 7, 3, 4), "C": torch.randn(2, 7, 3, 4)}, ValueError, "groups of B and C: expected a divisor of heads = 2, got 3"),
    (scan, {"z": torch.randn(2, 7, 2, 4)}, ValueError, "z: expected shape (2, 7, 2, 3) like x"),
    (scan, {"seq_idx": torch.zeros(2, 7)}, TypeError, "seq_idx: expected int32 or int64, got torch.float32"),
    (scan, {"initial_states": torch.zeros(2, 2, 4, 3)}, ValueError, "initial_states: expected shape (2, 2, 3, 4)"),
    (scan, {"return_varlen_states": True}, ValueError, "cu_seqlens: expected a tensor"),
    (scan, {"return_varlen_states": True, "cu_seqlens": torch.tensor([0, 7])}, ValueError, "x: expected batch 1"),
    (reassemble, {"kernel_size": 4}, ValueError, "kernel_size: expected an odd kernel size, got 4"),
    (reassemble, {"scale": 0}, ValueError, "scale: expected at least 1, got 0"),
    (reassemble, {"groups": 3}, ValueError, "groups: expected a divisor of the channels of x = 4, got 3"),
    (reassemble, {"logits": torch.randn(1, 25, 3, 3)}, ValueError, "logits: expected shape (1, 100, 3, 3)"),
    (reassemble, {"logits": torch.randn(1, 100, 3, 3, dtype=HALF)}, TypeError, "logits: expected torch.float32 like x"),
    (carafe, {"masks": torch.rand(1, 25, 3, 3)}, ValueError, "masks: expected shape (1, 25, 6, 6)"),
    (carafe, {"features": [1]}, TypeError, "features: expected a tensor, got list"),
    (upsample, {"compressed": torch.randn(1, 6, 3, 4)}, ValueError, "compressed: expected shape (1, 6, 3, 3) (N, C_d, H, W), got (1, 6, 3, 4)"),
    (upsample, {"compressed": torch.randn(1, 5, 3, 3)}, ValueError, "weight: expected shape (100, 5, 3, 3)"),
    (upsample, {"weight": torch.randn(36, 6, 3, 3)}, ValueError, "weight: expected shape (100, 6, 3, 3)"),
    (upsample, {"weight": torch.randn(100, 6, 1, 3)}, ValueError, "weight: expected shape (100, 6, 3, 3)"),
    (upsample, {"weight": torch.randn(100, 6, 2, 2)}, ValueError, "weight: expected an odd kernel size, got 2"),
    (upsample, {"weight": torch.randn(100, 6, 3, 3, dtype=HALF)}, TypeError, "weight: expected torch.float32 like x"),
    (upsample, {"bias": torch.randn(99)}, ValueError, "bias: expected shape (100,)"),
    (upsample, {"bias": 0.0}, TypeError, "bias: expected a tensor, got float"),
    (upsample, {"dilation": 0}, ValueError, "dilation: expected at least 1, got 0"),
    (upsample, {"kernel_size": 4}, ValueError, "kernel_size: expected an odd kernel size, got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "changes", "error", "message"), BAD, ids=[b[3][:50] for b in BAD])
def test_message_names_the_argument(call, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


def test_the_good_arguments_are_good():
    for call in (strips, scan2d, scan, reassemble, carafe, upsample):
        assert torch.isfinite(call()).all()
