r"""The mean of each part of −log w is a divergence: the bound as it is computed.

    L(x_0) = KL(q(x_N|x_0) ‖ p(x_N)) + Σ_pairs E_{q(x_t|x_0)} KL(q(x_s|x_t, x_0) ‖ p_θ(x_s|x_t))
           + E_{q(x_1|x_0)} [−log p_θ(x_0|x_1)].

A log-ratio on a drawn trajectory and the divergence at a drawn x_t have the same mean; the second
has the mean over x_s taken in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.bound import bound, decoder_term, pair_term, prior_term
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.models import BERNOULLI, GAUSSIAN, affine, bits, exact_affine
from nelbo.derivation.rows import Mean, log_weights, marginals, posterior_steps, reverse_steps
from nelbo.derivation.settings import Enumerated, Known, Setting, patterns
from nelbo.derivation.stated import Stated, Values, averaged, drawn, exact, line_of, together
from nelbo.distributions import per_example
from nelbo.likelihood import importance_weighted
from nelbo.parameterizations import with_variance
from nelbo.randomness import seeded
from nelbo.reverse import Prediction
from nelbo.variances import Posterior

DRAWS = 2000
"""Draws of the bound of each example."""
POSTERIOR = "nelbo.processes.base.Process.posterior"
MARGINAL = "nelbo.processes.base.Process.marginal"
TRANSITION = "nelbo.processes.base.Process.transition"
PAIR, PRIOR, BOUND = "nelbo.bound.pair_term", "nelbo.bound.prior_term", "nelbo.bound.bound"
TERMS = "nelbo.bound.term_of"


class MeanOfRatio(Stated):
    id = "I9"
    name = "divergences"
    title = "The mean of a log-ratio is a divergence, averaged over the x_t where it stands"
    latex = (
        r"\mathbb E_{q(x_{1:N}|x_0)}\log\frac{q(x_s|x_t,x_0)}{p_\theta(x_s|x_t)}"
        r"=\mathbb E_{q(x_t|x_0)}\mathrm{KL}\big(q(x_s|x_t,x_0)\,\|\,p_\theta(x_s|x_t)\big)"
    )
    text = (
        "E_q(x_{1:N}|x_0) log[q(x_s|x_t,x_0)/p_θ(x_s|x_t)] "
        "= E_q(x_t|x_0) KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t))"
    )
    assumes = "x_s follows its posterior given x_t and x_0, as it does on a trajectory of q"
    steps = (
        "Only x_s and x_t appear: integrate all other latents out.",
        "Split what is left: q(x_s, x_t|x_0) = q(x_t|x_0) q(x_s|x_t, x_0).",
        "The inner mean, over x_s, is the divergence by definition.",
        "The outer mean, over x_t, stays: a divergence at one x_t is a random number.",
    )
    functions = (POSTERIOR, "nelbo.reverse.Reverse.kernel", PAIR)
    source = "Ho et al. 2020, eq. 5 and 22; common lecture notes"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        rows, times = setting.trajectories(), setting.times
        kernels = reverse_steps(setting.model, times, rows)[:, 1:-1]
        ratio = posterior_steps(setting.model, times, rows) - kernels
        ratios = together([rows.mean(column) for column in ratio.T])
        terms = together([setting.term(i) for i in range(1, setting.count)])
        left = Values("E_q log q(x_s|x_t,x_0)/p_θ(x_s|x_t)", POSTERIOR, ratios)
        right = Values("E_q(x_t|x_0) KL", PAIR, terms)
        return [line_of(setting.family, left, right, of="pairs and examples")]


class LastTerm(Stated):
    id = "I10"
    name = "prior"
    title = "The last latent's part is a divergence in closed form"
    latex = (
        r"\mathbb E_{q(x_{1:N}|x_0)}\log\frac{q(x_N|x_0)}{p(x_N)}"
        r"=\mathrm{KL}\big(q(x_N|x_0)\,\|\,p(x_N)\big)"
    )
    text = "E_q(x_{1:N}|x_0) log[q(x_N|x_0)/p(x_N)] = KL(q(x_N|x_0) ‖ p(x_N)), a function of x_0"
    assumes = "nothing"
    steps = (
        "Only x_N appears: integrate the other latents out.",
        "What is left is the divergence by definition. No further mean over x_N is missing.",
        "No network is in it: it is exact for every example, and it is never left out.",
    )
    functions = (PRIOR, MARGINAL, "nelbo.processes.base.Process.prior")
    source = "Ho et al. 2020, eq. 5"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        rows, times = setting.trajectories(), setting.times
        prior = reverse_steps(setting.model, times, rows)[:, -1]
        ratio = marginals(setting.model, times, rows)[:, -1] - prior
        left = Values("E_q log q(x_N|x_0)/p(x_N)", MARGINAL, rows.mean(ratio))
        closed = rows.mean(prior_term(setting.model, rows.x_0, times))
        right = Values("KL(q(x_N|x_0) ‖ p(x_N))", PRIOR, closed)
        return [line_of(setting.family, left, right, of="examples")]


class Vlb(Stated):
    id = "I11"
    name = "bound"
    title = "The bound in three terms, as it is computed"
    latex = (
        r"L(x_0)=\mathrm{KL}(q(x_N|x_0)\|p(x_N))+\sum_{\text{pairs}}\mathbb E_{q(x_t|x_0)}"
        r"\mathrm{KL}(q(x_s|x_t,x_0)\|p_\theta(x_s|x_t))"
        r"+\mathbb E_{q(x_1|x_0)}[-\log p_\theta(x_0|x_1)]"
    )
    text = (
        "E_q[-log w] = KL(q(x_N|x_0) ‖ p(x_N)) + Σ_pairs E_q(x_t|x_0) KL(q(x_s|x_t,x_0) ‖ "
        "p_θ(x_s|x_t)) + E_q(x_1|x_0)[-log p_θ(x_0|x_1)]"
    )
    assumes = "the means over x_t stay in front of every divergence and of the decoder"
    steps = (
        "Take the mean of -log w in three terms (I8).",
        "The last latent gives the prior term (I10), each pair a mean of divergences (I9).",
        "The decoder's term has no divergence to become: its mean over x_1 is drawn.",
        "Each mean is estimated by a draw of its own x_t: no whole trajectory is needed.",
    )
    functions = (BOUND, PRIOR, PAIR, "nelbo.likelihood.importance_weighted", TRANSITION)
    source = "Sohl-Dickstein et al. 2015, eq. 14; Ho et al. 2020, eq. 5"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        rows = setting.trajectories()
        ratios = rows.mean(-log_weights(setting.model, setting.times, rows))
        left = Values("E_q[-log w]", TRANSITION, ratios)
        if isinstance(setting, Known):
            right = exact("prior + Σ E KL + decoder", TERMS, setting.bound().total)
            return [line_of(setting.family, left, right, of="examples"), *_drawn(setting, seed)]
        with seeded(seed, "bound"):
            total = bound(setting.model, rows.x_0, setting.times).total
        value, se = mean_se(total)
        mean = Mean(torch.tensor([value]).double(), torch.tensor([se]).double())
        return [line_of(setting.family, left, Values("bound", BOUND, mean))]


def _drawn(setting: Known, seed: int) -> list[Line]:
    """The same by drawn terms, and by drawn trajectories of posteriors."""
    rows = setting.trajectories()
    truth = rows.mean(-log_weights(setting.model, setting.times, rows)).value
    left = exact("E_q(x_0) E_q[-log w]", TRANSITION, averaged(truth, setting.weight))
    with seeded(seed, "bound"):
        x_0 = setting.x_0.repeat_interleave(DRAWS, 0)
        total = bound(setting.model, x_0, setting.times).total.view(-1, DRAWS)
    found = importance_weighted(setting.model, setting.x_0, setting.times, DRAWS, seed=seed)
    by_terms = Values("mean of bound", BOUND, drawn(total, setting.weight))
    what, by = "mean of -log w", "nelbo.likelihood.importance_weighted"
    by_weights = Values(what, by, drawn(-found.log_w, setting.weight))
    note = f"{DRAWS} draws of each example"
    return [line_of(setting.family, left, right, note) for right in (by_terms, by_weights)]


# --- errata --------------------------------------------------------------------------------------


class MarginalInside(Erratum):
    id = "E12"
    identity = "I9"
    printed = "∫ q(x_s) log[q(x_s|x_t,x_0)/p_θ(x_s|x_t)] dx_s"
    right = "∫ q(x_s|x_t,x_0) log[q(x_s|x_t,x_0)/p_θ(x_s|x_t)] dx_s"
    why = "with the marginal in place of the posterior the inner mean is no divergence"

    def line(self, seed: int) -> Line:
        setting = bits()
        right = Side("E KL", setting.average(setting.term(1).value), by=PAIR)
        return Line(BERNOULLI, (right, Side("under q(x_s)", _marginal_inside(setting))))


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


IDENTITIES: tuple[Identity, ...] = (MeanOfRatio(), LastTerm(), Vlb())
ERRATA: tuple[Erratum, ...] = (
    MarginalInside(),
    MatchThePosterior(),
    NoMean(),
    WrongLatent(),
    SignOfTheDecoder(),
)
