"""A residual convolutional network at one resolution, for small images.

    h_0 = conv_in x + positions
    u = conv1(a) + W mean(a),   a = SiLU(norm1 h_k)          mean over all positions
    h_{k+1} = h_k + conv2(dropout(SiLU(norm2(u)(1 + s) + b))),   (s, b) = linear maps of e(t)
    y = conv_out(SiLU(norm h_blocks))

A 3x3 convolution sees its neighbourhood alone; the mean tells every position in one step what the
whole image holds, at the cost of one small linear map.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.errors import InputRefused
from nelbo.networks.attention import Attention
from nelbo.networks.layers import Dropout, TimeFeatures, per_example, without_condition

M = TypeVar("M", bound=nn.Module)


class ResNet(nn.Module):
    """Residual network (B, in_channels, H, W) -> (B, out_channels, H, W), time in [0, 1].

    Every residual path and the output start at zero.

    Arguments:
        in_channels: channels of the input.
        out_channels: channels of the output.
        channels: of the hidden states; a multiple of `groups`.
        blocks: how many residual blocks.
        dropout: probability, before the second convolution of each block.
        groups: of each group normalisation.
        positions: (H, W) to add a learned map to the first hidden state; None keeps the network
            free of position, and of any fixed size.
        attention: follow each block with self-attention, in heads of up to 32 channels.
        time_width: features of the embedded time.

    Raises:
        InputRefused: groups does not divide channels.

    References:
        He et al. (2016); Ho et al. (2020), appendix B, for the block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 48,
        blocks: int = 4,
        dropout: float = 0.0,
        groups: int = 8,
        positions: tuple[int, int] | None = None,
        attention: bool = False,
        time_width: int = 128,
    ) -> None:
        super().__init__()
        if channels % groups:
            raise InputRefused(f"groups={groups} does not divide channels={channels}")
        self.in_channels = in_channels
        self.time = TimeFeatures(time_width)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.positions: nn.Parameter | None = None
        if positions is not None:
            self.positions = nn.Parameter(torch.zeros(1, channels, *positions))
        self.blocks = nn.ModuleList(
            [_Block(channels, time_width, dropout, groups, attention) for _ in range(blocks)]
        )
        self.norm = nn.GroupNorm(groups, channels)
        self.conv_out = _zero(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """Apply the network.

        Arguments:
            x_t: (B, in_channels, H, W).
            t: () or (B,), in [0, 1].
            cond: must be None.

        Returns:
            (B, out_channels, H, W).

        Raises:
            InputRefused: the shape of x_t or t is off, or cond is given.
        """
        without_condition(cond, self)
        self._check(x_t)
        embedded = self.time(per_example(t, x_t))
        h = self.conv_in(x_t)
        if self.positions is not None:
            h = h + self.positions
        for block in self.blocks:
            h = block(h, embedded)
        out: Tensor = self.conv_out(F.silu(self.norm(h)))
        return out

    def _check(self, x_t: Tensor) -> None:
        if x_t.ndim != 4 or x_t.shape[1] != self.in_channels:
            raise InputRefused(
                f"the ResNet reads (B, {self.in_channels}, H, W), this input is {tuple(x_t.shape)}"
            )
        if self.positions is not None and x_t.shape[2:] != self.positions.shape[2:]:
            height, width = self.positions.shape[2:]
            raise InputRefused(
                f"the ResNet has learned positions for {height}x{width} images, this input is "
                f"{x_t.shape[2]}x{x_t.shape[3]}: resize it, or build with positions=None"
            )


class _Block(nn.Module):
    def __init__(
        self, channels: int, time_width: int, dropout: float, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.mean = nn.Linear(channels, channels, bias=False)
        self.time = nn.Linear(time_width, 2 * channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.dropout = Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.attention: Attention | None = None
        if attention:
            head = max(d for d in range(1, min(32, channels) + 1) if channels % d == 0)
            self.attention = Attention(channels, head, groups=groups)
            _zero(self.attention.to_out[0])

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.time(embedded)[:, :, None, None].chunk(2, dim=1)
        a = F.silu(self.norm1(h))
        u = self.conv1(a) + self.mean(a.mean(dim=(2, 3)))[:, :, None, None]
        u = F.silu(self.norm2(u) * (1 + scale) + shift)
        out: Tensor = h + self.conv2(self.dropout(u))
        return out if self.attention is None else self.attention(out)


def _zero(layer: M) -> M:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
