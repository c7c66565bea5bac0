r"""Divergences of two normal laws: the quadratic forms and both closed forms.

    KL(N(m_1, Σ) ‖ N(m_2, Σ))       = ½ (m_1−m_2)ᵀ Σ⁻¹ (m_1−m_2)
    KL(N(m_1, v_1 I) ‖ N(m_2, v_2 I)) = ½ [d (ρ − 1 − log ρ) + ‖m_1−m_2‖²/v_2],   ρ = v_1/v_2.

The terms of the bound are such divergences, because each step of the chain is normal on both
sides. Expectations are taken over points that are exact for quadratic functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo.derivation.denoisers import compared, normal, sphere
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.distributions import DiagonalNormal, kl_divergence, per_example
from nelbo.quadrature import kl
from nelbo.randomness import seeded

KL, LOG_PROB = "nelbo.distributions.kl_divergence", "nelbo.distributions.DiagonalNormal.log_prob"
MIXTURE = "nelbo.data.mixture.GaussianMixture.log_prob"
COVARIANCE = [[0.8, 0.3, 0.0], [0.3, 0.6, -0.2], [0.0, -0.2, 1.1]]
ONE, OTHER = [0.4, -1.0, 0.2], [0.1, 0.3, -0.5]
FLAT = 0.7
"""A variance that two isotropic laws share."""
DRAWS = 100_000


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _isotropic(mean: list[float], variance: float) -> DiagonalNormal:
    value = torch.tensor(math.log(variance), dtype=torch.float64)
    return DiagonalNormal(_vector(mean)[None], value)


def _points(covariance: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Points of N(ONE, covariance), exact for quadratic functions, and their weights."""
    z, weight = sphere(len(ONE))
    return _vector(ONE) + z @ torch.linalg.cholesky(_matrix(covariance)).T, weight


def _form(mean: list[float], x: Tensor) -> Tensor:
    """(x − m)ᵀ Σ⁻¹ (x − m) of rows x, as the log density has it: twice what it falls from m."""
    law = normal(mean, COVARIANCE)
    return 2 * (law.log_prob(_vector(mean)[None]) - law.log_prob(x))


def _solved() -> float:
    """δᵀ Σ⁻¹ δ by solving a linear system."""
    delta = _vector(ONE) - _vector(OTHER)
    return float(delta @ torch.linalg.solve(_matrix(COVARIANCE), delta))


class QuadraticForm(Identity):
    id = "I18"
    name = "quadratic-form"
    title = "The expected quadratic form of a normal law is its dimension"
    latex = (
        r"\mathbb E_{\mathcal N(m,\Sigma)}(x-m)^\top\Sigma^{-1}(x-m)=d,\qquad "
        r"\mathbb E\,(x-m_2)^\top\Sigma^{-1}(x-m_2)=d+(m-m_2)^\top\Sigma^{-1}(m-m_2)"
    )
    text = "E (x-m)' S^-1 (x-m) = d;  E (x-m2)' S^-1 (x-m2) = d + (m-m2)' S^-1 (m-m2)"
    assumes = "x ~ N(m, S) with S positive definite"
    steps = (
        "A number is its own trace: (x-m)' S^-1 (x-m) = tr[S^-1 (x-m)(x-m)'].",
        "The expectation of (x-m)(x-m)' is S, so that the first form is tr[S^-1 S] = d.",
        "About another centre write x - m2 = r + delta with r = x - m and delta = m - m2.",
        "The square has three parts: r' S^-1 r, whose mean is d; delta' S^-1 delta; and "
        "2 delta' S^-1 r, whose mean is 0 because E r = 0.",
    )
    functions = (MIXTURE, LOG_PROB, "nelbo.distributions.DiagonalNormal.rsample")
    source = "common lecture notes"

    def lines(self, seed: int) -> list[Line]:
        x, weight = _points(COVARIANCE)
        own, other = (float(weight @ _form(m, x)) for m in (ONE, OTHER))
        return [
            compared(
                "Gaussian", ("E (x-m)' S^-1 (x-m)", own, MIXTURE), ("d", 3.0, "the dimension")
            ),
            compared(
                "Gaussian",
                ("E (x-m2)' S^-1 (x-m2)", other, MIXTURE),
                ("d + delta' S^-1 delta", 3 + _solved(), "torch.linalg.solve"),
            ),
            self._drawn(seed),
        ]

    @staticmethod
    def _drawn(seed: int) -> Line:
        law, other = _isotropic(ONE, FLAT), _isotropic(OTHER, FLAT)
        with seeded(seed, "quadratic form"):
            x = law.rsample(torch.Size([DRAWS]))[:, 0]
        fallen = 2 * per_example(other.log_prob(other.mean) - other.log_prob(x))
        mean, se = mean_se(fallen)
        right = 3 + 2 * float(per_example(kl_divergence(law, other)))
        drawn = Side("E ‖x-m2‖²/v, drawn", mean, se, "nelbo.distributions.DiagonalNormal.rsample")
        note = f"{DRAWS} draws"
        return Line("Gaussian", (drawn, Side("d + 2 KL", right, by=KL)), note=note)


class EqualCovariances(Identity):
    id = "I19"
    name = "equal-covariances"
    title = "With equal covariances the divergence is a squared distance of the means"
    latex = (
        r"\mathrm{KL}(\mathcal N(m_1,\Sigma)\,\|\,\mathcal N(m_2,\Sigma))="
        r"\tfrac12(m_1-m_2)^\top\Sigma^{-1}(m_1-m_2)=+\tfrac12\,\mathbb E_{m_1}[B-A]"
    )
    text = "KL = ½ (m1-m2)' S^-1 (m1-m2) = + ½ E_m1[B - A], A and B the two quadratic forms"
    assumes = "both laws have the covariance S"
    steps = (
        "KL is the mean of log N(x; m1, S) - log N(x; m2, S) over x ~ N(m1, S).",
        "The normalising constants are equal and cancel. What is left is -A/2 + B/2, with "
        "A = (x-m1)' S^-1 (x-m1) and B = (x-m2)' S^-1 (x-m2): note the sign.",
        "By the rule before, E A = d and E B = d + delta' S^-1 delta; d cancels.",
    )
    functions = (KL, MIXTURE, "nelbo.quadrature.kl")
    source = "Ho, Jain, Abbeel 2020, eq. 8; common lecture notes"

    def lines(self, seed: int) -> list[Line]:
        x, weight = _points(COVARIANCE)
        a, b = (weight @ _form(m, x) for m in (ONE, OTHER))
        laws = [_isotropic(m, FLAT) for m in (ONE, OTHER)]
        squares = float(((_vector(ONE) - _vector(OTHER)) ** 2).sum())
        flat, other = (normal(m[:1], [[FLAT]]) for m in (ONE, OTHER))
        first = float(kl_divergence(*laws)[0, 0])
        return [
            compared(
                "Gaussian",
                ("½ E[B - A], S full", 0.5 * float(b - a), MIXTURE),
                ("½ delta' S^-1 delta", 0.5 * _solved(), "torch.linalg.solve"),
            ),
            compared(
                "Gaussian",
                ("KL, S = v I", per_example(kl_divergence(*laws)), KL),
                ("‖m1-m2‖²/(2v)", squares / (2 * FLAT), "the means"),
            ),
            compared(
                "Gaussian",
                ("KL of one dimension", first, KL),
                ("E log p1/p2 over a lattice", kl(flat, other).value, "nelbo.quadrature.kl"),
                tolerance=1e-8,
            ),
        ]


class IsotropicKL(Identity):
    id = "I20"
    name = "isotropic-kl"
    title = "Unequal variances: the variance part counts once for every dimension"
    latex = (
        r"\mathrm{KL}(\mathcal N(m_1,v_1I)\|\mathcal N(m_2,v_2I))=\tfrac12\Big[d\big(\rho-1-"
        r"\log\rho\big)+\tfrac{\|m_1-m_2\|^2}{v_2}\Big],\quad\rho=v_1/v_2"
    )
    text = "KL = ½ [d (rho - 1 - log rho) + ‖m1-m2‖²/v2], rho = v1/v2"
    assumes = "two normal laws with covariances v1 I and v2 I"
    steps = (
        "The general formula is ½ [tr(S2^-1 S1) - d + log det S2 - log det S1 + "
        "(m1-m2)' S2^-1 (m1-m2)].",
        "With S1 = v1 I and S2 = v2 I the trace is d rho, the log determinants give -d log rho.",
        "All of it but the squared distance has the factor d.",
    )
    functions = (KL, "nelbo.quadrature.kl")
    source = "Ho, Jain, Abbeel 2020, section 3.2; common lecture notes"

    def lines(self, seed: int) -> list[Line]:
        variances = [(0.3, 0.8), (0.8, 0.3), (1.0, 1.0 + 1e-4)]
        closed, full = [], []
        for one, other in variances:
            laws = _isotropic(ONE, one), _isotropic(OTHER, other)
            closed.append(float(per_example(kl_divergence(*laws))))
            full.append(_full(one, other))
        scalar = [_isotropic(m[:1], v) for m, v in ((ONE, 0.3), (OTHER, 0.8))]
        summed = kl(normal(ONE[:1], [[0.3]]), normal(OTHER[:1], [[0.8]])).value
        return [
            compared(
                "Gaussian",
                ("½ [d (rho - 1 - log rho) + ‖m1-m2‖²/v2]", _vector(closed), KL),
                ("with trace and log det of matrices", _vector(full), "torch.linalg"),
                tolerance=1e-9,
            ),
            compared(
                "Gaussian",
                ("the same in one dimension", kl_divergence(*scalar), KL),
                ("E log p1/p2 over a lattice", summed, "nelbo.quadrature.kl"),
                tolerance=1e-8,
            ),
        ]


def _full(one: float, other: float) -> float:
    """The divergence of N(ONE, one I) from N(OTHER, other I) by matrices."""
    eye, delta = torch.eye(len(ONE), dtype=torch.float64), _vector(ONE) - _vector(OTHER)
    inside = torch.linalg.solve(other * eye, one * eye).trace() - len(ONE)
    log_det = torch.logdet(other * eye) - torch.logdet(one * eye)
    return float(0.5 * (inside + log_det + delta @ torch.linalg.solve(other * eye, delta)))


IDENTITIES: tuple[Identity, ...] = (QuadraticForm(), EqualCovariances(), IsotropicKL())
ERRATA: tuple[Erratum, ...] = ()
