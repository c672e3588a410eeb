"""strip_conv2d on NVIDIA GPUs with Triton: sums over taps on FMA units.

Triton can neither shift a tensor that lives in registers nor index shared memory, and a strip convolution is nothing
but shifts. So columns are tensors of their own: a lane owns a group of neighbouring columns of one channel, and a row
of them, with those that a row kernel reaches, is a tuple. A shift along the row is another place in the tuple.

    square:    all rows that a few rows of results need are loaded, then multiplied; what L1 has seen costs no memory.
    strips:    a lane goes down its columns. Each row of `a` gives a row of r for each branch, and that is added to the
               sums of all rows of y that it reaches. A sum moves up by one place in each step, which costs nothing:
               an FMA writes another register than it reads. When it is at the top, it is whole.
    gradients: of the weights, a sum for each tap in registers, over all pixels of a lane; lanes of a channel are added
               in a fixed order, programs by a sum of torch's.

Without biases the strips commute, so the gradient of `a` is the kernel of the strips over the incoming gradient with
the weights turned round, and the gradient of x is the kernel of the square over that, likewise.

An element costs its multiplications, 25 and 78 for 5 and (7, 11, 21), and about a quarter as many instructions beside
them; bytes are a copy of x to `a` and of `a` to y. So all dtypes take the same kernels, and issuing instructions binds
them; the lone 3×3 is bound by memory. Products with banded matrices on tensor cores take five times the
multiplications, and their factors pass through shared memory; by count they were slower in 16 bits, too.

Images are read and written as they lie. In NCHW a lane reads its columns in one access where rows are a multiple of 16,
in channels_last neighbouring lanes are neighbouring channels. What lies outside the image is not read. Beside a weight
that is not finite it may count as zero; a gradient of weights is spoiled in its own channel only. `a` is rounded to x's
dtype; sums are fp32. No GPU has run this yet.
"""

from famseg_kernels.strip_conv.triton.launch import CONFIGURATIONS, Configuration, strip_conv2d

__all__ = ["CONFIGURATIONS", "Configuration", "strip_conv2d"]
