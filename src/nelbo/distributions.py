r"""Distributions that `torch.distributions` lacks, with the precision that a bound needs.

Variances travel as their logarithms. Two normal distributions whose log variances differ by 1e-12
have a Kullback-Leibler divergence of about 1e-25 nats per dimension, and it is computed as such:

    KL(N(m_1, v_1) || N(m_2, v_2)) = ½ [expm1(δ) − δ + (m_1 − m_2)²/v_2],   δ = log v_1 − log v_2.

Integer levels j ∈ {0..n−1} sit at x = 2j/(n−1) − 1 in bins of half width 1/(n−1); the lowest bin
reaches to −∞ and the highest to +∞, so that the masses of the n levels sum to one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.kl import kl_divergence as kl_divergence
from torch.distributions.kl import register_kl

from nelbo.randomness import by_row

Shape = torch.Size | list[int] | tuple[int, ...]
_SERIES = 1e-2  # below this |δ| the first terms of the series of expm1(δ) − δ are exact


def per_example(values: Tensor) -> Tensor:
    """Sum over all dimensions but the first, in float64.

    Arguments:
        values: (B, *shape), nats per dimension.
    Returns:
        (B,) float64, nats per example.
    """
    return values.flatten(1).sum(1, dtype=torch.float64)


def level_of(x: Tensor, levels: int) -> Tensor:
    """Level j = (x + 1)(n − 1)/2 of data on the model's scale [−1, 1]; int64, same shape."""
    return ((x + 1) * ((levels - 1) / 2)).round().long()


def level_values(levels: int, like: Tensor) -> Tensor:
    """(n,) values 2j/(n−1) − 1 of the levels, in the dtype and on the device of `like`."""
    j = torch.arange(levels, dtype=torch.float64, device=like.device)
    return (2 * j / (levels - 1) - 1).to(like.dtype)


class DiagonalNormal(Distribution):
    """N(mean, exp(logvar)) for every dimension on its own; batch_shape is the full shape.

    Arguments:
        mean: any shape.
        logvar: log variance, broadcastable to `mean`.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self._mean = mean
        self.logvar = logvar
        super().__init__(mean.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp().expand_as(self._mean)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        shape, like = self._extended_shape(torch.Size(sample_shape)), self._mean

        def normal(rows: int, stream: torch.Generator | None) -> Tensor:
            kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
            return torch.randn(rows, *shape[1:], generator=stream, **kind)

        noise = by_row(shape[0], normal, like.device) if shape else torch.randn_like(like)
        return self._mean + (0.5 * self.logvar).exp() * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; mean, variance), nats per dimension (elementwise)."""
        z2 = (value - self._mean) ** 2 * (-self.logvar).exp()
        return -0.5 * (z2 + self.logvar + math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        """½ log(2πe v), nats per dimension (elementwise)."""
        return (0.5 * (self.logvar + math.log(2 * math.pi * math.e))).expand_as(self._mean)


def expm1_minus(delta: Tensor) -> Tensor:
    """expm1(δ) − δ without cancellation near zero (series δ²/2 + … + δ⁷/5040 below 1e-2)."""
    small = delta.abs() < _SERIES
    d = torch.where(small, delta, torch.zeros_like(delta))
    tail = 1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7))))
    large = torch.where(small, torch.ones_like(delta), delta)
    return torch.where(small, 0.5 * d * d * tail, torch.expm1(large) - large)


@register_kl(DiagonalNormal, DiagonalNormal)
def _kl_normal_normal(p: DiagonalNormal, q: DiagonalNormal) -> Tensor:
    excess = expm1_minus(p.logvar - q.logvar)
    return 0.5 * (excess + (p.mean - q.mean) ** 2 * (-q.logvar).exp())


class DiscretizedNormal(Distribution):
    """The mass that N(mean, exp(logvar)) gives to the bin of each level.

    P(j) = Φ((x_j + h − m)/σ) − Φ((x_j − h − m)/σ), h = 1/(n−1), with open edge bins. The edge test
    is on the integer level, and the mass is formed on the tail that is smaller, so that it is
    exact to rounding however far the level lies from the mean.

    Arguments:
        mean: (B, *shape), on the model's scale.
        logvar: log variance, broadcastable to `mean`.
        levels: n ≥ 2.

    References:
        Ho, Jain, Abbeel 2020, Denoising diffusion probabilistic models, eq. 13.
    """

    arg_constraints = {}

    def __init__(self, mean: Tensor, logvar: Tensor, levels: int) -> None:
        self._mean = mean
        self.logvar = logvar
        self.levels = levels
        super().__init__(mean.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The mean of the normal distribution before it is cut into bins."""
        return self._mean

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(level of value), nats per dimension (elementwise).

        Arguments:
            value: data on the model's scale, each entry within rounding of a level.
        """
        level = level_of(value, self.levels)
        return self.log_mass(level)

    def log_mass(self, level: Tensor) -> Tensor:
        """log P(level), elementwise, for integer levels broadcastable to the mean."""
        # one of 65536 bins is 250 roundings of float32 wide: its two edges need float64
        half = 1 / (self.levels - 1)
        offset = 2 * level.double() / (self.levels - 1) - 1 - self._mean
        inverse = (-0.5 * self.logvar.double()).exp()
        upper, lower = (offset + half) * inverse, (offset - half) * inverse
        inside = _log_interval(lower, upper)
        inside = torch.where(level == 0, log_cdf(upper), inside)
        mass = torch.where(level == self.levels - 1, log_cdf(-lower), inside)
        return mass.to(self._mean.dtype)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """A draw from the level masses, on the model's scale: round a normal draw to its bin."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)
        draw = self._mean + (0.5 * self.logvar).exp() * noise
        # The open edge bins take all that falls beyond them: this clamp is the distribution.
        level = level_of(draw, self.levels).clamp(0, self.levels - 1)
        return 2 * level.to(draw.dtype) / (self.levels - 1) - 1


def log_cdf(x: Tensor) -> Tensor:
    """log Φ(x) = log erfcx(−x/√2) − x²/2 − log 2 for x < 0; for x ≥ 0 log1p(−erfc(x/√2)/2).

    The gradient is right in both tails; that of `torch.special.log_ndtr` is not: in float32 it is
    6.5 times too large at x = −1e4 and 0 at −1e6, in float64 infinite at −1e10.
    """
    # each branch sees only its own half-line, so that neither spoils the other's gradient
    low, high = x.clamp(max=0), x.clamp(min=0)
    tail = torch.special.erfcx(-low * math.sqrt(0.5)).log() - 0.5 * low**2 - math.log(2)
    return torch.where(x < 0, tail, torch.log1p(-0.5 * torch.erfc(high * math.sqrt(0.5))))


def _log_interval(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Φ(upper) − Φ(lower)) on the smaller tail; exact to rounding for lower < upper."""
    flip = lower > 0
    a = torch.where(flip, -upper, lower)
    b = torch.where(flip, -lower, upper)
    log_b = log_cdf(b)
    ratio = log_cdf(a) - log_b
    return log_b + torch.log(-torch.expm1(ratio))


class LevelCategorical(Distribution):
    """A free mass function over the levels of every dimension.

    Arguments:
        logits: (B, *shape, n), unnormalised log masses, level last.
    """

    arg_constraints = {}

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.log_softmax(-1)
        self.levels = logits.shape[-1]
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.logits.exp() @ level_values(self.levels, self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(level of value), nats per dimension (elementwise)."""
        level = level_of(value, self.levels)
        return self.logits.gather(-1, level.unsqueeze(-1)).squeeze(-1)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(torch.Size(sample_shape))
        draw = torch.distributions.Categorical(logits=self.logits).sample(torch.Size(sample_shape))
        return level_values(self.levels, self.logits)[draw].reshape(shape)
