"""What is special to reassembly: CARAFE's definition by unfold, channel order, bf16, mmcv's numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import famseg_kernels as fk


def by_unfold(features, masks, k, groups, s):
    """CARAFE as everyone writes it: unfold, upsample the patches by nearest, weight, sum."""
    n, c, h, w = features.shape
    patches = F.unfold(features, k, padding=k // 2).view(n, c * k * k, h, w)
    patches = F.interpolate(patches, scale_factor=s, mode="nearest").view(n, groups, c // groups, k * k, h * s, w * s)
    return (patches * masks.view(n, groups, 1, k * k, h * s, w * s)).sum(3).view(n, c, h * s, w * s)


@pytest.mark.parametrize(("k", "groups", "s"), [(5, 1, 2), (3, 2, 3), (1, 4, 1), (7, 4, 2), (5, 2, 1)])
def test_carafe_is_the_weighted_unfold(k, groups, s):
    torch.manual_seed(0)
    features = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    masks = torch.randn(2, groups * k * k, 5 * s, 6 * s, dtype=torch.float64)
    torch.testing.assert_close(fk.carafe(features, masks, k, groups, s), by_unfold(features, masks, k, groups, s))


@pytest.mark.parametrize(("k", "groups", "s"), [(5, 1, 2), (3, 2, 3), (1, 4, 1), (5, 2, 4)])
def test_reassemble_is_pixel_shuffle_softmax_carafe(k, groups, s):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    logits = torch.randn(2, groups * k * k * s * s, 5, 6, dtype=torch.float64)
    masks = F.pixel_shuffle(logits, s).view(2, groups, k * k, 5 * s, 6 * s).softmax(2).flatten(1, 2)
    torch.testing.assert_close(fk.reassemble(x, logits, k, s, groups), by_unfold(x, masks, k, groups, s))


@pytest.mark.parametrize(
    ("k", "groups", "s", "encoder", "dilation"), [(5, 1, 2, 3, 1), (3, 2, 3, 1, 1), (3, 4, 1, 5, 2)]
)
def test_feature_aware_upsample_is_the_convolution_and_reassemble(k, groups, s, encoder, dilation):
    torch.manual_seed(0)
    x, compressed = torch.randn(2, 8, 5, 6, dtype=torch.float64), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    weight = torch.randn(groups * k * k * s * s, 3, encoder, encoder, dtype=torch.float64)
    for bias in (None, weight[:, 0, 0, 0]):
        logits = F.conv2d(compressed, weight, bias, padding="same", dilation=dilation)
        y = fk.feature_aware_upsample(x, compressed, weight, bias, k, s, groups, dilation)
        torch.testing.assert_close(y, fk.reassemble(x, logits, k, s, groups))


def test_the_border_is_zero_without_renormalisation():
    y = fk.reassemble(torch.ones(1, 1, 1, 1), torch.zeros(1, 9, 1, 1), 3, 1)
    torch.testing.assert_close(y, torch.full((1, 1, 1, 1), 1 / 9))


def test_large_logits_do_not_overflow():
    logits = torch.full((1, 25 * 4, 3, 3), 5e4)
    logits[:, 12 * 4 : 13 * 4] = 6e4  # the centre tap
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(fk.reassemble(x, logits), F.interpolate(x, scale_factor=2))


def test_under_autocast_half_and_float_meet_without_an_error():
    x, masks = torch.randn(2, 64, 3, 3), torch.rand(2, 100, 6, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fk.carafe(x, masks, 5, 4, 2).dtype == torch.bfloat16
