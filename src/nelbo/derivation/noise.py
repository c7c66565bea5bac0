r"""From divergences to squared errors of the noise: the algebra behind L_simple.

    μ̃ − μ_θ = B (ε − ε̂),   B = −c √(l_t/α),
    KL = ‖μ̃ − μ_θ‖²/(2β̃) = ½ (e^{λ_s−λ_t} − 1) ‖ε − ε̂‖²,

so that each term of the bound is a weighted squared error once σ² = β̃ (and β̃ is known: see
`simpleweight` for what is left when the weight is dropped).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.bound import pair_term
from nelbo.derivation.denoisers import (
    called,
    compared,
    in_three_ways,
    normal,
    quadratic_points,
)
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.distributions import per_example
from nelbo.objectives import noise_error
from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Prediction, Reverse
from nelbo.schedules import Linear

PAIR, POSTERIOR = "nelbo.bound.pair_term", "nelbo.processes.gaussian.Gaussian.posterior"
EPSILON = "nelbo.parameterizations.Epsilon.kernel"
LOG_PROB = "nelbo.distributions.DiagonalNormal.log_prob"
BETAS, NOISE = "nelbo.schedules.Stepped.betas", "nelbo.objectives.noise_error"
STEPS = 12
PLANE = normal([0.5, -0.3], [[0.7, 0.2], [0.2, 0.4]])
AROUND = (("noise", "velocity"), ("velocity", "data"), ("data", "noise"))
"""Each network once on every side of a line."""
SPOILED = (0.9, 0.1)
"""x̂_0 = .9 E[x_0|x_t] + .1: a network that is not the best one."""


class Chain:
    """A DDPM in 12 steps on two dimensions: one denoiser in three forms, at exact points."""

    def __init__(self) -> None:
        self.schedule = Linear(STEPS)
        self.times = self.schedule.grid()
        self.betas = self.schedule.betas()
        self.points = quadratic_points(PLANE)
        noise, x_0, speed = in_three_ways(PLANE, self.schedule, *SPOILED)
        self.models = {"noise": noise, "data": x_0, "velocity": speed}

    def at(self, name: str) -> tuple[Prediction, Tensor, Tensor]:
        """Predictions at every point and time but the first, x_0, and the place of the time."""
        at, x_0, index = called(self.models[name], self.points, self.times)
        rows = (index > 0).nonzero()[:, 0]
        return at[rows], x_0[rows], index[rows]


def chain() -> Chain:
    """A new one: nothing is kept between lines."""
    return Chain()


def _gaussian(model: Reverse) -> Gaussian:
    assert isinstance(model.process, Gaussian)
    return model.process


def _noise(at: Prediction, x_0: Tensor) -> Tensor:
    """ε in x_t = √k x_0 + √l ε."""
    q = at.model.process.schedule
    keep, lose = (along(v, x_0) for v in (q.keep(at.t), q.lose(at.t)))
    return (at.x_t - keep.sqrt() * x_0) / lose.sqrt()


class NoiseForm(Identity):
    id = "I22"
    name = "noise-form"
    title = "The posterior mean and the model's mean differ in the noise only"
    latex = (
        r"\tilde\mu=Ax_t+B\varepsilon,\quad\mu_\theta=Ax_t+B\hat\varepsilon,\quad "
        r"A=\tfrac1{\sqrt{\alpha}},\ B=-\tfrac{\beta}{\sqrt{\alpha(1-\bar\alpha_t)}},\qquad "
        r"\tilde\mu-\mu_\theta=B(\varepsilon-\hat\varepsilon)"
    )
    text = "posterior mean = A x_t + B eps, model mean = A x_t + B eps_hat, A = 1/√alpha"
    assumes = "Gaussian process; the network predicts noise"
    steps = (
        "The posterior mean is √k_s c x_0 + √alpha (l_s/l_t) x_t.",
        "Put x_0 = (x_t - √l_t eps)/√k_t into it.",
        "The factors of x_t add up to 1/√alpha; that of eps is -beta/√(alpha l_t).",
        "The model's mean is the same function of eps_hat, so that A x_t drops out of the "
        "difference.",
    )
    functions = (POSTERIOR, EPSILON, BETAS)
    source = "Ho, Jain, Abbeel 2020, eq. 7, 11"

    def lines(self, seed: int) -> list[Line]:
        c = chain()
        at, x_0, index = c.at("noise")
        s, beta = c.times[index - 1], c.betas[index]
        a = along((1 - beta).rsqrt(), x_0)
        b = along(-beta / ((1 - beta) * c.schedule.lose(at.t)).sqrt(), x_0)
        mean = _gaussian(at.model).posterior(at.x_t, x_0, at.t, s).mean
        mine, noise = at.kernel(s).mean, _noise(at, x_0)
        return [
            compared(
                "Gaussian",
                ("mean of q(x_s|x_t,x_0)", mean, POSTERIOR),
                ("A x_t + B eps, from the betas", a * at.x_t + b * noise, BETAS),
                unit="data",
            ),
            compared(
                "Gaussian",
                ("mean of p(x_s|x_t)", mine, EPSILON),
                ("A x_t + B eps_hat, from the betas", a * at.x_t + b * at.output, BETAS),
                unit="data",
            ),
        ]


class SquaredErrors(Identity):
    id = "I23"
    name = "squared-errors"
    title = "One divergence as a squared error of mean, data, noise and velocity"
    latex = (
        r"\frac{\|\tilde\mu-\mu_\theta\|^2}{2\tilde\beta}=\tfrac12(\mathrm{snr}_s-\mathrm{snr}_t)"
        r"\|x_0-\hat x_0\|^2=\tfrac12\mathrm{expm1}(\lambda_s-\lambda_t)\|\varepsilon-"
        r"\hat\varepsilon\|^2=\tfrac12(\mathrm{snr}_s-\mathrm{snr}_t)\,l_t\|v-\hat v\|^2"
    )
    text = (
        "‖mu~-mu‖²/(2 beta~) = ½ (snr_s-snr_t) ‖x_0-x_0_hat‖² = ½ expm1(lambda_s-"
        "lambda_t) ‖eps-eps_hat‖² = ½ (snr_s-snr_t) l_t ‖v-v_hat‖²"
    )
    assumes = "Gaussian process, sigma² = beta~ (equal covariances on both sides)"
    steps = (
        "With equal covariances the divergence is the squared distance of the means over 2 beta~.",
        "The means differ by √k_s c (x_0 - x_0_hat), and k_s c²/beta~ = snr_s - snr_t.",
        "At one x_t, x_0 - x_0_hat = -√(l_t/k_t) (eps - eps_hat), which turns the factor into "
        "(snr_s - snr_t)/snr_t = exp(lambda_s - lambda_t) - 1.",
        "For v = √k eps - √l x_0 it is x_0 - x_0_hat = -√l_t (v - v_hat).",
        "In the betas the factor of ‖eps-eps_hat‖² is beta_t/(2 alpha_t (1 - keep_{t-1})).",
        "The mean log-ratio of the two laws of x_s, over x_s from the posterior, is minus that.",
    )
    functions = (PAIR, POSTERIOR, NOISE, BETAS, LOG_PROB)
    source = "Ho, Jain, Abbeel 2020, eq. 12; Kingma et al. 2021, eq. 14; Salimans, Ho 2022"

    def lines(self, seed: int) -> list[Line]:
        c = chain()
        at, x_0, index = c.at("noise")
        s, q = c.times[index - 1], c.schedule
        posterior = at.model.process.posterior(at.x_t, x_0, at.t, s)
        means = per_example((posterior.mean - at.kernel(s).mean) ** 2 / posterior.variance) / 2
        keep, lose = (along(v.sqrt(), x_0) for v in (q.keep(at.t), q.lose(at.t)))
        moved = keep * _noise(at, x_0) - lose * x_0 - c.at("velocity")[0].output
        dropped = q.logsnr(s).exp() - q.logsnr(at.t).exp()
        data = 0.5 * dropped * per_example((x_0 - c.at("data")[0].output) ** 2)
        beta = c.betas[index]
        weight = beta / (2 * (1 - beta) * q.lose(s))
        return [
            compared(
                "Gaussian",
                ("KL, network of noise", pair_term(at, x_0, s), PAIR),
                ("‖mu~-mu‖²/(2 beta~)", means, POSTERIOR),
                ("½ (snr_s-snr_t) ‖x_0-x_0_hat‖²", data, "the network of data"),
                ("beta_t ‖eps-eps_hat‖²/(2 alpha_t l_s)", weight * noise_error(at, x_0), NOISE),
                (
                    "½ (snr_s-snr_t) l_t ‖v-v_hat‖²",
                    0.5 * dropped * q.lose(at.t) * per_example(moved**2),
                    "the network of velocity",
                ),
                tolerance=1e-9,
            ),
            *[self._log_ratios(*names) for names in AROUND],
        ]

    @staticmethod
    def _log_ratios(name: str, other: str) -> Line:
        c = chain()
        at, x_0, index = c.at(name)
        s = c.times[index - 1]
        return compared(
            "Gaussian",
            (f"KL, network of {name}", pair_term(at, x_0, s), PAIR),
            (
                f"-E log p/q of x_s, network of {other}",
                -_log_ratio(c.at(other)[0], x_0, s),
                LOG_PROB,
            ),
            tolerance=1e-9,
        )


def _log_ratio(at: Prediction, x_0: Tensor, s: Tensor) -> Tensor:
    """E over x_s ~ q(x_s|x_t,x_0), by two points, exact for squares in each dimension."""
    posterior, kernel = at.model.process.posterior(at.x_t, x_0, at.t, s), at.kernel(s)
    total = torch.zeros(len(x_0), dtype=torch.float64)
    for sign in (-1.0, 1.0):
        x_s = posterior.mean + sign * posterior.variance.sqrt()
        total += 0.5 * per_example(kernel.log_prob(x_s) - posterior.log_prob(x_s))
    return total


IDENTITIES: tuple[Identity, ...] = (NoiseForm(), SquaredErrors())
ERRATA: tuple[Erratum, ...] = ()
