r"""The instrument: what held-out pairs of a real and a fake prove about JSD.

With logits clipped to [−B, B] one pair pays Z = ½[log 2 − sp(−s(x))] + ½[log 2 − sp(s(y))]. Its
mean is L_D ≤ JSD and its range has width B. Betting on Z turns pairs into a lower confidence
bound without asymptotics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo import jsd, quadrature
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.pairs import (
    LOG2,
    Points,
    guesses,
    lopsided,
    on_lattice,
    random_points,
    unequal,
)
from nelbo.derivation.places import Said, below, equal
from nelbo.randomness import generator

POINTS, DENSITIES = "two laws on four points", "two densities"
PAYOFF, BOUND = "nelbo.jsd.payoff", "nelbo.jsd.lower_bound"
ALPHA, CLIP = 0.05, 1.5
RUNS, PAIRS, MANY = 250, 120, 20_000


def overconfident(laws: Points) -> Tensor:
    """Logits twice as large as the best ones, clipped."""
    return (2 * laws.ideal).clamp(-CLIP, CLIP)


def mean_of_pairs(laws: Points, logits: Tensor, clip: float) -> Tensor:
    """E Z over all pairs of points, (...) nats, by `jsd.payoff`; logits (..., K)."""
    flat = logits.reshape(-1, logits.shape[-1])
    real, fake = (v.expand(len(flat), *v.shape[-1:]) for v in (laws.p, laws.g))
    size = flat.shape[1]
    x, y = flat.repeat_interleave(size, 1), flat.repeat(1, size)
    z = jsd.payoff(x.flatten(), y.flatten(), clip).view(x.shape)
    weight = real.repeat_interleave(size, 1) * fake.repeat(1, size)
    return (weight * z).sum(1).reshape(logits.shape[:-1])


class Payoff(Identity):
    id = "I61"
    name = "payoff"
    title = "The mean payoff of a pair is a lower bound of JSD, and its range is known"
    latex = (
        r"Z = \tfrac12[\log2-\mathrm{sp}(-\tilde s(x))]"
        r" + \tfrac12[\log2-\mathrm{sp}(\tilde s(y))],"
        r"\quad \mathbb E Z = L_{\tilde D} \le \mathrm{JSD},\quad \max Z-\min Z = B"
    )
    text = "Z = [log 2 - sp(-s(x))]/2 + [log 2 - sp(s(y))]/2, s clipped to [-B, B]: E Z <= JSD"
    assumes = "x ~ p and y ~ g independent, D and B fixed before they are looked at"
    steps = (
        "log D = −sp(−s) and log(1 − D) = −sp(s), so E Z = log 2 + V(D)/2 = L_D.",
        "By I30 that is JSD less a mean divergence, whatever D is, clipped or not.",
        "Each half lies between ½[log 2 − sp(B)] and ½[log 2 − sp(−B)], and sp(B) − sp(−B) = B.",
    )
    functions = (PAYOFF, "nelbo.jsd.lowest", "nelbo.quadrature.value", "nelbo.bits.Bits")
    source = "Goodfellow et al. 2014, theorem 1, for one pair"

    def lines(self, seed: int) -> list[Line]:
        p, g = lopsided()
        x, masses = on_lattice(p, g)
        zero = torch.zeros_like(x[:, 0])
        halves = [
            (jsd.payoff(s, zero, math.inf), jsd.payoff(zero, s, math.inf))
            for s in (logit(x) for logit in guesses())
        ]
        means = [(masses.p * a + masses.g * b).sum() for a, b in halves]
        summed = [quadrature.value(p, g, logit).value for logit in guesses()]
        laws = random_points(100)
        logits = 3 * random_points(100, seed=1).ideal
        found = mean_of_pairs(laws, logits, CLIP)
        clips = torch.tensor([0.1, 1.0, 4.0, 12.0], dtype=torch.float64)
        far = torch.full_like(clips, 50.0)
        payoff = Said("E Z", PAYOFF)
        return [
            equal(
                DENSITIES,
                payoff,
                Said("log 2 + V/2", "nelbo.quadrature.value"),
                torch.stack(means),
                LOG2 + torch.tensor(summed, dtype=torch.float64) / 2,
                of="discriminators",
                tolerance=1e-8,
            ),
            equal(
                POINTS,
                payoff,
                Said("JSD - E_m KL(Bern(D*) ‖ Bern(D clipped))", "nelbo.bits.Bits"),
                found,
                laws.jsd() - laws.slack(logits.clamp(-CLIP, CLIP)),
                of="random pairs with random D",
            ),
            below(
                POINTS,
                payoff,
                Said("JSD from the masses"),
                found,
                laws.jsd(),
                of="random pairs with random D",
            ),
            equal(
                "logits",
                Said("largest Z - smallest Z", PAYOFF),
                Said("B"),
                jsd.payoff(far, -far, clips) - jsd.lowest(clips),
                clips,
                of="clips B",
            ),
        ]


def certificates(laws: Points, seed: int, name: str) -> Tensor:
    """(RUNS,) lower bounds of as many experiments with PAIRS pairs."""
    draws = generator(seed, "derivation", name)
    logits = overconfident(unequal())
    found = []
    for _ in range(RUNS):
        x, y = (
            torch.multinomial(law, PAIRS, replacement=True, generator=draws)
            for law in (laws.p, laws.g)
        )
        found.append(jsd.lower_bound(logits[x], logits[y], CLIP, ALPHA))
    return torch.tensor(found, dtype=torch.float64)


class Betting(Identity):
    id = "I62"
    name = "betting"
    title = "A gambler who grows rich proves that the mean payoff is large"
    latex = (
        r"K_j(m) = \prod_{i\le j}(1+b_i(m)(z_i-m)),\qquad "
        r"P\left(\sup_j K_j(\mathbb E z) \ge 1/\delta\right) \le \delta"
    )
    text = "P(LCB > L_D) <= delta, LCB the largest mean at which the capital reached 1/delta"
    assumes = "independent pairs; D, B and the order fixed beforehand; any D, any n"
    steps = (
        "For the true mean m, E[1 + b_i (z_i − m) | past] = 1 whatever the stake b_i was: the "
        "capital K_j(m) is a martingale that starts at 1 and stays positive.",
        "Ville: such a martingale ever reaches 1/δ with probability at most δ.",
        "K_j(m) falls with m, so the m at which it did reach 1/δ form an interval from below; its "
        "end m* exceeds the true mean with probability at most δ.",
        "LCB = log 2 − sp(B) + B m*, cut at 0.",
    )
    functions = (BOUND, "nelbo.gan.value")
    source = "Ville 1939; Waudby-Smith and Ramdas 2023 (betting on a mean)"

    def lines(self, seed: int) -> list[Line]:
        laws = unequal()
        same = Points(laws.p, laws.p)
        logits = overconfident(laws)
        truth = float(LOG2 + laws.value(logits) / 2)
        found, null = (certificates(v, seed, k) for v, k in ((laws, "apart"), (same, "equal")))
        mean, se = mean_se(found)
        draws = generator(seed, "derivation", "many")
        x, y = (torch.multinomial(v, MANY, True, generator=draws) for v in (laws.p, laws.g))
        large = jsd.lower_bound(logits[x], logits[y], CLIP, 1e-6)
        note = f"{RUNS} certificates of {PAIRS} pairs, D twice too sure"
        exact = Side("L_D = log 2 + V/2 of the clipped D", truth, 0.0, "nelbo.gan.value")
        return [
            self._missed(found, truth, f"{note}, p and g apart"),
            self._missed(null, 0.0, f"{note}, p = g"),
            Line(POINTS, (Side("mean LCB", mean, se, BOUND), exact), "<=", note=note),
            Line(
                POINTS,
                (
                    Side("0.7 L_D", 0.7 * truth, 0.0, "nelbo.gan.value"),
                    Side("LCB of many pairs", large, 0.0, BOUND),
                    exact,
                ),
                "<=",
                note=f"one certificate of {MANY} pairs at delta = 1e-6",
            ),
        ]

    @staticmethod
    def _missed(found: Tensor, truth: float, note: str) -> Line:
        share, se = mean_se((found > truth).double())
        sides = (Side("P(LCB > L_D)", share, se, BOUND), Side("delta", ALPHA))
        return Line(POINTS, sides, "<=", note=note, unit="")


IDENTITIES: tuple[Identity, ...] = (Payoff(), Betting())
ERRATA: tuple[Erratum, ...] = ()
