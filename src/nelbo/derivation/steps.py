r"""The mean of each part of −log w is a divergence: the bound as it is computed.

    L(x_0) = KL(q(x_N|x_0) ‖ p(x_N)) + Σ_pairs E_{q(x_t|x_0)} KL(q(x_s|x_t, x_0) ‖ p_θ(x_s|x_t))
           + E_{q(x_1|x_0)} [−log p_θ(x_0|x_1)].

A log-ratio on a drawn trajectory and the divergence at a drawn x_t have the same mean; the second
has the mean over x_s taken in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.bound import bound, prior_term, term
from nelbo.derivation.identity import Erratum, Identity, Line, mean_se
from nelbo.derivation.rows import Mean, log_weights, marginals, posterior_steps, reverse_steps
from nelbo.derivation.settings import Known, Setting
from nelbo.derivation.stated import Stated, Values, averaged, drawn, exact, line_of, together
from nelbo.likelihood import importance_weighted
from nelbo.randomness import seeded

DRAWS = 2000
"""Draws of the bound of each example."""
POSTERIOR = "nelbo.processes.base.Process.posterior"
MARGINAL = "nelbo.processes.base.Process.marginal"
TRANSITION = "nelbo.processes.base.Process.transition"
PAIR, PRIOR, BOUND = "nelbo.bound.pair_term", "nelbo.bound.prior_term", "nelbo.bound.bound"
TERMS, TERM = "nelbo.bound.term_of", "nelbo.bound.term"
WEIGHTS = "nelbo.likelihood.importance_weighted"


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
    functions = (BOUND, PRIOR, PAIR, TERM, WEIGHTS, TRANSITION)
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
    x_0 = setting.x_0.repeat_interleave(DRAWS, 0)
    with seeded(seed, "bound"):
        total = bound(setting.model, x_0, setting.times).total.view(-1, DRAWS)
    found = importance_weighted(setting.model, setting.x_0, setting.times, DRAWS, seed=seed)
    by_terms = Values("mean of bound", BOUND, drawn(total, setting.weight))
    by_weights = Values("mean of -log w", WEIGHTS, drawn(-found.log_w, setting.weight))
    note = f"{DRAWS} draws of each example"
    return [
        line_of(setting.family, left, by_terms, note),
        line_of(setting.family, left, by_weights, note),
        _same_draws(setting, total.mean(1), seed),
    ]


def _same_draws(setting: Known, total: Tensor, seed: int) -> Line:
    """`bound` against its single terms at the same draws, and the prior's part off trajectories.

    Exact, so that a small part left out shows as well.
    """
    rows, times = setting.trajectories(), setting.times
    last = marginals(setting.model, times, rows)[:, -1]
    ratio = last - reverse_steps(setting.model, times, rows)[:, -1]
    x_0 = setting.x_0.repeat_interleave(DRAWS, 0)
    with seeded(seed, "bound"):
        index = (torch.full((len(x_0),), i) for i in range(setting.count))
        terms = torch.stack([term(setting.model, x_0, times, i) for i in index]).sum(0)
    single = terms.view(-1, DRAWS).mean(1) + rows.mean(ratio).value
    left = exact("mean of bound", BOUND, total)
    right = exact("E log q(x_N|x_0)/p(x_N) + Σ mean of terms", TERM, single)
    return line_of(setting.family, left, right, "the same draws", of="examples")


IDENTITIES: tuple[Identity, ...] = (MeanOfRatio(), LastTerm(), Vlb())
ERRATA: tuple[Erratum, ...] = ()
