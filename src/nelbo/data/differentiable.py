"""Augmentation through which gradients pass: the discriminator sees changed reals and fakes alike.

A discriminator that only ever sees changed images cannot learn few training images by heart, and a
generator is judged by the same changes of its own samples, so that it learns the unchanged law
wherever the changes are invertible as a channel on laws.

References:
    Zhao, Liu, Lin, Zhu, Han 2020, Differentiable augmentation for data-efficient GAN training;
    Karras et al. 2020, Training generative adversarial networks with limited data (leaks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nelbo.randomness import by_row

MARGIN = 2.0**-10


@dataclass(frozen=True)
class Moved:
    """Each image, with a probability, is shifted by whole pixels, cut and made brighter or darker.

    Arguments:
        share: probability of each of the three changes.
        shift: largest shift, as a part of a side. cut: side of the square that is greyed.
        bright: largest change of all values, on the model's scale.
    """

    share: float
    shift: float = 0.125
    cut: float = 0.375
    bright: float = 0.25

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same; draws from the global generator."""
        return self._brightened(self._cut(self._shifted(x)))

    def _chosen(self, x: Tensor) -> Tensor:
        return (_uniform(x) < self.share).to(x.device)

    def _shifted(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        reach = max(1, round(self.shift * min(height, width)))
        moves = _integers(x, -reach, reach + 1, 2)
        moves = moves * self._chosen(x)[:, None]
        padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
        down = torch.arange(height, device=x.device)[None] + reach + moves[:, :1]
        along = torch.arange(width, device=x.device)[None] + reach + moves[:, 1:]
        rows = torch.arange(count, device=x.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[rows, down[:, :, None], along[:, None, :]]
        return moved.permute(0, 3, 1, 2)

    def _cut(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        masks = []
        for size in (height, width):
            side = max(1, round(self.cut * size))
            start = _integers(x, 0, size - side + 1, 1)
            place = torch.arange(size, device=x.device)[None]
            masks.append((place >= start) & (place < start + side))
        hole = masks[0][:, :, None] & masks[1][:, None, :] & self._chosen(x)[:, None, None]
        return x * ~hole[:, None]

    def _brightened(self, x: Tensor) -> Tensor:
        step = self.bright * (2 * _uniform(x).to(x.device) - 1) * self._chosen(x)
        return x + step[:, None, None, None]


@dataclass(frozen=True)
class Dequantised:
    """Levels become intervals: x + u, u uniform over the level's bin, values on [−1, 1].

    A generator has a density; against it, data on a lattice is told apart by the lattice alone
    (JSD = log 2 whatever the quality). Rounding to levels undoes the noise exactly: the bins are
    narrower by MARGIN than their distance, so that float32 cannot carry a value over an edge.

    Arguments:
        levels: n; bins have the width 2/(n − 1).
    """

    levels: int

    def __call__(self, x: Tensor) -> Tensor:
        """(B, *shape) -> the same; draws from the global generator."""
        width = (1 - MARGIN) * 2 / (self.levels - 1)
        shape = x.shape[1:]
        drawn = by_row(len(x), lambda n, g: torch.rand(n, *shape, generator=g))
        return x + (drawn.to(x) - 0.5) * width


def _uniform(x: Tensor) -> Tensor:
    return by_row(len(x), lambda n, g: torch.rand(n, generator=g))


def _integers(x: Tensor, low: int, high: int, columns: int) -> Tensor:
    drawn = by_row(len(x), lambda n, g: torch.randint(low, high, (n, columns), generator=g))
    return drawn.to(x.device)
