r"""The two ends of the chain and the entropies between them: the bound as it was in 2015.

With the fixed first step p(x_0|x_1) = q(x_1|x_0) π(x_0)/π(x_1) and ce(t) = −E_q log π(x_t),

    E L = Σ_pairs E KL + H_q(X_1|X_0) − H_q(X_N|X_0) + ce(t_N) − ce(t_1) + ce(0),

which is −K of Sohl-Dickstein et al. if and only if ce(t_N) − ce(t_1) + ce(0) = H_p(X_N).

References:
    Sohl-Dickstein et al. 2015, eq. 14 and appendix B.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nelbo.bound import bound
from nelbo.decoders import EdgeFixed
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.models import GAUSSIAN, MEAN, affine, bits, line_data
from nelbo.derivation.rows import Mean, Rows, posterior_steps, reverse_steps
from nelbo.derivation.settings import Known, Setting
from nelbo.derivation.stated import Stated, Values, averaged, drawn, exact, line_of
from nelbo.distributions import kl_divergence, per_example
from nelbo.entropy import EntropyForm, entropy_form, measure
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import seeded
from nelbo.schedules import Linear

DRAWS = 2000
"""Draws of each example."""
MATCHED_VARIANCE, MATCHED_RATE = 1 - MEAN**2, 0.45
"""Data with E x_0² = 1, and π at the mean activity of `bits`."""
MARGINAL, EDGE = "nelbo.processes.base.Process.marginal", "nelbo.decoders.EdgeFixed"
PRIOR, TERMS = "nelbo.processes.base.Process.prior", "nelbo.bound.term_of"
FORM, MEASURE = "nelbo.entropy.entropy_form", "nelbo.entropy.measure"


def edged(setting: Setting) -> Setting:
    """The setting with the fixed first step."""
    return replace(setting, model=setting.model.sharing(decoder=EdgeFixed()))


def cross_entropy(setting: Setting, rows: Rows) -> Mean:
    """ce(t) = −E log π(x_t), x_t the last latent of the rows."""
    x_t = rows.latents[:, -1]
    return rows.mean(-per_example(setting.model.process.prior(x_t).log_prob(x_t)))


def form_of(setting: Setting) -> tuple[Rows, EntropyForm]:
    """The entropy form on trajectories: the divergences as log-ratios, in the mean."""
    rows, times = setting.trajectories(), setting.times
    kernels = reverse_steps(setting.model, times, rows)[:, 1:-1]
    ratio = (posterior_steps(setting.model, times, rows) - kernels).sum(1)
    return rows, entropy_form(setting.model.process, rows.x_0, times, ratio)


class DetailedBalance(Stated):
    id = "I13"
    name = "balance"
    title = "Under its stationary law the forward step is its own reverse"
    latex = r"\pi(x_0)\,q(x_1|x_0)=\pi(x_1)\,T_\pi(x_0|x_1)"
    text = "π(x_0) q(x_1|x_0) = π(x_1) T_π(x_0|x_1)"
    assumes = "q leaves π invariant and is reversible; Gaussian and Bernoulli processes are"
    steps = (
        "Let x_0 follow π: then x_1 follows π too, and (x_0, x_1) is as likely as (x_1, x_0).",
        "So q(x_1|x_0) π(x_0)/π(x_1) is normalised over x_0: a decoder without parameters.",
        "It is a forward step from x_1: N(√k_1 x_1, l_1), or k_1 x_1 + l_1 π for a bit.",
    )
    functions = (MARGINAL, PRIOR, EDGE)
    source = "Sohl-Dickstein et al. 2015, appendix B"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        rows, times, process = setting.trajectories(), setting.times, setting.model.process
        model = edged(setting).model
        x_1 = rows.latents[:, 0]
        forth = process.prior(rows.x_0).log_prob(rows.x_0)
        forth = forth + process.marginal(rows.x_0, times[0]).log_prob(x_1)
        back = process.prior(x_1).log_prob(x_1) + model.decoder(x_1, times[0]).log_prob(rows.x_0)
        left = exact("log π(x_0) q(x_1|x_0)", MARGINAL, per_example(forth))
        right = exact("log π(x_1) p(x_0|x_1)", EDGE, per_example(back))
        return [line_of(setting.family, left, right, of="pairs (x_0, x_1)")]


class FixedEdge(Stated):
    id = "I14"
    name = "fixed-edge"
    title = "The bound with the fixed first step, by entropies"
    latex = (
        r"\mathbb E L=\sum\mathbb E\,\mathrm{KL}+H_q(X_1|X_0)-H_q(X_N|X_0)"
        r"+\mathrm{ce}(t_N)-\mathrm{ce}(t_1)+\mathrm{ce}(0)"
    )
    text = (
        "E L = Σ_pairs E KL + H_q(X_1|X_0) - H_q(X_N|X_0) + ce(t_N) - ce(t_1) + ce(0), "
        "ce(t) = -E_q log π(x_t)"
    )
    assumes = "the decoder is the fixed step q(x_1|x_0) π(x_0)/π(x_1); nothing about the data"
    steps = (
        "-log p(x_0|x_1) = -log q(x_1|x_0) - log π(x_0) + log π(x_1); its mean is "
        "H_q(X_1|X_0) + ce(0) - ce(t_1).",
        "KL(q(x_N|x_0) ‖ π) = -H_q(X_N|X_0) + ce(t_N).",
        "Add the divergences of the pairs.",
    )
    functions = (TERMS, EDGE, FORM, MEASURE)
    source = "Sohl-Dickstein et al. 2015, appendix B"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        setting = edged(setting)
        if isinstance(setting, Known):
            return [_decoder_term(setting), _whole(setting)]
        with seeded(seed, "bound"):
            total = bound(setting.model, setting.x_0, setting.times).total
            form = measure(setting.model, setting.x_0, setting.times)
        rows = setting.at(0)
        left = Values("bound", "nelbo.bound.bound", rows.mean(total))
        return [line_of(setting.family, left, Values("-K + ...", MEASURE, rows.mean(form.bound)))]


def _decoder_term(setting: Known) -> Line:
    rows, x_0 = setting.at(0), setting.x_0
    none = torch.zeros(len(x_0), dtype=torch.float64)
    form = entropy_form(setting.model.process, x_0, setting.times, none)
    ce_0 = -per_example(setting.model.process.prior(x_0).log_prob(x_0))
    value = form.first + ce_0 - cross_entropy(setting, rows).value
    left = Values("E[-log p(x_0|x_1)]", TERMS, setting.term(0))
    right = exact("H_q(X_1|X_0) + ce(0) - ce(t_1)", FORM, value)
    return line_of(setting.family, left, right, of="examples")


def _whole(setting: Known) -> Line:
    rows, form = form_of(setting)
    left = exact("L(x_0)", TERMS, setting.bound().total)
    right = Values("Σ KL and entropies", FORM, rows.mean(form.bound))
    return line_of(setting.family, left, right, of="examples")


class EntropyForm2015(Stated):
    id = "I15"
    name = "entropy-form"
    title = "K of 2015 and the bound, and the condition under which they are one"
    latex = (
        r"\mathbb E L+K=\mathrm{ce}(t_N)-\mathrm{ce}(t_1)+\mathrm{ce}(0)-H_p(X_N),\quad "
        r"K=-\sum\mathbb E\,\mathrm{KL}+H_q(X_N|X_0)-H_q(X_1|X_0)-H_p(X_N)"
    )
    text = (
        "E L + K = ce(t_N) - ce(t_1) + ce(0) - H_p(X_N); K = -E L if and only if that is 0: "
        "E ‖x_0‖² = d, or for bits mean activity π, or π = ½"
    )
    assumes = "the fixed first step"
    steps = (
        "K replaces every cross-entropy ce(t) by the entropy H_p of π.",
        "That is right if ce does not change with t, so if x_0 has the second moment of π.",
        "Then K = -E L, and H_p = -L_null, L_null = E log π(x_0).",
    )
    functions = (FORM, MEASURE, TERMS, EDGE)
    source = "Sohl-Dickstein et al. 2015, eq. 14 and appendix B"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        return [_violated(setting)] if isinstance(setting, Known) else []

    def apart(self, seed: int) -> list[Line]:
        lines = []
        for setting in (affine(variance=MATCHED_VARIANCE), bits(rate=MATCHED_RATE)):
            lines += _matched(setting, seed)
        return lines


def _violated(setting: Known) -> Line:
    """E L + K against cross-entropies summed over latents and the entropy of π."""
    fixed = edged(setting)
    assert isinstance(fixed, Known)
    rows, form = form_of(fixed)
    both = fixed.bound().total + rows.mean(form.k).value
    ce_first, ce_last = (cross_entropy(fixed, fixed.at(i)).value for i in (0, fixed.count - 1))
    prior = fixed.model.process.prior(fixed.x_0)
    ce_0, entropy = -per_example(prior.log_prob(fixed.x_0)), per_example(prior.entropy())
    what = "ce(t_N) - ce(t_1) + ce(0) - H_p(X_N)"
    excess = averaged(ce_last - ce_first + ce_0 - entropy, fixed.weight)
    left = exact("E L + K", FORM, averaged(both, fixed.weight))
    return line_of(fixed.family, left, exact(what, PRIOR, excess), "the condition is not met")


def _matched(setting: Known, seed: int) -> list[Line]:
    """K = −E L, exactly and by draws, and H_p = −L_null."""
    fixed = edged(setting)
    assert isinstance(fixed, Known)
    rows, form = form_of(fixed)
    total = averaged(fixed.bound().total, fixed.weight)
    k, prior, null = (rows.mean(v).value @ fixed.weight for v in (form.k, form.prior, form.null))
    with seeded(seed, "measure"):
        x_0 = fixed.x_0.repeat_interleave(DRAWS, 0)
        found = measure(fixed.model, x_0, fixed.times).k.view(-1, DRAWS)
    minus = exact("-E L", TERMS, -total)
    return [
        line_of(fixed.family, minus, exact("K", FORM, k[None]), "the condition is met"),
        line_of(
            fixed.family,
            minus,
            Values("mean of K", MEASURE, drawn(found, fixed.weight)),
            f"the condition is met; {DRAWS} draws of each example",
        ),
        line_of(
            fixed.family,
            exact("H_p(X_N)", PRIOR, prior[None]),
            exact("-L_null", FORM, -null[None]),
        ),
    ]


# --- errata --------------------------------------------------------------------------------------


class ConstantCrossEntropy(Erratum):
    id = "E8"
    identity = "I15"
    printed = "H_p(X_N) = -∫ q(x_t) log π(x_t) for all t, as the betas are small"
    right = "only if ce(t) does not change with t: a condition on the data"
    why = "it depends on the second moment of x_0 and not on the betas"

    def line(self, seed: int) -> Line:
        """A thousand betas from 1e-4 on, and data with the wrong second moment."""
        x_0, weight = line_data()
        schedule = Linear(1000)
        process, times = Gaussian(schedule), schedule.grid()
        none = torch.zeros(len(x_0), dtype=torch.float64)
        form = entropy_form(process, x_0, times, none)
        first = kl_divergence(process.marginal(x_0, times[0]), process.prior(x_0))
        ce_1 = form.first + per_example(first)
        h = Side("H_p(X_N)", float(weight @ form.prior), by=FORM)
        return Line(GAUSSIAN, (h, Side("ce(t_1)", float(weight @ ce_1), by=PRIOR)))


class SwappedSigns(Erratum):
    id = "E9"
    identity = "I14"
    printed = "E log[π(x_0)/π(x_1)] = ce(0) - ce(t_1)"
    right = "E log[π(x_0)/π(x_1)] = -ce(0) + ce(t_1)"
    why = "the two signs are swapped, which only their cancelling hides"

    def line(self, seed: int) -> Line:
        setting = edged(affine())
        assert isinstance(setting, Known)
        rows = setting.at(0)
        at = setting.model.decoder(rows.latents[:, 0], setting.times[0]).log_prob(rows.x_0)
        step = setting.model.process.marginal(rows.x_0, setting.times[0])
        ratio = rows.mean(per_example(at - step.log_prob(rows.latents[:, 0]))).value
        ce_1 = cross_entropy(setting, rows).value
        ce_0 = -per_example(setting.model.process.prior(setting.x_0).log_prob(setting.x_0))
        right = Side("E log p(x_0|x_1)/q(x_1|x_0)", setting.average(ratio), by=EDGE)
        printed = Side("ce(0) - ce(t_1)", setting.average(ce_0 - ce_1), by=PRIOR)
        return Line(GAUSSIAN, (right, printed))


IDENTITIES: tuple[Identity, ...] = (DetailedBalance(), FixedEdge(), EntropyForm2015())
ERRATA: tuple[Erratum, ...] = (ConstantCrossEntropy(), SwappedSigns())
