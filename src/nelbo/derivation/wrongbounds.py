"""Bounds as they are printed in some places, beside what they should be.

Each is wrong as a number: on a small model it is not the bound, or bounds nothing.
"""

from __future__ import annotations

from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.models import BERNOULLI, GAUSSIAN, affine, bits, exact_bits
from nelbo.derivation.ratio import (
    BOUND,
    KERNEL,
    TRANSITION,
    entropy_and_divergence,
    trajectory_bound,
)
from nelbo.derivation.rows import log_weights, reverse_steps
from nelbo.derivation.stated import exact, line_of


class OneExample(Erratum):
    id = "E3"
    identity = "I4"
    printed = "L(x_0) ≥ H(q, p_θ): the bound of one example as the loss"
    right = "E_q(x_0) L(x_0) ≥ H(q, p_θ)"
    why = "the outer mean over data is lost; one easy example lies below the cross-entropy"

    def line(self, seed: int) -> Line:
        setting = exact_bits()
        cross = Side("H(q, p_θ)", setting.average(-setting.log_likelihood()), by=KERNEL)
        one = Side("L of the likeliest x_0", float(setting.bound().total.min()), by=BOUND)
        return Line(BERNOULLI, (one, cross), ">=")


class CrossEntropy(Erratum):
    id = "E6"
    identity = "I4"
    printed = "KL divergence (cross entropy)"
    right = "H(q, p_θ) = H(q) + KL(q ‖ p_θ)"
    why = "they differ by H(q): the least cross-entropy is H(q) and not 0"

    def line(self, seed: int) -> Line:
        setting = affine()
        cross = Side("E[-log p_θ]", setting.average(-setting.log_likelihood()), by=KERNEL)
        _, divergence = entropy_and_divergence(setting)
        return Line(GAUSSIAN, (cross, Side("KL(q ‖ p_θ)", divergence, by="closed form")))


class PriorOutside(Erratum):
    id = "E7"
    identity = "I2"
    printed = "log p_θ(x_0) ≥ E_q[p(x_N) log Π(p/q)]"
    right = "log p_θ(x_0) ≥ E_q[log(p(x_N) Π(p/q))]"
    why = "with the prior left outside the logarithm it is no lower bound"

    def line(self, seed: int) -> Line:
        setting = bits()
        rows = setting.trajectories()
        log_prior = reverse_steps(setting.model, setting.times, rows)[:, -1]
        log_w = log_weights(setting.model, setting.times, rows)
        wrong = rows.mean(log_prior.exp() * (log_w - log_prior)).value
        low = Side("E_q[p(x_N) log Π(p/q)]", setting.average(wrong), by=TRANSITION)
        high = Side("log p_θ(x_0)", setting.average(setting.log_likelihood()), by=KERNEL)
        return Line(BERNOULLI, (low, high), "<=")


class SignOfThePrior(Erratum):
    id = "E23"
    identity = "I5"
    printed = "-log w = log p(x_N) - ..."
    right = "-log w = -log p(x_N) - ..."
    why = "the sign of the prior is lost when the sum is put back together"

    def line(self, seed: int) -> Line:
        setting = bits()
        rows = setting.trajectories()
        log_prior = reverse_steps(setting.model, setting.times, rows)[:, -1]
        log_w = log_weights(setting.model, setting.times, rows)
        left = exact("-log w", TRANSITION, -log_w)
        right = exact("with + log p(x_N)", TRANSITION, 2 * log_prior - log_w)
        return line_of(BERNOULLI, left, right, of="trajectories")


class JensenBackwards(Erratum):
    id = "E29"
    identity = "I2"
    printed = "E[f(x)] ≥ f(E[x]) for concave f"
    right = "E[f(x)] ≤ f(E[x]) for concave f"
    why = "with f = log the mean of log w would lie above log p_θ(x_0)"

    def line(self, seed: int) -> Line:
        setting = bits()
        low = -trajectory_bound(setting).mean.value
        left = Side("E_q[log w]", setting.average(low), by=TRANSITION)
        right = Side("log E_q[w]", setting.average(setting.log_evidence()), by=TRANSITION)
        return Line(BERNOULLI, (left, right), ">=")


IDENTITIES: tuple[Identity, ...] = ()
ERRATA: tuple[Erratum, ...] = (
    OneExample(),
    CrossEntropy(),
    PriorOutside(),
    SignOfThePrior(),
    JensenBackwards(),
)
