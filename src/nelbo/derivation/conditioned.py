r"""A model times a factor r(x): the weight of a path that makes the product right.

Target p̃(x_0) ∝ p_θ(x_0) r(x_0). Each kernel is multiplied by r(x_s, s) and divided by
Z(x_t) = ∫ p_θ(x_s|x_t) r(x_s, s) dx_s. A path then has the weight W = Π Z(x_t)/r(x_t, t), with
r(·, t_N) := 1: E W = ∫ p_θ r, and W-weighted x_0 follow p̃, for any positive r(·, t). If r(x, t)
is E[r(X_0)|X_t = x] under the model, then Z = r and nothing is left to weigh.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo.conditioning import Conditioned, posterior_samples
from nelbo.decoders import Constant, Density
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.models import (
    BERNOULLI,
    GAUSSIAN,
    MEAN,
    RATES,
    VARIANCE,
    LinePosterior,
    bits,
    exact_bits,
)
from nelbo.derivation.multiplied import MOMENTS, NOISE, SEEN, SEEN_BITS
from nelbo.derivation.places import Said, equal, single
from nelbo.derivation.settings import Enumerated
from nelbo.distributions import per_example
from nelbo.factors import Factor, Noisy
from nelbo.parameterizations import X0
from nelbo.processes.base import Process
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import Harmonic
from nelbo.variances import Optimal

LOG_R = "nelbo.factors.Factor.log_r"
LOG_Z, SAMPLES = "nelbo.conditioning.Conditioned.log_z", "nelbo.conditioning.posterior_samples"


def path_weights(setting: Enumerated, factor: Factor) -> tuple[Tensor, Tensor]:
    """Masses and weights W of every path x_N, …, x_1, x_0 of the conditioned chain, by x_0 (n, K).

    Arguments:
        factor: bound to the process.
    """
    rows, times = setting.trajectories(), setting.times
    model, x = Conditioned(setting.model, factor), rows.latents
    top = len(times) - 1
    log_mass = per_example(model.process.prior(x[:, top]).log_prob(x[:, top]))
    log_w = torch.zeros_like(log_mass)
    for i in range(top, -1, -1):
        s, x_s = (times[i - 1], x[:, i - 1]) if i else (None, rows.x_0)
        law, log_z = model.at(x[:, i], times[i]).multiplied(s)
        log_mass = log_mass + per_example(law.log_prob(x_s))
        log_w = log_w + log_z - (factor.log_r(x[:, i], times[i]) if i < top else 0.0)
    return log_mass.exp().view(rows.groups, -1), log_w.exp().view(rows.groups, -1)


def bit_factors(process: Process) -> dict[str, Factor]:
    """The same r(x_0), widened in two ways."""
    rates = (torch.tensor(RATES, dtype=torch.float64), torch.ones(2).double())
    plain, told = Noisy(SEEN_BITS, NOISE), Noisy(SEEN_BITS, NOISE, None, rates)
    return {"widened flatly": plain.bind(process), "widened by rates": told.bind(process)}


def erased(steps: int = 12) -> tuple[Reverse, Tensor]:
    """The exact model of N(.5, .49) on a chain that erases everything, and its times."""
    schedule = Harmonic(steps)
    times = schedule.grid()
    error = 1 / (1 / VARIANCE + schedule.logsnr(times).exp())
    decoder = Density(Constant(float(error[0].log())))
    parts = (LinePosterior(schedule, MEAN, VARIANCE), X0(Optimal(times, error)), decoder)
    return Reverse(Gaussian(schedule), *parts), times


def evidence() -> float:
    """N(1.5; .5, .49 + .25)."""
    spread = VARIANCE + NOISE**2
    return math.exp(-((1.5 - MEAN) ** 2) / (2 * spread)) / math.sqrt(2 * math.pi * spread)


class PathWeight(Identity):
    id = "I54"
    name = "path-weight"
    title = "Weighted paths of the conditioned chain follow the conditioned model exactly"
    latex = (
        r"W = \prod_{\text{steps}}\frac{Z(x_t)}{r(x_t,t)},\quad "
        r"\mathbb E\,W = \int p_\theta\, r,\quad \mathbb E[W\,1_{x_0}] = p_\theta(x_0)\,r(x_0)"
    )
    text = (
        "W = product over steps of Z(x_t)/r(x_t, t): E W = integral of p r; E[W; x_0] = p r(x_0)"
    )
    assumes = "any positive r(., t), with r(., t_N) := 1; without W the chain is approximate"
    steps = (
        "A path has mass p(x_N) Π p_θ(x_s|x_t) r(x_s, s)/Z(x_t).",
        "Times W every Z cancels, and every r(x_s, s) but that of the data.",
        "What is left is p_θ(x_{0:N}) r(x_0): sum over the latents, then over x_0.",
    )
    functions = ("nelbo.conditioning.Conditioned", LOG_R, SAMPLES)
    source = "Doucet, de Freitas and Gordon 2001; Wu et al. 2023"

    def lines(self, seed: int) -> list[Line]:
        setting = bits()
        found = []
        for name, factor in bit_factors(setting.model.process).items():
            mass, w = path_weights(setting, factor)
            target = setting.log_likelihood() + factor.log_r(setting.x_0, None)
            found.append(
                equal(
                    BERNOULLI,
                    Said(f"E[W; x_0] over every path, r {name}", "nelbo.conditioning.Conditioned"),
                    Said("p(x_0) r(x_0), p kernel by kernel", LOG_R),
                    (mass * w).sum(1),
                    target.exp(),
                    of="patterns x_0",
                    unit="",
                )
            )
        return [*found, *self._sampled(seed)]

    @staticmethod
    def _sampled(seed: int) -> list[Line]:
        model, times = erased()
        wide = (torch.zeros(1).double(), torch.ones(1).double())
        factor = Noisy(SEEN, NOISE, None, wide)
        done = posterior_samples(
            model, factor, times, 300, populations=60, seed=seed, batch=20_000
        )
        mean, error = done.pooled(done.x_0[..., 0].double())
        posterior = (MEAN / VARIANCE + 1.5 / NOISE**2) / (1 / VARIANCE + 1 / NOISE**2)
        note = "100 populations of 200 particles, resampled"
        return [
            Line(
                GAUSSIAN,
                (
                    Side("mean of W", *mean_se(done.log_evidence.exp()), SAMPLES),
                    Side("N(y; mean, variance + t²)", evidence()),
                ),
                note=note,
                unit="",
            ),
            Line(
                GAUSSIAN,
                (
                    Side("weighted mean of x_0", float(mean), float(error), SAMPLES),
                    Side("the exact posterior mean", posterior),
                ),
                "=",
                1e-3,
                note=note,
                unit="",
            ),
        ]


class NoWeight(Identity):
    id = "I55"
    name = "no-weight"
    title = "With the right widening of the factor all weights are equal"
    latex = (
        r"r(x,t) = \mathbb E[r(X_0)\mid X_t=x]\ \Longrightarrow\ Z(x_t) = r(x_t,t),"
        r"\quad W\ \text{constant}"
    )
    text = "r(x, t) = E[r(X_0)|X_t = x] under the model: then Z(x_t) = r(x_t, t) and W is constant"
    assumes = "the conditional mean under the model's own kernels"
    steps = (
        "Z(x_t) = ∫ p_θ(x_s|x_t) E[r(X_0)|X_s = x_s] dx_s.",
        "That is E[r(X_0)|X_t = x_t] by the chain rule of conditional means: r(x_t, t) itself.",
        "Every factor Z/r of W is 1 but that of the first step, where r(·, t_N) := 1; there x_N "
        "knows nothing of the data, and Z is the evidence.",
    )
    functions = (LOG_Z, LOG_R, SAMPLES)
    source = "the h-transform of Doob 1957"

    def lines(self, seed: int) -> list[Line]:
        setting = exact_bits()
        right = bit_factors(setting.model.process)["widened by rates"]
        model, times = erased()
        factor = Noisy(SEEN, NOISE, None, MOMENTS)
        x = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
        done = posterior_samples(model, factor, times, 500, seed=seed)
        spread = done.log_weights + math.log(500) + done.log_evidence[:, None]
        return [
            self._pointwise(BERNOULLI, setting.model, right, setting.times, setting.x_0),
            self._pointwise(GAUSSIAN, model, factor.bind(model.process), times[:-1], x),
            equal(
                GAUSSIAN,
                Said("log W of a particle", SAMPLES),
                Said("log N(y; mean, variance + t²)"),
                spread,
                single(math.log(evidence())),
                of="particles, latents in float32",
                tolerance=1e-5,
            ),
        ]

    @staticmethod
    def _pointwise(family: str, model: Reverse, factor: Factor, times: Tensor, x: Tensor) -> Line:
        chain = Conditioned(model, factor)
        before = [None, *times[:-1]]
        log_z = [chain.log_z(x, t, s) for s, t in zip(before, times, strict=True)]
        log_r = [factor.log_r(x, t) for t in times]
        left, right = Said("log Z(x_t)", LOG_Z), Said("log r(x_t, t)", LOG_R)
        return equal(family, left, right, torch.stack(log_z), torch.stack(log_r), of="x_t and t")


IDENTITIES: tuple[Identity, ...] = (PathWeight(), NoWeight())
ERRATA: tuple[Erratum, ...] = ()
