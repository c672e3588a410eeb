"""reassemble and carafe on NVIDIA GPUs with Triton: predicted kernels as banded matrices, shared by all channels.

Along a row of the image, a block of B pixels needs the B + k − 1 source columns around it, its window. For each row
of the predicted kernels their weights fill a band, so that for every channel at once

    y[c, (dy, j, dx)] = Σ_ky x[c, row i + ky − r, window] · Band_ky[window, (dy, j, dx)]

is a matrix product with the channels as rows. The alternative, a thread a pixel, needs for k = 5, s = 2 a load, an
address and a conversion for every 4 FMAs: about 230 instructions an element of x, where reading and writing 5 E + M at
an H200's rate leaves time for 80 in bf16 and 160 in fp32. Here an element costs 640 multiply–adds on tensor cores (a
third of a clock and SM) and a share of making the band, which C_BLOCK channels split: as compiled for sm_90, 220
instructions at 64 channels and 120 at 128, more than half of them for the softmax and the band. So 16-bit forward
should be bound by instruction issue at up to 1.5 times the bytes' time with many channels and 3 times with 64; fp32
("tf32x3": three TF32 products that keep 22 bits of each factor) by tensor cores. x is read in whole rows of a window.

The softmax over the taps is taken from the logits where the band is made; its running maximum and sum take one pass
more over the same logits, which then come from the first cache. Neither a softmaxed, nor a pixel-shuffled, nor an
unfolded tensor exists.

Backward: x gathers from the s²·k² results that used it (the same bands turned round), weights are the diagonals of
x[window]ᵀ · dy summed over the group's channels; no two programs write the same place. The second leaves the softmax's
maximum and sum (2 fp32 numbers a result pixel) for the first. No GPU has run this yet.

x, y and dy are taken with any strides (channels_last is as good as contiguous here: channels are a tile's rows).
"""

from famseg_kernels.reassembly.triton.launch import (
    CONFIGURATIONS,
    Configuration,
    carafe,
    feature_aware_upsample,
    reassemble,
)

__all__ = ["CONFIGURATIONS", "Configuration", "carafe", "feature_aware_upsample", "reassemble"]
