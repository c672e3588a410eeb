"""What is special to strip convolution: zero padding at every stage, and when it is one big convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import famseg_kernels as fk


def test_intermediate_results_are_zero_outside_the_image():
    # A row bias of 1 and a column of ones: each output counts the rows of the image that the column reaches.
    x = torch.zeros(1, 1, 4, 2)
    rows, cols = [torch.zeros(1, 1, 1, 3)], [torch.ones(1, 1, 5, 1)]
    y = fk.strip_conv2d(x, None, None, rows, [torch.ones(1)], cols, None)
    torch.testing.assert_close(y[0, 0, :, 0], torch.tensor([3.0, 4.0, 4.0, 3.0]))


def test_away_from_the_border_a_branch_is_one_outer_product_convolution():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 30, 30, dtype=torch.float64)
    row, col = torch.randn(2, 1, 1, 7, dtype=x.dtype), torch.randn(2, 1, 5, 1, dtype=x.dtype)
    y = fk.strip_conv2d(x, None, None, [row], None, [col], None)
    whole = x + F.conv2d(x, col * row, padding=(2, 3), groups=2)
    torch.testing.assert_close(y[..., 4:-4, 4:-4], whole[..., 4:-4, 4:-4])


def test_no_square_and_no_branch_is_the_identity():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(fk.strip_conv2d(x, None, None, [], None, [], None), x)


def test_bias_lists_may_be_none_or_hold_none():
    torch.manual_seed(0)
    x, row, col = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 1, 3), torch.randn(2, 1, 3, 1)
    a = fk.strip_conv2d(x, None, None, [row], None, [col], None)
    assert torch.equal(a, fk.strip_conv2d(x, None, None, [row], [None], [col], [torch.zeros(2)]))


def test_result_keeps_channels_last():
    layer = fk.StripConv2d(4)
    x = torch.randn(2, 4, 9, 7).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x.contiguous()))
