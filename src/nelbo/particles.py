"""Weighted samples: populations of particles, their averages, and resampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from nelbo.products import masses
from nelbo.randomness import seeded


@dataclass(frozen=True)
class Particles:
    """Weighted samples of R independent populations of P particles each.

    Arguments:
        x_0: (R, P, *shape) on the model's scale.
        log_weights: (R, P) float64, their sum over a population is one.
        log_evidence: (R,) log of an unbiased estimate of ∫ p_θ r, nats.
        ess: (N, R) effective sample sizes after each step, before any resampling; the last one is
            that of the samples.
        resampled: (N, R) whether the step was followed by resampling.
        decoder: the last product p(x_0|x_1) r(x_0)/Z of all R·P particles, population by
            population: its masses, weighted, are the predictive law of a dimension.
    """

    x_0: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    ess: Tensor
    resampled: Tensor
    decoder: Distribution

    @property
    def weights(self) -> Tensor:
        """(R, P), each population sums to one."""
        return self.log_weights.exp()

    def average(self, values: Tensor) -> Tensor:
        """Weighted mean over the particles, (R, ...), of values (R, P, ...)."""
        weights = self.weights.to(values.device, values.dtype)
        mean: Tensor = torch.einsum("rp,rp...->r...", weights, values)
        return mean

    def mean(self) -> Tensor:
        """(R, *shape) float64."""
        return self.average(self.x_0.double())

    def variance(self) -> Tensor:
        """(R, *shape) float64, of x_0 under each population."""
        return self.average((self.x_0.double() - self.mean()[:, None]) ** 2)

    def pooled(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over all populations of one condition, and its standard error (delta method).

        Populations count by their evidence: E[Z f] = ∫ p_θ r f holds at any number of particles,
        so that only a ratio is left that is biased, as 1/R.

        Arguments:
            values: (R, P, ...) of the particles.
        Returns:
            (...) and (...), the error is nan for one population.
        """
        each = self.average(values)
        share = self.log_evidence.softmax(0).to(values.device, values.dtype)
        mean = torch.einsum("r,r...->...", share, each)
        miss = torch.einsum("r,r...->r...", share, each - mean)
        populations = len(each)
        if populations == 1:
            return mean, torch.full_like(mean, math.nan)
        return mean, (miss.square().sum(0) * populations / (populations - 1)).sqrt()

    def predictive(self) -> Tensor:
        """Probabilities of the values of every dimension, (n, R, *shape), n levels or 2 bits.

        The decoder's masses, averaged over the weighted particles of each population. After much
        resampling particles of one population have common ancestors, and their average is too
        sure of itself; that of many populations is not.
        """
        mass = masses(self.decoder)[1].exp().unflatten(1, self.log_weights.shape)
        return self.average(mass.movedim(0, 2)).movedim(1, 0)

    def choose(self, count: int, seed: int = 0) -> Tensor:
        """(R, count, *shape) draws by weight; those of one population may repeat a particle."""
        with seeded(seed, "conditioning", "choose"):
            index = torch.multinomial(self.weights.cpu(), count, replacement=True)
        rows = torch.arange(len(index))[:, None]
        return self.x_0[rows, index]

    def evidence(self) -> tuple[float, float]:
        """log of the mean evidence over populations, and its error (nan for one population)."""
        log_z = self.log_evidence.logsumexp(0) - math.log(len(self.log_evidence))
        ratio = (self.log_evidence - log_z).exp()
        error = float(ratio.std()) / math.sqrt(len(ratio)) if len(ratio) > 1 else math.nan
        return float(log_z), error

    def __str__(self) -> str:
        """Particles, effective sample sizes and evidence, in one sentence each."""
        populations, particles = self.log_weights.shape
        log_z, error = self.evidence()
        last, least = self.ess[-1], self.ess.min(0).values
        return (
            f"{populations} population(s) of {particles} particles; effective sample size at the "
            f"end {float(last.median()):.1f} (median), on the way down to "
            f"{float(least.median()):.1f}; resampled "
            f"{float(self.resampled.double().sum(0).median()):.0f} times. log evidence "
            f"{log_z:.2f} ± {error:.2f} nats. Right in the limit of many particles only."
        )


def systematic(log_w: Tensor) -> Tensor:
    """Systematic resampling: particle p appears ⌊P w_p⌋ or ⌈P w_p⌉ times, P w_p on average.

    Arguments:
        log_w: (R, P) unnormalised log weights, float64.
    Returns:
        (R, P) indices.
    """
    populations, particles = log_w.shape
    edges = log_w.softmax(1).cumsum(1)
    start = torch.rand(populations, 1, dtype=torch.float64)
    points = (start + torch.arange(particles)) / particles
    # the last edge may be rounded below the last point
    return torch.searchsorted(edges, points).clamp(max=particles - 1)
