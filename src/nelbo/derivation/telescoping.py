r"""From forward steps to posteriors: Bayes in every pair, then telescoping.

    q(x_t|x_s) = q(x_s|x_t, x_0) q(x_t|x_0) / q(x_s|x_0),
    Σ_pairs [log q(x_s|x_0) − log q(x_t|x_0)] = log q(x_1|x_0) − log q(x_N|x_0),

so that −log w, which compares steps of opposite directions, becomes a sum in which each kernel
p_θ(x_s|x_t) stands beside the law that it has to imitate.
"""

from __future__ import annotations

import torch

from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.models import BERNOULLI, bits
from nelbo.derivation.rows import (
    Rows,
    forward_steps,
    log_weights,
    marginals,
    posterior_steps,
    reverse_steps,
)
from nelbo.derivation.settings import Enumerated, Known, Setting, patterns
from nelbo.derivation.stated import Stated, Values, exact, line_of
from nelbo.distributions import per_example
from nelbo.entropy import entropy_form

TRANSITION = "nelbo.processes.base.Process.transition"
POSTERIOR = "nelbo.processes.base.Process.posterior"
MARGINAL = "nelbo.processes.base.Process.marginal"
ENTROPY = "nelbo.entropy.entropy_form"


class Bayes(Stated):
    id = "I6"
    name = "bayes"
    title = "A forward step, turned round by Bayes' rule"
    latex = r"q(x_t|x_s)=q(x_s|x_t,x_0)\,\frac{q(x_t|x_0)}{q(x_s|x_0)}"
    text = "q(x_t|x_s) = q(x_s|x_t, x_0) q(x_t|x_0) / q(x_s|x_0) for every s < t"
    assumes = "the forward process is Markov: q(x_t|x_s, x_0) = q(x_t|x_s)"
    steps = (
        "Given x_0, Bayes' rule for x_s and x_t: q(x_t|x_s, x_0) q(x_s|x_0) = "
        "q(x_s|x_t, x_0) q(x_t|x_0).",
        "Markov: once x_s is known, x_0 says nothing more of x_t.",
        "x_0 has to stay in the posterior: without it q(x_s|x_t) is unknown.",
    )
    functions = (TRANSITION, POSTERIOR, MARGINAL)
    source = "Ho et al. 2020, eq. 6 and 20; Sohl-Dickstein et al. 2015, appendix B"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        rows = setting.trajectories()
        sides = [_turned(setting, rows, i, j) for i, j in _pairs(setting)]
        left, right = (torch.cat([pair[side] for pair in sides]) for side in (0, 1))
        one = exact("log q(x_t|x_s)", TRANSITION, left)
        other = exact("log q(x_s|x_t,x_0) + log q(x_t|x_0) - log q(x_s|x_0)", POSTERIOR, right)
        return [line_of(setting.family, one, other, of="pairs and trajectories")]


def _pairs(setting: Setting) -> list[tuple[int, int]]:
    """Every i < j of a small model; of a long grid the neighbours, and first and last."""
    n = setting.count
    if isinstance(setting, Known):
        return [(i, j) for j in range(n) for i in range(j)]
    return [*((i, i + 1) for i in range(n - 1)), (0, n - 1)]


def _turned(setting: Setting, rows: Rows, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides for one pair, (R,) each."""
    process, x_0 = setting.model.process, rows.x_0
    s, t, x_s, x_t = setting.times[i], setting.times[j], rows.latents[:, i], rows.latents[:, j]
    back = process.posterior(x_t, x_0, t, s).log_prob(x_s)
    ratio = process.marginal(x_0, t).log_prob(x_t) - process.marginal(x_0, s).log_prob(x_s)
    step = process.transition(x_s, s, t).log_prob(x_t)
    return per_example(step), per_example(back + ratio)


class Telescoping(Stated):
    id = "I7"
    name = "telescoping"
    title = "The marginals cancel in pairs, and only the two ends stay"
    latex = (
        r"\sum_{\text{pairs}}\log\frac{q(x_s|x_t,x_0)}{q(x_t|x_s)}"
        r"=\sum_{\text{pairs}}\log\frac{q(x_s|x_0)}{q(x_t|x_0)}"
        r"=\log\frac{q(x_1|x_0)}{q(x_N|x_0)}"
    )
    text = (
        "Σ_pairs log[q(x_s|x_t,x_0)/q(x_t|x_s)] = Σ_pairs [log q(x_s|x_0) - log q(x_t|x_0)] "
        "= log q(x_1|x_0) - log q(x_N|x_0)"
    )
    assumes = "the pairs are neighbours; holds on every single trajectory"
    steps = (
        "By Bayes (I6) each ratio of a step and its reverse is a ratio of two marginals.",
        "The t of one pair is the s of the next: each log q in between comes once with plus and "
        "once with minus.",
        "Of N marginals the first and the last stay.",
    )
    functions = (POSTERIOR, TRANSITION, MARGINAL)
    source = "common lecture notes; Ho et al. 2020, eq. 20 and 21"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        rows, times = setting.trajectories(), setting.times
        back = posterior_steps(setting.model, times, rows)
        forth = forward_steps(setting.model, times, rows)[:, 1:]
        still = marginals(setting.model, times, rows)
        left = exact("Σ log q(x_s|x_t,x_0)/q(x_t|x_s)", POSTERIOR, (back - forth).sum(1))
        right = exact("log q(x_1|x_0)/q(x_N|x_0)", MARGINAL, still[:, 0] - still[:, -1])
        return [line_of(setting.family, left, right, of="trajectories")]


class ThreeTerms(Stated):
    id = "I8"
    name = "three-terms"
    title = "-log w as prior, steps and decoder"
    latex = (
        r"-\log w=\log\frac{q(x_N|x_0)}{p(x_N)}+\sum_{\text{pairs}}"
        r"\log\frac{q(x_s|x_t,x_0)}{p_\theta(x_s|x_t)}-\log p_\theta(x_0|x_1)"
    )
    text = (
        "-log w = log[q(x_N|x_0)/p(x_N)] + Σ_pairs log[q(x_s|x_t,x_0)/p_θ(x_s|x_t)] "
        "- log p_θ(x_0|x_1)"
    )
    assumes = "Bayes in every pair; holds on every single trajectory, before any mean is taken"
    steps = (
        "Start from the sum over steps (I5).",
        "Replace log q(x_t|x_s) by posterior and marginals (I6).",
        "The marginals telescope (I7); log q(x_1|x_0) cancels the one of the first step, and "
        "log q(x_N|x_0) joins the prior.",
    )
    functions = (POSTERIOR, MARGINAL, TRANSITION, "nelbo.reverse.Reverse.kernel")
    source = "Sohl-Dickstein et al. 2015, appendix B; Ho et al. 2020, eq. 22"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        rows, times = setting.trajectories(), setting.times
        reverse = reverse_steps(setting.model, times, rows)
        last = marginals(setting.model, times, rows)[:, -1] - reverse[:, -1]
        pairs = posterior_steps(setting.model, times, rows) - reverse[:, 1:-1]
        left = exact("-log w", TRANSITION, -log_weights(setting.model, times, rows))
        right = exact("prior + steps + decoder", POSTERIOR, last + pairs.sum(1) - reverse[:, 0])
        return [line_of(setting.family, left, right, of="trajectories")]


class EntropyTelescoping(Stated):
    id = "I12"
    name = "entropy-telescoping"
    title = "The mean of the telescoping sum is a difference of entropies"
    latex = (
        r"\mathbb E_q\sum_{\text{pairs}}\log\frac{q(x_s|x_t,x_0)}{q(x_t|x_s)}"
        r"=H_q(X_N|X_0)-H_q(X_1|X_0)"
    )
    text = "E_q Σ_pairs log[q(x_s|x_t,x_0)/q(x_t|x_s)] = H_q(X_N|X_0) - H_q(X_1|X_0)"
    assumes = "the mean is over x_0 and the whole trajectory"
    steps = (
        "Take the mean of I7: E log q(x_1|x_0) - E log q(x_N|x_0).",
        "An entropy is a mean of -log q, so that the signs turn.",
        "Both entropies are closed forms: no network is called.",
    )
    functions = (ENTROPY, POSTERIOR, TRANSITION)
    source = "Sohl-Dickstein et al. 2015, appendix B"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        rows, times, process = setting.trajectories(), setting.times, setting.model.process
        back = posterior_steps(setting.model, times, rows)
        forth = forward_steps(setting.model, times, rows)[:, 1:]
        none = torch.zeros(len(rows.x_0), dtype=torch.float64)
        form = entropy_form(process, rows.x_0, times, none)
        what = "E Σ log q(x_s|x_t,x_0)/q(x_t|x_s)"
        left = Values(what, POSTERIOR, rows.mean((back - forth).sum(1)))
        right = Values("H_q(X_N|X_0) - H_q(X_1|X_0)", ENTROPY, rows.mean(form.last - form.first))
        return [line_of(setting.family, left, right, of="examples")]


# --- errata --------------------------------------------------------------------------------------


class Independent(Erratum):
    id = "E11"
    identity = "I12"
    printed = "E[log q(x_1|x_0) - log q(x_2|x_0)] under q(x_0, x_1) · q(x_2 ... x_N)"
    right = "the same under q(x_0) q(x_1|x_0) and q(x_0) q(x_2|x_0)"
    why = "the latents depend on x_0: split apart, x_2 belongs to another example"

    def line(self, seed: int) -> Line:
        setting = bits()
        first, second = (setting.at(i) for i in (0, 1))
        log_first = marginals(setting.model, setting.times[:1], first)[:, 0]
        right = setting.average(first.mean(log_first).value)
        log_second = marginals(setting.model, setting.times[1:2], second)[:, 0]
        joint = setting.average(second.mean(log_second).value)
        apart = _any_example(setting, 1)
        sides = (
            Side("under q(x_0) q(x_t|x_0)", right - joint, by=MARGINAL),
            Side("under q(x_0, x_1) · q(x_2)", right - apart, by=MARGINAL),
        )
        return Line(BERNOULLI, sides)


def _any_example(setting: Enumerated, index: int) -> float:
    """E_{q(x_0) q(x_t)} log q(x_t|x_0), x_t drawn without regard to x_0."""
    latents = patterns(setting.x_0.shape[1])
    law = setting.model.process.marginal(
        setting.x_0.repeat_interleave(len(latents), 0), setting.times[index]
    )
    log_q = per_example(law.log_prob(latents.repeat(len(setting.x_0), 1)))
    table = log_q.view(len(setting.x_0), -1)
    mass = setting.weight @ table.exp()
    return float(setting.weight @ table @ mass)


IDENTITIES: tuple[Identity, ...] = (Bayes(), Telescoping(), ThreeTerms(), EntropyTelescoping())
ERRATA: tuple[Erratum, ...] = (Independent(),)
