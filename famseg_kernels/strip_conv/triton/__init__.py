"""strip_conv2d on NVIDIA GPUs with Triton: depthwise convolutions as products with banded matrices.

Triton can neither shift a tensor that lives in registers nor index shared memory, and a strip convolution is nothing
but shifts. A product with a banded Toeplitz matrix is a shift and a sum in one, it runs on tensor cores, and cutting
the band off at the border is the zero padding. So a plane's result is

    y = a + Σ_i Col_i · (inside ∘ (a · Row_i + row_bias_i)) + col_bias_i,   a = inside ∘ (Σ_dy x↓dy · Square_dy + bias)

A program owns some rows of one (n, c) plane, its frame, and streams over the columns in blocks of B: `a` of the next
block comes from x by loads shifted by dy, a row convolution reaches one block to either side (B is at least half a
kernel), a column convolution is one dense product over the frame. Nothing but x and y touches memory; a plane higher
than a frame is cut into frames that overlap by the longest column kernel.

Without biases the strips commute, Col · (a · Row) = (Col · a) · Row, so the gradient of `a` is the same kernel over
the incoming gradient with the weights turned round, and the gradient of x is its square stage alone, likewise.

Cost an element, for 5 and (7, 11, 21), frame F = 64, B = 16: 5·32 + 3·48 + 3·F = 496 multiply–adds on tensor
cores where 103 are useful, 0.24 clocks of an SM at an H200's dense bf16 rate (2048 a clock; an A100 has 1024), and as
compiled for sm_90 65 instructions a thread, 0.5 clocks to issue; both times 1.5 for the overlap of frames on 128 rows,
1 on 64. 103 FMAs take 0.8 clocks, 2 passes over memory 0.2. So forward in 16 bits should be bound by issuing
instructions, at or below the FMA bound; the gradient of x is two such launches. fp32 takes "tf32x3", three TF32
products that keep 22 bits of each factor, and is bound by tensor cores: Triton's own fp32 dot runs on FMA units, where
496 instead of 103 multiply–adds could not win. Plain TF32 is never used. No GPU has run this yet.

A product with a band multiplies zeros too, which makes NaN of what is not finite in x beyond the kernels' reach: where
that shows, a program leaves it out and puts it in its places by itself. Gradients of weights have no such places: what
is not finite in a channel may spoil all of that channel's, but none of another's. Intermediate `a` and row results are
rounded to x's dtype, as tensor cores take them; sums are fp32.
"""

from famseg_kernels.strip_conv.triton.launch import CONFIGURATIONS, Configuration, strip_conv2d

__all__ = ["CONFIGURATIONS", "Configuration", "strip_conv2d"]
