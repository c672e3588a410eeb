"""What our kernels are timed against: each operation as a PyTorch user would write it, usual and best-written.

Every peer is a function of the operation's own arguments, works in x's dtype throughout and is differentiable; each
runs eagerly and through torch.compile, image operations also in channels_last. Peers from other libraries take part
where they are installed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from famseg_kernels.strip_conv.spec import unpacked


@dataclass(frozen=True)
class Peer:
    name: str
    run: Callable[..., Any]
    layouts: tuple[torch.memory_format, ...] = (torch.contiguous_format,)
    compiles: bool = True
    cuda_only: bool = False
    forward_only: bool = False  # its gradients are another peer's
    needs: str | None = None  # a module that must be there: of a package, the one that has what is called

    def missing(self, device: str) -> str | None:
        """Why this peer cannot take part, or None."""
        if self.cuda_only and device != "cuda":
            return "runs on CUDA only"
        return None if self.needs is None else missing_module(self.needs)


@functools.cache
def missing_module(name: str) -> str | None:
    """Why module `name` cannot be used, or None. Imported, not looked for: mmcv-lite has mmcv.ops but not its code."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken build ends in any of them: OSError, RuntimeError, AttributeError
        return f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return None


MAMBA, MMCV = "mamba_ssm.ops.triton.ssd_combined", "mmcv.ops"


_IMAGES = (torch.contiguous_format, torch.channels_last)

# --- strip convolution ------------------------------------------------------------------------------


def strip_convolutions(x, square, square_bias, rows, row_biases, cols, col_biases):  # type: ignore[no-untyped-def]
    """SegNeXt's attention, convolution by convolution."""
    return _strips(_depthwise, x, square, square_bias, rows, row_biases, cols, col_biases)


def strip_convolutions_cudnn(x, square, square_bias, rows, row_biases, cols, col_biases):  # type: ignore[no-untyped-def]
    """The same on cuDNN's kernels; torch takes its own for depthwise convolutions, in the backward of these too."""
    return _strips(_depthwise_cudnn, x, square, square_bias, rows, row_biases, cols, col_biases)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


def _depthwise_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    # (stride, dilation, groups, benchmark, deterministic, allow_tf32)
    y = torch.cudnn_convolution(x, weight, padding, [1, 1], [1, 1], x.shape[1], True, False, False)
    return y if bias is None else y + bias[:, None, None]


def _strips(depthwise, x, square, square_bias, rows, row_biases, cols, col_biases):  # type: ignore[no-untyped-def]
    a = depthwise(x, square, square_bias)
    y = a
    sides = (rows, unpacked(row_biases, rows), cols, unpacked(col_biases, cols))
    for row, row_bias, col, col_bias in zip(*sides, strict=True):
        y = y + depthwise(depthwise(a, row, row_bias), col, col_bias)
    return y


# --- scan ----------------------------------------------------------------------------------------------


def _directions(x, dt, A, B, C, dt_bias, softplus):  # type: ignore[no-untyped-def]
    """Cross-scan: the directions' sequences side by side as heads."""
    k = dt.shape[3]
    step = dt if dt_bias is None else dt + dt_bias
    step = F.softplus(step.float()) if softplus else step.float()
    xs, steps = _cross_scan(x, k), _cross_scan(step, k, each=True)  # (N, L, K, heads, p), (N, L, K, heads)
    Bs, Cs = (_cross_scan(t if t.shape[3] > 1 else t.squeeze(3), k, each=t.shape[3] > 1) for t in (B, C))
    return xs, steps, steps * A.float(), Bs, Cs


def _cross_scan(image: Tensor, directions: int, each: bool = False) -> Tensor:
    """(N, H, W, ...), or with `each` (N, H, W, K, ...), one image a direction → sequences (N, H·W, K, ...)."""
    if image.is_cuda:
        from benchmarks.cross_scan import cross_scan

        return cross_scan(image, directions, each)

    def unroll(image: Tensor, direction: int) -> Tensor:
        sequence = (image.transpose(1, 2) if direction >= 2 else image).flatten(1, 2)
        return sequence.flip(1) if direction % 2 else sequence

    return torch.stack([unroll(image[:, :, :, d] if each else image, d) for d in range(directions)], 2)


def _merge(ys: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """Cross-merge: roll the directions' results back and add."""
    y = _cross_merge(ys, *x.shape[1:3])
    if D is not None:
        y = y + (D if D.dim() == 1 else D.sum(0))[:, None] * x
    return y.to(x.dtype)


def _cross_merge(ys: Tensor, h: int, w: int) -> Tensor:
    """Sequences (N, H·W, K, heads, p) → their sum as an image (N, H, W, heads, p)."""
    if ys.is_cuda:
        from benchmarks.cross_scan import cross_merge

        return cross_merge(ys, h, w)
    y = None
    for d in range(ys.shape[2]):
        sequence = ys[:, :, d].flip(1) if d % 2 else ys[:, :, d]
        image = sequence.unflatten(1, (w, h)).transpose(1, 2) if d >= 2 else sequence.unflatten(1, (h, w))
        y = image if y is None else y + image
    return y


def _chunks(sequence: Tensor, q: int) -> Tensor:
    pad = -sequence.shape[1] % q
    sequence = F.pad(sequence, [0, 0] * (sequence.dim() - 2) + [0, pad])
    return sequence.unflatten(1, (-1, q))


def _ssd_einsum(x, step, log_decay, B, C, q):  # type: ignore[no-untyped-def]
    """The minimal SSD listing of the Mamba-2 paper: x (b, l, h, p), step (b, l, h), B and C (b, l, h, n)."""
    length = x.shape[1]
    x, log_decay, B, C = (
        _chunks(x * step[..., None].to(x.dtype), q),
        _chunks(log_decay, q),
        _chunks(B, q),
        _chunks(C, q),
    )
    sums = log_decay.permute(0, 3, 1, 2).cumsum(-1)  # (b, h, c, q)
    mask = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(~mask, -torch.inf).exp().to(x.dtype)
    y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, decay, x)
    added = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (sums[..., -1:] - sums).exp().to(x.dtype), x)
    state = torch.zeros_like(added[:, 0])
    states = []
    for c in range(added.shape[1]):
        states.append(state)
        state = state * sums[:, :, c, -1, None, None].exp().to(x.dtype) + added[:, c]
    y = y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, torch.stack(states, 1), sums.exp().to(x.dtype))
    return y.flatten(1, 2)[:, :length]


def _ssd_matmul(x, step, log_decay, B, C, q):  # type: ignore[no-untyped-def]
    """The same as batched matrix products: x (b, l, h, p), step (b, l, h), B and C (b, l, g, n) with g dividing h."""
    length, heads, groups = x.shape[1], x.shape[2], B.shape[2]
    x, step, log_decay = (_chunks(t, q).transpose(2, 3) for t in (x, step, log_decay))  # (b, c, h, q, ...)
    B, C = (_chunks(t, q).transpose(2, 3) for t in (B, C))  # (b, c, g, q, n)
    sums = log_decay.cumsum(-1)
    mask = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(~mask, -torch.inf).exp()
    split = (groups, heads // groups)
    gram = C @ B.transpose(-1, -2)  # (b, c, g, q, q)
    mixing = gram[:, :, :, None] * (decay * step[..., None, :]).to(x.dtype).unflatten(2, split)
    y = mixing.flatten(2, 3) @ x
    weight = ((sums[..., -1:] - sums).exp() * step).to(x.dtype)
    added = (x * weight[..., None]).transpose(-1, -2).unflatten(2, split) @ B[:, :, :, None]  # (b, c, g, r, p, n)
    survives = sums[..., -1].exp().to(x.dtype).unflatten(2, split)[..., None, None]
    state = torch.zeros_like(added[:, 0])
    states = []
    for c in range(added.shape[1]):
        states.append(state)
        state = state * survives[:, c] + added[:, c]
    read = C[:, :, :, None] @ torch.stack(states, 1).transpose(-1, -2)  # (b, c, g, r, q, p)
    y = y + read.flatten(2, 3) * sums.exp().to(x.dtype)[..., None]
    return y.transpose(2, 3).flatten(1, 2)[:, :length]


def _heads(t: Tensor, heads: int) -> Tensor:
    """(b, l, K, g, n) → (b, l, K·heads, n)."""
    return t.repeat_interleave(heads // t.shape[3], 3).flatten(2, 3)


def scan_2d_einsum(x, dt, A, B, C, D, dt_bias, chunk_size, softplus, low, high):  # type: ignore[no-untyped-def]
    xs, steps, log_decay, Bs, Cs = _directions(x, dt, A, B, C, dt_bias, softplus)
    heads, flat = x.shape[3], (t.flatten(2, 3) for t in (xs, steps, log_decay))
    y = _ssd_einsum(*flat, _heads(Bs, heads), _heads(Cs, heads), chunk_size or 64)
    return _merge(y.unflatten(2, (-1, heads)), x, D)


def scan_2d_matmul(x, dt, A, B, C, D, dt_bias, chunk_size, softplus, low, high):  # type: ignore[no-untyped-def]
    xs, steps, log_decay, Bs, Cs = _directions(x, dt, A, B, C, dt_bias, softplus)
    flat = (t.flatten(2, 3) for t in (xs, steps, log_decay, Bs, Cs))
    return _merge(_ssd_matmul(*flat, chunk_size or 64).unflatten(2, (-1, x.shape[3])), x, D)


def _one_sequence(x, dt, A, B, C, D, z, dt_bias, softplus, core):  # type: ignore[no-untyped-def]
    step = dt if dt_bias is None else dt + dt_bias
    step = F.softplus(step.float()) if softplus else step.float()
    y = core(x, step, step * A.float(), B, C)
    return y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x


def scan_einsum(x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, cu_seqlens, chunk_size, softplus, *_):  # type: ignore[no-untyped-def]
    def core(x, step, log_decay, B, C):  # type: ignore[no-untyped-def]
        B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
        return _ssd_einsum(x, step, log_decay, B, C, chunk_size or 64)

    return _one_sequence(x, dt, A, B, C, D, z, dt_bias, softplus, core)


def scan_matmul(x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, cu_seqlens, chunk_size, softplus, *_):  # type: ignore[no-untyped-def]
    def core(x, step, log_decay, B, C):  # type: ignore[no-untyped-def]
        return _ssd_matmul(x, step, log_decay, B, C, chunk_size or 64)

    return _one_sequence(x, dt, A, B, C, D, z, dt_bias, softplus, core)


def scan_mamba_ssm(x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, cu_seqlens, chunk_size, softplus, *_):  # type: ignore[no-untyped-def]
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size or 256, D=D, z=z, dt_bias=dt_bias, dt_softplus=softplus
    )  # fmt: skip


def scan_2d_mamba_ssm(x, dt, A, B, C, D, dt_bias, chunk_size, softplus, low, high):  # type: ignore[no-untyped-def]
    """Cross-scan, one stacked upstream scan, cross-merge: VMamba's way with Mamba-2's kernels."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    xs, steps, _, Bs, Cs = _directions(x, dt, A, B, C, dt_bias, softplus)
    heads = x.shape[3]
    y = mamba_chunk_scan_combined(
        xs.flatten(2, 3), steps.flatten(2, 3), A.flatten(), Bs.flatten(2, 3), Cs.flatten(2, 3), chunk_size or 256
    )
    return _merge(y.unflatten(2, (-1, heads)), x, D)


# --- reassembly ----------------------------------------------------------------------------------------


def reassemble_unfold(x, logits, k, s, groups):  # type: ignore[no-untyped-def]
    """The usual form without mmcv: pixel shuffle, softmax, unfold, nearest upsampling, product, sum."""
    masks = F.pixel_shuffle(logits, s).unflatten(1, (groups, k * k)).softmax(2).flatten(1, 2)
    return carafe_unfold(x, masks, k, groups, s)


def reassemble_taps(x, logits, k, s, groups):  # type: ignore[no-untyped-def]
    """The best-written form: a loop over taps at the low resolution, nothing unfolded."""
    n, _, h, w = x.shape
    return _taps(x, logits.reshape(n, groups, k * k, s, s, h, w).softmax(2))


def carafe_unfold(x, masks, k, groups, s):  # type: ignore[no-untyped-def]
    n, c, h, w = x.shape
    unfolded = F.unfold(x, k, padding=k // 2).view(n, c * k * k, h, w)
    unfolded = F.interpolate(unfolded, scale_factor=s, mode="nearest")
    unfolded = unfolded.view(n, groups, c // groups, k * k, s * h, s * w)
    return (unfolded * masks.reshape(n, groups, 1, k * k, s * h, s * w)).sum(3).flatten(1, 2)


def carafe_taps(x, masks, k, groups, s):  # type: ignore[no-untyped-def]
    n, _, h, w = x.shape
    return _taps(x, masks.reshape(n, groups, k * k, h, s, w, s).permute(0, 1, 2, 4, 6, 3, 5))


def _taps(x: Tensor, weights: Tensor) -> Tensor:
    n, c, h, w = x.shape
    _, groups, taps, s, _, _, _ = weights.shape
    k = round(taps**0.5)
    padded = F.pad(x, [k // 2] * 4).view(n, groups, c // groups, 1, 1, h + k - 1, w + k - 1)
    parts = weights.unsqueeze(2).unbind(3)
    y = parts[0] * padded[..., :h, :w]
    for tap in range(1, taps):
        ky, kx = divmod(tap, k)
        y = y + parts[tap] * padded[..., ky : ky + h, kx : kx + w]
    return y.permute(0, 1, 2, 5, 3, 6, 4).reshape(n, c, s * h, s * w)


def carafe_mmcv(x, masks, k, groups, s):  # type: ignore[no-untyped-def]
    from mmcv.ops import carafe

    return carafe(x, masks, k, groups, s)


def reassemble_mmcv(x, logits, k, s, groups):  # type: ignore[no-untyped-def]
    masks = F.pixel_shuffle(logits, s).unflatten(1, (groups, k * k)).softmax(2).flatten(1, 2)
    return carafe_mmcv(x, masks, k, groups, s)


def upsample_unfold(x, compressed, weight, bias, k, s, groups, dilation):  # type: ignore[no-untyped-def]
    return reassemble_unfold(x, _encoded(compressed, weight, bias, dilation), k, s, groups)


def upsample_taps(x, compressed, weight, bias, k, s, groups, dilation):  # type: ignore[no-untyped-def]
    return reassemble_taps(x, _encoded(compressed, weight, bias, dilation), k, s, groups)


def upsample_mmcv(x, compressed, weight, bias, k, s, groups, dilation):  # type: ignore[no-untyped-def]
    return reassemble_mmcv(x, _encoded(compressed, weight, bias, dilation), k, s, groups)


def _encoded(compressed, weight, bias, dilation):  # type: ignore[no-untyped-def]
    return F.conv2d(compressed, weight, bias, padding=weight.shape[3] // 2 * dilation, dilation=dilation)


PEERS: dict[str, tuple[Peer, ...]] = {
    "strip_conv2d": (
        Peer("convolutions", strip_convolutions, _IMAGES),
        Peer("cuDNN", strip_convolutions_cudnn, _IMAGES, compiles=False, cuda_only=True, forward_only=True),
    ),
    "ssd_scan_2d": (
        Peer("einsum", scan_2d_einsum),
        Peer("matmul", scan_2d_matmul),
        Peer("mamba_ssm", scan_2d_mamba_ssm, compiles=False, cuda_only=True, needs=MAMBA),
    ),
    "ssd_scan": (
        Peer("einsum", scan_einsum),
        Peer("matmul", scan_matmul),
        Peer("mamba_ssm", scan_mamba_ssm, compiles=False, cuda_only=True, needs=MAMBA),
    ),
    "reassemble": (
        Peer("unfold", reassemble_unfold),
        Peer("taps", reassemble_taps, _IMAGES),
        Peer("mmcv", reassemble_mmcv, compiles=False, cuda_only=True, needs=MMCV),
    ),
    "carafe": (
        Peer("unfold", carafe_unfold),
        Peer("taps", carafe_taps, _IMAGES),
        Peer("mmcv", carafe_mmcv, compiles=False, cuda_only=True, needs=MMCV),
    ),
    "feature_aware_upsample": (
        Peer("unfold", upsample_unfold),
        Peer("taps", upsample_taps, _IMAGES),
        Peer("mmcv", upsample_mmcv, compiles=False, cuda_only=True, needs=MMCV),
    ),
}
