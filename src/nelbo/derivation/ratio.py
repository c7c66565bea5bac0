r"""The likelihood as a mean of ratios over trajectories, and the bound that comes of it.

p_θ(x_0) = E_q w,   w = p_θ(x_{0:N}) / q(x_{1:N}|x_0),
L(x_0) = −E_q log w = −log p_θ(x_0) + KL(q(x_{1:N}|x_0) ‖ p_θ(x_{1:N}|x_0)) ≥ −log p_θ(x_0).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributions import Normal, kl_divergence

from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.line import Affine, Levelled
from nelbo.derivation.models import stationary_bits, stationary_line
from nelbo.derivation.rows import forward_steps, log_weights, reverse_steps
from nelbo.derivation.settings import Joint, Known, Setting
from nelbo.derivation.stated import Stated, Values, averaged, drawn, exact, line_of
from nelbo.likelihood import importance_weighted

DRAWS = 2000
"""Trajectories of each example."""
KERNEL = "nelbo.reverse.Reverse.kernel"
TRANSITION = "nelbo.processes.base.Process.transition"
BOUND = "nelbo.bound.term_of"
WEIGHTS = "nelbo.likelihood.importance_weighted"


def trajectory_bound(setting: Setting) -> Values:
    """−E_q log w by the forward steps."""
    rows = setting.trajectories()
    mean = rows.mean(-log_weights(setting.model, setting.times, rows))
    return Values("E_q[-log w]", TRANSITION, mean)


class Importance(Stated):
    id = "I1"
    name = "importance"
    title = "The likelihood is a mean of ratios over noised trajectories"
    latex = (
        r"p_\theta(x_0)=\mathbb E_{q(x_{1:N}|x_0)}\left[\frac{p(x_N)\,p_\theta(x_0|x_1)"
        r"\prod p_\theta(x_s|x_t)}{q(x_1|x_0)\prod q(x_t|x_s)}\right]"
    )
    text = (
        "p_θ(x_0) = E_q(x_{1:N}|x_0)[w], w = p(x_N) p_θ(x_0|x_1) Π p_θ(x_s|x_t) "
        "/ (q(x_1|x_0) Π q(x_t|x_s))"
    )
    assumes = "q gives mass wherever p_θ does"
    steps = (
        "The likelihood sums the latents out: p_θ(x_0) = ∫ p_θ(x_{0:N}) dx_{1:N}.",
        "Multiply and divide by q(x_{1:N}|x_0), which is not 0 where p_θ is not.",
        "An integral of q times something is its mean under q.",
        "Both joint laws are chains, so that w is a product over the steps.",
    )
    functions = (KERNEL, "nelbo.reverse.Reverse.decoder", TRANSITION, WEIGHTS)
    source = "Sohl-Dickstein et al. 2015, section 2.3"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        if not isinstance(setting, Known):
            return []
        return [_summed(setting), *_masses(setting), _weighed(setting, seed)]


def _otherwise(setting: Known) -> Values:
    """log p_θ(x_0) without pushing the law of x_0 forward."""
    if isinstance(setting, Joint):
        return exact("log E_q[w]", TRANSITION, setting.log_evidence())
    assert isinstance(setting, Levelled)
    by = "nelbo.decoders.Discretized"
    return exact("log E_{p_θ(x_1)}[p_θ(x_0|x_1)]", by, setting.log_by_decoder())


def _summed(setting: Known) -> Line:
    left = exact("log p_θ(x_0)", KERNEL, setting.log_likelihood())
    note = "kernels pushed forward from the prior"
    return line_of(setting.family, left, _otherwise(setting), note, of="examples")


def _masses(setting: Known) -> list[Line]:
    """A law over finitely many x_0 sums to one."""
    if isinstance(setting, Affine):
        return []
    other = _otherwise(setting)
    total = other.mean.value.exp().sum()[None]
    one = exact("1", "closed form", torch.ones(1))
    left = exact("Σ p_θ(x_0) over all x_0", other.by, total)
    found = line_of(setting.family, left, one, f"{len(setting.x_0)} values of x_0")
    return [replace(found, unit="probability")]


def _weighed(setting: Known, seed: int) -> Line:
    """Drawn trajectories, walked from x_N down by posteriors.

    The open bin of an outer level takes latents from far beyond q(x_1|x_0): w has no variance
    there, and a mean of draws says nothing.
    """
    inner = (setting.x_0.abs() < 1)[:, 0] if isinstance(setting, Levelled) else slice(None)
    x_0, weight = setting.x_0[inner], setting.weight[inner] / setting.weight[inner].sum()
    found = importance_weighted(setting.model, x_0, setting.times, DRAWS, seed=seed)
    p = averaged(setting.log_likelihood()[inner].exp(), weight)
    left = exact("E_q(x_0) p_θ(x_0)", KERNEL, p)
    right = Values("E_q(x_0) mean of w", WEIGHTS, drawn(found.log_w.exp(), weight))
    note = f"{DRAWS} trajectories of each of {len(x_0)} examples"
    unit = "density" if isinstance(setting, Affine) else "probability"
    return replace(line_of(setting.family, left, right, note), unit=unit)


class Jensen(Stated):
    id = "I2"
    name = "jensen"
    title = "The logarithm goes inside the mean: a bound"
    latex = (
        r"L(x_0):=\mathbb E_q\left[-\log\frac{p_\theta(x_{0:N})}{q(x_{1:N}|x_0)}\right]"
        r"\ge-\log p_\theta(x_0)"
    )
    text = (
        "L(x_0) := E_q[-log w] ≥ -log E_q[w] = -log p_θ(x_0), equal if and only if w is constant"
    )
    assumes = "the whole of w is inside the logarithm, the prior p(x_N) included"
    steps = (
        "-log is convex, so that E[-log w] ≥ -log E[w] (Jensen).",
        "E_q[w] is the likelihood (importance).",
        "-log is strictly convex: both are equal only where w does not vary under q.",
    )
    functions = (TRANSITION, KERNEL, BOUND)
    source = "Sohl-Dickstein et al. 2015, section 2.4; Ho et al. 2020, eq. 3"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        if not isinstance(setting, Known):
            return []
        left = trajectory_bound(setting)
        right = exact("-log p_θ(x_0)", KERNEL, -setting.log_likelihood())
        return [line_of(setting.family, left, right, relation=">=", of="examples")]

    def apart(self, seed: int) -> list[Line]:
        """Data that follows the prior: then the exact reverse steps leave w constant."""
        return [_equal(setting) for setting in (stationary_line(), stationary_bits())]


def _equal(setting: Joint) -> Line:
    left = exact("L(x_0)", BOUND, setting.bound().total)
    prior = setting.model.process.prior(setting.x_0).log_prob(setting.x_0).sum(1)
    right = exact("-log π(x_0)", "nelbo.processes.base.Process.prior", -prior)
    note = "equality: data that follows the prior, with its exact reverse steps"
    return line_of(setting.family, left, right, note, of="examples")


class Gap(Stated):
    id = "I3"
    name = "gap"
    title = "What the bound lacks is a divergence between trajectories"
    latex = (
        r"L(x_0)+\log p_\theta(x_0)=\mathrm{KL}\big(q(x_{1:N}|x_0)\,\|\,"
        r"p_\theta(x_{1:N}|x_0)\big)"
    )
    text = "L(x_0) + log p_θ(x_0) = KL(q(x_{1:N}|x_0) ‖ p_θ(x_{1:N}|x_0)) ≥ 0"
    assumes = "nothing; it proves the bound without Jensen"
    steps = (
        "By Bayes p_θ(x_{0:N}) = p_θ(x_0) p_θ(x_{1:N}|x_0).",
        "So -log w = -log p_θ(x_0) + log[q(x_{1:N}|x_0)/p_θ(x_{1:N}|x_0)].",
        "Take the mean under q: the first part is a constant, the second the divergence.",
    )
    functions = (BOUND, "nelbo.bound.prior_term", KERNEL, TRANSITION)
    source = "common lecture notes; Kingma, Welling 2014, eq. 1"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        if not isinstance(setting, Joint):
            return []
        lacks = setting.bound().total + setting.log_likelihood()
        left = exact("L(x_0) + log p_θ(x_0)", BOUND, lacks)
        what = "KL(q(x_{1:N}|x_0) ‖ p_θ(x_{1:N}|x_0))"
        return [
            line_of(setting.family, left, exact(what, TRANSITION, setting.gap()), of="examples")
        ]


class Order(Stated):
    id = "I4"
    name = "order"
    title = "The bound lies above the cross-entropy, and that above the entropy"
    latex = (
        r"\mathbb E_{q(x_0)}L\ge\mathbb E_{q(x_0)}[-\log p_\theta]"
        r"=H(q)+\mathrm{KL}(q(x_0)\|p_\theta)\ge H(q)"
    )
    text = "E_q(x_0) L ≥ E_q(x_0)[-log p_θ] = H(q) + KL(q(x_0) ‖ p_θ) ≥ H(q)"
    assumes = "for densities H is differential and may be negative"
    steps = (
        "Average the bound over the data.",
        "Add and subtract log q(x_0): the cross-entropy is entropy plus divergence.",
        "A divergence is never negative. So no model codes data below its entropy.",
    )
    functions = (BOUND, KERNEL)
    source = "Sohl-Dickstein et al. 2015, section 2.4; common lecture notes"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        if not isinstance(setting, Known):
            return []
        cross = Side("E[-log p_θ]", setting.average(-setting.log_likelihood()), by=KERNEL)
        bound = Side("E L", setting.average(setting.bound().total), by=BOUND)
        entropy, divergence = entropy_and_divergence(setting)
        parts = Side("H(q) + KL(q ‖ p_θ)", entropy + divergence, by=_otherwise(setting).by)
        low = Side("H(q)", entropy, by="closed form")
        return [
            Line(setting.family, (bound, cross, low), ">="),
            Line(setting.family, (cross, parts)),
        ]


def entropy_and_divergence(setting: Known) -> tuple[float, float]:
    """H(q) and KL(q(x_0) ‖ p_θ): of normal laws, or summed over all x_0."""
    weight, x_0 = setting.weight, setting.x_0
    if isinstance(setting, Affine):
        mean = weight @ x_0[:, 0]
        law = Normal(mean, (weight @ (x_0[:, 0] - mean) ** 2).sqrt())
        return float(law.entropy()), float(kl_divergence(law, setting.data_law()))
    log_p = _otherwise(setting).mean.value
    return float(-weight @ weight.log()), float(weight @ (weight.log() - log_p))


class Product(Stated):
    id = "I5"
    name = "product"
    title = "The logarithm of the product is a sum over steps"
    latex = (
        r"-\log w=-\log p(x_N)-\log\frac{p_\theta(x_0|x_1)}{q(x_1|x_0)}"
        r"-\sum\log\frac{p_\theta(x_s|x_t)}{q(x_t|x_s)}"
    )
    text = "-log w = -log p(x_N) - log[p_θ(x_0|x_1)/q(x_1|x_0)] - Σ log[p_θ(x_s|x_t)/q(x_t|x_s)]"
    assumes = "both chains are Markov; holds on every single trajectory"
    steps = (
        "w is one prior factor, one decoder factor, and one factor for every pair.",
        "The logarithm of a product is the sum of the logarithms.",
    )
    functions = (TRANSITION, KERNEL, "nelbo.reverse.Reverse.decoder")
    source = "Sohl-Dickstein et al. 2015, appendix B; Ho et al. 2020, eq. 3"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        if not isinstance(setting, Joint):
            return []
        rows, times = setting.trajectories(), setting.times
        forward = forward_steps(setting.model, times, rows)
        backward = reverse_steps(setting.model, times, rows)
        w = backward.exp().prod(1) / forward.exp().prod(1)
        sums = -backward[:, -1] - (backward[:, :-1] - forward).sum(1)
        left = exact("-log of the product", KERNEL, -w.log())
        right = exact("sum of -log", TRANSITION, sums)
        return [line_of(setting.family, left, right, of="trajectories")]


IDENTITIES: tuple[Identity, ...] = (Importance(), Jensen(), Gap(), Order(), Product())
ERRATA: tuple[Erratum, ...] = ()
