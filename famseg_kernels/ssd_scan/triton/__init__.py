"""ssd_scan and ssd_scan_2d on NVIDIA GPUs, in Triton.

The scan is computed in chunks of Q tokens (arXiv 2405.21060, section 6). A direction and the reverse one of the
same axis share one index order, so nothing is reversed, and column-major order is only another way from token to
pixel, so nothing is transposed. Per chunk and head, with X (Q, p), B and C (Q, n), G = C Bᵀ of either direction f, b:

    M = tril(G_f ∘ L_f · step_f) + triu(G_b ∘ L_b · step_b)      L: the decay between two tokens
    Y = M X + [arrive_f ∘ C_f | arrive_b ∘ C_b] [S_f; S_b]       S: the state that enters the chunk
    S ← through · S + Xᵀ (weight ∘ B)                            the state that leaves it

An element of M off the diagonal belongs to one direction only, so two directions cost one exponential and one product
M X. Kernels: `chunk_states` (each chunk's own Xᵀ (weight ∘ B)), `pass_states` (the recurrence over chunks, in place)
and for Y `mix_direction` or, once an axis, `mix_axis`; the column launch adds to what the row launch has left. A
sequence of a single chunk (64 tokens in bf16, else 32) needs the last alone. Of a bf16 image of at most 600 pixels one
matrix holds all four directions, and there are no states: `running_sums` and `mix_image` (docs/design/gpu-model.md
counts both ways).

The gradient of X is the same computation on dY with M transposed, B and C swapped and the gradients of the states for
the states: by the same kernels. `matrix_gradients` makes the rest, and `step_gradients` takes the steps' gradients
through softplus and clamp. Only the inputs are kept for backward.

Log-decays are summed in fixed point, int64 with 40 bits after the point: the sum is exact, so a step of -110 costs its
neighbours no digits, as it would in fp32, and no segmented sum is needed. Integers hold no NaN: where a log-decay is
NaN, the token's step is made NaN, a factor of all that it gives to itself and to later tokens. In the gradients, all
that comes through a token's decay is read by the token as well: a NaN in the decays to it reaches what it should.

What is not finite reaches what the recurrence gives it, forward and in the gradients: rows of a triangle that do not
read a token must not multiply it by 0, so it is taken out of the product and put in its places (`add_product`), and
what lies beyond a reset is chosen away, never weighed by 0. With both directions of an axis M has no zeros to mind.

Device memory, forward, a token and head, K = 4, e bytes an element: x is read once a direction for the states and once
an axis for Y (6·p·e), y is written, read and written (the row's part in fp32: 8·p + p·e), the chunks' states are
written, read and written by the recurrence, and read (16·K·p·n/Q); B and C serve the heads of a group from the L2
cache. At p = n = Q = 64 in bf16 that is 1.4 KB and 4.1 KB of states. Products are K/2·(2·Q·n + Q·p) + 2·K·p·n = 57 k
multiply–adds, with 128 exponentials. So bf16 should be bound by memory, and there by the states: 1.1 ns a token and
head on H200 (4.8 TB/s), 2.7 ns on A100 (2 TB/s), against 0.2 and 0.6 ns of products at 60 % of the tensor cores' peak.
fp32 should be bound by its FMA products (`ieee`: no silent TF32). No GPU has run this yet.
"""

from famseg_kernels.ssd_scan.triton.launch import CONFIGURATIONS, Configuration, scan, scan_2d

__all__ = ["CONFIGURATIONS", "Configuration", "scan", "scan_2d"]
