"""FLOP and byte formulas, and the paper's Eq. 1–5."""

from __future__ import annotations

import torch

import famseg_kernels as fk


def test_mscan_costs_206_flops_an_element():
    layer = fk.StripConv2d(2, bias=True)
    x = torch.zeros(1, 2, 8, 8)
    convs = [getattr(layer, f"conv{i}_{j}") for j in (1, 2) for i in range(3)]
    rows, cols = [c.weight for c in convs[:3]], [c.weight for c in convs[3:]]
    args = (x, layer.conv0.weight, layer.conv0.bias, rows, None, cols, None)
    assert fk.flops.strip_conv2d(*args) == 206 * x.numel()
    parameters = 2 * (25 + 1 + 78)  # one bias given, the others None
    assert fk.flops.strip_conv2d_bytes(*args) == 4 * (2 * x.numel() + parameters)


def test_reassembly_counts_taps_of_every_output():
    x, logits = torch.zeros(2, 4, 3, 5), torch.zeros(2, 100, 3, 5)
    assert fk.flops.reassemble(x, logits) == 2 * 2 * 4 * 6 * 10 * 25
    assert fk.flops.reassemble_bytes(x, logits) == 4 * (5 * x.numel() + logits.numel())
    assert fk.flops.carafe(x, torch.zeros(2, 25, 6, 10), 5, 1, 2) == fk.flops.reassemble(x, logits)


def test_the_encoder_counts_what_its_convolution_does_and_moves_no_logits():
    x, compressed, weight, bias = (torch.zeros(shape) for shape in ((2, 4, 3, 5), (2, 6, 3, 5), (100, 6, 3, 3), (100,)))
    of_reassembly = fk.flops.reassemble(x, torch.zeros(2, 100, 3, 5))
    for dilation in (1, 2):
        args = (x, compressed, weight, bias, 5, 2, 1, dilation)
        assert fk.flops.feature_aware_upsample(*args) == 2 * 2 * 15 * 100 * 6 * 9 + of_reassembly
    moved = 4 * (5 * x.numel() + compressed.numel() + weight.numel() + 100)
    assert fk.flops.feature_aware_upsample_bytes(x, compressed, weight, bias) == moved
    assert fk.flops.feature_aware_upsample_bytes(x, compressed, weight, None) == moved - 4 * 100


def test_the_scan_is_linear_in_tokens_and_directions_whatever_the_chunk():
    def cost(h, k):
        x, dt = torch.zeros(1, h, 4, 2, 8), torch.zeros(1, h, 4, k, 2)
        B = torch.zeros(1, h, 4, k, 1, 16)
        return fk.flops.ssd_scan_2d(x, dt, torch.zeros(k, 2), B, B, chunk_size=h)

    assert cost(6, 4) == 2 * cost(3, 4) == 4 * cost(6, 1) == 4 * 6 * 4 * 2 * 8 * 16 * 4
    x, dt, B = torch.zeros(1, 9, 2, 8), torch.zeros(1, 9, 2), torch.zeros(1, 9, 1, 16)
    assert fk.flops.ssd_scan(x, dt, torch.zeros(2), B, B, 4, torch.zeros(2)) == x.numel() * (4 * 16 + 2)
    moved = 4 * (2 * x.numel() + dt.numel() + 2 + 2 * B.numel() + 2)
    assert fk.flops.ssd_scan_bytes(x, dt, torch.zeros(2), B, B, 4, torch.zeros(2)) == moved


def test_equations_of_the_paper():
    h, w = 17, 23
    assert fk.flops.eq1(7, h, w) == fk.flops.eq4(h, w) == 49 * h * w
    assert fk.flops.eq2(7, h, w) == fk.flops.eq3(h, w) == 14 * h * w
    assert fk.flops.eq4(h, w) / fk.flops.eq3(h, w) == 3.5
    assert fk.flops.eq5(h, w) == 18 * h * w


def test_equation_2_is_what_the_operation_counts():
    x = torch.zeros(1, 1, 17, 23)
    rows, cols = [torch.zeros(1, 1, 1, 7)], [torch.zeros(1, 1, 7, 1)]
    assert fk.flops.strip_conv2d(x, None, None, rows, None, cols, None) == 2 * fk.flops.eq2(7, 17, 23)
