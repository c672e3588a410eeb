"""Networks of segmentation-models-pytorch with its own or timm's encoders: the extra `baselines`.

They are the rivals of FAMSeg's Table 1 that have a public definition there, and the fine-tuning studies' U-Net. The
papers name encoders or heads only in part; what they leave open is chosen in `NETWORKS`. Nothing is downloaded:
encoders start at random.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

from torch import nn

from famseg.models.padded import PaddedNetwork


class Network(NamedTuple):
    decoder: str  # a class of segmentation_models_pytorch
    encoder: str  # "tu-": of timm
    options: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default, not a class attribute)


NETWORKS = {
    "unet": Network("Unet", "resnet34"),
    "upernet": Network("UPerNet", "resnet50"),  # the encoder of its paper
    "twins": Network("UPerNet", "tu-twins_svt_small"),
    # Windows as in the paper's segmentation: of 7 × 7 and shifted at every stage, whatever the image's size.
    "swin": Network("UPerNet", "tu-swin_tiny_patch4_window7_224", {"strict_img_size": False, "always_partition": True}),
    "mobilenetv3": Network("Unet", "tu-mobilenetv3_large_100"),
    "convnext": Network("UPerNet", "tu-convnext_tiny"),
    "unet_mobilenetv2": Network("Unet", "mobilenet_v2"),
}


def require_package(name: str) -> None:
    """ValueError where the package that model `name` needs is not installed."""
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        raise ValueError(f"model: {name} needs a package: pip install 'famseg[baselines]'")


class SmpNetwork(PaddedNetwork):
    """One of NETWORKS: (N, in_channels, H, W) → logits (N, num_classes, H, W), for any H, W ≥ 1.

    Raises:
        ValueError: segmentation-models-pytorch is not installed.
    """

    def __init__(self, name: str, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__()
        require_package(name)
        import segmentation_models_pytorch as smp

        decoder, encoder, options = NETWORKS[name]
        net = getattr(smp, decoder)(
            encoder, encoder_weights=None, in_channels=in_channels, classes=num_classes, **options
        )
        self.encoder, self.decoder, self.classifier = net.encoder, net.decoder, net.segmentation_head[0]

    @property
    def decoder_layers(self) -> nn.ModuleList:
        decoder = self.decoder
        if hasattr(decoder, "blocks"):  # U-Net
            return decoder.blocks
        steps = zip(decoder.fpn_lateral_blocks, decoder.fpn_conv_blocks, strict=True)
        return nn.ModuleList([decoder.psp, *(nn.ModuleList(step) for step in steps), decoder.fusion_block])


class UNetMobileNetV2(SmpNetwork):
    """U-Net with a MobileNetV2 encoder of the fine-tuning studies (arXiv 2307.09067, 2407.20086)."""

    def __init__(self, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__("unet_mobilenetv2", num_classes, in_channels)
