r"""One error curve M_t gives the best variance, the bound of every grid, and the best grids.

    σ*² = β̃ (1 + (snr_s − snr_t) M_t),     E KL = (d/2) log(1 + (snr_s − snr_t) M_t),
    cost of a grid = decoder at its first time + prior + Σ_pairs of either form,

M_t = E‖x_0 − x̂_0(x_t)‖²/d of the network, exact or not. Here the curve is exact, and each figure
is held against the bound's own terms, summed over points.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from nelbo.bound import decoder_term, pair_term, prior_term
from nelbo.curve import Curve
from nelbo.derivation.denoisers import (
    at_logsnr,
    averaged,
    called,
    compared,
    lattice,
    mixture_points,
    model_of,
    two_modes,
)
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.parameterizations import with_variance
from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian, Pair
from nelbo.reverse import Reverse, strided
from nelbo.variances import Posterior, Transition, Variance

PAIR, OPTIMAL = "nelbo.bound.pair_term", "nelbo.variances.Optimal"
VALUES, SUBSETS = "nelbo.curve.Curve.values", "nelbo.curve.Curve.subsets"
LOGSNR = [4.0, 3.2, 2.0, 1.3, 0.4, -0.5, -1.7, -3.0, -6.0]
SCALE, SHIFT = 0.9, 0.1
"""x̂_0 = .9 E[x_0|x_t] + .1: the network is not the best one."""
SIZES = (1, 2, 3, 5)
GRIDS = (tuple(range(9)), (0, 2, 4, 6, 8), (1, 5, 8), (3, 8), (8,))


class Study:
    """A mixture of two normals, nine latents, a network that is off, and its exact curve."""

    def __init__(self) -> None:
        self.data, self.schedule = two_modes(), at_logsnr(LOGSNR)
        self.times = self.schedule.grid()
        self.points = mixture_points(self.data)
        self.model = model_of(self.data, self.schedule, scale=SCALE, shift=SHIFT)
        self.error = self._error()
        lose = self.schedule.lose(self.times)
        decoder = 0.5 * ((2 * math.pi * lose).log() + self.error / lose)
        # E x_0² = 1, so that the prior's divergence is its log term
        prior = -0.5 * lose[-1:].log()
        process = Gaussian(self.schedule)
        self.curve = Curve(self.times, process, self.error[None], prior, decoder[None], 1)

    def _error(self) -> Tensor:
        """(9,) M_t: what no network avoids, and what this one adds."""
        found = []
        for keep, lose in zip(
            self.schedule.keep(self.times), self.schedule.lose(self.times), strict=True
        ):
            x_t, weight = lattice(self.data.diffused(keep, lose))
            best = self.data.denoise(x_t, keep, lose)[:, 0]
            added = (best - (SCALE * best + SHIFT)) ** 2
            found.append(weight @ (self.data.spread(x_t, keep, lose) + added))
        return torch.stack(found)

    def costs(self, variance: Variance) -> Tensor:
        """(9, 9) E KL of every pair s < t, by the bound's own terms; infinite elsewhere."""
        at, x_0, index = called(with_variance(self.model, variance), self.points, self.times)
        table = torch.full((len(self.times), len(self.times)), math.inf, dtype=torch.float64)
        for j in range(1, len(self.times)):
            rows = (index == j).nonzero()[:, 0]
            here, x = at[rows], x_0[rows]
            for i in range(j):
                table[i, j] = averaged(pair_term(here, x, self.times[i]), self.points)[0]
        return table

    def decoder(self) -> Tensor:
        """(9,) the expected decoder term at every time, by the bound's own term."""
        at, x_0, _ = called(self.model, self.points, self.times)
        return averaged(decoder_term(at, x_0), self.points)

    def total(self, model: Reverse, kept: Tensor) -> Tensor:
        """E L of the chain of these places, by the bound's own terms."""
        times = self.times[kept]
        at, x_0, index = called(strided(model, times), self.points, times)
        first = index == 0
        total = self.points.weight @ decoder_term(at[first], x_0[first])
        total = total + self.points.weight @ prior_term(model, self.points.x_0, times)
        if len(kept) > 1:
            rows = ~first
            value = pair_term(at[rows], x_0[rows], times[index[rows] - 1])
            total = total + averaged(value, self.points).sum()
        return total


class OptimalSubsets(Identity):
    id = "I44"
    name = "optimal-subsets"
    title = "The best grid of every size, by dynamic programming over pairs"
    latex = (
        r"D_1[j]=\mathrm{dec}[j],\quad D_{k+1}[j]=\min_{i<j}\big(D_k[i]+F[i,j]\big),\quad "
        r"\min_{|S|=K}L_S=D_K[N]+\mathrm{prior}"
    )
    text = "D_1[j] = dec[j]; D_{k+1}[j] = min_i (D_k[i] + F[i,j]); best of size K: D_K[N] + prior"
    assumes = "a network that depends on (x_t, t) only; the last time is kept"
    steps = (
        "Any increasing subset of the times is a chain of its own, with the same marginals.",
        "Its bound is a sum over its pairs, and the expected term F[i,j] of a pair does not "
        "depend on the rest of the subset.",
        "A cheapest path of k + 1 times that ends in j is a cheapest path of k times that ends in "
        "some i < j, and the edge (i, j).",
        "K N² steps replace all subsets. Fit on training data, report on test data.",
    )
    functions = (SUBSETS, "nelbo.subsets.best_subsets", PAIR, "nelbo.bound.decoder_term")
    source = "Watson, Ho, Norouzi, Chan 2021"

    def lines(self, seed: int) -> list[Line]:
        s, lines = Study(), []
        decoder = s.decoder()
        for name, variance in (("beta~", Posterior()), ("the optimal", s.curve.optimal())):
            found = s.curve.subsets(variance, max(SIZES))
            costs = s.costs(variance)
            least = [brute(costs, decoder, size) for size in SIZES]
            chosen = [_cost(costs, decoder, found.best(size).tolist()) for size in SIZES]
            lines.append(
                compared(
                    "Gaussian",
                    ("the terms of its grid", torch.tensor(chosen, dtype=torch.float64), PAIR),
                    ("dynamic programming", found.costs[torch.tensor(SIZES) - 1], SUBSETS),
                    (
                        "the least of all subsets",
                        torch.tensor(least, dtype=torch.float64),
                        "brute force",
                    ),
                    tolerance=1e-7,
                    note=f"{SIZES} of 9, variance {name}, without prior",
                )
            )
        return lines


def _cost(pairs: Tensor, decoder: Tensor, path: list[int]) -> float:
    edges = zip(path, path[1:], strict=False)
    return float(decoder[path[0]]) + sum(float(pairs[i, j]) for i, j in edges)


def brute(pairs: Tensor, decoder: Tensor, size: int) -> float:
    """The least cost of all subsets of this size that keep the last time."""
    last = len(pairs) - 1
    return min(
        _cost(pairs, decoder, [*some, last]) for some in combinations(range(last), size - 1)
    )


class Moved(Variance):
    """log σ² of another rule, plus a constant."""

    def __init__(self, rule: Variance, by: Tensor) -> None:
        super().__init__()
        self.rule, self.by = rule, by

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return self.rule.between(pair, extra, like) + along(self.by, like)


class OptimalVariance(Identity):
    id = "I45"
    name = "optimal-variance"
    title = "The best variance of a step, and what the step then costs"
    latex = (
        r"\sigma_*^2=\tilde\beta\big(1+(\mathrm{snr}_s-\mathrm{snr}_t)M_t\big),\qquad \mathbb E\,"
        r"\mathrm{KL}=\tfrac d2\log\big(1+(\mathrm{snr}_s-\mathrm{snr}_t)M_t\big)"
    )
    text = "sigma*² = beta~ (1 + (snr_s-snr_t) M_t); E KL = d/2 log(1 + (snr_s-snr_t) M_t)"
    assumes = "one variance per step; any network; M_t measured on training data"
    steps = (
        "E KL = d/2 [beta~/v - 1 - log(beta~/v) + k_s c² M_t/v] for a variance v.",
        "Its derivative in v is 0 at v = beta~ + k_s c² M_t, and k_s c² = beta~ (snr_s-snr_t).",
        "Put in: the bracket becomes log(v/beta~).",
        "log(1 + x) <= x: never more than with beta~. It needs no exact denoiser, only its error.",
    )
    functions = (OPTIMAL, PAIR, "nelbo.data.mixture.GaussianMixture.spread")
    source = "Bao, Li, Zhu, Zhang 2022, theorem 1; Nichol, Dhariwal 2021, section 3.1"

    def lines(self, seed: int) -> list[Line]:
        s = Study()
        optimal = s.curve.optimal()
        snr = s.schedule.logsnr(s.times).exp()
        gain = (snr[:-1] - snr[1:]) * s.error[1:]
        cost = self._pairs(s, optimal).detach()
        move = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(self._pairs(s, Moved(optimal, move)).sum(), move)
        fixed = 0.5 * gain.sum()
        around = [self._pairs(s, Moved(optimal, torch.tensor(v))).sum() for v in (-0.02, 0.02)]
        return [
            compared(
                "Gaussian",
                ("E KL with sigma*²", cost, OPTIMAL),
                ("½ log(1 + (snr_s-snr_t) M_t)", 0.5 * gain.log1p(), "closed form"),
                tolerance=1e-8,
                note="a network that is off",
            ),
            compared(
                "Gaussian",
                ("d sum E KL/d log sigma² at sigma*²", slope, OPTIMAL),
                ("0", 0.0, "a minimum"),
                tolerance=1e-7,
            ),
            Line(
                "Gaussian",
                (
                    Side("sum E KL with sigma*²", float(cost.sum()), by=OPTIMAL),
                    Side("with 2 % more or less", float(min(around)), by=PAIR),
                    Side("with beta~", float(fixed), by="closed form"),
                ),
                "<=",
                tolerance=0.0,
            ),
        ]

    @staticmethod
    def _pairs(s: Study, variance: Variance) -> Tensor:
        """(8,) E KL of neighbours."""
        model = with_variance(s.model, variance)
        at, x_0, index = called(model, s.points, s.times)
        rows = index > 0
        return averaged(pair_term(at[rows], x_0[rows], s.times[index[rows] - 1]), s.points)


class StepCurve(Identity):
    id = "I46"
    name = "step-curve"
    title = "The bound of every subset of the times, from one error curve"
    latex = (
        r"\mathbb E L_S=\mathrm{dec}[t_1]+\mathrm{prior}+\tfrac d2\sum(\mathrm{snr}_s-\mathrm{snr}"
        r"_t)M_t\quad\text{or}\quad\tfrac d2\sum\log\big(1+(\mathrm{snr}_s-\mathrm{snr}_t)M_t\big)"
    )
    text = "E L = dec + prior + d/2 sum (snr_s-snr_t) M_t, or d/2 sum log(1 + (snr_s-snr_t) M_t)"
    assumes = "a variance that depends on times alone"
    steps = (
        "The network sees (x_t, t) and not the grid: its error M_t is the same in every chain.",
        "A pair's expected divergence needs M at its later time only.",
        "So N calls per example, one at every time, tell the bound of all 2^(N-1) chains.",
    )
    functions = (VALUES, PAIR, "nelbo.bound.decoder_term", "nelbo.bound.prior_term")
    source = "Kingma et al. 2021, section 4; Watson, Ho, Norouzi, Chan 2021"

    def lines(self, seed: int) -> list[Line]:
        s = Study()
        rules = {"beta~": Posterior(), "beta": Transition(), "optimal": s.curve.optimal()}
        kept = [torch.tensor(grid) for grid in GRIDS]
        return [
            compared(
                "Gaussian",
                ("from the curve", torch.cat([s.curve.values(v, k) for k in kept]), VALUES),
                (
                    "from the terms",
                    torch.stack([s.total(with_variance(s.model, v), k) for k in kept]),
                    PAIR,
                ),
                tolerance=1e-7,
                note=f"variance {name}",
            )
            for name, v in rules.items()
        ]


IDENTITIES: tuple[Identity, ...] = (OptimalSubsets(), OptimalVariance(), StepCurve())
ERRATA: tuple[Erratum, ...] = ()
