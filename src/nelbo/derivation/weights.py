r"""Tighter than the bound: many trajectories for one example, and the check from the other side.

With w the weight of a trajectory, E_q w = p_θ(x_0) and L_M = −log (1/M) Σ w_m,

    −log p_θ(x_0) ≤ E L_{M+1} ≤ E L_M ≤ E L_1 = L(x_0),   E L_M + log p_θ ≈ χ²/(2M).

Put the trajectory that the model itself drew with x_0 in the place of one of them, and the mean of
the logarithm lies above log p_θ: truth between two estimates.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from nelbo import likelihood
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.models import BERNOULLI, GAUSSIAN, affine, bits, exact_bits
from nelbo.derivation.places import Said, equal
from nelbo.derivation.rows import Rows, forward_steps, log_weights, reverse_steps
from nelbo.derivation.settings import Enumerated, Joint
from nelbo.likelihood import ImportanceWeighted
from nelbo.randomness import generator, seeded
from nelbo.samplers import Ancestral, sample

WEIGHTS, BOUND = "nelbo.likelihood.importance_weighted", "nelbo.bound.term_of"
TABLE, ESS = (f"nelbo.likelihood.ImportanceWeighted.{name}" for name in ("values", "ess"))
DRAWS = 4096
BIAS = 5e-3
"""Of ESS/M at M = 1000: e^−v (e^v − 2 e^2v + e^4v)/M = .0022 for v = ½, and a little more."""


def drawn(setting: Joint, seed: int) -> ImportanceWeighted:
    """DRAWS weights of every example."""
    return likelihood.importance_weighted(
        setting.model, setting.x_0, setting.times, DRAWS, seed=seed
    )


def averaged(setting: Joint, values: Tensor) -> tuple[float, float]:
    """Mean and error of Σ_x q(x) v(x) from independent columns of values (n, R)."""
    return mean_se(setting.weight @ values)


def tuples(first: Tensor, log_w: Tensor, log_q: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every choice of `size` trajectories out of K: log weights (K^size, size), masses (K^size,).

    Arguments:
        first: (K,) log mass of the first of them. log_q: (K,) of each other one.
    """
    chosen = torch.cartesian_prod(*[torch.arange(len(log_w))] * size).view(-1, size)
    mass = first[chosen[:, 0]] + log_q[chosen[:, 1:]].sum(1)
    return log_w[chosen], mass.exp()


class Enumeration:
    """The weights of all trajectories of every example, by group (n, K)."""

    def __init__(self, setting: Enumerated) -> None:
        rows = setting.trajectories()
        self.setting = setting
        self.log_w, self.log_q, self.log_joint = (
            v.view(rows.groups, -1)
            for v in (
                log_weights(setting.model, setting.times, rows),
                forward_steps(setting.model, setting.times, rows).sum(1),
                reverse_steps(setting.model, setting.times, rows).sum(1),
            )
        )

    def mean_of(self, size: int, own: bool = False) -> Tensor:
        """(n,) E of L_M, M = size, over forward trajectories; `own`: the first is the model's."""
        first = self.log_joint.log_softmax(1) if own else self.log_q
        means = []
        for start, log_w, log_q in zip(first, self.log_w, self.log_q, strict=True):
            values, mass = tuples(start, log_w, log_q, size)
            means.append(mass @ ImportanceWeighted(values).values)
        return torch.stack(means)

    def chi_square(self) -> Tensor:
        """(n,) Var(w)/p_θ²."""
        second = (self.log_q + 2 * self.log_w).logsumexp(1)
        return torch.expm1(second - 2 * self.setting.log_likelihood())


class ManyTrajectories(Identity):
    id = "I47"
    name = "importance-weights"
    title = "More trajectories per example give a tighter bound that never falls below the truth"
    latex = (
        r"-\log p_\theta(x_0) \le L_{M+1} \le L_M \le L_1 = L(x_0),\quad "
        r"L_M = -\mathbb E\log\tfrac1M\sum_m w_m"
    )
    text = "-log p(x_0) <= E L_{M+1} <= E L_M <= E L_1 = L(x_0), L_M = -log((1/M) sum of w_m)"
    assumes = "every w_m of one joint trajectory: x_N ~ q(x_N|x_0), then x_s ~ q(x_s|x_t, x_0)"
    steps = (
        "E w = p_θ(x_0) (I1), so the mean of M weights has the same mean.",
        "−log is convex: E L_M >= −log p_θ(x_0) (Jensen), and L_1 is the bound itself.",
        "The mean of M + 1 weights is the average of the means of all M of them: Jensen again.",
        "KLs in the place of log-ratios, or x_t drawn anew for each step, keep the mean of log w "
        "and lose that of w: they estimate no likelihood.",
    )
    functions = (WEIGHTS, TABLE, BOUND)
    source = "Burda, Grosse and Salakhutdinov 2016, theorem 1"

    def lines(self, seed: int) -> list[Line]:
        found = [line for setting in (bits(), affine()) for line in self._drawn(setting, seed)]
        every = Enumeration(bits())
        truth = every.setting.average(every.setting.log_likelihood())
        sides = [Side("-log p(x_0), kernel by kernel", -truth)]
        for size in (3, 2, 1):
            mean = every.setting.average(every.mean_of(size))
            sides.append(Side(f"E L_{size}", mean, 0.0, TABLE))
        note = "every choice of M of the 64 trajectories"
        return [Line(BERNOULLI, tuple(sides), "<=", note=note), *found]

    @staticmethod
    def _drawn(setting: Joint, seed: int) -> list[Line]:
        weights = drawn(setting, seed)
        truth = setting.log_likelihood()
        note = f"{DRAWS} joint trajectories per example, mean over the data"
        mean, se = averaged(setting, (weights.log_w - truth[:, None]).exp())
        first = averaged(setting, weights.table(1))
        loss = setting.average(setting.bound().total)
        sides = [Side("-log p(x_0), kernel by kernel", -setting.average(truth))]
        sides += [Side(f"L_{m}", *averaged(setting, weights.table(m)), TABLE) for m in (64, 8, 1)]
        ratio = Side("mean of w/p(x_0), p kernel by kernel", mean, se, WEIGHTS)
        return [
            Line(setting.family, (ratio, Side("1", 1.0)), note=note, unit=""),
            Line(
                setting.family,
                (Side("L_1", *first, WEIGHTS), Side("L by term", loss, 0.0, BOUND)),
                note=note,
            ),
            Line(setting.family, tuple(sides), "<=", note=note),
        ]


class EffectiveSize(Identity):
    id = "I48"
    name = "effective-size"
    title = "How far M trajectories come is set by the spread of their weights"
    latex = (
        r"\mathbb E L_M + \log p_\theta \approx \frac{\chi^2}{2M},\quad "
        r"\mathrm{ESS} = \frac{(\sum w)^2}{\sum w^2} \approx \frac{M}{1+\chi^2},\quad "
        r"\chi^2 = \frac{\mathrm{Var}\,w}{p_\theta^2}"
    )
    text = "E L_M + log p = chi²/(2M) + ..., (sum w)²/(sum w²) near M/(1 + chi²)"
    assumes = "M large against chi²; if log w is normal with variance v, E L_1 + log p = v/2"
    steps = (
        "Write the mean of the weights as p_θ (1 + δ): δ has mean 0 and variance χ²/M.",
        "−log(1 + δ) = −δ + δ²/2 − δ³/3 + …: the mean is χ²/(2M) − μ₃/(3M²) + 3χ⁴/(4M²) + …",
        "Σw² / M is near p_θ² (1 + χ²), which gives the effective size.",
        "If log w is normal with variance v and E w = p_θ, its mean is log p_θ − v/2, and "
        "1 + χ² = e^v.",
    )
    functions = (TABLE, ESS, WEIGHTS)
    source = "Kong 1992 for the effective sample size; Nowozin 2018 for the expansion in 1/M"

    def lines(self, seed: int) -> list[Line]:
        every = Enumeration(exact_bits())
        truth, chi = every.setting.log_likelihood(), every.chi_square()
        gaps = torch.stack([every.mean_of(m) + truth for m in (2, 3)])
        return [self._expanded(every, gaps, chi), self._size(seed), *self._normal(seed)]

    @staticmethod
    def _expanded(every: Enumeration, gaps: Tensor, chi: Tensor) -> Line:
        m = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
        truth = every.setting.log_likelihood()[:, None]
        third = (every.log_q.exp() * (every.log_w - truth).expm1() ** 3).sum(1)
        series = chi / (2 * m) - third / (3 * m**2) + 3 * chi**2 / (4 * m**2)
        left = Said("E L_M + log p, all choices of M trajectories", TABLE)
        right = Said("chi²/(2M) - mu_3/(3M²) + 3 chi^4/(4M²)")
        # what is left out is of the order of (chi^2)^2/M^3 and mu_4/M^3
        return equal(
            BERNOULLI, left, right, gaps, series, of="examples and M = 2, 3", tolerance=2e-4
        )

    @staticmethod
    def _size(seed: int) -> Line:
        setting = bits()
        chi = Enumeration(setting).chi_square()[1]
        x_0 = setting.x_0[1:2].expand(16, -1)
        found = likelihood.importance_weighted(setting.model, x_0, setting.times, 2048, seed=seed)
        mean, se = mean_se(found.ess / found.draws)
        exact = Side("1/(1 + chi²), every trajectory", float(1 / (1 + chi)))
        note = "16 times 2048 trajectories of one example"
        return Line(
            BERNOULLI, (Side("ESS/M", mean, se, ESS), exact), "=", 1e-3, note=note, unit=""
        )

    @staticmethod
    def _normal(seed: int) -> list[Line]:
        v, rows = 0.5, 400
        draws = generator(seed, "derivation", "normal weights")
        z = torch.randn(rows, 1000, dtype=torch.float64, generator=draws)
        weights = ImportanceWeighted(math.sqrt(v) * z - v / 2)
        gap, share = mean_se(weights.table(1).mean(1)), mean_se(weights.ess / weights.draws)
        note = f"log w ~ N(-v/2, v), v = {v}, so that E w = 1"
        return [
            Line(GAUSSIAN, (Side("E L_1", *gap, TABLE), Side("v/2", v / 2)), note=note),
            Line(
                GAUSSIAN,
                (Side("ESS/M", *share, ESS), Side("e^-v", math.exp(-v))),
                "=",
                BIAS,
                note=note,
                unit="",
            ),
        ]


class TwoSided(Identity):
    id = "I49"
    name = "two-sided"
    title = "With the model's own trajectory the estimate lies on the other side of the truth"
    latex = (
        r"\mathbb E_{p_\theta(x_{1:N}|x_0)}\log w = \log p_\theta(x_0)"
        r" + \mathrm{KL}(p_\theta(x_{1:N}|x_0)\,\|\,q) \ge \log p_\theta(x_0)"
    )
    text = "E log w = log p(x_0) + KL(p(x_1:N|x_0) ‖ q(x_1:N|x_0)) >= log p(x_0)"
    assumes = "x_0 drawn from the model together with its trajectory"
    steps = (
        "w = p_θ(x_{0:N})/q(x_{1:N}|x_0) = p_θ(x_0) p_θ(x_{1:N}|x_0)/q(x_{1:N}|x_0).",
        "Its logarithm, averaged over p_θ(x_{1:N}|x_0), is log p_θ(x_0) plus a KL.",
        "With M − 1 forward trajectories beside it the mean of the logarithm still lies above "
        "log p_θ, and nearer.",
    )
    functions = (TABLE, "nelbo.samplers.sample", "nelbo.reverse.Reverse.kernel")
    source = "Grosse, Ancha and Roy 2016 (bidirectional Monte Carlo)"

    def lines(self, seed: int) -> list[Line]:
        every = Enumeration(bits())
        setting, truth = every.setting, every.setting.log_likelihood()
        log_own = every.log_joint.log_softmax(1)
        apart = (log_own.exp() * (log_own - every.log_q)).sum(1)
        own = (log_own.exp() * every.log_w).sum(1)
        below = [self._side(every, m, False) for m in (1, 2, 3)]
        above = [self._side(every, m, True) for m in (3, 2, 1)]
        middle = Side("log p(x_0)", setting.average(truth))
        return [
            equal(
                BERNOULLI,
                Said("E log w over the model's own trajectories", "nelbo.reverse.Reverse.kernel"),
                Said("log p(x_0) + KL(p(x_1:N|x_0) ‖ q), p(x_0) kernel by kernel"),
                own,
                truth + apart,
                of="examples",
            ),
            Line(BERNOULLI, (*below, middle, *above), "<=", note="every choice of M trajectories"),
            self._sampled(seed),
        ]

    @staticmethod
    def _side(every: Enumeration, size: int, own: bool) -> Side:
        mean = every.setting.average(-every.mean_of(size, own))
        whose = "one its own" if own else "all forward"
        return Side(f"E log-mean-w of {size}, {whose}", mean, 0.0, TABLE)

    @staticmethod
    def _sampled(seed: int) -> Line:
        setting = affine()
        with seeded(seed, "derivation", "two-sided"):
            way = sample(setting.model, Ancestral(), setting.times, (DRAWS, 1))
            x = [x_t.double() for _, x_t in way]
        latents = torch.stack(x[:-1][::-1], 1)
        rows = Rows(x[-1], latents, torch.ones(DRAWS), 1, sampled=True)
        log_w = log_weights(setting.model, setting.times, rows)
        truth = replace(setting, x_0=x[-1]).log_likelihood()
        se = mean_se(log_w - truth)[1]
        sides = (
            Side("E log p(x_0), kernel by kernel", *mean_se(truth)),
            Side("E log w", *mean_se(log_w), "nelbo.samplers.sample"),
        )
        return Line(GAUSSIAN, sides, "<=", paired_se=se, note=f"{DRAWS} examples that it drew")


IDENTITIES: tuple[Identity, ...] = (ManyTrajectories(), EffectiveSize(), TwoSided())
ERRATA: tuple[Erratum, ...] = ()
