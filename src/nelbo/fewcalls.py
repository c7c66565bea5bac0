r"""The bound from a few network calls per example.

K calls per example are spent in two independent replicates. Each measures the decoder term once
and spends its other k calls on the pair terms: a number v in (0, 1) picks a pair i = F⁻¹(v) under
probabilities p_i, and

    diffusion ≈ Σ_i B_i + (1/k) Σ_j [term_i − b_i (G_i − E[G_i|x_0]) − B_i]/p_i,   i = i_j,

    v_j = (2j + 2u)/k and (2j + 2 − 2u)/k,   j < k/2,

two mirrored nodes in each stratum (and one node in a stratum of half the width if k is odd). Every
node is uniform on its stratum, so the estimate is unbiased; what is linear within a stratum costs
nothing. G is a stand-in for the term with known expectation (`controls`);
B_i = a_i + e_i min(E[G_i|x_0], m_i) is a guess of the term of this example, of which all N−1 are
summed without the network. p_i is proportional to the spread of what is left. p, a, b, e and m are
fixed beforehand on training examples: refitting them on the draws that they weigh would bias the
result.

References:
    Neyman 1934 (allocation to strata); Hammersley, Morton 1956 (antithetic nodes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nelbo.bound import prior_term
from nelbo.controls import Control
from nelbo.drawing import Drawer, Integrand

POINTS = 48
"""Pairs at which the pilot measures."""


@dataclass(frozen=True)
class Design:
    """What is fixed before the first example is measured; each (N−1,) float64.

    Arguments:
        probability: p, with which pairs are drawn.
        level, share, most: a, e and m of the guess B_i = a_i + e_i min(E[G_i|x_0], m_i), nats.
        slope: b, by which the fluctuation of G is taken away.
    """

    probability: Tensor
    level: Tensor
    share: Tensor
    most: Tensor
    slope: Tensor


class Few(NamedTuple):
    """Raw values of a few-call evaluation, nats: prior (n,), diffusion and decoder (n, 2)."""

    prior: Tensor
    diffusion: Tensor
    decoder: Tensor
    integrand: Integrand


def pilot(drawer: Drawer, examples: Tensor, control: Control | None) -> Design:
    """Fit the design on training examples.

    At up to 48 pairs two draws per example are taken. With f = G − E[G|x_0], half the mean product
    of the differences of the two draws is a covariance within an example: b = cov(term, f)/var(f).
    a and e are the least-squares line of the mean term on E[G|x_0] over examples, which is trusted
    up to the largest E[G|x_0] among them: an example unlike all of these (a pixel lit that never
    was) would have a wild guess, and pay for it in variance. p is the root mean square of what is
    left. All are interpolated between the pairs measured, and p is mixed
    with 5 % of its mean, so that no pair is left out.

    Arguments:
        examples: (m, *shape) stored training examples, m ≥ 2.
    """
    pairs = len(drawer.times) - 1
    x_0 = drawer.encode(examples).to(drawer.device)
    rows = torch.arange(len(examples))
    expected = _expected(control, x_0, drawer.times)
    at = torch.linspace(0, pairs - 1, min(POINTS, pairs)).round().long().unique()
    fits = torch.zeros(4, len(at), dtype=torch.float64)
    for j, pair in enumerate(at):
        draws = [_measured(drawer, x_0, rows, pair, control, "pilot", r, j) for r in range(2)]
        fits[:, j] = _fit(draws, expected[:, pair])
    spread, level, share, slope = (interpolated(at, values, pairs) for values in fits)
    spread = spread + 0.05 * spread.mean() + torch.finfo(torch.float64).tiny
    return Design(spread / spread.sum(), level, share, expected.max(0).values, slope)


def _fit(draws: list[tuple[Tensor, Tensor]], expected: Tensor) -> Tensor:
    """(4,) spread, level, share and slope at one pair, from two draws of (term, f)."""
    (one, f_one), (two, f_two) = draws
    rise, run = one - two, f_one - f_two
    slope = _ratio((rise * run).sum(), (run * run).sum())
    steadied = torch.stack([one - slope * f_one, two - slope * f_two])
    centred = expected - expected.mean()
    share = _ratio((steadied.mean(0) * centred).sum(), (centred**2).sum())
    level = steadied.mean() - share * expected.mean()
    spread = (steadied - level - share * expected).pow(2).mean().sqrt()
    return torch.stack([spread, level, share, slope])


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return above / below if bool(below > 0) else torch.zeros_like(above)


def _expected(control: Control | None, x_0: Tensor, times: Tensor) -> Tensor:
    """E[G_i|x_0] (B, N−1) on the CPU; zeros without a control."""
    if control is None:
        return torch.zeros(len(x_0), len(times) - 1, dtype=torch.float64)
    return control.expected(x_0, times).cpu()


def _measured(
    drawer: Drawer,
    x_0: Tensor,
    rows: Tensor,
    pair: Tensor,
    control: Control | None,
    *purpose: str | int,
) -> tuple[Tensor, Tensor]:
    """A pair term and f; pair () or (B,) in 0..N−2 stands for (times[pair], times[pair + 1])."""
    value, x_t = drawer.term(x_0, rows, pair + 1, *purpose)
    if control is None:
        return value, torch.zeros_like(value)
    s, t = drawer.times[pair], drawer.times[pair + 1]
    return value, control.fluctuation(x_0, x_t, s, t).cpu()


def measure(drawer: Drawer, calls: int, design: Design, control: Control | None) -> Few:
    """`calls` network calls per example, at least 4, in two replicates."""
    parts = [_batch(drawer, x_0, rows, calls, design, control) for rows, x_0 in drawer.batches()]
    nodes = calls - 2
    widths: list[tuple[int, ...]] = [(), (2,), (2,), (nodes,), (nodes,)]
    prior, diffusion, decoder, pair, terms = (
        drawer.collect([part[k] for part in parts], widths[k]) for k in range(5)
    )
    return Few(prior, diffusion, decoder, _scattered(drawer, pair.long(), terms))


def _batch(
    drawer: Drawer,
    x_0: Tensor,
    rows: Tensor,
    calls: int,
    design: Design,
    control: Control | None,
) -> tuple[Tensor, ...]:
    decoder, diffusion, pairs, terms = [], [], [], []
    cdf = design.probability.cumsum(0)
    expected = torch.minimum(_expected(control, x_0, drawer.times), design.most)
    guess = design.level + design.share * expected
    for r in range(2):
        decoder.append(drawer.term(x_0, rows, torch.tensor(0), "few", r, "decoder")[0])
        k = calls // 2 - 1 + (calls % 2 if r == 0 else 0)
        estimate = guess.sum(1)
        for j, v in enumerate(nodes(drawer.uniform(rows, 2, "nodes", k, r), k)):
            pair = torch.searchsorted(cdf, v * cdf[-1], right=True).clamp(max=len(cdf) - 1)
            value, f = _measured(drawer, x_0, rows, pair, control, "few", r, j)
            steadied = value - design.slope[pair] * f
            guessed = guess.gather(1, pair[:, None])[:, 0]
            estimate += (steadied - guessed) / design.probability[pair] / k
            pairs.append(pair.double())
            terms.append(steadied)
            drawer.tick(calls)
        diffusion.append(estimate)
    prior = prior_term(drawer.model, x_0, drawer.times).cpu()
    return (prior, *(torch.stack(v, 1) for v in (diffusion, decoder, pairs, terms)))


def nodes(u: Tensor, k: int) -> list[Tensor]:
    """k numbers per example in (0, 1), mirrored within strata of width 2/k.

    Arguments:
        u: (B, 2) uniform; the second column serves the single node of an odd k.
    """
    out = []
    for j in range(k // 2):
        out += [(2 * j + 2 * u[:, 0]) / k, (2 * j + 2 - 2 * u[:, 0]) / k]
    return [*out, (k - 1 + u[:, 1]) / k] if k % 2 else out


def interpolated(at: Tensor, values: Tensor, length: int) -> Tensor:
    """Linear interpolation of values at increasing integers `at` to 0..length−1."""
    i = torch.arange(length)
    right = torch.searchsorted(at, i).clamp(max=len(at) - 1)
    left = (right - 1).clamp(min=0)
    share = ((i - at[left]).double() / (at[right] - at[left]).clamp(min=1)).clamp(0, 1)
    return values[left] + share * (values[right] - values[left])


def _scattered(drawer: Drawer, pair: Tensor, terms: Tensor, most: int = 40) -> Integrand:
    """The integrand from scattered terms, mean and error in bins of log-SNR: a picture only."""
    logsnr = drawer.model.process.schedule.logsnr(drawer.times).cpu()
    # a last step that erases everything ends at log-SNR −∞ and has no density
    drawn, logsnr = logsnr[1:].isfinite()[pair], logsnr[logsnr.isfinite()]
    width, centre = logsnr[:-1] - logsnr[1:], 0.5 * (logsnr[:-1] + logsnr[1:])
    place = pair[drawn]
    density = terms[drawn] / width[place]
    bins = min(most, len(width))
    of = place * bins // len(width)
    count = torch.bincount(of, minlength=bins).double()
    zero = torch.zeros(bins, dtype=torch.float64)
    mean = zero.index_add(0, of, density) / count
    square = zero.index_add(0, of, (density - mean[of]) ** 2)
    where = zero.index_add(0, of, centre[place]) / count
    seen = (count > 1) & torch.isfinite(where)  # a chain may end at a log-SNR of −∞
    se = (square / (count - 1) / count).sqrt()
    return Integrand(where[seen], mean[seen], se[seen])
