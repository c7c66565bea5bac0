r"""Where the divergence of two normal laws in one dimension is least.

    ∂KL/∂μ_P = (μ_P − μ_Q)/σ_Q² = −∂KL/∂μ_Q,      arg min over σ_Q² = σ_P² + (μ_P − μ_Q)².

A squared error of the means is least where KL is, for held variances and one target at a time; in
the variance, and for a parameter that several steps share, it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nelbo.derivation.denoisers import compared
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.distributions import DiagonalNormal, kl_divergence

KL = "nelbo.distributions.kl_divergence"
P_MEAN, P_LOGVAR = 0.6, math.log(0.5)
Q_MEAN, Q_LOGVAR = -0.5, math.log(0.9)


def vector(values: list[float]) -> Tensor:
    """(n,) float64."""
    return torch.tensor(values, dtype=torch.float64)


def scalar_kl(theta: Tensor) -> Tensor:
    """KL of two normal laws in one dimension; theta = (mean, log variance) of P, then of Q."""
    return kl_divergence(DiagonalNormal(theta[0], theta[1]), DiagonalNormal(theta[2], theta[3]))


def newton(f: Callable[[Tensor], Tensor], start: float, steps: int = 1) -> float:
    """Where f is least, by Newton's method; one step does for a quadratic function."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(f(x), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope, x)
        x = (x - slope / bend).detach().requires_grad_()
    return float(x.detach())


def best_logvar() -> float:
    """log σ_Q² where KL(P‖Q) is least."""
    known = vector([P_MEAN, P_LOGVAR, Q_MEAN])
    return newton(lambda v: scalar_kl(torch.stack([*known, v])), 0.0, steps=12)


def shared_mean(weighted: bool) -> float:
    """One mean for targets 0 and 1 of variances .01 and 1, of the least sum of KL or squares."""
    targets, logvar = vector([0.0, 1.0]), vector([0.01, 1.0]).log()

    def total(m: Tensor) -> Tensor:
        if not weighted:
            return ((m - targets) ** 2).sum()
        laws = DiagonalNormal(targets, logvar), DiagonalNormal(m.expand(2), logvar)
        return kl_divergence(*laws).sum()

    return newton(total, 0.3)


class Stationarity(Identity):
    id = "I21"
    name = "stationarity"
    title = "A squared error may replace the divergence in the means, and only there"
    latex = (
        r"\frac{\partial\,\mathrm{KL}}{\partial\mu_P}=\frac{\mu_P-\mu_Q}{\sigma_Q^2}="
        r"-\frac{\partial\,\mathrm{KL}}{\partial\mu_Q},\qquad "
        r"\arg\min_{\sigma_Q^2}\mathrm{KL}=\sigma_P^2+(\mu_P-\mu_Q)^2"
    )
    text = "dKL/dmu_P = (mu_P-mu_Q)/v_Q = -dKL/dmu_Q; the best v_Q is v_P + (mu_P-mu_Q)²"
    assumes = "P and Q normal in one dimension"
    steps = (
        "KL(P‖Q) = ½ [v_P/v_Q - 1 - log(v_P/v_Q) + (mu_P-mu_Q)²/v_Q].",
        "With the variances held, all but the last part is constant: KL = (mu_P-mu_Q)²/(2 v_Q) "
        "+ const, so that KL and the squared error are least at the same mean.",
        "In v_Q, d/dv_Q = ½ [1/v_Q - (v_P + (mu_P-mu_Q)²)/v_Q²] is 0 at "
        "v_Q = v_P + (mu_P-mu_Q)²: a squared error says nothing of this.",
        "Summed over steps that share one parameter, the factors 1/(2 v_Q) are weights: targets "
        "0 and 1 with v = .01 and 1 have their best common value at .0099, not at .5.",
    )
    functions = (KL,)
    source = "common lecture notes"

    def lines(self, seed: int) -> list[Line]:
        theta = vector([P_MEAN, P_LOGVAR, Q_MEAN, Q_LOGVAR]).requires_grad_()
        (slopes,) = torch.autograd.grad(scalar_kl(theta), theta)
        slope = (P_MEAN - Q_MEAN) / math.exp(Q_LOGVAR)
        best = math.exp(P_LOGVAR) + (P_MEAN - Q_MEAN) ** 2
        weight = vector([1 / 0.01, 1.0])
        return [
            compared(
                "Gaussian",
                ("dKL/dmu_P and dKL/dmu_Q", slopes[[0, 2]], KL),
                ("+-(mu_P-mu_Q)/v_Q", vector([slope, -slope]), "the parameters"),
                unit="nats per unit",
            ),
            compared(
                "Gaussian",
                ("v_Q of the least KL", math.exp(best_logvar()), KL),
                ("v_P + (mu_P-mu_Q)²", best, "the parameters"),
                unit="variance",
            ),
            compared(
                "Gaussian",
                ("shared mean of the least sum of KL", shared_mean(weighted=True), KL),
                ("mean of targets weighted by 1/v", weight[1] / weight.sum(), "the parameters"),
                unit="mean",
            ),
        ]


IDENTITIES: tuple[Identity, ...] = (Stationarity(),)
ERRATA: tuple[Erratum, ...] = ()
