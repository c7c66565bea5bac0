"""Data that a model does not see in [-1, 1], and networks that want to know a class."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from nelbo.decoders import Discretized, Edge
from nelbo.distributions import DiscretizedNormal, Shape
from nelbo.reverse import Decoder, Prediction

Scaling = Literal["symmetric", "unit"]
SCALINGS: dict[str, tuple[float, float]] = {"symmetric": (-1.0, 1.0), "unit": (0.0, 1.0)}
"""Where the lowest and the highest level sit."""


class OnScale(DiscretizedNormal):
    """The same masses for data whose levels sit at even distance from `low` to `high`."""

    def __init__(self, mean: Tensor, logvar: Tensor, levels: int, ends: tuple[float, float]):
        self.low, self.width = ends[0], ends[1] - ends[0]
        super().__init__(self._to(mean), logvar + 2 * math.log(2 / self.width), levels)

    def _to(self, x: Tensor) -> Tensor:
        return (x - self.low) * (2 / self.width) - 1

    def _back(self, y: Tensor) -> Tensor:
        return (y + 1) * (self.width / 2) + self.low

    @property
    def mean(self) -> Tensor:
        return self._back(self._mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(level of value), nats per dimension; value as the model sees it."""
        return super().log_prob(self._to(value))

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """A draw of a level, on the scale of the model."""
        return self._back(super().sample(sample_shape))


class DiscretizedOnScale(Decoder):
    """`Discretized` for a model whose data do not lie in [−1, 1].

    Arguments:
        levels: n. edge: the variance, on the scale of the model.
        ends: where the lowest and the highest level sit.
    """

    def __init__(self, levels: int, edge: Edge, ends: tuple[float, float]) -> None:
        self.levels = levels
        self.ends = ends
        self.plain = Discretized(levels, edge)

    def distribution(self, at: Prediction) -> DiscretizedNormal:
        normal = self.plain.density.distribution(at)
        return OnScale(normal.mean, normal.logvar, self.levels, self.ends)


class Labelled(nn.Module):
    """Gives a class-conditional network one class throughout.

    Arguments:
        network: called as network(x_t, t, classes). label: the class.
    """

    def __init__(self, network: nn.Module, label: int) -> None:
        super().__init__()
        self.network = network
        self.label = label

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Call the network with cond, or with the label for every example."""
        if cond is None:
            cond = torch.full((len(x_t),), self.label, dtype=torch.int64, device=x_t.device)
        out: Tensor = self.network(x_t, t, cond)
        return out
