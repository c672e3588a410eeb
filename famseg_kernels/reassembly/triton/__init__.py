"""reassemble and carafe on NVIDIA GPUs with Triton: a multiply–add for each tap, in fp32, and nothing else multiplied.

A thread has 16 channels of a pixel. It makes a tap's weight once for all of them (a softmax's exponential included) and
uses every number of x that it loads for all results of its pixel: k² s² multiply–adds an element of x and about three
times as many instructions in all, loads, addresses and conversions. Products on tensor cores would need the weights
spread over a band, five times as many numbers as there are weights, which reach the tensor cores through shared memory;
they would mix what is not finite, and cost fp32 three times as much. Here nothing passes through shared memory.

Which lanes have which channels is the compiler's choice, by the strides: along pixels, or, where channels are next to
each other in memory (channels_last), 16 bytes of them a lane. Logits, masks and dy are taken with any strides too.

The softmax is taken on the way, a kernel row at a time: neither a softmaxed, nor a pixel-shuffled, nor an unfolded
tensor exists. Backward: a pixel's weights sum over channels in registers; x gathers from the s²·k² results that used
it, two rows of it at once from the same dy. No two programs write the same place. The first leaves the softmax's log Σ
exp (an fp32 number a result pixel) for the second.

feature_aware_upsample makes the logits in its forward's only kernel (`upsample.py`), unless `launch.py` says that two
are better. Its backward writes them and their gradient, which the convolution's gradients read anyway. No GPU has run
this yet.
"""

from famseg_kernels.reassembly.triton.launch import (
    CONFIGURATIONS,
    Configuration,
    carafe,
    feature_aware_upsample,
    reassemble,
)

__all__ = ["CONFIGURATIONS", "Configuration", "carafe", "feature_aware_upsample", "reassemble"]
