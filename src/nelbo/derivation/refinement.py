r"""What finer grids do to the bound, and where they lead: for normal laws and for bits.

    inserting u between s and t (σ² = β̃):  ΔL = ½ d (snr_s − snr_u)(M_u − M_t),

M_t = E‖x_0 − x̂_0‖²/d; for bits the sum of divergences tends to

    ∫ β(t) E π(x) [ρ log(ρ/ρ̂) − ρ + ρ̂] dt,   β = −d log k/dt,   ρ = q(x̄|x_0)/q(x|x_0),

x̄ the flipped bit and ρ̂ the mean of ρ over the model's x_0. nelbo has no function of this integral,
which is a Gauss-Legendre sum here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo.bound import pair_term
from nelbo.curve import Curve
from nelbo.derivation.coin import by_time, coin, states
from nelbo.derivation.denoisers import (
    averaged,
    called,
    compared,
    legendre,
    mixture_points,
    mmse,
    model_of,
    two_modes,
)
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import LogSNRLinear
from nelbo.variances import Posterior

PAIR, VALUES = "nelbo.bound.pair_term", "nelbo.curve.Curve.values"
RICHARDSON = "nelbo.curve.Curve.richardson"
ENDS = (6.0, -6.0)
"""Log-SNRs between which grids are refined."""
VARIANCE = 0.49
"""Of the normal law whose grids are refined."""
SIZES = (3, 5, 9, 17, 65)
FINE, PAIRS = 4097, 2000
SLOPPY = 0.6
"""How far the bit's model is off."""


class Halving(Identity):
    id = "I37"
    name = "halving"
    title = "A finer grid costs less, and the gap to continuous time halves with the steps"
    latex = (
        r"\mathrm{KL}_{s,u}+\mathrm{KL}_{u,t}-\mathrm{KL}_{s,t}=\tfrac d2(\mathrm{snr}_s-"
        r"\mathrm{snr}_u)(M_u-M_t)\le0,\qquad 2L_{2N}-L_N\to L_\infty"
    )
    text = "cost(s,u) + cost(u,t) - cost(s,t) = d/2 (snr_s - snr_u)(M_u - M_t) <= 0"
    assumes = "Gaussian process, sigma² = beta~, an error M that grows with time"
    steps = (
        "A pair costs d/2 (snr_s - snr_t) M_t: the error at its later time.",
        "(snr_s - snr_u) M_u + (snr_u - snr_t) M_t - (snr_s - snr_t) M_t = "
        "(snr_s - snr_u)(M_u - M_t).",
        "A sum with the later value of a growing function lies above its integral, by a gap that "
        "falls like 1/N.",
        "Two grids therefore tell the limit: 2 L_2N - L_N, which is an estimate and no bound.",
    )
    functions = (PAIR, "nelbo.data.mixture.GaussianMixture.spread", VALUES, RICHARDSON)
    source = "Kingma et al. 2021, appendix F"

    def lines(self, seed: int) -> list[Line]:
        # between N(0, v) data and its exact denoiser, ∫ ½ v snr/(1 + v snr) dλ is a logarithm
        limit = 0.5 * math.log((1 + VARIANCE * math.exp(6)) / (1 + VARIANCE * math.exp(-6)))
        known = Side("L_inf of N(0, v)", limit, by="closed form")
        found = [(f"L_{n}", float(_pairs_of(n)), VALUES) for n in SIZES]
        falling = tuple(Side(what, value, by=by) for what, value, by in found)
        extrapolated = float(_curve(FINE).richardson(Posterior())[0])
        return [
            _inserted(),
            Line("Gaussian", (*falling, known), ">=", note="divergences of N latents"),
            compared(
                "Gaussian",
                (f"2 L_{FINE} - L_{(FINE + 1) // 2}", extrapolated, RICHARDSON),
                (known.what, limit, known.by),
                tolerance=1e-5,
                note="tolerance: its own error, O(1/N²)",
            ),
        ]


def _inserted() -> Line:
    data, schedule = two_modes(), LogSNRLinear(3.0, -2.0)
    s, u, t = times = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    points, model = mixture_points(data), model_of(data, schedule)
    costs = []
    for before, after in ((s, u), (u, t), (s, t)):
        at, x_0, _ = called(model, points, after[None])
        costs.append(averaged(pair_term(at, x_0, before), points)[0])
    logsnr = schedule.logsnr(times)
    snr, error = logsnr.exp(), mmse(data, logsnr)
    gain = 0.5 * (snr[0] - snr[1]) * (error[1] - error[2])
    return compared(
        "Gaussian",
        ("cost(s,u) + cost(u,t) - cost(s,t)", costs[0] + costs[1] - costs[2], PAIR),
        ("½ (snr_s - snr_u)(M_u - M_t)", gain, "nelbo.data.mixture.GaussianMixture.spread"),
        tolerance=1e-8,
        note="mixture of two normals",
    )


def _curve(count: int) -> Curve:
    """The error of the exact denoiser of N(0, v); prior and decoder terms are left out."""
    schedule = LogSNRLinear(*ENDS)
    times = schedule.grid(count)
    error = VARIANCE / (1 + VARIANCE * schedule.logsnr(times).exp())
    nothing = torch.zeros(1, dtype=torch.float64)
    return Curve(times, Gaussian(schedule), error[None], nothing, 0 * error[None], 1)


def _pairs_of(count: int) -> Tensor:
    return _curve(count).values(Posterior(), torch.arange(count))[0]


class BitsContinuous(Identity):
    id = "I38"
    name = "bits-continuous"
    title = "For bits, too, the bound has a limit: an integral over jumps"
    latex = (
        r"\sum_{\mathrm{pairs}}\mathbb E\,\mathrm{KL}\ \to\ \int\beta(t)\,\mathbb E\,\pi(x)\Big["
        r"\rho\log\frac{\rho}{\hat\rho}-\rho+\hat\rho\Big]dt"
    )
    text = "sum of E KL -> integral of beta(t) E pi(x) [rho log(rho/rho^) - rho + rho^] dt"
    assumes = "Bernoulli process, any model w, exact or not; a sum over bits if there are more"
    steps = (
        "In a short time dt a bit jumps to x from its other value with probability "
        "beta(t) pi(x) dt, where beta = -d log k/dt.",
        "Backwards, given x_0, it jumps from x with the rate beta pi(x) rho, "
        "rho = q(other|x_0)/q(x|x_0); under the model with rho^ in place of rho.",
        "The divergence of two jumps with rates a and b is a log(a/b) - a + b per time.",
        "The gap of N pairs falls like 1/N, so that 2 S_2N - S_N is right to 1/N².",
    )
    functions = (PAIR, "nelbo.binary.Context", "nelbo.processes.bernoulli.Bernoulli.marginal")
    source = "Campbell et al. 2022, A continuous time framework for discrete denoising models"

    def lines(self, seed: int) -> list[Line]:
        lines = []
        for name, off in (("a model that is off", SLOPPY), ("the exact model", 0.0)):
            model = coin(LogSNRLinear(*ENDS), off)
            coarse, fine = (_summed(model, n) for n in (PAIRS, 2 * PAIRS))
            lines.append(
                compared(
                    "Bernoulli",
                    (f"2 S_{2 * PAIRS} - S_{PAIRS}", 2 * fine - coarse, PAIR),
                    ("the integral", _jumps(model), self.functions[2]),
                    tolerance=1e-6,
                    note=f"{name}; tolerance: the grids' own error, O(1/N²)",
                )
            )
        return lines


def _summed(model: Reverse, pairs: int) -> float:
    """Σ E KL over a grid of so many pairs, all states enumerated."""
    times = torch.linspace(0, 1, pairs + 1, dtype=torch.float64)
    at, x_0, index, probability = states(model, times[1:])
    return float(by_time(pair_term(at, x_0, times[index]), probability).sum())


def _jumps(model: Reverse) -> float:
    """∫ β(t) E π(x) [ρ log(ρ/ρ̂) − ρ + ρ̂] dt."""
    times, width = legendre(0.0, 1.0, 64)
    at, x_0, _, probability = states(model, times)
    schedule = model.process.schedule
    assert isinstance(schedule, LogSNRLinear)
    one, zero = (_ratio(model, torch.full_like(x_0, bit), at.x_t, at.t) for bit in (1.0, 0.0))
    true = torch.where(x_0 > 0.5, one, zero)
    mine = at.x_0 * one + (1 - at.x_0) * zero
    lost = true * (true / mine).log() - true + mine
    stays = model.process.prior(at.x_t).log_prob(at.x_t).exp()
    rate = -schedule.lose(times) * schedule.slope(times)
    return float(by_time((stays * lost)[:, 0], probability) * rate @ width)


def _ratio(model: Reverse, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """ρ = q(x̄_t|x_0)/q(x_t|x_0)."""
    law = model.process.marginal(x_0, t)
    return (law.log_prob(1 - x_t) - law.log_prob(x_t)).exp()


IDENTITIES: tuple[Identity, ...] = (Halving(), BitsContinuous())
ERRATA: tuple[Erratum, ...] = ()
