r"""What the best discriminator reaches, and what any other one leaves.

At D* = p/(p + g) the value is V = 2 JSD(p, g) − log 4. For any D whatever,

    JSD(p, g) − (log 2 + V(D, G)/2) = E_m KL(Bern(D*)‖Bern(D)) ≥ 0,   m = (p + g)/2,

so that L_D = log 2 + V/2 bounds JSD from below, whoever trained D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo import gan, quadrature
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.derivation.pairs import (
    LOG2,
    LOG4,
    SHIFTED,
    SHIFTS,
    Points,
    guesses,
    lopsided,
    normal,
    on_lattice,
    random_points,
)
from nelbo.derivation.places import Said, below, equal, single

POINTS, DENSITIES = "two laws on four points", "two densities"
VALUE, JSD, SLACK = (f"nelbo.quadrature.{name}" for name in ("value", "jsd", "slack"))
LOSS = "nelbo.gan.Minimax.discriminator"
SUMMED = 1e-8
"""Sums over different lattices agree to this; the tail of torch's softplus costs 2e-9."""


def lost_by(laws: Points, logits: Tensor) -> Tensor:
    """E_p of what a real costs D, and E_g of what a fake does, by its minimax loss."""
    cost, far = gan.Minimax().discriminator, torch.full_like(logits, math.inf)
    return (laws.p * cost(logits, -far) + laws.g * cost(far, logits)).sum(-1)


class ValueAtBest(Identity):
    id = "I29"
    name = "log-four"
    title = "At the best discriminator the value is 2 JSD − log 4"
    latex = (
        r"\max_D V = \mathbb E_p\log\frac{p}{p+g} + \mathbb E_g\log\frac{g}{p+g}"
        r" = 2\,\mathrm{JSD}(p,g) - \log 4 \ge -\log 4"
    )
    text = "max over D of V = E_p log p/(p+g) + E_g log g/(p+g) = 2 JSD(p, g) - log 4 >= -log 4"
    assumes = "JSD in nats, with m = (p + g)/2"
    steps = (
        "Put D* = p/(p + g) into V.",
        "p/(p + g) = ½ p/m: the logarithm is log(p/m) − log 2, and so for g.",
        "The two −log 2 add up to −log 4, what is left is KL(p‖m) + KL(g‖m) = 2 JSD.",
        "JSD >= 0 with equality only for p = g, so −log 4 is the least value, reached at g = p.",
    )
    functions = ("nelbo.quadrature.value", "nelbo.quadrature.jsd", "nelbo.gan.value")
    source = "Goodfellow et al. 2014, theorem 1"

    def lines(self, seed: int) -> list[Line]:
        p, g = lopsided()
        best = quadrature.OptimalDiscriminator(p.log_prob, g.log_prob)
        _, masses = on_lattice(p, g)
        pairs = random_points(200)
        known = [self._reached(float(d)) for d in SHIFTS]
        same = quadrature.OptimalDiscriminator(p.log_prob, p.log_prob)
        reached = Said("V of D*", VALUE)
        return [
            equal(
                DENSITIES,
                reached,
                Said("2 JSD(N(0, 1), N(d, 1)) - log 4, tabulated"),
                torch.tensor(known, dtype=torch.float64),
                2 * SHIFTED - LOG4,
                of="distances d",
                tolerance=1.1e-6,
            ),
            equal(
                DENSITIES,
                reached,
                Said("E_p log p/(p+g) + E_g log g/(p+g)", "nelbo.gan.value"),
                single(quadrature.value(p, g, best).value),
                masses.value(masses.ideal),
                tolerance=SUMMED,
            ),
            equal(
                DENSITIES,
                Said("E_p log p/(p+g) + E_g log g/(p+g)", "nelbo.gan.value"),
                Said("2 JSD - log 4", JSD),
                masses.value(masses.ideal),
                single(2 * quadrature.jsd(p, g).value - LOG4),
                tolerance=SUMMED,
            ),
            equal(
                POINTS,
                Said("V of D*", "nelbo.gan.value"),
                Said("2 JSD - log 4 from the masses"),
                pairs.value(pairs.ideal),
                2 * pairs.jsd() - LOG4,
                of="random pairs",
            ),
            equal(
                DENSITIES,
                Said("V of D* where g = p", VALUE),
                Said("-log 4"),
                single(quadrature.value(p, p, same).value),
                single(-LOG4),
            ),
        ]

    @staticmethod
    def _reached(shift: float) -> float:
        p, g = normal(0.0), normal(shift)
        best = quadrature.OptimalDiscriminator(p.log_prob, g.log_prob)
        return quadrature.value(p, g, best).value


class Slack(Identity):
    id = "I30"
    name = "slack"
    title = "What a discriminator leaves of JSD is a mean KL divergence"
    latex = (
        r"\mathrm{JSD}(p,g) - \left(\log 2 + \tfrac12 V(D,G)\right)"
        r" = \mathbb E_m\,\mathrm{KL}(\mathrm{Bern}(D^*)\,\|\,\mathrm{Bern}(D)) \ge 0"
    )
    text = "JSD - (log 2 + V/2) = E_m KL(Bern(D*) ‖ Bern(D)) >= 0, m = (p + g)/2"
    assumes = "any D at all"
    steps = (
        "By I29, JSD − (log 2 + V(D)/2) = (V(D*) − V(D))/2.",
        "With p = 2 m D* and g = 2 m (1 − D*) this is E_m of "
        "D* log(D*/D) + (1 − D*) log((1 − D*)/(1 − D)).",
        "That is the divergence of two coins, so it is never negative: L_D = log 2 + V(D)/2 is a "
        "lower bound of JSD for every D, trained or not.",
        "D minimises E sp(−s(x)) + E sp(s(y)) = −V: with a mean loss of log 4 it knows nothing.",
    )
    functions = (
        "nelbo.gan.value",
        "nelbo.quadrature.slack",
        "nelbo.quadrature.jsd",
        "nelbo.quadrature.value",
        LOSS,
        "nelbo.bits.Bits",
    )
    source = "Goodfellow et al. 2014, theorem 1, for a D that is not the best one"

    def lines(self, seed: int) -> list[Line]:
        p, g = lopsided()
        x, masses = on_lattice(p, g)
        divergence = quadrature.jsd(p, g).value
        values = torch.stack([masses.value(logit(x)) for logit in guesses()])
        summed = [quadrature.value(p, g, logit).value for logit in guesses()]
        lost = [quadrature.slack(p, g, logit).value for logit in guesses()]
        pairs = random_points(200)
        logits = random_points(200, seed=1).ideal
        lower = Said("L_D = log 2 + V/2", "nelbo.gan.value")
        return [
            equal(
                DENSITIES,
                Said("V of a D that is not the best", "nelbo.gan.value"),
                Said("V by quadrature", VALUE),
                values,
                torch.tensor(summed, dtype=torch.float64),
                of="discriminators",
                tolerance=SUMMED,
            ),
            equal(
                DENSITIES,
                Said("JSD - (log 2 + V/2), JSD by quadrature", "nelbo.gan.value"),
                Said("E_m KL(Bern(D*) ‖ Bern(D))", SLACK),
                divergence - (LOG2 + values / 2),
                torch.tensor(lost, dtype=torch.float64),
                of="discriminators",
                tolerance=SUMMED,
            ),
            equal(
                POINTS,
                Said("JSD - (log 2 + V/2), JSD from the masses", "nelbo.gan.value"),
                Said("E_m KL(Bern(D*) ‖ Bern(D))", "nelbo.bits.Bits"),
                pairs.jsd() - (LOG2 + pairs.value(logits) / 2),
                pairs.slack(logits),
                of="random pairs with random D",
            ),
            equal(
                DENSITIES,
                Said("log 2 - (D's mean loss)/2", LOSS),
                Said("log 2 + V/2", VALUE),
                torch.stack([LOG2 - lost_by(masses, logit(x)) / 2 for logit in guesses()]),
                LOG2 + torch.tensor(summed, dtype=torch.float64) / 2,
                of="discriminators",
                tolerance=SUMMED,
            ),
            below(
                DENSITIES,
                lower,
                Said("JSD", JSD),
                LOG2 + values / 2,
                single(divergence),
                of="discriminators",
            ),
        ]


IDENTITIES: tuple[Identity, ...] = (ValueAtBest(), Slack())
ERRATA: tuple[Erratum, ...] = ()
