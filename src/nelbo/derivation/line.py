r"""Chains in one dimension whose kernels are affine in x_t, with exact expectations.

Log-ratios of normal laws are quadratic in the normal noise of a trajectory. For those the points
±√N e_i, equally weighted, give the exact mean (cubature of degree 3), and p_θ(x_0) is a normal law
whose mean and variance are propagated from the prior. With the discretised decoder only x_1 needs
more points: a Gauss-Hermite rule for its noise, times the cubature for the rest.

References:
    Stroud 1957, Remarks on the disposition of points in numerical integration formulas.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from nelbo.decoders import Discretized
from nelbo.derivation.rows import Rows, forward_steps, log_weights
from nelbo.derivation.settings import Joint, Known
from nelbo.distributions import DiagonalNormal, DiscretizedNormal

NODES = 48
"""Gauss-Hermite nodes of x_1 for the discretised decoder's term."""
REACH, LATTICE = 9.0, 2001
"""Standard deviations of p_θ(x_1), and how many points there: far below the decoder's width."""


def hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(z), z ~ N(0, 1), exact for polynomials below degree 2 nodes."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.from_numpy(z), torch.from_numpy(w / w.sum())


class OnALine(Known, ABC):
    """One dimension, kernels affine in x_t with a fixed variance; a decoder of a normal law."""

    nodes: ClassVar[int]
    """For the noise of x_1."""

    def trajectories(self) -> Rows:
        """Noise points: quadrature for x_1 times ±√(N−1) e_i for the others."""
        z, w = hermite(self.nodes)
        others = self.count - 1
        axes = math.sqrt(others) * torch.eye(others, dtype=torch.float64)
        sphere = torch.cat([axes, -axes])
        noise = torch.cat([z.repeat_interleave(len(sphere))[:, None], sphere.repeat(len(z), 1)], 1)
        weight = w.repeat_interleave(len(sphere)) / len(sphere)
        x_0, n = self.x_0.repeat_interleave(len(noise), 0), len(self.x_0)
        return Rows(x_0, self._walk(x_0, noise.repeat(n, 1)), weight.repeat(n), n)

    def _walk(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """(R, N, 1) latents of the forward process that this noise (R, N) drives."""
        process, x = self.model.process, [x_0]
        for i, t in enumerate(self.times):
            step = process.transition(x[-1], self.times[i - 1], t) if i else None
            law = process.marginal(x_0, t) if step is None else step
            x.append(law.mean + law.variance.sqrt() * noise[:, i : i + 1])
        return torch.stack(x[1:], 1)

    def at(self, index: int) -> Rows:
        z, w = hermite(self.nodes)
        x_0, n = self.x_0.repeat_interleave(len(z), 0), len(self.x_0)
        law = self.model.process.marginal(x_0, self.times[index])
        x_t = law.mean + law.variance.sqrt() * z.repeat(n)[:, None]
        return Rows(x_0, x_t[:, None], w.repeat(n), n)

    def first_latent(self) -> Normal:
        """p_θ(x_1): mean and variance of the prior pushed through the kernels."""
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        prior = self.model.process.prior(ends)
        law = Normal(prior.mean[0, 0], prior.variance[0, 0].sqrt())
        for i in range(self.count - 1, 0, -1):
            kernel = self.model.kernel(ends, self.times[i], self.times[i - 1])
            law = _pushed(law, kernel.mean, kernel.variance)
        return law

    def data_law(self) -> Normal:
        """The normal law of x_0 under p_θ, before it is cut into levels."""
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        law = self.model.decoder(ends, self.times[0])
        assert isinstance(law, DiagonalNormal | DiscretizedNormal)
        return _pushed(self.first_latent(), law.mean, law.logvar.exp().expand_as(law.mean))


def _pushed(law: Normal, ends: Tensor, variance: Tensor) -> Normal:
    """The law after an affine step with the means `ends` at 0 and 1 and this variance, (2, 1)."""
    slope = ends[1, 0] - ends[0, 0]
    total = slope**2 * law.variance + variance[0, 0]
    return Normal(ends[0, 0] + slope * law.mean, total.sqrt(), validate_args=False)


class Affine(Joint, OnALine):
    """A density in one dimension: everything is normal, log w is quadratic."""

    nodes = 2

    def log_likelihood(self) -> Tensor:
        density: Tensor = self.data_law().log_prob(self.x_0[:, 0])
        return density

    def log_evidence(self) -> Tensor:
        return self._joint().log_mass

    def gap(self) -> Tensor:
        forward = self._normal(lambda rows: forward_steps(self.model, self.times, rows).sum(1))
        return kl_divergence(forward.law, self._joint().law)

    def _joint(self) -> _Normal:
        """q(x_{1:N}|x_0) w as a multiple of a normal law of x_{1:N}."""

        def log_joint(rows: Rows) -> Tensor:
            forward = forward_steps(self.model, self.times, rows).sum(1)
            return forward + log_weights(self.model, self.times, rows)

        return self._normal(log_joint)

    def _normal(self, log_mass: Callable[[Rows], Tensor]) -> _Normal:
        """A quadratic function of x_{1:N} as a normal law, off its second differences."""
        size, n = self.count, len(self.x_0)
        unit = torch.eye(size, dtype=torch.float64)
        both = (unit[:, None] + unit).flatten(0, 1)
        points = torch.cat([torch.zeros_like(unit[:1]), unit, -unit, both])
        x_0 = self.x_0.repeat_interleave(len(points), 0)
        latents = points.repeat(n, 1)[..., None]
        value = log_mass(Rows(x_0, latents, torch.ones(len(x_0)), n)).view(n, -1)
        zero, up, down = value[:, :1], value[:, 1 : size + 1], value[:, size + 1 : 2 * size + 1]
        mixed = value[:, 2 * size + 1 :].unflatten(1, (size, size))
        curvature = mixed - up[:, :, None] - up[:, None, :] + zero[..., None]
        return _Normal.of(zero[:, 0], 0.5 * (up - down), curvature)


@dataclass(frozen=True)
class _Normal:
    """exp(log_mass) times a normal law, by group."""

    log_mass: Tensor
    law: MultivariateNormal

    @classmethod
    def of(cls, constant: Tensor, slope: Tensor, curvature: Tensor) -> _Normal:
        """From constant + slope·x + ½ xᵀ curvature x."""
        covariance = torch.linalg.inv(-curvature)
        covariance = 0.5 * (covariance + covariance.mT)
        mean = (covariance @ slope[..., None])[..., 0]
        law = MultivariateNormal(mean, covariance, validate_args=False)
        zero = law.log_prob(torch.zeros_like(mean))
        return cls(constant - zero, law)


class Levelled(OnALine):
    """Integer levels: the normal law of a line, cut into bins by the decoder."""

    nodes = NODES

    def log_likelihood(self) -> Tensor:
        """By the normal cdf of the whole chain: a bin is one interval, the outer ones are open."""
        law, x, levels = self.data_law(), self.x_0[:, 0], self.levels
        edges = torch.arange(1, levels, dtype=torch.float64) * (2 / (levels - 1))
        cdf = law.cdf(edges - 1 - 1 / (levels - 1))
        mass = torch.cat([cdf, torch.ones(1).double()]) - torch.cat([torch.zeros(1).double(), cdf])
        return mass[((x + 1) * (levels - 1) / 2).round().long()].log()

    def log_by_decoder(self) -> Tensor:
        """log E_{p_θ(x_1)} p_θ(x_0|x_1), (n,) nats: the decoder's masses, on a lattice of x_1."""
        law = self.first_latent()
        z = torch.linspace(-REACH, REACH, LATTICE, dtype=torch.float64)
        decoder = self.model.decoder((law.mean + law.stddev * z)[:, None], self.times[0])
        density = (-0.5 * z**2).exp() * ((z[1] - z[0]) / math.sqrt(2 * math.pi))
        masses = [decoder.log_prob(x.expand(LATTICE, 1))[:, 0].exp() for x in self.x_0]
        return (torch.stack(masses) @ density).log()

    @property
    def levels(self) -> int:
        """n of the decoder."""
        decoder = self.model.decoder_rule
        assert isinstance(decoder, Discretized)
        return decoder.levels
