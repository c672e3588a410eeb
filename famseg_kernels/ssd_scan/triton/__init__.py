"""ssd_scan and ssd_scan_2d on NVIDIA GPUs, in Triton.

The scan is computed in chunks of Q tokens (arXiv 2405.21060, section 6). A direction and the reverse one of the
same axis share one index order, so nothing is reversed, and column-major order is only another way from token to
pixel, so nothing is transposed. Per chunk and head, with X (Q, p), B and C (Q, n), G = C Bᵀ of either direction f, b:

    M = tril(G_f ∘ L_f · step_f) + triu(G_b ∘ L_b · step_b)      L: the decay between two tokens
    Y = M X + [arrive_f ∘ C_f | arrive_b ∘ C_b] [S_f; S_b]       S: the state that enters the chunk
    S ← through · S + Xᵀ (weight ∘ B)                            the state that leaves it

An element of M off the diagonal belongs to one direction only, so two directions cost one exponential and one product
M X. Kernels: `running_sums` (steps, and their log-decays summed within each chunk), `chunk_states` (walks along the
chunks with the state in registers, and writes what enters each), and for Y `mix_direction` or, once an axis,
`mix_axis`; the column launch adds to what the row launch has left. A sequence of a single chunk (64 tokens in bf16,
else 32) needs no states. Of a bf16 image of at most 600 pixels one matrix holds all four directions, and there are no
states either: `mix_image` (docs/design/gpu-model.md counts both ways).

The gradient of X is the same computation on dY with M transposed, B and C swapped and the gradients of the states for
the states: by the same kernels. `pair_gradients` makes what pairs of tokens in a chunk give to the rest,
`matrix_gradients` what the states give, and `step_gradients` takes the steps' gradients through softplus and clamp.
Only the inputs are kept for backward.

Log-decays are summed in fixed point, int64 with 40 bits after the point: the sum is exact, so a step of -110 costs its
neighbours no digits, as it would in fp32, and no segmented sum is needed. Integers hold no NaN: where a log-decay is
NaN, the token's step is made NaN, a factor of all that it gives to itself and to later tokens. In the gradients, all
that comes through a token's decay is read by the token as well: a NaN in the decays to it reaches what it should.

What is not finite reaches what the recurrence gives it, forward and in the gradients: rows of a triangle that do not
read a token must not multiply it by 0, so it is taken out of the product and put in its places (`add_product`), and
what lies beyond a reset is chosen away, never weighed by 0. With both directions of an axis M has no zeros to mind.

Device memory, forward, a token and head, K = 4, e bytes an element: x is read once a direction for the states and once
an axis for Y (6·p·e), y is written, read and written (the row's part in fp32: 8·p + p·e), the chunks' states are
written and read once (2·K·p·n·e/Q: in bf16 they are stored as they are multiplied); B and C serve the heads of a group
from the L2 cache. At p = n = Q = 64 in bf16 that is 1.4 KB and 1 KB of states. fp32 products are three of TF32, which
keep fp32's digits. No GPU has run this yet; `python -m benchmarks.issue` predicts what binds each kernel.
"""

from famseg_kernels.ssd_scan.triton.launch import CONFIGURATIONS, Configuration, scan, scan_2d

__all__ = ["CONFIGURATIONS", "Configuration", "scan", "scan_2d"]
