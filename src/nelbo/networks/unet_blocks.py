"""The blocks of a U-Net: residual block, change of resolution, and one level on each side.

A residual block adds to its input (through a 1x1 convolution where the number of channels changes)
    conv2(dropout(act(norm2(conv1(act(norm1 x)) + W act(e)))))
where e is the embedded time (blocks are given act(e), the same for all); with `scale_shift` the
time enters after the second normalisation instead, as norm2(h)(1 + a) + b with (a, b) = W act(e)
(Dhariwal and Nichol, 2021). The levels keep every state on the way down and concatenate it
on the way up (Ronneberger et al., 2015; Ho et al., 2020). The names of all tensors are those of
diffusers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nelbo.networks.attention import Attention
from nelbo.networks.kernels import PLAIN, Kernels
from nelbo.networks.layers import Dropout
from nelbo.networks.unet_config import UNetConfig

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


class Halve(nn.Module):
    """Half the resolution by a 3x3 convolution of stride 2.

    Padding 0 adds one row below and one column to the right, as TensorFlow's "same" does for even
    sizes; padding 1 adds one on each side.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2); the time is not used."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.conv.padding == (0, 0) else x)
        return out


class Double(nn.Module):
    """Double the resolution: repeat each pixel, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.Identity()
        self.kernels: Kernels = PLAIN

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W); the time is not used."""
        return self.kernels.doubled(x, self.conv)


class Residual(nn.Module):
    """The residual block of the module's opening, at one resolution or across two.

    Arguments:
        config: gives activation, groups, dropout, the width of the time and how it enters.
        channels_in: C.
        channels_out: C'.
        resample: "down" averages 2x2 pixels, "up" repeats each, before the first convolution.
        rescale: divides the sum of the two paths.
    """

    def __init__(
        self,
        config: UNetConfig,
        channels_in: int,
        channels_out: int,
        *,
        resample: str | None = None,
        rescale: float = 1.0,
    ) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.resample = {"down": _average, "up": _repeat, None: None}[resample]
        self.rescale = rescale
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_width, channels_out * (1 + self.scale_shift))
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=eps)
        self.dropout = Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.act = _ACTIVATIONS[config.act_fn]()
        self.kernels: Kernels = PLAIN
        if channels_in != channels_out:
            self.conv_shortcut: nn.Module = nn.Conv2d(channels_in, channels_out, 1)
        else:
            self.conv_shortcut = nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(B, C, H, W) and act(embedded time) (B, time_width) to (B, C', H', W')."""
        h = self.kernels.normalised(x, self.norm1, self.act)
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.dropout(self._timed(h, self.time_emb_proj(embedded)))
        # the addition is in place: no gradient needs the output of a convolution
        out: Tensor = self.conv2(h).add_(self.conv_shortcut(x))
        return out if self.rescale == 1 else out / self.rescale

    def _timed(self, h: Tensor, time: Tensor) -> Tensor:
        if not self.scale_shift:
            return self.kernels.timed(h, self.conv1, time, self.norm2, self.act)
        scale, shift = time[:, :, None, None].chunk(2, dim=1)
        out: Tensor = self.act(self.norm2(self.conv1(h)) * (1 + scale) + shift)
        return out


class Down(nn.Module):
    """One level on the way down: residual blocks, each followed by attention, then halving.

    Arguments:
        config: the network's.
        level: 0 for the finest.
    """

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        before = config.block_out_channels[max(level - 1, 0)]
        width = config.block_out_channels[level]
        kind = config.down_block_types[level]
        layers = config.layers_per_block
        widths = [before] + (layers - 1) * [width]
        self.resnets = nn.ModuleList([Residual(config, w, width) for w in widths])
        self.attentions = _attentions(config, width, layers if kind == "AttnDownBlock2D" else 0)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [_halving(config, width, kind)])

    def forward(self, x: Tensor, embedded: Tensor) -> list[Tensor]:
        """Every state of the level in order; the last one goes on to the next level."""
        states = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, embedded)
            x = self.attentions[index](x) if len(self.attentions) else x
            states.append(x)
        return states + [halve(x, embedded) for halve in self.downsamplers]


class Middle(nn.Module):
    """The coarsest level: residual block, attention, residual block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, rescale = config.block_out_channels[-1], config.mid_block_scale_factor
        groups = config.attn_norm_num_groups
        # diffusers leaves the normalisation out when the time enters by scale and shift.
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        blocks = [Residual(config, width, width, rescale=rescale) for _ in range(2)]
        self.resnets = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList()
        if config.add_attention:
            head, eps = config.head_dim(width), config.norm_eps
            attention = Attention(width, head, groups=groups, eps=eps, rescale=rescale)
            self.attentions.append(attention)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        x = self.resnets[0](x, embedded)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x, embedded)
        return out


class Up(nn.Module):
    """One level on the way up: one residual block per state kept on the way down, then doubling.

    Arguments:
        config: the network's.
        index: 0 for the coarsest, the order in which they run.
    """

    def __init__(self, config: UNetConfig, index: int) -> None:
        super().__init__()
        coarse_first = config.block_out_channels[::-1]
        width, before = coarse_first[index], coarse_first[max(index - 1, 0)]
        finer = coarse_first[min(index + 1, len(coarse_first) - 1)]
        kind = config.up_block_types[index]
        layers = config.layers_per_block
        arriving = [before] + layers * [width]
        # The last state kept at a level is what came down to it from the finer one.
        kept = layers * [width] + [finer]
        widths = [a + k for a, k in zip(arriving, kept, strict=True)]
        self.resnets = nn.ModuleList([Residual(config, w, width) for w in widths])
        count = layers + 1 if kind == "AttnUpBlock2D" else 0
        self.attentions = _attentions(config, width, count, up=True)
        last = index == len(coarse_first) - 1
        self.upsamplers = nn.ModuleList([] if last else [_doubling(config, width, kind)])

    def forward(self, x: Tensor, states: list[Tensor], embedded: Tensor) -> Tensor:
        """Consume one state from the end of `states` for each residual block."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(torch.cat((x, states.pop()), dim=1), embedded)
            x = self.attentions[index](x) if len(self.attentions) else x
        for double in self.upsamplers:
            x = double(x, embedded)
        return x


def _attentions(config: UNetConfig, width: int, count: int, *, up: bool = False) -> nn.ModuleList:
    groups, eps, head = config.norm_num_groups, config.norm_eps, config.head_dim(width, up)
    layers = [Attention(width, head, groups=groups, eps=eps) for _ in range(count)]
    return nn.ModuleList(layers)


def _halving(config: UNetConfig, width: int, kind: str) -> nn.Module:
    # In diffusers the type of resampling concerns the levels with attention only; others have a
    # kind of block of their own.
    attend = kind == "AttnDownBlock2D" and config.downsample_type == "resnet"
    if attend or kind == "ResnetDownsampleBlock2D":
        return Residual(config, width, width, resample="down")
    return Halve(width, config.downsample_padding)


def _doubling(config: UNetConfig, width: int, kind: str) -> nn.Module:
    attend = kind == "AttnUpBlock2D" and config.upsample_type == "resnet"
    if attend or kind == "ResnetUpsampleBlock2D":
        return Residual(config, width, width, resample="up")
    return Double(width)


def activation(config: UNetConfig) -> nn.Module:
    """The nonlinearity that a configuration names."""
    return _ACTIVATIONS[config.act_fn]()


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _repeat(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
