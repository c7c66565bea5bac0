r"""Where a few calls go: strata, mirrored nodes and Latin hypercubes, and the variance of each.

    strata, n_i calls each            Σ σ_i²/n_i,   (Σ σ_i)²/n at the best n_i ∝ σ_i
    independent, p_i ∝ r_i = rms      [(Σ r_i)² − J²]/n, never less
    mirrored nodes                    0 for what is linear in each cell
    a Latin hypercube of n examples   ΣΣ D²/(n² (n−1)), D the table without both main effects

J is the sum of the terms' means, σ_i their deviations.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from nelbo.derivation.denoisers import compared
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.design import nodes
from nelbo.randomness import generator
from nelbo.timesampling import MEMORY, UNIFORM, SecondMoment, place

NODES, PLACE = "nelbo.design.nodes", "nelbo.timesampling.place"
MOMENT = "nelbo.timesampling.SecondMoment"
REPEATS = 2000
SQUARED = "nats²"


def vector(values: list[float]) -> Tensor:
    """(n,) float64."""
    return torch.tensor(values, dtype=torch.float64)


MEANS, SPREADS = vector([3.0, 1.0, 0.5, 2.0]), vector([1.0, 2.0, 3.0, 6.0])
"""Of four terms; 12 calls are 1, 2, 3 and 6 of them at the best allocation."""


class Strata(Identity):
    id = "I39"
    name = "strata"
    title = "Calls in proportion to the spread of a term: the best allocation"
    latex = (
        r"\mathrm{Var}\,\hat J=\sum_g\frac{\Delta_g^2\sigma_g^2}{n_g}\ \ge\ \frac1n\Big(\sum_g"
        r"\Delta_g\sigma_g\Big)^2,\qquad n\,\mathrm{Var}_{\mathrm{iid}}\ge\Big(\sum_i r_i\Big)^2"
        r"-J^2\ge\Big(\sum_i\sigma_i\Big)^2"
    )
    text = "Var of strata = sum sigma_i²/n_i, least at n_i ~ sigma_i; independent draws cost more"
    assumes = "allocation and probabilities fixed beforehand"
    steps = (
        "n_i independent draws of term i have a mean of variance sigma_i²/n_i; the terms add up.",
        "Cauchy-Schwarz: (sum sigma_i)² <= (sum sigma_i²/n_i)(sum n_i), equal at n_i ~ sigma_i.",
        "Independent draws of (i, term_i/p_i) have the second moment sum r_i²/p_i >= "
        "(sum r_i)², r_i² = E term_i², equal at p_i ~ r_i; subtract J².",
        "With r_i² = a_i² + sigma_i² the triangle inequality gives (sum r)² >= (sum a)² + "
        "(sum sigma)²: strata are never worse.",
    )
    functions = (NODES, PLACE, MOMENT)
    source = "Neyman 1934; Cochran 1977, ch. 5; Nichol, Dhariwal 2021, section 3.3"

    def lines(self, seed: int) -> list[Line]:
        p, total = SPREADS / SPREADS.sum(), float(SPREADS.sum())
        n, stream = int(total), generator(seed, "strata")
        index = torch.stack([place(p, nodes(n, 1, stream)[:, 0])[0] for _ in range(REPEATS)])
        noise = torch.randn(index.shape, generator=stream, dtype=torch.float64)
        sums = ((MEANS[index] + SPREADS[index] * noise) / p[index]).mean(1)
        square = Side(
            "variance of the stratified sum", *mean_se((sums - MEANS.sum()) ** 2), by=NODES
        )
        known = Side("(sum sigma)²/n", total**2 / n, by="closed form")
        note = f"{REPEATS} repeats of {n} calls"
        even, seen = _iid(torch.full_like(p, 0.25)), _iid(_remembered())
        bare = _iid((_remembered() - UNIFORM / 4) / (1 - UNIFORM))
        roots = (MEANS**2 + SPREADS**2).sqrt().sum()
        return [
            Line("Gaussian", (square, known), tolerance=0.0, note=note, unit=SQUARED),
            compared(
                "any terms",
                ("variance of one draw, p by second moments", bare, MOMENT),
                ("(sum r)² - J²", roots**2 - MEANS.sum() ** 2, "closed form"),
                note="without the uniform share of .001",
                unit=SQUARED,
            ),
            Line(
                "any terms",
                (
                    Side("one draw, uniform p", even, by="closed form"),
                    Side("one draw, p by second moments", seen, by=MOMENT),
                    Side("(sum sigma)²", total**2, by="closed form"),
                ),
                ">=",
                unit=SQUARED,
            ),
        ]


def _remembered() -> Tensor:
    """(4,) p after ten terms a ± σ of each."""
    rule = SecondMoment(len(MEANS))
    sign = torch.ones(MEMORY, dtype=torch.float64)
    sign[: MEMORY // 2] = -1
    index = torch.arange(len(MEANS)).repeat_interleave(MEMORY)
    rule.remember(index, (MEANS[:, None] + SPREADS[:, None] * sign).flatten())
    return rule.probabilities()


def _iid(p: Tensor) -> float:
    """The variance of term_i/p_i, i ~ p."""
    return float(((MEANS**2 + SPREADS**2) / p).sum() - MEANS.sum() ** 2)


class MirroredOffsets(Identity):
    id = "I40"
    name = "mirrored-offsets"
    title = "Two nodes mirrored in a cell integrate every line through it exactly"
    latex = (
        r"v=\tfrac{2j+2w}{k},\ \tfrac{2j+2-2w}{k}:\qquad \tfrac12\big(f(v)+f(v')\big)="
        r"\tfrac k2\int_{\mathrm{cell}\ j}f\quad\text{for every }w\text{, if }f\text{ is linear}"
    )
    text = "the mean of f at the nodes (2j+2w)/k and (2j+2-2w)/k is its mean over cell j, f linear"
    assumes = "k even; w uniform, one for every cell"
    steps = (
        "The two nodes lie at the same distance d on both sides of the middle of their cell.",
        "For a line the two errors cancel, whatever w is.",
        "Each node alone is uniform on its cell, so that the mean is unbiased for every f.",
        "For f = v² the mean of a pair is (middle)² + d² with d uniform up to 1/k, and "
        "Var d² = (4/45)/k^4: over k/2 cells the variance is 32/(180 k^5).",
    )
    functions = (NODES,)
    source = "Hammersley, Morton 1956"
    K = 8

    def lines(self, seed: int) -> list[Line]:
        k = self.K
        v = nodes(REPEATS, k, generator(seed, "mirrored"))
        slope, level = torch.linspace(-2, 3, k // 2).double(), torch.arange(k // 2) ** 2.0
        cell = (v * (k // 2)).long()
        broken = (level[cell] + slope[cell] * v).mean(1)
        middle = (2 * torch.arange(k // 2) + 1) / k
        square = Side(
            "variance of the mean of v²", *mean_se(((v**2).mean(1) - 1 / 3) ** 2), by=NODES
        )
        known = Side("32/(180 k^5)", 32 / (180 * k**5), by="closed form")
        return [
            compared(
                "any terms",
                ("mean of a broken line at the nodes", broken, NODES),
                ("its integral", (level + slope * middle).mean(), "closed form"),
                unit="value",
            ),
            Line("any terms", (square, known), tolerance=0.0, note=f"{REPEATS} repeats, k = {k}"),
        ]


class LatinHypercube(Identity):
    id = "I42"
    name = "latin-hypercube"
    title = "Paired at random without repeats, only what examples and times do together costs"
    latex = (
        r"\mathrm{Var}\,\frac1n\sum_xf(x,\sigma(x))=\frac{\sum_{x,j}D_{xj}^2}{n^2(n-1)},\qquad "
        r"D_{xj}=f_{xj}-\bar f_{x\cdot}-\bar f_{\cdot j}+\bar f_{\cdot\cdot}"
    )
    text = "Var of the mean of f(x, sigma(x)) = sum D²/(n² (n-1)), D = f less both main effects"
    assumes = "n examples meet n cells in uniformly random order sigma"
    steps = (
        "Every example comes once and every cell comes once: what depends on one of them alone "
        "adds up to a constant. Subtract it; D is left.",
        "E D_{x sigma(x)} = 0 and E D²_{x sigma(x)} = sum_j D_xj²/n.",
        "For two examples E D D' = sum_{j != l} D_xj D_yl/(n(n-1)) = -sum_j D_xj D_yj/(n(n-1)).",
        "Summed over all pairs, with the columns of D adding up to 0, the factor becomes 1/(n-1).",
    )
    functions = (NODES,)
    source = "McKay, Beckman, Conover 1979; Stein 1987"
    N = 6

    def lines(self, seed: int) -> list[Line]:
        n, stream = self.N, generator(seed, "latin")
        rows = torch.arange(n)
        table = torch.randn(n, n, generator=generator(0, "table"), dtype=torch.float64)
        cells = torch.stack([(nodes(n, 1, stream)[:, 0] * n).long() for _ in range(2 * REPEATS)])
        drawn = table[rows, cells].mean(1)
        every = table[rows, torch.tensor(list(permutations(range(n))))].mean(1)
        left = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
        sides = (
            Side("variance, drawn", *mean_se((drawn - table.mean()) ** 2), by=NODES),
            Side("variance over all 720 pairings", float(every.var(unbiased=False)), by="all"),
            Side("sum D²/(n² (n-1))", float((left**2).sum() / (n**2 * (n - 1))), by="table"),
        )
        added = torch.arange(n)[:, None] ** 2 + 3.0 * torch.arange(n)
        means = added.double()[rows, cells].mean(1)
        return [
            Line("any terms", sides, note=f"{2 * REPEATS} designs of {n} examples", unit=SQUARED),
            compared(
                "any terms",
                ("mean of a table of main effects, drawn", means, NODES),
                ("mean of all its entries", added.double().mean(), "table"),
                unit="value",
            ),
        ]


IDENTITIES: tuple[Identity, ...] = (Strata(), MirroredOffsets(), LatinHypercube())
ERRATA: tuple[Erratum, ...] = ()
