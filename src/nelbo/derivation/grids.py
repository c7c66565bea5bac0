r"""Any grid is a chain of its own; with exact reverse steps the bound is tight on every one.

    ∫ q(x_s|x_r) q(x_t|x_s) dx_s = q(x_t|x_r)   (Chapman-Kolmogorov),

so that leaving times out leaves the other marginals as they are, and the bound of the chain that
is left speaks of the model with the kernels between its own times.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from nelbo.bits import Bits
from nelbo.bound import prior_term
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.derivation.models import (
    MEAN,
    RATE,
    RATES,
    VARIANCE,
    exact_affine,
    exact_bits,
    line_law,
)
from nelbo.derivation.settings import Enumerated, Joint, Known, Setting, patterns
from nelbo.derivation.stated import Stated, averaged, exact, line_of
from nelbo.distributions import DiagonalNormal, kl_divergence, per_example
from nelbo.reverse import strided

TERMS, PRIOR_TERM = "nelbo.bound.term_of", "nelbo.bound.prior_term"
TRANSITION = "nelbo.processes.base.Process.transition"
REACH, LATTICE = 12.0, 1201
"""Standard deviations of q(x_s|x_r), and how many points there."""


class Oracle(Stated):
    id = "I16"
    name = "oracle"
    title = "With the exact reverse steps the bound is the likelihood, on every grid"
    latex = (
        r"\mathbb E_{q(x_0)}L=H(q)+\mathrm{KL}(q(x_N)\|\pi),\qquad "
        r"L(x_0)=-\log q(x_0)\ \text{with prior } q(x_N)"
    )
    text = (
        "E_q(x_0) L = H(q) + KL(q(x_N) ‖ π); with q(x_N) as the prior L(x_0) = -log q(x_0) for "
        "every x_0"
    )
    assumes = "kernels and decoder are the reverse conditionals of q(x_0) q(x_{1:N}|x_0)"
    steps = (
        "Then p_θ(x_{0:N}) and q(x_{0:N}) differ in the law of x_N alone.",
        "So w = q(x_0) π(x_N)/q(x_N), and w = q(x_0) if the prior is q(x_N).",
        "Take the mean of -log w. Any grid will do: the price of few steps is that real reverse "
        "conditionals are not of the form of the kernels.",
    )
    functions = (
        TERMS,
        "nelbo.bound.prior_term",
        "nelbo.variances.Optimal",
        "nelbo.binary.Context",
    )
    source = "common lecture notes; Kingma et al. 2021, appendix"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        return []

    def apart(self, seed: int) -> list[Line]:
        grid = exact_affine().times
        line_grids = (grid, grid[[0, 4]], grid[[1, 3]], torch.linspace(0, 1, 40).double())
        steps = exact_bits().times
        bit_grids = (steps, steps[[0, 2]], steps[:1])
        lines = []
        for line in (exact_affine(times=times) for times in line_grids):
            truth = -line_law().log_prob(line.x_0[:, 0])
            lines += _tight(line, _line_end(line), float(line_law().entropy()), truth)
        for bit in (exact_bits(times=times) for times in bit_grids):
            truth = -bit.weight.log()
            lines += _tight(bit, _bit_end(bit), bit.average(truth), truth)
        return lines


def _line_end(setting: Known) -> DiagonalNormal:
    """q(x_N) of N(MEAN, VARIANCE) data."""
    t = setting.times[-1]
    keep, lose = setting.model.process.schedule.keep(t), setting.model.process.schedule.lose(t)
    mean = (keep.sqrt() * MEAN).expand_as(setting.x_0)
    return DiagonalNormal(mean, (keep * VARIANCE + lose).log())


def _bit_end(setting: Known) -> Bits:
    """q(x_N) of bits with the rates RATES."""
    t = setting.times[-1]
    keep, lose = setting.model.process.schedule.keep(t), setting.model.process.schedule.lose(t)
    rates = torch.tensor(RATES, dtype=torch.float64)
    return Bits((keep * rates + lose * RATE).logit().expand_as(setting.x_0))


def _tight(
    setting: Known, end: DiagonalNormal | Bits, entropy: float, surprise: Tensor
) -> list[Line]:
    """The average against the entropy, and every example with the exact prior.

    Arguments:
        end: q(x_N). entropy: H(q). surprise: (n,) −log q(x_0).
    """
    process, n = setting.model.process, setting.count
    total, x_0 = setting.bound().total, setting.x_0
    last = per_example(kl_divergence(end, process.prior(x_0)))[:1]
    mean = exact("E L", TERMS, averaged(total, setting.weight))
    known = exact("H(q) + KL(q(x_N) ‖ π)", "closed form", entropy + last)
    note = f"a grid of {n}" if n > 1 else "a grid of 1: a decoder alone"
    with_end = per_example(kl_divergence(process.marginal(x_0, setting.times[-1]), end))
    swapped = total - prior_term(setting.model, x_0, setting.times) + with_end
    each = exact("L(x_0) with prior q(x_N)", TERMS, swapped)
    truth = exact("-log q(x_0)", "closed form", surprise)
    return [
        line_of(setting.family, mean, known, note),
        line_of(setting.family, each, truth, note, of="examples"),
    ]


class Subsets(Stated):
    id = "I17"
    name = "subsets"
    title = "Any subset of the times is a chain again"
    latex = r"\int q(x_s|x_r)\,q(x_t|x_s)\,dx_s=q(x_t|x_r)"
    text = (
        "∫ q(x_s|x_r) q(x_t|x_s) dx_s = q(x_t|x_r), so that L on a subset of the times is the "
        "bound of the model with the kernels between those times"
    )
    assumes = "the kernel serves every pair s < t, not only neighbours"
    steps = (
        "Two steps of one family make a step of the family: α and the noise compose.",
        "So the latents of the subset have the same marginals as before.",
        "All of the derivation used only marginals, steps and posteriors of neighbours: it holds "
        "for the subset, with its own p_θ(x_0).",
    )
    functions = (TRANSITION, TERMS, "nelbo.reverse.strided")
    source = "Nichol, Dhariwal 2021, section 4; Kingma et al. 2021"

    def on(self, setting: Setting, seed: int) -> list[Line]:
        if not isinstance(setting, Known):
            return []
        lines = [_composed(setting)]
        for kept in ([0, setting.count - 1], list(range(1, setting.count))):
            lines += _subset(setting, kept)
        return lines


def _composed(setting: Known) -> Line:
    """Chapman-Kolmogorov for all triples of times, on the ends of trajectories."""
    rows, process = setting.trajectories(), setting.model.process
    two, one = [], []
    for i, j, k in combinations(range(setting.count), 3):
        r, s, t = (setting.times[m] for m in (i, j, k))
        x_r, x_t = rows.latents[:, i], rows.latents[:, k]
        pick = torch.arange(0, len(x_r), max(1, len(x_r) // 64))
        two.append(_through(setting, x_r[pick], x_t[pick], (r, s, t)))
        one.append(per_example(process.transition(x_r[pick], r, t).log_prob(x_t[pick])))
    left = exact("log ∫ q(x_s|x_r) q(x_t|x_s) dx_s", TRANSITION, torch.cat(two))
    right = exact("log q(x_t|x_r)", TRANSITION, torch.cat(one))
    return line_of(setting.family, left, right, "r < s < t", of="triples and ends")


def _through(
    setting: Known, x_r: Tensor, x_t: Tensor, times: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """log ∫ q(x_s|x_r) q(x_t|x_s) dx_s, (R,): over all bits, or over a lattice of x_s."""
    r, s, t = times
    process = setting.model.process
    law = process.transition(x_r, r, s)
    if isinstance(setting, Enumerated):
        points, log_size = patterns(x_r.shape[1])[:, None].expand(-1, *x_r.shape), 0.0
    else:
        z = torch.linspace(-REACH, REACH, LATTICE, dtype=torch.float64)[:, None, None]
        spread = law.variance.sqrt()
        points = law.mean + spread * z
        log_size = float(spread.flatten()[0].log()) + math.log(2 * REACH / (LATTICE - 1))
    log_first = law.log_prob(points).sum(2)
    flat = process.transition(points.flatten(0, 1), s, t)
    log_second = flat.log_prob(x_t.repeat(len(points), 1)).sum(1).view(len(points), -1)
    both: Tensor = (log_first + log_second).logsumexp(0)
    return both + log_size


def _subset(setting: Known, kept: list[int]) -> list[Line]:
    """The bound of the chain that is left against its own likelihood and gap."""
    times = setting.times[kept]
    left_out = replace(setting, model=strided(setting.model, times), times=times)
    total, log_p = left_out.bound().total, left_out.log_likelihood()
    note = f"times {', '.join(str(k + 1) for k in kept)} of {setting.count}"
    loss = exact("L on the subset", TERMS, total)
    likelihood = exact("-log p_θ(x_0) of the subset", "nelbo.reverse.strided", -log_p)
    lines = [line_of(setting.family, loss, likelihood, note, relation=">=", of="examples")]
    if isinstance(left_out, Joint):
        gap = exact("-log p_θ(x_0) + KL(q ‖ p_θ)", TRANSITION, left_out.gap() - log_p)
        lines.append(line_of(setting.family, loss, gap, note, of="examples"))
    return lines


IDENTITIES: tuple[Identity, ...] = (Oracle(), Subsets())
ERRATA: tuple[Erratum, ...] = ()
