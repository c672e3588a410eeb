"""Mamba2Scan2d: a Mamba-2 block that scans an image in several directions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famseg_kernels.ssd_scan.op import ssd_scan_2d
from famseg_kernels.strip_conv.layer import DepthwiseConv2d

# silu(GATE_ONE) = 1: the gate of a block that starts as the identity.
_GATE_ONE = 1.2784645427610738


@torch.fx.wrap  # or torch.fx of torch 2.6 asks for the dtype of what has none
def rates(A_log: Tensor) -> Tensor:
    """A of the scan, in fp32 or wider."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


class Mamba2Scan2d(nn.Module):
    """Mamba-2 over an image: project, 3×3 depthwise convolution, scan in K directions, gate, normalise, project.

    The block of arXiv 2405.21060 (section 7) with VMamba's depthwise 2D convolution in place of the causal one and
    `ssd_scan_2d` in place of the 1D scan. FAMSeg uses it as the shortcut of its bottle block (section 3.2.2).

    Args:
        d_model: C, channels of input and output.
        d_state: state size n.
        headdim: channels a head p; must divide expand · d_model.
        expand: inner width as a multiple of d_model.
        directions: 1, 2 or 4.
        ngroups: groups of B and C; must divide the number of heads.
        shared_bc: whether all directions read the same B and C.
        d_conv: odd size of the depthwise convolution.
        A_init_range: A is drawn uniformly from it (and negated).
        dt_min: initial step sizes are drawn log-uniformly between it and dt_max.
        dt_max: the upper end.
        chunk_size: passed to the scan; changes speed only.

    Shape: (N, C, H, W) → (N, C, H, W).

    Raises:
        ValueError: headdim does not divide the inner width, or directions is not 1, 2 or 4.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        headdim: int = 64,
        expand: int = 2,
        directions: int = 4,
        *,
        ngroups: int = 1,
        shared_bc: bool = False,
        d_conv: int = 3,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        inner = expand * d_model
        if inner % headdim:
            raise ValueError(f"headdim: expected a divisor of expand · d_model = {inner}, got {headdim}")
        if directions not in (1, 2, 4):
            raise ValueError(f"directions: expected 1, 2 or 4, got {directions}")
        self.d_inner, self.d_state, self.headdim = inner, d_state, headdim
        self.heads, self.directions, self.ngroups = inner // headdim, directions, ngroups
        self.bc_directions = 1 if shared_bc else directions
        self.chunk_size = chunk_size
        bc = self.bc_directions * ngroups * d_state
        self.split = (inner, inner + 2 * bc, directions * self.heads)  # z | x, B, C | dt
        self.in_proj = nn.Conv2d(d_model, sum(self.split), 1)
        convolved = inner + 2 * bc
        self.conv2d = DepthwiseConv2d(convolved, d_conv)
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Conv2d(inner, d_model, 1, bias=False)

        dt = torch.exp(torch.empty(directions, self.heads).uniform_(math.log(dt_min), math.log(dt_max)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(directions, self.heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def init_identity(self) -> None:
        """Start near y = x for inputs of unit variance over channels (what a LayerNorm before the block gives).

        The inner width is split into x and −x: silu(x) − silu(−x) = x exactly. The convolution passes x through, the
        gate is 1, D carries x past the scan, and the norm's weight undoes the scaling of a unit normal's silu. What
        the scan adds starts small, through small B and C.

        Raises:
            ValueError: expand is below 2.
        """
        inner, d_model = self.out_proj.in_channels, self.out_proj.out_channels
        if inner < 2 * d_model:
            raise ValueError(f"init_identity: expected expand ≥ 2, got inner width {inner} for d_model {d_model}")
        eye = torch.eye(d_model)
        split = torch.zeros(inner, d_model)
        split[: 2 * d_model] = torch.cat([eye, -eye])
        weight = self.in_proj.weight[:, :, 0, 0]
        nn.init.normal_(weight, std=0.02)
        weight[inner : 2 * inner] = split
        assert self.in_proj.bias is not None and self.conv2d.bias is not None
        nn.init.zeros_(self.in_proj.bias)
        self.in_proj.bias[:inner] = _GATE_ONE
        self.conv2d.weight[:inner] = 0.0
        centre = self.conv2d.kernel_size[0] // 2
        self.conv2d.weight[:inner, 0, centre, centre] = 1.0
        nn.init.zeros_(self.conv2d.bias)
        self.norm_weight.fill_(_SILU_RMS)
        self.out_proj.weight.copy_(split.T[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        z, xbc, dt = self.in_proj(x).split(self.split, dim=1)
        xbc = F.silu(self.conv2d(xbc)).permute(0, 2, 3, 1)
        bc = self.bc_directions * self.ngroups * self.d_state
        inputs, B, C = xbc.split((self.d_inner, bc, bc), dim=-1)
        y = ssd_scan_2d(
            inputs.reshape(n, h, w, self.heads, self.headdim),
            dt.permute(0, 2, 3, 1).reshape(n, h, w, self.directions, self.heads),
            rates(self.A_log),
            B.reshape(n, h, w, self.bc_directions, self.ngroups, self.d_state),
            C.reshape(n, h, w, self.bc_directions, self.ngroups, self.d_state),
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            chunk_size=self.chunk_size,
        )
        y = y.reshape(n, h, w, self.d_inner).permute(0, 3, 1, 2)
        return self.out_proj(self._gated_norm(y, z))

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """Mamba-2's gated RMS norm over channels: norm(y · silu(z)) · weight, in y's dtype."""
        gated = (y * F.silu(z)).permute(0, 2, 3, 1)
        weight = self.norm_weight.to(y.dtype)
        if torch.jit.is_tracing():  # torch's older exporter to ONNX knows no rms_norm
            wide = gated.to(torch.promote_types(y.dtype, torch.float32))
            normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPSILON)).to(y.dtype) * weight
        else:
            normed = F.rms_norm(gated, (self.d_inner,), weight, NORM_EPSILON)
        return normed.permute(0, 3, 1, 2)


NORM_EPSILON = 1e-5  # of the gated norm, as in Mamba-2
# Root mean square of silu over a unit normal variable, √E[silu(x)²].
_SILU_RMS = 0.5964
