"""U-Net with a MobileNetV2 encoder of the fetal-head fine-tuning studies (arXiv 2307.09067 and 2407.20086)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class UNetMobileNetV2(nn.Module):
    """segmentation-models-pytorch's U-Net, decoder layers 1 (deepest) to 5, on grey images of any size.

    (N, 1, H, W) → logits (N, num_classes, H, W). The image is padded with zeros to the encoder's stride of 32, right
    and below, and the logits are cropped again.
    """

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ModuleNotFoundError as error:
            raise ValueError("model: unet_mobilenetv2 needs a package: pip install 'famseg[baselines]'") from error
        net = smp.Unet("mobilenet_v2", encoder_weights=None, in_channels=1, classes=num_classes)
        self.encoder, self.decoder, self.classifier = net.encoder, net.decoder, net.segmentation_head[0]

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.decoder.blocks

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % 32, 0, -height % 32))
        return self.classifier(self.decoder(self.encoder(x)))[:, :, :height, :width]

    def load_encoder(self, state_dict: dict[str, Tensor]) -> int:
        """Load a classifier's MobileNetV2 (torchvision's keys, `features.…`); returns how many tensors were loaded.

        Colour kernels of the first convolution are summed: a grey image is one with three equal channels.

        Raises:
            ValueError: it is not a MobileNetV2.
        """
        target = self.encoder.state_dict()
        first = "features.0.0.weight"
        found = {key: value for key, value in state_dict.items() if key in target}
        if first in found:
            found[first] = found[first].sum(1, keepdim=True)
        for key, value in target.items():
            if key not in found or found[key].shape != value.shape:
                came = f"shape {tuple(found[key].shape)}" if key in found else "nothing"
                raise ValueError(f"{key}: expected shape {tuple(value.shape)} of a MobileNetV2, got {came}")
        self.encoder.load_state_dict(found)
        return len(found)
