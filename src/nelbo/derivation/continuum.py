r"""Continuous time: the bound as an integral over log-SNR, and the entropy as one of errors.

    L_∞(x_0) = prior + decoder + ½ ∫ E‖ε − ε̂‖² dλ                      between two log-SNRs,
    −log q(x_0) = (d/2) log 2πe − ½ ∫ [d k − E‖ε − E[ε|x_t]‖²] dλ      over all of them.

Both hold for every single x_0 once ε̂ is E[ε|x_t]. The integrals are taken by Gauss-Legendre and
Gauss-Hermite rules, the densities are those of a mixture of two normals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo.continuous import Continuous
from nelbo.derivation.denoisers import (
    Exact,
    called,
    compared,
    legendre,
    mmse,
    model_of,
    noise_points,
    two_modes,
)
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.objectives import noise_error
from nelbo.schedules import LogSNRLinear

LOG_PROB = "nelbo.data.mixture.GaussianMixture.log_prob"
PLACES = torch.tensor([[-1.7], [-0.8], [0.1], [1.2]], dtype=torch.float64)
"""The x_0 at which a density is compared."""
PIECES, NODES = 8, 16
DECODED, ERASED = 14.0, -13.0
"""Log-SNRs between which the bound is taken: what is left beyond them is below 1e-10 nats."""
REACH = 26.0
"""Of the integral over all log-SNRs: what is left is below 1e-11 nats."""


def _pieces(low: float, high: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of an integral from low to high, piece by piece."""
    edges = torch.linspace(low, high, PIECES + 1).tolist()
    parts = [legendre(a, b, NODES) for a, b in zip(edges, edges[1:], strict=False)]
    x, w = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, w


class ContinuousTime(Identity):
    id = "I35"
    name = "continuous-time"
    title = "With infinitely many latents the exact model reaches the density itself"
    latex = (
        r"-\log q(x_0)=\mathrm{KL}(q(x_N|x_0)\|\pi)+\mathbb E[-\log p(x_0|x_1)]+\tfrac12"
        r"\int_{\lambda_N}^{\lambda_1}\mathbb E\|\varepsilon-\hat\varepsilon\|^2\,d\lambda"
    )
    text = "-log q(x_0) = prior KL + decoder + ½ integral of E‖eps-eps_hat‖² over lambda"
    assumes = "Gaussian process; denoiser, decoder and prior exact"
    steps = (
        "Each pair costs ½ (exp(lambda_s-lambda_t) - 1) E‖eps-eps_hat‖², which is "
        "½ E‖eps-eps_hat‖² d lambda for close times.",
        "Their sum tends to an integral over lambda. Time has dropped out: only the two ends of "
        "the schedule matter.",
        "sigma² = beta~ and the exact variance differ less and less for close times, so that the "
        "exact denoiser makes the exact reverse process and the bound has no gap.",
        "The objective draws t uniformly and weighs the error by ½ (-lambda'(t)).",
    )
    functions = ("nelbo.continuous.Continuous", LOG_PROB)
    source = "Kingma et al. 2021, eq. 17, 18"

    def lines(self, seed: int) -> list[Line]:
        data = two_modes()
        return [
            compared(
                "Gaussian",
                ("prior + decoder + ½ integral", _in_continuous_time(), self.functions[0]),
                ("-log q(x_0)", -data.log_prob(PLACES), LOG_PROB),
                tolerance=1e-7,
                note="mixture of two normals",
            )
        ]


def _in_continuous_time() -> Tensor:
    """(4,) E of the objective over its index, its time and the noise, at each of PLACES."""
    schedule = LogSNRLinear(DECODED, ERASED)
    model = model_of(two_modes(), schedule, Exact())
    objective = Continuous(torch.tensor([0.0, 1.0], dtype=torch.float64))
    p, points = objective.probabilities, noise_points(PLACES)
    fraction, width = _pieces(0.0, 1.0)
    times = torch.cat([torch.zeros_like(fraction[:1]), fraction])
    index = torch.ones(len(times), dtype=torch.int64)
    index[0] = 0
    at, x_0, place = called(model, points, times)
    loss = objective.loss(at, x_0, index[place], p[index[place]])
    share = torch.cat([p[:1], p[1] * width])
    return _over_noise(loss) @ share


def _over_noise(values: Tensor) -> Tensor:
    """(4, N) means over the noise points beside each of PLACES of values in their order."""
    points = noise_points(PLACES)
    table = points.weight[:, None] * values.view(len(points.weight), -1)
    return table.view(len(PLACES), -1, table.shape[1]).sum(1)


class IMMSE(Identity):
    id = "I36"
    name = "i-mmse"
    title = "Minus log density is an integral of denoising errors"
    latex = (
        r"-\log q(x_0)=\tfrac d2\log2\pi e-\tfrac12\int_{-\infty}^{\infty}\big[d\,k-\mathbb E_"
        r"\varepsilon\|\varepsilon-\hat\varepsilon^*\|^2\big]\,d\lambda"
    )
    text = "-log q(x_0) = d/2 log 2 pi e - ½ integral [d k - E‖eps-E[eps|x_t]‖²] d lambda"
    assumes = "Gaussian process, exact denoiser; for every x_0, and hence on average"
    steps = (
        "Let the two ends of the bound in continuous time go to infinity.",
        "The integrand tends to d at large lambda, so that the integral and the decoder term "
        "diverge together.",
        "Subtract the same formula for a standard normal law, whose error is d k with "
        "k = keep(lambda) on average: what remains converges.",
        "On average over x_0 the left side is the differential entropy of the data.",
    )
    functions = (
        "nelbo.objectives.noise_error",
        LOG_PROB,
        "nelbo.data.mixture.GaussianMixture.spread",
        "nelbo.data.mixture.GaussianMixture.entropy",
    )
    source = "Guo, Shamai, Verdu 2005; Kong, Brekelmans, Ver Steeg 2023, eq. 9"

    def lines(self, seed: int) -> list[Line]:
        data, schedule = two_modes(), LogSNRLinear(REACH, -REACH)
        logsnr, width = _pieces(-REACH, REACH)
        keep = logsnr.sigmoid()
        times = (REACH - logsnr) / (2 * REACH)
        at, x_0, _ = called(model_of(data, schedule), noise_points(PLACES), times)
        error = _over_noise(noise_error(at, x_0))
        half = 0.5 * math.log(2 * math.pi * math.e)
        pointwise = half - 0.5 * (keep - error) @ width
        overall = half - 0.5 * (keep - logsnr.exp() * mmse(data, logsnr)) @ width
        entropy = data.entropy()[0]
        return [
            compared(
                "Gaussian",
                ("½ log 2 pi e - ½ integral", pointwise, self.functions[0]),
                ("-log q(x_0)", -data.log_prob(PLACES), LOG_PROB),
                tolerance=1e-6,
                note="mixture of two normals",
            ),
            compared(
                "Gaussian",
                ("½ log 2 pi e - ½ integral, averaged", overall, self.functions[2]),
                ("H(q)", entropy, self.functions[3]),
                tolerance=1e-6,
            ),
        ]


IDENTITIES: tuple[Identity, ...] = (ContinuousTime(), IMMSE())
ERRATA: tuple[Erratum, ...] = ()
