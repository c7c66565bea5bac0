r"""The numbers behind the pictures of the derivation, by nelbo's own functions.

Telescope   log q(x_t|x_0) along one trajectory, and the bound of its chain by term;
Density     nats per unit of log-SNR that the exact denoiser of a Swiss roll pays:
            ½ E‖ε − ε̂‖² = ½ snr_t E tr Cov(x_0|x_t) in continuous time, and the terms of a
            chain, each over the log-SNR that it spans;
Errors      KL(P‖Q) of two normal laws and E(X − Y)² of independent draws;
Duel        two densities, D* = p/(p + g), and what each place pays to JSD and to log 2 + V/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nelbo import quadrature
from nelbo.data.mixture import GaussianMixture
from nelbo.data.toys import swissroll
from nelbo.derivation.models import MEAN, affine
from nelbo.derivation.rows import Rows, marginals
from nelbo.distributions import DiagonalNormal, kl_divergence
from nelbo.jsd import payoff
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import generator, seeded
from nelbo.schedules import LogSNRLinear

DRAWS, PLACES = 500, 43
"""Draws of x_t for each of so many log-SNRs."""
CHAIN = 29
"""Latents of the chain beside the integral."""


@dataclass(frozen=True)
class Telescope:
    """One trajectory, and the bound of its chain.

    Arguments:
        marginals: (N,) log q(x_t|x_0) of the trajectory, nats.
        terms: (N+1,) of the bound, the mean over data: prior, pairs from the noisy end, decoder.
        likelihood: the mean of −log p_θ(x_0), nats.
    """

    marginals: Tensor
    terms: Tensor
    likelihood: float


def telescope() -> Telescope:
    """Of the chain in one dimension whose network is off, so that the bound has a gap."""
    setting = affine()
    process, times = setting.model.process, setting.times
    x_0 = torch.full((1, 1), MEAN, dtype=torch.float64)
    latents: list[Tensor] = []
    with seeded(0, "trajectory"):
        for i, t in enumerate(times):
            step = process.transition(latents[-1], times[i - 1], t) if i else None
            latents.append((process.marginal(x_0, t) if step is None else step).sample())
    rows = Rows(x_0, torch.stack(latents, 1), torch.ones(1), 1)
    found = setting.bound()
    by_term = torch.cat([found.prior[:, None], found.diffusion.flip(1)], 1)
    terms = torch.cat([by_term, found.reconstruction[:, None]], 1)
    return Telescope(
        marginals(setting.model, times, rows)[0],
        setting.weight @ terms,
        -setting.average(setting.log_likelihood()),
    )


@dataclass(frozen=True)
class Density:
    """Nats per unit of log-SNR.

    Arguments:
        logsnr, continuous: (PLACES,). edges: (CHAIN,) log-SNR of the latents, falling.
        chain: (CHAIN − 1,) the term of each pair over the log-SNR between its latents.
    """

    logsnr: Tensor
    continuous: Tensor
    edges: Tensor
    chain: Tensor


@cache
def density() -> Density:
    """Of the Swiss roll, scaled as a model sees it, with the exact E[x_0|x_t]."""
    data = swissroll(10_000, 2, n_validation=1)
    assert data.truth is not None and data.truth.components is not None
    law = data.truth.components.standardized(data.shift, data.scale)
    process = Gaussian(LogSNRLinear(8.0, -6.0))
    schedule = process.schedule
    x_0, eps = law.sample(DRAWS, generator(0, "curves")), _noise(DRAWS, law.dims)
    fine, coarse = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (PLACES, CHAIN))

    def error(t: Tensor) -> Tensor:
        """E‖x_0 − E[x_0|x_t]‖² at one time."""
        at = process.marginal(x_0, t)
        x_t = at.mean + at.variance.sqrt() * eps
        return law.spread(x_t, schedule.keep(t), schedule.lose(t)).mean()

    snr = schedule.logsnr(fine).exp()
    continuous = 0.5 * snr * torch.stack([error(t) for t in fine])
    edges = schedule.logsnr(coarse)
    weights = 0.5 * (edges[:-1].exp() - edges[1:].exp()) / (edges[:-1] - edges[1:])
    chain = weights * torch.stack([error(t) for t in coarse[1:]])
    return Density(schedule.logsnr(fine), continuous, edges, chain)


def _noise(count: int, dims: int) -> Tensor:
    return torch.randn(count, dims, dtype=torch.float64, generator=generator(0, "noise"))


@dataclass(frozen=True)
class Errors:
    """KL(P‖Q) in nats and ½ E(X − Y)², P = N(0, 1), along a mean and along a deviation.

    Arguments:
        means: (m,) of Q. deviations: (k,) of Q with mean `off`.
        kl_mean, square_mean: (3, m) for deviations of Q `widths`.
        kl_deviation, square_deviation: (k,).
    """

    means: Tensor
    widths: tuple[float, ...]
    kl_mean: Tensor
    square_mean: Tensor
    off: float
    deviations: Tensor
    kl_deviation: Tensor
    square_deviation: Tensor


def errors() -> Errors:
    """Of normal laws."""
    widths, off = (0.7, 1.0, 1.6), 0.5
    means, deviations = (
        torch.linspace(low, high, 141, dtype=torch.float64) for low, high in ((-2, 2), (0.1, 2.5))
    )
    p = DiagonalNormal(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    moved = [_normal(means, torch.full_like(means, w)) for w in widths]
    spread = _normal(torch.full_like(deviations, off), deviations)
    return Errors(
        means,
        widths,
        torch.stack([kl_divergence(p, q) for q in moved]),
        torch.stack([_square(p, q) for q in moved]),
        off,
        deviations,
        kl_divergence(p, spread),
        _square(p, spread),
    )


def _normal(mean: Tensor, deviation: Tensor) -> DiagonalNormal:
    return DiagonalNormal(mean, 2 * deviation.log())


def _square(p: DiagonalNormal, q: DiagonalNormal) -> Tensor:
    """½ E(X − Y)² of independent X ~ P, Y ~ Q."""
    return 0.5 * ((p.mean - q.mean) ** 2 + p.variance + q.variance)


@dataclass(frozen=True)
class Duel:
    """Two densities on a line and two discriminators, the best one first.

    Arguments:
        x, p, g: (m,). best, other: (m,) probabilities of "real".
        paid, paid_other: (m,) what each place pays, nats per unit of x; their integrals are
        jsd, reached: JSD(p, g), and log 2 + V/2 of the other one.
    """

    x: Tensor
    p: Tensor
    g: Tensor
    best: Tensor
    other: Tensor
    paid: Tensor
    paid_other: Tensor
    jsd: float
    reached: float


def duel() -> Duel:
    """p with two modes; g has one of them, too wide."""
    p = _mixture((0.6, 0.4), (-1.2, 1.6), (0.6, 0.5))
    g = _mixture((1.0,), (-0.9,), (0.9,))
    best = quadrature.OptimalDiscriminator(p.log_prob, g.log_prob)
    x = torch.linspace(-4.5, 4.0, 341, dtype=torch.float64)[:, None]
    ideal, given = best(x), _timid(x)
    at_p, at_g = p.log_prob(x).exp(), g.log_prob(x).exp()
    return Duel(
        x[:, 0],
        at_p,
        at_g,
        ideal.sigmoid(),
        given.sigmoid(),
        _paid(at_p, at_g, ideal),
        _paid(at_p, at_g, given),
        quadrature.jsd(p, g).value,
        math.log(2) + 0.5 * quadrature.value(p, g, _timid).value,
    )


def _mixture(
    weights: tuple[float, ...], means: tuple[float, ...], deviations: tuple[float, ...]
) -> GaussianMixture:
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, deviations))
    return GaussianMixture(w, m[:, None], (s**2)[:, None, None])


def _timid(x: Tensor) -> Tensor:
    """The logit of a straight line: it cannot bend where D* does."""
    return 0.5 * x[:, 0] + 0.2


def _paid(p: Tensor, g: Tensor, logit: Tensor) -> Tensor:
    """p ½[log 2 − sp(−s)] + g ½[log 2 − sp(s)] by `payoff` of pairs at one place."""
    far = torch.zeros_like(logit)
    # a pair whose other member has logit 0 pays for one side alone
    return p * payoff(logit, far, torch.inf) + g * payoff(far, logit, torch.inf)
