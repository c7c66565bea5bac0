r"""Augmentation that does not leak: changed examples are marked, and the mark is a condition.

A share of every batch is rotated, scaled, sheared and shifted a little and rounded back to its
levels; the network is told which examples were changed (1) and which were not (0). The model that
is measured and sampled is the one under the mark 0, so that its bound is a bound for the data and
not for a blurred version of it.

References:
    Karras, Aittala, Aila, Laine 2022, Elucidating the design space of diffusion-based generative
    models, section 5 (augmentation with its parameters as a condition).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nelbo.randomness import by_row
from nelbo.transfer import sent


@dataclass(frozen=True)
class Affine:
    """Small random affine maps of images with levels.

    Arguments:
        levels: n. share: of the examples that are changed.
        rotation: standard deviation in radians. scale: of both scales around 1.
        shear, shift: standard deviations; a shift of 1 is half the image.
    """

    levels: int
    share: float = 0.4
    rotation: float = 0.08
    scale: float = 0.05
    shear: float = 0.1
    shift: float = 0.08

    def __call__(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """Change a random share of x_0 (B, C, H, W), values on the levels of [−1, 1].

        Draws from the global generator.

        Returns:
            the images, on the levels again, and the marks (B,) int64.
        """
        marked = by_row(len(x_0), lambda n, g: torch.rand(n, generator=g)) < self.share
        grid = F.affine_grid(self._maps(len(x_0)), list(x_0.shape), align_corners=False)
        # the border is padded with the lowest level
        there = sent(grid, x_0.device)
        moved = F.grid_sample(x_0 + 1, there, mode="bicubic", align_corners=False)
        top = self.levels - 1
        level = (moved * (top / 2)).round().clamp(0, top)
        rounded = (2 * level / top - 1).to(x_0)
        here = sent(marked, x_0.device)
        return torch.where(here[:, None, None, None], rounded, x_0), here.long()

    def _maps(self, count: int) -> Tensor:
        """(count, 2, 3) matrices [A | b], near the identity."""
        angle = self.rotation * _normal(count)[:, 0]
        scale = 1 + self.scale * _normal(count, 2)
        shear = self.shear * _normal(count)[:, 0]
        shift = self.shift * _normal(count, 2)
        first = torch.stack([scale[:, 0] * angle.cos(), shear - angle.sin(), shift[:, 0]], 1)
        second = torch.stack([angle.sin(), scale[:, 1] * angle.cos(), shift[:, 1]], 1)
        return torch.stack([first, second], 1)


def _normal(count: int, columns: int = 1) -> Tensor:
    return by_row(count, lambda n, g: torch.randn(n, columns, generator=g))
