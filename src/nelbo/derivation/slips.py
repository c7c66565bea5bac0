r"""Slips of common notes in the algebra of normal laws, each beside the right value.

They cancel, or look right, in one place and break the next one: a squared distance with one half
too many, a divergence the wrong way round, a bar or a factor d that was lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo.bound import pair_term
from nelbo.derivation.algebra import KL, LOG_PROB
from nelbo.derivation.denoisers import compared, hermite, normal, sphere
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.derivation.minima import shared_mean
from nelbo.derivation.noise import BETAS, NOISE, PAIR, POSTERIOR, chain
from nelbo.distributions import DiagonalNormal, kl_divergence, per_example
from nelbo.objectives import noise_error
from nelbo.processes.base import along

TRANSITION = "nelbo.processes.gaussian.Gaussian.transition"


def _law(mean: float, variance: float, dims: int = 1) -> DiagonalNormal:
    values = torch.full((1, dims), mean, dtype=torch.float64)
    return DiagonalNormal(values, torch.tensor(math.log(variance), dtype=torch.float64))


P, Q = (0.6, 0.5), (0.0, 1.48)
"""Mean and variance of two laws."""


class SquaredDistance(Erratum):
    id = "E25"
    identity = "I21"
    printed = "the mean squared error of two normals is ½ ((mu_P-mu_Q)² + v_P + v_Q)"
    right = "of independent draws it is (mu_P-mu_Q)² + v_P + v_Q"
    why = "there is no ½, and it depends on how the two draws are coupled"

    def line(self, seed: int) -> Line:
        z, w = hermite(4)
        one, other = _law(*P), _law(*Q)
        x, y = (law.mean + law.variance.sqrt() * z for law in (one, other))
        drawn = (w[:, None] * w * (x.T - y) ** 2).sum()
        printed = 0.5 * ((P[0] - Q[0]) ** 2 + P[1] + Q[1])
        return compared(
            "Gaussian",
            ("as printed", printed, "closed form"),
            ("E (X - Y)² of independent draws", drawn, "nelbo.distributions.DiagonalNormal"),
            unit="squared error",
        )


class SameMinimiser(Erratum):
    id = "E26"
    identity = "I21"
    printed = "minimising the squared error is equivalent to minimising KL"
    right = "in the means only, with variances held, and for each step alone"
    why = "one mean that two steps share has another best value (and v_Q -> 0 has KL infinite)"

    def line(self, seed: int) -> Line:
        return compared(
            "Gaussian",
            ("shared mean of the least squared error", shared_mean(weighted=False), "autograd"),
            ("shared mean of the least KL", shared_mean(weighted=True), KL),
            unit="mean",
        )


class Transition(Erratum):
    id = "E28"
    identity = "I22"
    printed = "q(x_t|x_{t-1}) has the variance (1 - keep_t)²"
    right = "1 - alpha_t = beta_t; 1 - keep_t, not squared, is that of q(x_t|x_0)"
    why = "a bar too many, and a standard deviation's square squared"

    def line(self, seed: int) -> Line:
        c = chain()
        s, t = c.times[:-1], c.times[1:]
        law = c.models["noise"].process.transition(torch.zeros(len(s), 1).double(), s, t)
        printed = c.schedule.lose(t) ** 2
        return compared(
            "Gaussian",
            ("as printed", printed, "nelbo.schedules.Schedule.lose"),
            ("variance of q(x_t|x_s)", law.variance[:, 0], TRANSITION),
            unit="variance",
        )


class WrongWay(Erratum):
    id = "E34"
    identity = "I19"
    printed = "the expectation in KL is taken under the learned model"
    right = "under the posterior: KL(q‖p)"
    why = "both ways are equal for equal covariances only"

    def line(self, seed: int) -> Line:
        one, other = _law(*P), _law(*Q)
        z, w = hermite(8)
        x = other.mean + other.variance.sqrt() * z
        under_model = (w * (other.log_prob(x) - one.log_prob(x))).sum()
        return compared(
            "Gaussian",
            ("E_p log p/q", under_model, LOG_PROB),
            ("KL(q‖p)", kl_divergence(one, other), KL),
        )


class Density(Erratum):
    id = "E35"
    identity = "I19"
    printed = "the density is exp(-A/2)/(2 pi^(D/2) |S|^(1/2))"
    right = "(2 pi)^(-D/2) |S|^(-1/2) exp(-A/2)"
    why = "the constant cancels in KL, and not in a likelihood"

    def line(self, seed: int) -> Line:
        law, dims = _law(*P, dims=3), 3
        x = torch.tensor([[0.2, -0.4, 1.0]], dtype=torch.float64)
        form = ((x - P[0]) ** 2).sum() / P[1]
        constant = math.log(2) + 0.5 * dims * (math.log(math.pi) + math.log(P[1]))
        return compared(
            "Gaussian",
            ("log density as printed, D = 3", -0.5 * form - constant, "closed form"),
            ("log N(x; m, v I)", per_example(law.log_prob(x)), LOG_PROB),
        )


class CrossTerm(Erratum):
    id = "E36"
    identity = "I18"
    printed = "E (x-m2)' S^-1 (x-m2) = d + delta + delta' S^-1 delta"
    right = "d + 0 + delta' S^-1 delta"
    why = "the cross term is 2 delta' S^-1 E r, and E r = 0"

    def line(self, seed: int) -> Line:
        form, delta = _form()
        printed = 1 + delta + delta**2 / P[1]
        return compared(
            "Gaussian",
            ("as printed", printed, "closed form"),
            ("E (x-m2)²/v", form, "nelbo.data.mixture.GaussianMixture.log_prob"),
        )


def _form() -> tuple[Tensor, float]:
    """E of the quadratic form about Q's mean under N(P), both of the variance of P, and δ."""
    z, weight = sphere(1)
    law = normal([Q[0]], [[P[1]]])
    x = P[0] + math.sqrt(P[1]) * z
    return weight @ (2 * (law.log_prob(law.means) - law.log_prob(x))), P[0] - Q[0]


class LostMinus(Erratum):
    id = "E37"
    identity = "I19"
    printed = "½ E[A - B] = -½ (d - d - ‖delta‖²/v)"
    right = "-½ E[A - B] = ½ ‖delta‖²/v"
    why = "the minus on the left was lost: E[A - B] is negative, KL is not"

    def line(self, seed: int) -> Line:
        form, _ = _form()
        return compared(
            "Gaussian",
            ("½ E[A - B]", 0.5 * (1 - form), "nelbo.data.mixture.GaussianMixture.log_prob"),
            ("KL", kl_divergence(_law(*P), _law(Q[0], P[1])), KL),
        )


class BarredMean(Erratum):
    id = "E38"
    identity = "I22"
    printed = "mu = (x_t - beta_t eps/√(1 - keep_t))/√keep_t"
    right = "mu = (x_t - beta_t eps/√(1 - keep_t))/√alpha_t"
    why = "alpha_t was read as its product, keep_t"

    def line(self, seed: int) -> Line:
        c = chain()
        at, x_0, index = c.at("noise")
        q, s = c.schedule, c.times[index - 1]
        keep, lose, beta = (along(v, x_0) for v in (q.keep(at.t), q.lose(at.t), c.betas[index]))
        noise = (at.x_t - keep.sqrt() * x_0) / lose.sqrt()
        mean = at.model.process.posterior(at.x_t, x_0, at.t, s).mean
        return compared(
            "Gaussian",
            ("as printed", (at.x_t - beta * noise / lose.sqrt()) / keep.sqrt(), BETAS),
            ("mean of q(x_s|x_t,x_0)", mean, POSTERIOR),
            unit="data",
        )


class BarredWeight(Erratum):
    id = "E39"
    identity = "I23"
    printed = "KL = beta_t²/(2 beta_t keep_t (1 - keep_t)) ‖eps - eps_hat‖²"
    right = "beta_t/(2 alpha_t (1 - keep_{t-1})) ‖eps - eps_hat‖², with sigma² = beta~"
    why = "a bar on alpha_t, and beta_t for beta~: other covariances, so that KL has one part more"

    def line(self, seed: int) -> Line:
        c = chain()
        at, x_0, index = c.at("noise")
        q = c.schedule
        weight = c.betas[index] / (2 * q.keep(at.t) * q.lose(at.t))
        return compared(
            "Gaussian",
            ("as printed", weight * noise_error(at, x_0), NOISE),
            ("KL of the pair", pair_term(at, x_0, c.times[index - 1]), PAIR),
        )


class LostDimension(Erratum):
    id = "E44"
    identity = "I20"
    printed = "KL = ½ [log(v2/v1) + v1/v2 + ‖m1-m2‖²/v2 - 1] for vectors"
    right = "½ [d log(v2/v1) + d v1/v2 + ‖m1-m2‖²/v2 - d]"
    why = "the variance part counts once per dimension: 1.07 nats at d = 7, v1 = .3, v2 = .8"

    def line(self, seed: int) -> Line:
        one, other, dims = 0.3, 0.8, 7
        printed = 0.5 * (math.log(other / one) + one / other + dims * 0.04 / other - 1)
        laws = _law(0.2, one, dims), _law(0.0, other, dims)
        return compared(
            "Gaussian",
            ("as printed", printed, "closed form"),
            ("KL", per_example(kl_divergence(*laws)), KL),
        )


IDENTITIES: tuple[Identity, ...] = ()
ERRATA: tuple[Erratum, ...] = (
    SquaredDistance(),
    SameMinimiser(),
    Transition(),
    WrongWay(),
    Density(),
    CrossTerm(),
    LostMinus(),
    BarredMean(),
    BarredWeight(),
    LostDimension(),
)
