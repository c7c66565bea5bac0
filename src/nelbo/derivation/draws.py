r"""One term per example is enough: the objectives are unbiased for the bound.

    E_{i ~ p} [term_i/p_i] = Σ_i p_i term_i/p_i = Σ_i term_i     for every p > 0 fixed beforehand.

With exact kernels the bound of the whole data is known without a term: E L = H(q) + KL(q(x_N)‖π).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.derivation.coin import DATA, RATE, by_time, coin, divergence, entropy, states
from nelbo.derivation.denoisers import (
    Exact,
    at_logsnr,
    averaged,
    called,
    compared,
    model_of,
    normal,
    quadratic_points,
)
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.objectives import Vlb
from nelbo.quadrature import kl
from nelbo.randomness import generator, seeded
from nelbo.reverse import Reverse
from nelbo.timesampling import MEMORY, SecondMoment

VLB, MOMENT = "nelbo.objectives.Vlb", "nelbo.timesampling.SecondMoment"
LOGSNR = [4.0, 2.0, 0.0, -2.0, -6.0]
LINE = normal([0.5], [[0.49]])
BATCHES, BATCH = 64, 400


class ExactChain:
    """The exact models of a normal law and of a bit on one chain, and their true bounds."""

    def __init__(self) -> None:
        self.schedule = at_logsnr(LOGSNR)
        self.times = self.schedule.grid()
        self.gaussian = model_of(LINE, self.schedule, Exact())
        self.bit = coin(self.schedule)

    def truth(self) -> float:
        """H(q) + KL(q(x_N)‖π) of the normal law."""
        end = LINE.diffused(*(v(self.times[-1]) for v in (self.schedule.keep, self.schedule.lose)))
        return LINE.entropy()[0] + kl(end, normal([0.0], [[1.0]])).value

    def bit_truth(self) -> float:
        """The same of the bit."""
        keep = float(self.schedule.keep(self.times[-1]))
        return entropy(DATA) + divergence(keep * DATA + (1 - keep) * RATE, RATE)

    def uneven(self) -> Vlb:
        """Draws in proportion to terms that were seen; the rule is warm."""
        objective = Vlb(self.times)
        objective.history = SecondMoment(len(self.times))
        index = torch.arange(len(self.times)).repeat(MEMORY)
        objective.history.remember(index, 0.2 + index.double() ** 2)
        return objective

    def enumerated(self, objective: Vlb) -> Tensor:
        """E over i, x_0 and noise of the objective on the normal law."""
        points, p = quadratic_points(LINE), objective.current().clone()
        at, x_0, index = called(self.gaussian, points, self.times)
        return averaged(objective.loss(at, x_0, index, p[index]), points) @ p

    def enumerated_bit(self, objective: Vlb) -> Tensor:
        """The same on the bit."""
        p = objective.current().clone()
        at, x_0, index, probability = states(self.bit, self.times)
        return by_time(objective.loss(at, x_0, index, p[index]), probability) @ p


def _called(objective: Vlb, model: Reverse, seed: int, name: str) -> Side:
    """The mean of the objective as training calls it, batch by batch."""
    rows = LINE.sample(BATCHES * BATCH, generator(seed, "unbiased", name))
    with seeded(seed, "unbiased", name), torch.no_grad():
        means = torch.stack([objective(model, x_0).mean() for x_0 in rows.split(BATCH)])
    mean, se = mean_se(means)
    return Side(f"mean loss, {name}", mean, se, VLB)


class Unbiased(Identity):
    id = "I34"
    name = "unbiased"
    title = "One term per example, divided by its probability, is unbiased for the bound"
    latex = (
        r"\mathbb E_{i\sim p}\Big[\mathrm{KL}(q(x_N|x_0)\|\pi)+\frac{\mathrm{term}_i}{p_i}\Big]"
        r"=L(x_0)"
    )
    text = "E over i of [prior KL + term_i/p_i] = L, for uniform, even and importance draws"
    assumes = "every p_i > 0, and p fixed before i is drawn"
    steps = (
        "term_0 is -log p(x_0|x_1), term_i the divergence of pair i, each at its own x_t.",
        "The mean of term_i/p_i over i is sum_i p_i term_i/p_i: the p_i cancel.",
        "Low discrepancy: u_b = (u + b/B) mod 1 is uniform for each b alone, so that each index "
        "has the law p; the members of a batch depend on each other, their means do not.",
        "Here the kernels are exact, so that the bound is known: H(q) + KL(q(x_N)‖pi).",
    )
    functions = (VLB, MOMENT, "nelbo.timesampling.ladder", "nelbo.quadrature.kl")
    source = "Nichol, Dhariwal 2021, section 3.3; Kingma et al. 2021, appendix I.1"

    def lines(self, seed: int) -> list[Line]:
        g = ExactChain()
        truth = g.truth()
        known = ("H(q) + KL(q(x_N)‖pi)", truth, "nelbo.data.mixture.GaussianMixture.entropy")
        uniform, uneven = g.enumerated(Vlb(g.times)), g.enumerated(g.uneven())
        bits = g.enumerated_bit(Vlb(g.times)), g.enumerated_bit(g.uneven())
        right = Side(*known[:2], by=known[2])
        note = f"{BATCHES} batches of {BATCH}"
        drawn = [
            _called(Vlb(g.times), g.gaussian, seed, "low discrepancy"),
            _called(g.uneven(), g.gaussian, seed, "importance sampled"),
        ]
        return [
            compared(
                "Gaussian",
                ("sum p_i E loss_i, uniform p", uniform, VLB),
                known,
                ("sum p_i E loss_i, p by second moments", uneven, MOMENT),
                tolerance=1e-8,
            ),
            compared(
                "Bernoulli",
                ("sum p_i E loss_i, uniform p", bits[0], VLB),
                ("h(r) + KL(q(x_N)‖pi)", g.bit_truth(), "closed form"),
                ("sum p_i E loss_i, p by second moments", bits[1], MOMENT),
            ),
            *[Line("Gaussian", (side, right), tolerance=1e-8, note=note) for side in drawn],
        ]


IDENTITIES: tuple[Identity, ...] = (Unbiased(),)
ERRATA: tuple[Erratum, ...] = ()
