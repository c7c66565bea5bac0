"""Terms of the bound as they are printed in some places, beside what they should be.

Most lose a mean, or take it over the wrong latent: a divergence at one x_t is a random number, and
the bound is its mean over the x_t that the forward process gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.bound import decoder_term, pair_term, prior_term
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.models import BERNOULLI, GAUSSIAN, affine, bits, exact_affine, levels
from nelbo.derivation.settings import Enumerated, Known, patterns
from nelbo.derivation.stated import exact, line_of
from nelbo.derivation.steps import PAIR, POSTERIOR, TERMS
from nelbo.distributions import per_example
from nelbo.parameterizations import with_variance
from nelbo.reverse import Prediction
from nelbo.variances import Posterior


class NotAConstant(Erratum):
    id = "E5"
    identity = "I9"
    printed = "E over x_{1:N-1} of a constant: KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t)) is its own mean"
    right = "E_q(x_t|x_0) KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t))"
    why = "only the prior's term is a constant given x_0; the others depend on x_t"

    def line(self, seed: int) -> Line:
        setting = bits()
        rows, times = setting.at(1), setting.times
        at = setting.model.at(rows.latents[:, 0], times[1])
        each = exact("KL at one x_t", PAIR, pair_term(at, rows.x_0, times[0]))
        mean = setting.term(1).value.repeat_interleave(len(rows.x_0) // rows.groups)
        return line_of(BERNOULLI, each, exact("E_q(x_t|x_0) KL", PAIR, mean), of="latents")


class MarginalInside(Erratum):
    id = "E12"
    identity = "I9"
    printed = "∫ q(x_s) log[q(x_s|x_t,x_0)/p_θ(x_s|x_t)] dx_s"
    right = "∫ q(x_s|x_t,x_0) log[q(x_s|x_t,x_0)/p_θ(x_s|x_t)] dx_s"
    why = "with the marginal in place of the posterior the inner mean is no divergence"

    def line(self, seed: int) -> Line:
        setting = bits()
        right = Side("E KL", setting.average(setting.term(1).value), by=PAIR)
        return Line(
            BERNOULLI, (right, Side("under q(x_s)", _marginal_inside(setting), by=POSTERIOR))
        )


def _marginal_inside(setting: Enumerated) -> float:
    """E_{q(x_0) q(x_t|x_0) q(x_s)} of the log-ratio of the first pair."""
    rows, times, latents = setting.at(1), setting.times, patterns(setting.x_0.shape[1])
    process, x_t = setting.model.process, rows.latents[:, 0]
    posterior = process.posterior(x_t, rows.x_0, times[1], times[0])
    kernel = setting.model.kernel(x_t, times[1], times[0])
    total = torch.zeros(len(setting.x_0), dtype=torch.float64)
    for x_s in latents:
        law = process.marginal(setting.x_0, times[0])
        mass = setting.weight @ per_example(law.log_prob(x_s.expand_as(setting.x_0))).exp()
        here = x_s.expand_as(x_t)
        ratio = per_example(posterior.log_prob(here) - kernel.log_prob(here))
        total += mass * rows.mean(ratio).value
    return setting.average(total)


class MatchThePosterior(Erratum):
    id = "E13"
    identity = "I9"
    printed = "p_θ(x_s|x_t) should match q(x_s|x_t, x_0), variance β̃ included"
    right = "the best p_θ(x_s|x_t) is q(x_s|x_t): mean at E[x_0|x_t], variance above β̃"
    why = "p_θ does not know x_0; its uncertainty about x_0 adds to the variance"

    def line(self, seed: int) -> Line:
        setting = exact_affine()
        values = [_pairs_under(setting), _pairs_under(setting, Posterior())]
        names = ("Σ E KL with the variance of q(x_s|x_t)", "with β̃")
        sides = tuple(Side(n, v, by=PAIR) for n, v in zip(names, values, strict=True))
        return Line(GAUSSIAN, sides, ">=")


def _pairs_under(setting: Known, variance: Posterior | None = None) -> float:
    """Σ_pairs E KL with the model's variance or another."""
    model = setting.model if variance is None else with_variance(setting.model, variance)
    total = torch.zeros(len(setting.x_0), dtype=torch.float64)
    for i in range(1, setting.count):
        rows = setting.at(i)
        at = model.at(rows.latents[:, 0], setting.times[i])
        total += rows.mean(pair_term(at, rows.x_0, setting.times[i - 1])).value
    return setting.average(total)


class NoMean(Erratum):
    id = "E22"
    identity = "I11"
    printed = "L = L_0 + ... + L_N with L_0 = -log p_θ(x_0|x_1), L_t = KL(...), no mean"
    right = "E_q(x_1|x_0) and E_q(x_t|x_0) in front of the terms"
    why = "the printed terms are random numbers: they depend on x_1 and on x_t"

    def line(self, seed: int) -> Line:
        setting = affine()
        rows, times = setting.trajectories(), setting.times
        total = prior_term(setting.model, rows.x_0, times)
        for i in range(setting.count):
            at = setting.model.at(rows.latents[:, i], times[i])
            total = total + _one_term(at, rows.x_0, times, i)
        printed = exact("the terms on one trajectory", PAIR, total)
        each = setting.bound().total.repeat_interleave(len(total) // rows.groups)
        mean = exact("L(x_0)", TERMS, each)
        return line_of(GAUSSIAN, printed, mean, of="trajectories")


def _one_term(at: Prediction, x_0: Tensor, times: Tensor, i: int) -> Tensor:
    return decoder_term(at, x_0) if i == 0 else pair_term(at, x_0, times[i - 1])


class WrongLatent(Erratum):
    id = "E31"
    identity = "I9"
    printed = "E_q(x_N|x_0)[KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t))]"
    right = "E_q(x_t|x_0)[KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t))]"
    why = "the mean is over the x_t in the divergence, not over another latent"

    def line(self, seed: int) -> Line:
        setting = affine()
        rows, times = setting.at(setting.count - 1), setting.times
        at = setting.model.at(rows.latents[:, 0], times[1])
        wrong = setting.average(rows.mean(pair_term(at, rows.x_0, times[0])).value)
        right = Side("x_t ~ q(x_t|x_0)", setting.average(setting.term(1).value), by=PAIR)
        return Line(GAUSSIAN, (right, Side("x_t ~ q(x_N|x_0)", wrong, by=PAIR)))


class SignOfTheDecoder(Erratum):
    id = "E41"
    identity = "I11"
    printed = "prior + Σ E KL - L_0 with L_0 = -log p_θ(x_0|x_1)"
    right = "prior + Σ E KL + L_0"
    why = "the minus sign is inside L_0 already"

    def line(self, seed: int) -> Line:
        setting = affine()
        found = setting.bound()
        wrong = setting.average(found.total - 2 * found.reconstruction)
        right = Side("E L", setting.average(found.total), by=TERMS)
        return Line(GAUSSIAN, (right, Side("with - L_0", wrong, by=TERMS)))


class DecoderUnits(Erratum):
    id = "E42"
    identity = "I11"
    printed = "x_0 in {0..n-1}, bins j ± ½, under a normal law that lives in [-1, 1]"
    right = "x = 2j/(n-1) - 1, bins x ± 1/(n-1), the outer two open"
    why = "levels and law are on two scales, and the masses of all levels do not sum to one"

    def line(self, seed: int) -> Line:
        setting = levels()
        law, n = setting.data_law(), setting.levels
        edges = torch.tensor([-0.5, n - 0.5], dtype=torch.float64)
        printed = float(law.cdf(edges).diff())
        right = float(setting.log_by_decoder().exp().sum())
        sides = (
            Side("Σ p_θ(x_0)", right, by="nelbo.decoders.Discretized"),
            Side("Σ over bins j ± ½", printed, by="closed form"),
        )
        return Line(setting.family, sides, unit="probability")


IDENTITIES: tuple[Identity, ...] = ()
ERRATA: tuple[Erratum, ...] = (
    NotAConstant(),
    MarginalInside(),
    MatchThePosterior(),
    NoMean(),
    WrongLatent(),
    SignOfTheDecoder(),
    DecoderUnits(),
)
