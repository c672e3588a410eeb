"""FeatureAwareUpsample, the paper's FAM, with the names of mmcv's CARAFEPack; Carafe, with those of mmcv's CARAFE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg_kernels import children
from famseg_kernels.reassembly.op import carafe, feature_aware_upsample, reassemble


class FeatureAwareUpsample(nn.Module):
    """Content-aware upsampling (FAMSeg section 3.3, Fig. 3): compress, predict a kernel per output pixel, reassemble.

    State-dict keys, shapes, initialisation, attributes and methods are those of mmcv's CARAFEPack, so that its
    checkpoints load and code written for it goes on working. One fused op reads the encoder's weight and makes its
    logits where they are used. The encoder is called, and an op takes its logits, where that is faster (training on a
    CPU with many compressed channels), where there are hooks on all modules, and where the encoder is not a plain
    convolution any more (an adapter in its place, hooks, pruning, a parametrization, another padding). A subclass or
    an instance with another `kernel_normalizer` or `feature_reassemble` runs by these, as mmcv's does.

    Args:
        channels: C of the input and the output.
        scale_factor: upsampling factor s.
        up_kernel: odd size k of the predicted kernels.
        up_group: number of kernel groups, a divisor of C.
        encoder_kernel: odd kernel size of the content encoder.
        encoder_dilation: its dilation.
        compressed_channels: channels C_d between compressor and encoder.

    Shape: (N, C, H, W) → (N, C, s·H, s·W).
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int = 2,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.encoder_kernel = encoder_kernel
        self.encoder_dilation = encoder_dilation
        self.compressed_channels = compressed_channels
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_kernel**2 * up_group * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """mmcv's initialisation: Xavier-uniform compressor, encoder N(0, 0.001): it starts as an average."""
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for bias in (self.channel_compressor.bias, self.content_encoder.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    reset_parameters = init_weights

    def kernel_normalizer(self, mask: Tensor) -> Tensor:
        """The encoder's logits (N, groups·k²·s², H, W) as kernels (N, groups·k², s·H, s·W), each with the sum 1."""
        mask = F.pixel_shuffle(mask, self.scale_factor)
        return mask.unflatten(1, (-1, self.up_kernel**2)).softmax(2).flatten(1, 2)

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (N, C, H, W) reassembled by finished kernels (N, groups·k², s·H, s·W): (N, C, s·H, s·W)."""
        return carafe(x, mask, self.up_kernel, self.up_group, self.scale_factor)

    def forward(self, x: Tensor) -> Tensor:
        compressed = self.channel_compressor(x)
        other_steps = any(name in self.__dict__ or getattr(type(self), name) is not method for name, method in _STEPS)
        encoder = self.content_encoder
        if not other_steps and _is_plain(encoder) and not _chain_is_faster(encoder):
            weight, bias, dilation = encoder.weight, encoder.bias, encoder.dilation[0]
            window = self.up_kernel, self.scale_factor, self.up_group
            return feature_aware_upsample(x, compressed, weight, bias, *window, dilation)
        logits = encoder(compressed)
        if other_steps:
            return self.feature_reassemble(x, self.kernel_normalizer(logits))
        return reassemble(x, logits, self.up_kernel, self.scale_factor, self.up_group)


# What the fused op stands for.
_STEPS = tuple((name, getattr(FeatureAwareUpsample, name)) for name in ("kernel_normalizer", "feature_reassemble"))


def _chain_is_faster(encoder: nn.Module) -> bool:
    """Whether convolution and `reassemble` one after the other take less time: in training on a CPU.

    The backward of the fused op makes the logits again, where theirs finds them in memory. At FAMSeg's shapes forward
    and backward then take 0.93 times their time with 8 compressed channels, 1.1 to 1.3 times with 16 to 64 (one thread,
    AVX2). Without a backward the fused op takes 0.7 to 1.1 times theirs, 1.3 at 4 × 4 pixels.
    """
    if torch.jit.is_tracing():  # a trace holds aten only, and the same whether gradients are recorded or not
        return False
    weight: Any = encoder._parameters["weight"]  # the attribute has no values for torch.fx
    recording = torch.is_grad_enabled() and weight.requires_grad
    return bool(recording and weight.device.type == "cpu" and weight.shape[1] > 8)


def _is_plain(encoder: nn.Module) -> bool:
    """Whether the encoder's weight and bias say all: a "same" convolution with zeros, to which nothing was added."""
    if children.patched() or children.altered(encoder) or children.watched():
        return False
    own = encoder.__dict__  # twice as fast as attributes
    (height, width), (down, across) = own["kernel_size"], own["dilation"]
    same = (height // 2 * down, width // 2 * across)
    return bool(
        (height == width and height % 2 == 1 and down == across)
        and own["padding"] in (same, "same")
        and (own["stride"], own["groups"], own["padding_mode"]) == ((1, 1), 1, "zeros")
    )


class Carafe(nn.Module):
    """mmcv's CARAFE: `fk.carafe` as a module.

    Args:
        kernel_size: odd window size k.
        group_size: number of kernel groups, a divisor of C.
        scale_factor: upsampling factor s.

    Shape: features (N, C, H, W), masks (N, k²·group_size, s·H, s·W), normalised → (N, C, s·H, s·W).
    """

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.group_size = group_size
        self.scale_factor = scale_factor

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        return carafe(features, masks, self.kernel_size, self.group_size, self.scale_factor)
