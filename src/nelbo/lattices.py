"""Where two densities live: a region of the line or the plane, and a square lattice in it.

The trapezoidal rule over the whole line or plane is a plain sum over a lattice. Where narrow modes
lie far apart most of that lattice holds nothing: patches around the modes keep the points that do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.data.mixture import GaussianMixture
from nelbo.errors import InputRefused

REACH = 10.0
"""Standard deviations from a component beyond which its mass, below 2e-22, is left out."""
ENTRIES = 2**20
LATTICE = 2**23


class Region(ABC):
    """Where two densities live, and the coarsest step at which a sum may see them."""

    step: float

    @property
    def dims(self) -> int:
        """D."""
        return len(self.corners()[0])

    @abstractmethod
    def corners(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest corner, (D,) each."""

    @abstractmethod
    def holds(self, points: Tensor) -> Tensor:
        """Which of the points (B, D) count, (B,) bool."""

    def size(self, step: float) -> int:
        """Lattice points in the rectangle between the corners."""
        return math.prod(self._counts(step))

    def _counts(self, step: float) -> list[int]:
        low, high = self.corners()
        return (((high - low) / step).floor().long() + 1).tolist()

    def lattice(self, step: float) -> Iterator[Tensor]:
        """The points (B, D) of a square lattice in the region, in blocks.

        Raises:
            InputRefused: more points than can be summed.
        """
        if self.size(step) > LATTICE:
            raise InputRefused(
                "quadrature: a mode is too narrow for the range of all: "
                f"{self.size(step)} lattice points, and the most is {LATTICE}"
            )
        axes = [
            start + step * torch.arange(count, dtype=torch.float64)
            for start, count in zip(self.corners()[0].tolist(), self._counts(step), strict=True)
        ]
        for first in torch.split(axes[0], max(1, ENTRIES // math.prod(self._counts(step)[1:]))):
            points = torch.cartesian_prod(first, *axes[1:]).reshape(-1, len(axes))
            inside = points[self.holds(points)]
            if len(inside):
                yield inside


@dataclass(frozen=True, eq=False)
class Box(Region):
    """A rectangle outside of which both densities vanish.

    Arguments:
        low, high: (D,) float64, D at most 2.
        step: the coarsest lattice step, at most the smallest standard deviation of any mode.
    """

    low: Tensor
    high: Tensor
    step: float

    def corners(self) -> tuple[Tensor, Tensor]:
        """`low` and `high`."""
        return self.low, self.high

    def holds(self, points: Tensor) -> Tensor:
        """All of them."""
        return torch.ones(len(points), dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Patches(Region):
    """Discs around centres.

    Arguments:
        centres: (K, D) float64. radii: (K,). step: the coarsest lattice step.
    """

    centres: Tensor
    radii: Tensor
    step: float

    def corners(self) -> tuple[Tensor, Tensor]:
        """The rectangle around all discs."""
        reach = self.radii[:, None]
        return (self.centres - reach).amin(0), (self.centres + reach).amax(0)

    def holds(self, points: Tensor) -> Tensor:
        """Points within the radius of a centre."""
        size = max(1, 4 * ENTRIES // len(self.centres))
        near = [
            (torch.cdist(rows, self.centres) <= self.radii).any(1) for rows in points.split(size)
        ]
        return torch.cat(near)


def around(*mixtures: GaussianMixture) -> Patches:
    """Where mixtures live: each component's patch, the step its smallest standard deviation."""
    spreads = [torch.linalg.eigvalsh(mixture.covariances).sqrt() for mixture in mixtures]
    return Patches(
        torch.cat([mixture.means for mixture in mixtures]),
        REACH * torch.cat([spread.amax(1) for spread in spreads]),
        min(float(spread.min()) for spread in spreads),
    )
