r"""The likelihood and the bound on a trained model: every identity at the user's own data.

A function here gives the lines of one identity for a `Trained`, or says why it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from nelbo.bound import bound
from nelbo.decoders import EdgeFixed
from nelbo.derivation.edges import DetailedBalance
from nelbo.derivation.identity import Line
from nelbo.derivation.stated import Stated
from nelbo.derivation.telescoping import Bayes, Telescoping, ThreeTerms
from nelbo.derivation.trained import Trained
from nelbo.distributions import per_example
from nelbo.entropy import EntropyForm, entropy_form
from nelbo.likelihood import importance_weighted
from nelbo.randomness import seeded

Said = list[Line] | str
"""Lines, or why there are none."""
BOUND, IW = "nelbo.bound.bound", "nelbo.likelihood.importance_weighted"
PAIR, PRIOR, FORM = "nelbo.bound.pair_term", "nelbo.bound.prior_term", "nelbo.entropy.entropy_form"
MARGINAL = "nelbo.processes.base.Process.marginal"
TRANSITION = "nelbo.processes.base.Process.transition"
POSTERIOR = "nelbo.processes.base.Process.posterior"
KERNEL = "nelbo.reverse.Reverse.kernel"
LAW = "nelbo.data.mixture.GaussianMixture.log_prob"
ONE = "the chain has one latent, so no pair"


def paired(lines: Callable[[Trained], Said]) -> Callable[[Trained], Said]:
    """Only for chains with a pair of latents."""
    return lambda t: lines(t) if len(t.times) > 1 else ONE


def said(one: Stated) -> Callable[[Trained], Said]:
    """What is said of any setting, said of this one."""
    return lambda t: one.on(t.setting, t.setting.seed)


def divergences(t: Trained) -> Said:
    """I9: the inner expectation exact at every pair of every trajectory, the outer one drawn."""
    inner = [
        _expected_ratio(t, i, t.model.process.posterior(at.x_t, t.x_0, at.t, t.times[i - 1]))
        for i, at in ((i, t.at(i)) for i in range(1, len(t.times)))
    ]
    ratios, kl = t.posterior - t.reverse[:, 1:-1], t.terms.diffusion
    left = "log q(x_s|x_t,x_0)/p(x_s|x_t)"
    return [
        t.exact(
            (f"E over x_s of {left}, x_t given", torch.stack(inner, 1), KERNEL),
            ("KL(q(x_s|x_t,x_0)‖p(x_s|x_t))", kl, PAIR),
            of="pairs of neighbours on trajectories",
        ),
        t.drawn(
            (f"sum over pairs of E {left}", ratios.sum(1), KERNEL),
            ("sum over pairs of E KL", kl.sum(1), PAIR),
        ),
    ]


def _expected_ratio(t: Trained, i: int, posterior: Distribution) -> Tensor:
    """E over x_s ~ q(x_s|x_t, x_0) of the log-ratio of pair i, exact; (R,).

    A bit has two values. A log-ratio of normal laws is quadratic in each number, and the mean of
    such a function is its mean over the two points one standard deviation away.
    """
    kernel = t.at(i).kernel(t.times[i - 1])
    if posterior.has_enumerate_support:
        points = posterior.enumerate_support()
        weights = [posterior.log_prob(x).exp() for x in points]
    else:
        spread = posterior.variance.sqrt()
        points = torch.stack([posterior.mean - spread, posterior.mean + spread])
        weights = [torch.tensor(0.5, dtype=torch.float64)] * 2
    ratios = (posterior.log_prob(x) - kernel.log_prob(x) for x in points)
    return per_example(sum((w * r for w, r in zip(weights, ratios, strict=True)), torch.zeros(())))


def last_term(t: Trained) -> Said:
    """I10."""
    ratio = t.marginal[:, -1] - t.reverse[:, -1]
    return [
        t.drawn(
            ("E log q(x_N|x_0)/p(x_N)", ratio, MARGINAL),
            ("KL(q(x_N|x_0)‖p(x_N))", t.terms.prior, PRIOR),
        )
    ]


def three_term_bound(t: Trained) -> Said:
    """I11: whole trajectories against the bound with draws of its own."""
    return [
        t.drawn(
            ("E[-log w] on trajectories", t.minus_log_w, f"{TRANSITION}, {KERNEL}"),
            ("prior + sum E KL + E[-log p(x_0|x_1)]", t.bound, BOUND),
        )
    ]


def entropies(t: Trained) -> Said:
    """I12."""
    form = _form(t, t.terms.diffusion.sum(1))
    return [
        t.drawn(
            (
                "E sum of log q(x_s|x_t,x_0)/q(x_t|x_s)",
                (t.posterior - t.forward[:, 1:]).sum(1),
                POSTERIOR,
            ),
            ("H_q(X_N|X_0) - H_q(X_1|X_0)", form.last - form.first, FORM),
        )
    ]


def edge_step(t: Trained) -> Said:
    """I14, with the bound drawn apart from the divergences."""
    if not isinstance(t.model.decoder_rule, EdgeFixed):
        return "its decoder is not the fixed edge step (--decoder fixed)"
    form = _form(t, t.terms.diffusion.sum(1))
    return [
        t.drawn(
            ("E L", t.bound, BOUND),
            (
                "sum E KL + H_q(X_1|X_0) - H_q(X_N|X_0) + ce(t_N) - ce(t_1) + ce(0)",
                form.bound,
                FORM,
            ),
        )
    ]


def paper_form(t: Trained) -> Said:
    """I15: K, and by what it misses the bound."""
    if not isinstance(t.model.decoder_rule, EdgeFixed):
        return "its decoder is not the fixed edge step (--decoder fixed)"
    form = _form(t, t.terms.diffusion.sum(1))
    return [
        t.drawn(
            ("E L + K", t.bound + form.k, f"{FORM}, {BOUND}"),
            ("ce(t_N) - ce(t_1) + ce(0) - H_p(X_N)", form.excess, FORM),
            note="0 where K is the bound",
        )
    ]


def order(t: Trained) -> Said:
    """I4 where the data's law is known."""
    if t.law is None:
        return "the law of its data is not known"
    return [
        t.drawn(
            ("E L", t.bound, BOUND),
            (
                "E[-log q(x_0)], the entropy",
                -t.law.log_prob(t.x_0),
                "nelbo.data.mixture.GaussianMixture.log_prob",
            ),
            ">=",
        )
    ]


def importance(t: Trained) -> Said:
    """I47: one trajectory gives the bound, several a tighter one."""
    rows, draws = t.weighed
    x_0 = t.x_0[:rows]
    found = importance_weighted(t.model, x_0, t.times, draws, seed=t.setting.seed)
    with seeded(t.setting.seed, "derive", "importance"):
        total = bound(t.model, x_0, t.times).total
    size = f"median effective sample size {float(found.ess.median()):.1f} of {draws}"
    return [
        t.drawn(("L_1, mean over trajectories", found.table(1).mean(1), IW), ("L", total, BOUND)),
        t.drawn((f"L_{draws}", found.values, IW), ("L", total, BOUND), "<=", size),
    ]


def _form(t: Trained, divergences: Tensor) -> EntropyForm:
    return entropy_form(t.model.process, t.x_0, t.times, divergences)


TABLE: dict[str, Callable[[Trained], Said]] = {
    "I4": order,
    "I6": paired(said(Bayes())),
    "I7": paired(said(Telescoping())),
    "I8": said(ThreeTerms()),
    "I9": paired(divergences),
    "I10": last_term,
    "I11": three_term_bound,
    "I12": entropies,
    "I13": said(DetailedBalance()),
    "I14": edge_step,
    "I15": paper_form,
    "I47": importance,
}
