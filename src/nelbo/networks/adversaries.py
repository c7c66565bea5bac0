"""The players of a game: generators z -> x and discriminators x -> logit.

No layer uses statistics of a batch: a row of the output depends on its row of the input alone.
Images grow from a small map by residual blocks that double its sides, and shrink likewise; the
number of doublings follows from the size, so that any size that the data has fits. Sides that do
not halve evenly are cropped after the last doubling (generator) or pooled with ceilings.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST, WIDEST = 4, 4
"""Least side of a map, and most times the channels of the full size."""
SLOPE = 0.2


class VectorGenerator(nn.Module):
    """A perceptron (B, latent) -> (B, dims) with ReLUs.

    Piecewise linear maps make the jumps between modes; smooth activations bridge them.

    Arguments:
        latent: dimensions of z. dims: of the data. width, depth: of its hidden layers.
    """

    def __init__(self, latent: int, dims: int, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.layers = perceptron(latent, dims, width, depth, nn.ReLU)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent) -> (B, dims)."""
        out: Tensor = self.layers(z)
        return out


class VectorDiscriminator(nn.Module):
    """A perceptron (B, dims) -> (B,) on x and waves of x.

    Tight modes ask for a steep D, which a plain perceptron learns slowly.

    Arguments:
        dims: of the data. width, depth: of its hidden layers.
        directions: of the waves; 0 for none. finest: the largest of their frequencies.
    """

    def __init__(
        self,
        dims: int,
        width: int = 128,
        depth: int = 3,
        directions: int = 64,
        finest: float = 64.0,
    ) -> None:
        super().__init__()
        self.waves = Waves(dims, directions, finest)
        self.layers = perceptron(dims + 2 * directions, 1, width, depth, leaky)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dims) -> (B,) logits."""
        out: Tensor = self.layers(self.waves(x))[:, 0]
        return out


class Waves(nn.Module):
    """x with sin(w.x) and cos(w.x) for fixed random directions w.

    Their lengths, in radians per unit, are evenly spaced in the logarithm from 1 to `finest`.

    Arguments:
        dims: of x. directions: how many w. finest: the largest length.
    References:
        Rahimi & Recht 2007; Tancik et al. 2020, Fourier features.
    """

    directions: Tensor

    def __init__(self, dims: int, directions: int, finest: float) -> None:
        super().__init__()
        w = torch.randn(directions, dims)
        places = (torch.arange(directions) + 0.5) / max(directions, 1)
        w = w / w.norm(dim=1, keepdim=True) * finest ** places[:, None]
        self.register_buffer("directions", w)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D + 2 directions)."""
        angles = x @ self.directions.T
        return torch.cat([x, angles.sin(), angles.cos()], 1)


def leaky() -> nn.Module:
    """The activation of discriminators, which passes gradients everywhere."""
    return nn.LeakyReLU(SLOPE)


def perceptron(
    inputs: int, outputs: int, width: int, depth: int, activation: Callable[[], nn.Module]
) -> nn.Sequential:
    """`depth` hidden layers of `width` between linear maps."""
    sizes = [inputs, *[width] * depth]
    hidden = [
        layer
        for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        for layer in (nn.Linear(a, b), activation())
    ]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def doublings(height: int, width: int) -> int:
    """How often the shorter side halves before it falls below SMALLEST."""
    return max(0, int(math.log2(max(min(height, width), SMALLEST) / SMALLEST)))


def widths(channels: int, times: int) -> list[int]:
    """Channels from the full size to the smallest: twice as many at half the size, to WIDEST."""
    return [channels * min(2**k, WIDEST) for k in range(times + 1)]


class ImageGenerator(nn.Module):
    """Residual blocks that double a small map, (B, latent) -> (B, C, H, W).

    Arguments:
        latent: dimensions of z. shape: (C, H, W) of the data. channels: at full size.
    """

    def __init__(self, latent: int, shape: tuple[int, ...], channels: int = 32) -> None:
        super().__init__()
        planes, self.height, self.width = shape
        times = doublings(self.height, self.width)
        sizes = widths(channels, times)[::-1]
        self.start = (sizes[0], -(-self.height // 2**times), -(-self.width // 2**times))
        self.first = nn.Linear(latent, math.prod(self.start))
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.blocks = nn.ModuleList([_Residual(a, b, 2.0) for a, b in pairs])
        self.refine = _Residual(channels, channels, 1.0)
        self.last = nn.Conv2d(channels, planes, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent) -> (B, C, H, W) on the model's scale, not limited to it."""
        h = self.first(z).unflatten(1, self.start)
        for block in self.blocks:
            h = block(h)
        h = self.refine(h)[:, :, : self.height, : self.width]
        out: Tensor = self.last(F.leaky_relu(h, SLOPE))
        return out


class ImageDiscriminator(nn.Module):
    """Residual blocks that halve the image, then a linear map: (B, C, H, W) -> (B,).

    Arguments:
        shape: (C, H, W) of the data. channels: at full size.
    """

    def __init__(self, shape: tuple[int, ...], channels: int = 32) -> None:
        super().__init__()
        planes, height, width = shape
        times = doublings(height, width)
        sizes = widths(channels, times)
        self.first = nn.Conv2d(planes, channels, 3, padding=1)
        self.refine = _Residual(channels, channels, 1.0)
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.blocks = nn.ModuleList([_Residual(a, b, 0.5) for a, b in pairs])
        for _ in range(times):
            height, width = -(-height // 2), -(-width // 2)
        self.last = nn.Linear(sizes[-1] * height * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B,) logits."""
        h = self.refine(self.first(x))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.last(F.leaky_relu(h, SLOPE).flatten(1))[:, 0]
        return out


class _Residual(nn.Module):
    """h + conv(act(conv(act(h)))) with the second convolution at zero, and a change of size.

    Without normalisation a deep stack starts as the identity (a linear map where the number of
    channels changes); the gradient penalty keeps it tame.
    """

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv_1 = nn.Conv2d(inputs, min(inputs, outputs), 3, padding=1)
        self.conv_2 = nn.Conv2d(min(inputs, outputs), outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None
        for parameter in self.conv_2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor) -> Tensor:
        if self.scale > 1:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        u = self.conv_2(F.leaky_relu(self.conv_1(F.leaky_relu(h, SLOPE)), SLOPE))
        out: Tensor = (h if self.skip is None else self.skip(h)) + u
        return F.avg_pool2d(out, 2, ceil_mode=True) if self.scale < 1 else out
