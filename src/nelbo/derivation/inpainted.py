r"""Two more facts about reverse steps: the weight of inpainting, and how uncertain a step can be.

Inpainting that noises the known part y anew walks with y_{1:N} ~ q(·|y_0) and draws the rest from
the model. It is exact with the weight

    W = [p(y_N)/q(y_N|y_0)] Π_pairs p_θ(y_s|x_t)/q(y_s|y_t, y_0) · p_θ(y_0|x_1),   E W = p_θ(y_0).

The entropy of a reverse step lies between two that know the forward process only,

    H_q(X_t|X_s) + H_q(X_s|X_0) − H_q(X_t|X_0) ≤ H_q(X_s|X_t) ≤ H_q(X_t|X_s).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo.conditioning import posterior_samples
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.models import BERNOULLI, GAUSSIAN, VARIANCE, affine, bits
from nelbo.derivation.pairs import normal
from nelbo.derivation.places import Said, below
from nelbo.derivation.settings import Enumerated
from nelbo.distributions import per_example
from nelbo.entropy import step_entropies
from nelbo.factors import Observed
from nelbo.processes.gaussian import Gaussian

SAMPLES, ENTROPIES = "nelbo.conditioning.posterior_samples", "nelbo.entropy.step_entropies"
KERNEL = "nelbo.reverse.Reverse.kernel"


def renoised(setting: Enumerated, y_0: float) -> tuple[Tensor, Tensor]:
    """Masses and weights W of every path with bit 0 known, bit 1 drawn by the model; (R,) each."""
    times, process = setting.times, setting.model.process
    rows = setting.trajectories()
    x, first = rows.latents[: len(rows.latents) // rows.groups], slice(0, 1)
    known = torch.full((len(x), 2), y_0, dtype=torch.float64)
    top = len(times) - 1
    prior = process.prior(x[:, top]).log_prob(x[:, top])
    ahead = process.marginal(known, times[top]).log_prob(x[:, top])
    log_mass, log_w = ahead[:, 0] + prior[:, 1], prior[:, 0] - ahead[:, 0]
    for i in range(top, 0, -1):
        s, t, x_s = times[i - 1], times[i], x[:, i - 1]
        ours = setting.model.kernel(x[:, i], t, s).log_prob(x_s)
        theirs = process.posterior(x[:, i], known, t, s).log_prob(x_s)
        log_mass = log_mass + theirs[:, 0] + ours[:, 1]
        log_w = log_w + ours[:, 0] - theirs[:, 0]
    decoded = setting.model.decoder(x[:, 0], times[0]).log_prob(known)
    return log_mass.exp(), (log_w + per_example(decoded[:, first])).exp()


class Inpainting(Identity):
    id = "I56"
    name = "inpainting"
    title = "Inpainting that noises the known part anew is exact with a weight"
    latex = (
        r"W = \frac{p(y_N)}{q(y_N|y_0)}\prod_{\text{pairs}}"
        r"\frac{p_\theta(y_s|x_t)}{q(y_s|y_t,y_0)}\,p_\theta(y_0|x_1),\qquad "
        r"\mathbb E\,W = p_\theta(y_0)"
    )
    text = "W = p(y_N)/q(y_N|y_0) prod p(y_s|x_t)/q(y_s|y_t, y_0) p(y_0|x_1): E W = p(y_0)"
    assumes = (
        "kernels that factorise over dimensions; the unknown part is drawn given the whole x_t"
    )
    steps = (
        "A path has mass q(y_{1:N}|y_0) times the model's law of the unknown part, step by step.",
        "Times W the posteriors of y cancel and the model's law of y takes their place.",
        "What is left is p_θ(y_0, x_{1:N}): its sum over all paths is p_θ(y_0).",
    )
    functions = (KERNEL, SAMPLES)
    source = "Lugmayr et al. 2022 (the walk, without a weight); Trippe et al. 2023 (the weight)"

    def lines(self, seed: int) -> list[Line]:
        setting = bits()
        mass = setting.log_likelihood().exp()
        found = []
        for y_0 in (0.0, 1.0):
            path, w = renoised(setting, y_0)
            truth = float(mass[setting.x_0[:, 0] == y_0].sum())
            known = torch.tensor([[y_0, 0.0]], dtype=torch.float64)
            factor = Observed(known, torch.tensor([True, False]))
            done = posterior_samples(
                setting.model, factor, setting.times, 100, populations=100, seed=seed, batch=10_000
            )
            by_particles = mean_se(done.log_evidence.exp())
            exact = Side("p(y_0), kernel by kernel", truth)
            walked = Side("E W over every path", float((path * w).sum()), 0.0, KERNEL)
            particles = Side("evidence by particles, r a delta at y", *by_particles, SAMPLES)
            what = f"y_0 = {y_0:g}, the first of two bits"
            found += [
                Line(BERNOULLI, (walked, exact), note=what, unit=""),
                Line(BERNOULLI, (particles, exact), note=f"{what}; 100 populations", unit=""),
            ]
        return found


def reverse_entropy(setting: Enumerated, index: int) -> float:
    """H_q(X_s|X_t) of the pair (index − 1, index), by enumeration of both."""
    process, s, t = setting.model.process, setting.times[index - 1], setting.times[index]
    x = setting.x_0
    here = torch.stack(
        [per_example(process.marginal(row.expand_as(x), s).log_prob(x)) for row in x]
    ).exp()
    onward = torch.stack(
        [per_example(process.transition(row.expand_as(x), s, t).log_prob(x)) for row in x]
    ).exp()
    joint = (setting.weight @ here)[:, None] * onward
    later = joint.sum(0)
    return float(-torch.xlogy(joint, joint).sum() + torch.xlogy(later, later).sum())


class StepEntropy(Identity):
    id = "I57"
    name = "step-entropy"
    title = "How uncertain a reverse step is lies between two figures of the forward process"
    latex = r"H_q(X_t|X_s) + H_q(X_s|X_0) - H_q(X_t|X_0) \le H_q(X_s|X_t) \le H_q(X_t|X_s)"
    text = "H(X_t|X_s) + H(X_s|X_0) - H(X_t|X_0) <= H(X_s|X_t) <= H(X_t|X_s)"
    assumes = "the upper one only where H(X_t) >= H(X_s): E|x_0|² = d and normal, or uniform bits"
    steps = (
        "Bayes in entropies: H(X_s|X_t) = H(X_t|X_s) + H(X_s) − H(X_t).",
        "If H(X_t) >= H(X_s) the last two terms are not positive: the upper bound.",
        "The lower one is H(X_s|X_t, X_0) by the same rule, and to know X_0 as well can only "
        "lower an entropy.",
        "For normal steps they are ½ log(2πe β̃) and ½ log(2πe β) per dimension.",
    )
    functions = (ENTROPIES, "nelbo.data.mixture.GaussianMixture.diffused")
    source = "Sohl-Dickstein et al. 2015, section 2.6 and appendix A"

    def lines(self, seed: int) -> list[Line]:
        setting = bits(rate=0.5)
        each = step_entropies(setting.model.process, setting.x_0, setting.times)
        lower, upper = setting.weight @ each.lower, setting.weight @ each.upper
        entropies = [reverse_entropy(setting, i) for i in range(1, setting.count)]
        exact = torch.tensor(entropies, dtype=torch.float64)
        return [
            *self._both(BERNOULLI, lower, exact, upper, "every pattern of both latents"),
            *self._normal(VARIANCE, True),
            *self._normal(4.0, False),
        ]

    def _normal(self, variance: float, narrow: bool) -> list[Line]:
        """Of N(0, variance) data, whose reverse step is normal."""
        setting = affine()
        process, times, data = setting.model.process, setting.times, normal(0, variance**0.5)
        assert isinstance(process, Gaussian)
        each = step_entropies(process, setting.x_0[:1], times)
        pair = process.pair(times[:-1], times[1:])
        keep, lose = process.schedule.keep(times), process.schedule.lose(times)
        spread = torch.cat(
            [data.diffused(k, v).covariance()[0] for k, v in zip(keep, lose, strict=True)]
        )
        conditional = spread[:-1] - pair.log_alpha.exp() * spread[:-1].square() / spread[1:]
        exact = 0.5 * (2 * math.pi * math.e * conditional).log()
        lines = self._both(GAUSSIAN, each.lower[0], exact, each.upper[0], "closed form")
        if narrow:
            return lines
        broken = below(
            GAUSSIAN,
            Said("H(X_t|X_s), where H(X_t) < H(X_s)", ENTROPIES),
            Said("H(X_s|X_t), data of variance 4"),
            each.upper[0],
            exact,
            of="pairs, no upper bound here",
        )
        return [lines[0], broken]

    @staticmethod
    def _both(family: str, lower: Tensor, exact: Tensor, upper: Tensor, how: str) -> list[Line]:
        step = Said(f"H(X_s|X_t), {how}")
        return [
            below(
                family,
                Said("H(X_t|X_s) + H(X_s|X_0) - H(X_t|X_0)", ENTROPIES),
                step,
                lower,
                exact,
                of="pairs",
            ),
            below(family, step, Said("H(X_t|X_s)", ENTROPIES), exact, upper, of="pairs"),
        ]


IDENTITIES: tuple[Identity, ...] = (Inpainting(), StepEntropy())
ERRATA: tuple[Erratum, ...] = ()
