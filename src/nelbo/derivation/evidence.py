r"""Two more certificates: counts beyond one threshold, and a product that grows if p ≠ g.

A threshold on the logit turns both laws into coins, whose rates have exact binomial limits; JSD of
the coins at the limits is a lower bound. The product of 4 D(x)(1 − D(y)) over pairs has mean at
most 1 if p = g, so that a large one is evidence against it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo import jsd
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.pairs import LOG2, Points, random_points, unequal
from nelbo.derivation.places import Said, below, equal, single
from nelbo.randomness import generator

POINTS = "two laws on four points"
E_VALUE, CELLS = "nelbo.jsd.log_e_value", "nelbo.jsd.two_cells"
ALPHA = 0.05


def binomial(n: int, rate: float) -> Tensor:
    """(n+1,) masses of the number of hits."""
    law = torch.distributions.Binomial(n, torch.tensor(rate, dtype=torch.float64))
    mass: Tensor = law.log_prob(torch.arange(n + 1, dtype=torch.float64)).exp()
    return mass


class TwoCells(Identity):
    id = "I63"
    name = "two-cells"
    title = "One threshold and two binomial limits bound JSD and total variation"
    latex = (
        r"\mathrm{LCB} = h\!\left(\tfrac{a+b}2\right) - \tfrac12 h(a) - \tfrac12 h(b)"
        r"\ \text{at}\ (a_L, b_U),\qquad \mathrm{TV} \ge a_L - b_U"
    )
    text = (
        "LCB = h((a+b)/2) - h(a)/2 - h(b)/2 at the limits a_L of P(s(x) > c), b_U of P(s(y) > c)"
    )
    assumes = "the threshold c is fixed beforehand; 0 where a_L <= b_U"
    steps = (
        "The channel 'is s above c?' lowers JSD (I33); of two coins a and b JSD is "
        "h((a + b)/2) − h(a)/2 − h(b)/2.",
        "For a > b it grows with a and falls with b.",
        "Clopper and Pearson: the rate at which so many hits or more have probability δ/2 exceeds "
        "the true rate with probability at most δ/2.",
        "Both limits hold together with probability 1 − δ, and then LCB <= JSD.",
    )
    functions = (CELLS, "nelbo.jsd.limit_below")
    source = "Clopper and Pearson 1934"

    def lines(self, seed: int) -> list[Line]:
        n, pairs = 8, [(0.8, 0.3), (0.5, 0.45), (0.5, 0.5)]
        limits = [jsd.limit_below(k, n, ALPHA / 2) for k in range(n + 1)]
        limit = torch.tensor(limits, dtype=torch.float64)
        rates = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        missed = torch.stack([binomial(n, float(r))[limit > r].sum() for r in rates])
        cells, variation = self._all(n)
        missing = [self._missing(n, a, b, cells, variation) for a, b in pairs]
        low, high = limit[:, None], 1 - limit.flip(0)
        apart = (low > high).expand(n + 1, n + 1)
        expected = torch.where(apart, self._coins(low, high).jsd(), torch.zeros(()).double())
        return [
            below(
                "coins",
                Said("P(limit > rate), all outcomes", "nelbo.jsd.limit_below"),
                Said("delta/2"),
                missed,
                single(ALPHA / 2),
                of="rates",
                unit="",
            ),
            equal(
                "coins",
                Said("LCB", CELLS),
                Said("JSD of the coins a_L and b_U, from their masses"),
                cells,
                expected,
                of="outcomes",
            ),
            below(
                "coins",
                Said("P(bound > truth), all outcomes; of JSD and of TV", CELLS),
                Said("delta"),
                torch.stack(missing),
                single(ALPHA),
                of="bounds and pairs of coins",
                unit="",
            ),
        ]

    @staticmethod
    def _all(n: int) -> Tensor:
        """(2, n+1, n+1) bounds of JSD and of TV for every number of hits of reals and fakes."""
        signs = [torch.where(torch.arange(n) < k, 1.0, -1.0) for k in range(n + 1)]
        rows = [[jsd.two_cells(x, y, 0.0, ALPHA) for y in signs] for x in signs]
        both = [[(cell.jsd_nats_lower, cell.tv_lower) for cell in row] for row in rows]
        return torch.tensor(both, dtype=torch.float64).movedim(2, 0)

    @classmethod
    def _missing(cls, n: int, a: float, b: float, cells: Tensor, variation: Tensor) -> Tensor:
        """(2,) probabilities that the bounds exceed JSD and TV of the coins a and b."""
        weight = torch.outer(binomial(n, a), binomial(n, b))
        truth = cls._coins(single(a), single(b)).jsd()
        return torch.stack([weight[cells > truth].sum(), weight[variation > a - b].sum()])

    @staticmethod
    def _coins(a: Tensor, b: Tensor) -> Points:
        return Points(torch.stack([a, 1 - a], -1), torch.stack([b, 1 - b], -1))


class EValue(Identity):
    id = "I64"
    name = "e-value"
    title = "The product of 4 D(x)(1 − D(y)) is an e-value against p = g"
    latex = (
        r"E = \prod_i 4 D(x_i)(1-D(y_i)),\qquad "
        r"\mathbb E_{p=g}[E] \le 1,\qquad \mathbb E[\log E] = 2 n L_D"
    )
    text = "E = prod 4 D(x)(1 - D(y)): mean at most 1 if p = g; E[log E] = 2 n L_D always"
    assumes = "D fixed beforehand; logits not clipped"
    steps = (
        "If x and y have one law, E[4 D(x)(1 − D(y))] = 4 a (1 − a) with a = E D, and that is at "
        "most 1.",
        "Pairs are independent, so the product has mean at most 1 too: reaching 1/δ has "
        "probability at most δ (Markov).",
        "log E is a sum of log 4 + log D(x) + log(1 − D(y)), each with mean 2 L_D.",
    )
    functions = (E_VALUE, "nelbo.gan.value")
    source = "Pandeva et al. 2024; Grünwald, de Heide and Koolen 2024 (e-values)"

    def lines(self, seed: int) -> list[Line]:
        laws, logits = random_points(20), random_points(20, seed=1).ideal
        each = torch.stack([self._pairs(row) for row in logits])
        both = laws.p[:, :, None] * laws.p[:, None]
        cross = laws.p[:, :, None] * laws.g[:, None]
        draws = generator(seed, "derivation", "e-value")
        law, best = unequal().p, unequal().ideal
        x, y = torch.multinomial(law, 2 * 1000 * 30, True, generator=draws).view(2, 1000, 30)
        grown = [jsd.log_e_value(best[a], best[b]) for a, b in zip(x, y, strict=True)]
        reached = torch.tensor(grown) >= math.log(1 / ALPHA)
        share, se = mean_se(reached.double())
        return [
            below(
                POINTS,
                Said("E[E] of one pair where g = p", E_VALUE),
                Said("1"),
                (both * each.exp()).sum((1, 2)),
                single(1.0),
                of="random laws with random D",
                unit="",
            ),
            equal(
                POINTS,
                Said("E[log E] of one pair", E_VALUE),
                Said("2 L_D = 2 log 2 + V", "nelbo.gan.value"),
                (cross * each).sum((1, 2)),
                2 * LOG2 + laws.value(logits),
                of="random pairs with random D",
            ),
            Line(
                POINTS,
                (Side("P(E >= 1/delta) where g = p", share, se, E_VALUE), Side("delta", ALPHA)),
                "<=",
                note="1000 tests of 30 pairs",
                unit="",
            ),
        ]

    @staticmethod
    def _pairs(logits: Tensor) -> Tensor:
        """(K, K) log e-values of every pair of points."""
        rows = [[jsd.log_e_value(x[None], y[None]) for y in logits] for x in logits]
        return torch.tensor(rows, dtype=torch.float64)


IDENTITIES: tuple[Identity, ...] = (TwoCells(), EValue())
ERRATA: tuple[Erratum, ...] = ()
