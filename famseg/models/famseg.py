"""FAMSeg, top-down: the network of the paper's Fig. 1 (section 3), each design choice a named option."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from famseg.models.blocks import (
    BottleMamba,
    ConvBlock,
    ConvBNReLU,
    GroupNorm,
    Levels,
    Shortcut,
    StripBlock,
    StripForm,
    segnext_stem,
)
from famseg.models.hamburger import GROUPS, AggregatedDepthConv, Hamburger, LightHam
from famseg_kernels import FeatureAwareUpsample, Mamba2Scan2d, StripConv2d
from famseg_kernels.strip_conv.layer import init_convolutions


@dataclass(frozen=True)
class FAMSegConfig:
    """What makes a FAMSeg.

    widths, strips, bottles: channels, strip blocks and bottle blocks of the four stages.
    bottleneck_ratio: outer over hidden width of the convolution and bottle blocks' main branches.
    mlp_ratios: hidden over outer width of the strip blocks' MLPs, a stage.
    strip_form: how a strip block scans rows and columns: one after the other ("cascade", SegNeXt's), separately and
        summed ("independent"), separately and concatenated ("stacked"), or not at all ("square", 5×5 alone).
    context_channels: C_h, width of the context and of the decoder at stride 16; it halves with every finer stride.
    context: "hamburger" (aggregated depth convolution + hamburger), "lightham" (SegNeXt's head, at stride 8) or "none"
        (aggregated depth convolution alone).
    context_stride: 32, 16 or 8, of the aggregated depth convolution's output.
    context_rank: R, bases of the hamburger. They constrain nothing where the context has no more pixels than that.
    shortcut: of the bottle block, "mamba" or "identity" (Table 3, "No mamba").
    d_state, headdim, directions, shared_bc: of the bottle block's Mamba2Scan2d.
    upsample: "fam" or "bilinear" (ablation of the decoder).
    fam_kernel, fam_groups: odd size of FAM's reassembly kernels; how many a pixel has, each for a group of channels.
    fusion: whether the decoder fuses features of the encoder (Table 3, feature fusion).
    skip_stride: the finest stride whose features it fuses: 8, of stages 3 and 2, as the paper has it; 4, of stage 1 as
        well; 2, of the stem as well.
    stage_norm: whether a group norm of one group ends every stage. Without it features of many strip blocks can grow
        past all bounds in evaluation, while batch norms lag behind: their attention multiplies what it has by itself.
    drop_path: probability of leaving out the last strip block in training; it rises linearly from 0 at the first one.
    """

    num_classes: int = 3
    in_channels: int = 1
    widths: Sequence[int] = (32, 64, 160, 256)
    strips: Sequence[int] = (3, 3, 5, 2)
    bottles: Sequence[int] = (1, 2, 2, 1)
    bottleneck_ratio: int = 4
    mlp_ratios: Sequence[int] = (8, 8, 4, 4)
    strip_form: StripForm = "cascade"
    stage_norm: bool = True
    context_channels: int = 256
    context: Literal["hamburger", "lightham", "none"] = "hamburger"
    context_stride: int = 32
    context_rank: int = 16
    shortcut: Shortcut = "mamba"
    d_state: int = 64
    headdim: int = 32
    directions: int = 4
    shared_bc: bool = False
    upsample: Literal["fam", "bilinear"] = "fam"
    fam_kernel: int = 5
    fam_groups: int = 1
    fusion: bool = True
    skip_stride: int = 8
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices or isinstance(value, bool) != (choices == _SWITCH):
                raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
        for name in _COUNTS:
            expect_count(name, getattr(self, name))
        ranges = {"widths": (2, 4096), "strips": (0, 32), "bottles": (0, 32), "mlp_ratios": (1, 100)}
        for name, (least, most) in ranges.items():
            stages = getattr(self, name)
            if isinstance(stages, str) or not isinstance(stages, Sequence) or len(stages) != 4:
                raise ValueError(f"{name}: expected four numbers, one a stage, got {stages!r}")
            for value in stages:
                expect_count(name, value, least, most)
        for width, bottles in zip(self.widths, self.bottles, strict=True):
            if self.shortcut == "mamba" and bottles and 2 * width % self.headdim:
                raise ValueError(f"headdim: expected a divisor of {2 * width} (twice a width), got {self.headdim}")
        if self.context_channels > GROUPS and self.context_channels % GROUPS:
            raise ValueError(
                f"context_channels: expected a multiple of {GROUPS} (groups of its norm) or less, "
                f"got {self.context_channels}"
            )
        if not (isinstance(self.drop_path, (int, float)) and 0 <= self.drop_path < 1):
            raise ValueError(f"drop_path: expected a number from 0 to below 1, got {self.drop_path!r}")
        if self.context == "lightham" and not self.fusion:
            raise ValueError("fusion: lightham fuses stages 2 to 4 by itself; leave fusion out or take another context")
        if self.context_stride == 8 and not self.fusion:
            raise ValueError("fusion: a context at stride 8 has stages 2 and 3 in it; leave one of the two out")
        if self.skip_stride < 8 and not self.fusion:
            raise ValueError("fusion: without it there are no skips at any stride; leave fusion or skip_stride out")
        if self.fam_kernel % 2 == 0 or not 3 <= self.fam_kernel <= 63:
            raise ValueError(f"fam_kernel: expected an odd size from 3 to 63, got {self.fam_kernel}")
        if self.upsample == "fam":
            for width in (self.context_channels, *self.decoder_widths[:-1]):
                if width % self.fam_groups:
                    raise ValueError(
                        f"fam_groups: expected a divisor of {width} (channels of an upsampling), got {self.fam_groups}"
                    )

    @property
    def decoder_widths(self) -> list[int]:
        """Channels of the decoder's steps, the last one at stride 1."""
        # SegNeXt's head fuses the three stages at stride 8 by itself.
        start = 8 if self.context == "lightham" else self.context_stride
        return [max(self.context_channels * stride // 16, 8) for stride in (16, 8, 4, 2, 1) if stride < start]

    @property
    def skip_widths(self) -> list[int]:
        """Channels of the encoder's features that enter the decoder's steps, 0 where none do."""
        channels = {16: self.widths[2], 8: self.widths[1], 4: self.widths[0], 2: self.widths[0] // 2}
        skips = [width if self.fusion and stride >= self.skip_stride else 0 for stride, width in channels.items()]
        return [*skips, 0][-len(self.decoder_widths) :]

    def context_pixels(self, image_size: int) -> int:
        """Pixels of the context of a square image, which its `context_rank` bases describe."""
        stride = 8 if self.context == "lightham" else self.context_stride
        return (-(-image_size // stride)) ** 2


def expect_count(name: str, value: object, least: int = 1, most: int = 4096) -> None:
    """ValueError where `value` is not a whole number from `least` to `most`, which is more than any network has."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if not value <= most:
        raise ValueError(f"{name}: expected at most {most}, got {value}")


_SWITCH = (True, False)
_CHOICES: dict[str, tuple[object, ...]] = {
    "strip_form": get_args(StripForm),
    "shortcut": ("mamba", "identity"),
    "upsample": ("fam", "bilinear"),
    "context": ("hamburger", "lightham", "none"),
    "context_stride": (32, 16, 8),
    "skip_stride": (8, 4, 2),
    "fusion": _SWITCH,
    "stage_norm": _SWITCH,
    "shared_bc": _SWITCH,
    "directions": (1, 2, 4),
}
_COUNTS = (
    *("num_classes", "in_channels", "bottleneck_ratio", "context_channels", "context_stride", "context_rank"),
    *("d_state", "headdim", "directions", "fam_kernel", "fam_groups"),
)

SIZES = {
    "famseg_nano": FAMSegConfig(
        widths=(16, 32, 48, 64),
        strips=(1, 1, 2, 1),
        bottles=(1, 1, 1, 1),
        bottleneck_ratio=1,  # a quarter of so few channels lets too little through
        mlp_ratios=(4, 4, 4, 4),
        stage_norm=False,  # with one strip block or two a stage, nothing grows
        context_channels=64,
        d_state=16,
        headdim=16,
        drop_path=0.0,
    ),
    "famseg_tiny": FAMSegConfig(),
    "famseg_small": FAMSegConfig(widths=(64, 128, 320, 512), strips=(2, 2, 4, 2)),
    "famseg_base": FAMSegConfig(
        widths=(64, 128, 320, 512), strips=(3, 3, 12, 3), context_channels=512, context_rank=64
    ),
}


class FAMSeg(nn.Module):
    """(N, in_channels, H, W) → logits (N, num_classes, H, W), for any H, W ≥ 1."""

    def __init__(self, config: FAMSegConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.classifier = nn.Conv2d(self.decoder.out_channels, config.num_classes, 1)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.decoder.steps

    def published_tensors(self) -> dict[str, Tensor]:
        """The strip blocks by the names of a published MSCAN; they share the model's memory."""
        found: dict[str, Tensor] = {}
        for i, stage in enumerate(self.encoder.stages, 1):
            blocks = [block for block in stage.children() if isinstance(block, StripBlock)]
            for j, block in enumerate(blocks):
                found |= {f"block{i}.{j}.{name}": value for name, value in block.state_dict().items()}
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.decoder(self.encoder(x), x.shape[2:]))


class Encoder(nn.Module):
    """SegNeXt's stem to stride 4, then four stages; returns their features at strides 4, 8, 16, 32.

    Before them, where the decoder wants it, stands the stem's map at stride 2.
    """

    def __init__(self, config: FAMSegConfig) -> None:
        super().__init__()
        width = config.widths[0]
        self.stem = segnext_stem(config.in_channels, width)
        self.halves = config.skip_stride == 2
        if self.halves:
            self.stem = nn.Sequential(self.stem[:3], self.stem[3:])
        rates = iter(torch.linspace(0, config.drop_path, sum(config.strips), device="cpu").tolist())
        self.stages = Levels()
        cin = width
        for i, (cout, strips, bottles) in enumerate(zip(config.widths, config.strips, config.bottles, strict=True)):
            blocks: list[nn.Module] = [ConvBlock(cin, cout, 1 if i == 0 else 2, config.bottleneck_ratio)]
            scan = config.d_state, config.headdim, config.directions, config.shared_bc
            blocks += [BottleMamba(cout, config.shortcut, *scan, config.bottleneck_ratio) for _ in range(bottles)]
            blocks += [StripBlock(cout, config.mlp_ratios[i], next(rates), config.strip_form) for _ in range(strips)]
            if config.stage_norm:
                blocks.append(GroupNorm(1, cout))
            self.stages.append(nn.Sequential(*blocks))
            cin = cout

    def forward(self, x: Tensor) -> list[Tensor]:
        if not self.halves:
            return self.stages(self.stem(x))
        half = self.stem[0](x)
        return [half, *self.stages(self.stem[1](half))]


class Decoder(nn.Module):
    """Context at stride 32, fused upwards with stages 3 and 2, upsampled to full size (section 3.3).

    In the paper only the last three encoder stages enter: the first one carries the raw noise. `skip_stride` lets finer
    features in.
    """

    def __init__(self, config: FAMSegConfig) -> None:
        super().__init__()
        width, rank = config.context_channels, config.context_rank
        self.context: nn.Module
        if config.context == "lightham":
            self.context = LightHam(config.widths[1:], width, rank)
        else:
            aggregate = AggregatedDepthConv(config.widths[1:], width, config.context_stride)
            ham = [Hamburger(width, rank)] if config.context == "hamburger" else []
            self.context = nn.Sequential(aggregate, *ham)
        self.steps = nn.ModuleList()
        self.skips = [skip > 0 for skip in config.skip_widths]
        for cout, skip in zip(config.decoder_widths, config.skip_widths, strict=True):
            self.steps.append(UpStep(width, skip, cout, config))
            width = cout
        self.out_channels = width

    def forward(self, features: Sequence[Tensor], size: torch.Size) -> Tensor:
        x = self.context(features[-3:])
        # Every size is the ceiling of the input's over the stride, so an upsampled map is cropped by one at most.
        sizes = {1: size}
        for stride in (2, 4, 8, 16):
            # Not -(-extent // stride): exported, a division may round towards zero.
            sizes[stride] = torch.Size((extent + stride - 1) // stride for extent in size)
        stride = 2 ** (len(self.steps) - 1)
        skips = dict(zip((16, 8, 4, 2), features[-2::-1], strict=False))
        for step, has_skip in zip(self.steps, self.skips, strict=True):
            x = step(x, skips[stride] if has_skip else None, sizes[stride])
            stride //= 2
        return x


class UpStep(nn.Module):
    """Upsample twofold by FAM (or bilinearly), crop to `size`, concatenate the skip, Conv3×3-BN-ReLU."""

    def __init__(self, cin: int, skip: int, cout: int, config: FAMSegConfig) -> None:
        super().__init__()
        kernels = {"up_kernel": config.fam_kernel, "up_group": config.fam_groups}
        self.upsample = (
            FeatureAwareUpsample(cin, compressed_channels=min(64, cin), **kernels)
            if config.upsample == "fam"
            else nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        )
        self.conv = ConvBNReLU(cin + skip, cout, 3)

    def forward(self, x: Tensor, skip: Tensor | None, size: torch.Size) -> Tensor:
        x = self.upsample(x)[:, :, : size[0], : size[1]]
        return self.conv(x if skip is None else torch.cat([x, skip], 1))


def famseg_config(name: str, num_classes: int, **options: object) -> FAMSegConfig:
    """One of SIZES with other options. Raises ValueError for a bad value, or one that changes nothing."""
    size = SIZES[name]
    config = dataclasses.replace(size, num_classes=num_classes, **options)  # type: ignore[arg-type]
    scans = config.shortcut == "mamba" and any(config.bottles)
    used = {
        "context_rank": config.context != "none",
        "context_stride": config.context != "lightham",
        "shortcut": any(config.bottles),
        "shared_bc": scans and config.directions > 1,
        **dict.fromkeys(("d_state", "headdim", "directions"), scans),
        **dict.fromkeys(("mlp_ratios", "drop_path", "strip_form"), any(config.strips)),
        **dict.fromkeys(("fam_kernel", "fam_groups"), config.upsample == "fam"),
    }
    for option, has_effect in used.items():
        if option in options and not has_effect and getattr(config, option) != getattr(size, option):
            raise ValueError(f"{option}: nothing in this network depends on it, given the other options; leave it out")
    return config


def create_famseg(config: FAMSegConfig) -> FAMSeg:
    """A freshly initialised FAMSeg.

    The classifier is initialised like every convolution. With SegNeXt's 0.01, made for 256 channels, a small network
    still found no femur after 400 steps (docs/design/learning.md).
    """
    model = FAMSeg(config)
    init_convolutions(model)
    for module in model.modules():  # these have an initialisation of their own
        if isinstance(module, (StripConv2d, FeatureAwareUpsample)):
            module.reset_parameters()
        elif isinstance(module, Mamba2Scan2d):
            module.init_identity()
    return model
