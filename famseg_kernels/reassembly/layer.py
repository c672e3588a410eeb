"""FeatureAwareUpsample: the paper's FAM, with the parameter names of mmcv's CARAFEPack."""

from __future__ import annotations

from torch import Tensor, nn

from famseg_kernels.reassembly.op import reassemble


class FeatureAwareUpsample(nn.Module):
    """Content-aware upsampling (FAMSeg section 3.3, Fig. 3): compress, predict a kernel per output pixel, reassemble.

    State-dict keys, shapes and initialisation are those of mmcv's CARAFEPack, so that its checkpoints load.

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
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_kernel**2 * up_group * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """mmcv's initialisation: Xavier-uniform compressor, encoder N(0, 0.001): it starts as an average."""
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for bias in (self.channel_compressor.bias, self.content_encoder.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.content_encoder(self.channel_compressor(x))
        return reassemble(x, logits, self.up_kernel, self.scale_factor, self.up_group)
