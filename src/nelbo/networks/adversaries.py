"""The players of a game: generators z -> x and discriminators x -> logit.

No layer uses statistics of a batch: a row of the output depends on its row of the input alone.
Images grow from a small map by residual blocks that double its sides, and shrink likewise; the
number of doublings follows from the size, so that any size that the data has fits. Sides that do
not halve evenly are cropped after the last doubling (generator) or pooled with ceilings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 4
SLOPE = 0.2


class VectorGenerator(nn.Module):
    """A perceptron (B, latent) -> (B, dims).

    Arguments:
        latent: dimensions of z. dims: of the data. width, depth: of its hidden layers.
    """

    def __init__(self, latent: int, dims: int, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.layers = perceptron(latent, dims, width, depth)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent) -> (B, dims)."""
        out: Tensor = self.layers(z)
        return out


class VectorDiscriminator(nn.Module):
    """A perceptron (B, dims) -> (B,) on x and its sines and cosines.

    Tight modes ask for a steep D, which a plain perceptron learns slowly: octave k adds
    sin(2^k π x) and cos(2^k π x) of every coordinate.

    Arguments:
        dims: of the data. width, depth: of its hidden layers. octaves: of waves; 0 for none.
    """

    def __init__(self, dims: int, width: int = 256, depth: int = 3, octaves: int = 0) -> None:
        super().__init__()
        self.octaves = octaves
        self.layers = perceptron(dims * (1 + 2 * octaves), 1, width, depth)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dims) -> (B,) logits."""
        out: Tensor = self.layers(waves(x, self.octaves))[:, 0]
        return out


def waves(x: Tensor, octaves: int) -> Tensor:
    """(B, D) -> (B, D (1 + 2 octaves)): x, sin(2^k π x), cos(2^k π x), k = 0..octaves−1."""
    angles = [x * (math.pi * 2.0**k) for k in range(octaves)]
    return torch.cat([x, *(f(a) for a in angles for f in (torch.sin, torch.cos))], 1)


def perceptron(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    """`depth` hidden layers of `width` with leaky ReLUs between linear maps."""
    sizes = [inputs, *[width] * depth]
    hidden = [
        layer
        for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        for layer in (nn.Linear(a, b), nn.LeakyReLU(SLOPE))
    ]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def doublings(height: int, width: int) -> int:
    """How often the shorter side halves before it falls below SMALLEST."""
    return max(0, int(math.log2(max(min(height, width), SMALLEST) / SMALLEST)))


class ImageGenerator(nn.Module):
    """Residual blocks that double a small map, (B, latent) -> (B, C, H, W).

    Arguments:
        latent: dimensions of z. shape: (C, H, W) of the data. channels: of the hidden maps.
    """

    def __init__(self, latent: int, shape: tuple[int, ...], channels: int = 64) -> None:
        super().__init__()
        planes, self.height, self.width = shape
        times = doublings(self.height, self.width)
        self.start = (channels, -(-self.height // 2**times), -(-self.width // 2**times))
        self.first = nn.Linear(latent, math.prod(self.start))
        self.blocks = nn.ModuleList([_Residual(channels, 2.0) for _ in range(times)])
        self.refine = _Residual(channels, 1.0)
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
        shape: (C, H, W) of the data. channels: of the hidden maps.
    """

    def __init__(self, shape: tuple[int, ...], channels: int = 64) -> None:
        super().__init__()
        planes, height, width = shape
        times = doublings(height, width)
        self.first = nn.Conv2d(planes, channels, 3, padding=1)
        self.refine = _Residual(channels, 1.0)
        self.blocks = nn.ModuleList([_Residual(channels, 0.5) for _ in range(times)])
        for _ in range(times):
            height, width = -(-height // 2), -(-width // 2)
        self.last = nn.Linear(channels * height * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B,) logits."""
        h = self.refine(self.first(x))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.last(F.leaky_relu(h, SLOPE).flatten(1))[:, 0]
        return out


class _Residual(nn.Module):
    """h + conv(act(conv(act(h)))) with the second convolution at zero, after a change of size.

    Without normalisation a deep stack starts as the identity; the gradient penalty keeps it tame.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv_2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor) -> Tensor:
        if self.scale > 1:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        u = self.conv_2(F.leaky_relu(self.conv_1(F.leaky_relu(h, SLOPE)), SLOPE))
        out: Tensor = h + u
        return F.avg_pool2d(out, 2, ceil_mode=True) if self.scale < 1 else out
