r"""What JSD says of dropped modes and of KL, and how noise lowers it.

A sampler that copies p on a set of mass r and never leaves it has JSD = φ(r),

    φ(r) = log 2 + ½ [r log r − (1 + r) log(1 + r)],

and by Jensen JSD ≤ φ(exp(−KL)) for both KL divergences. The inverse κ(x) = −log φ⁻¹(x) turns a
lower bound of JSD into one of KL. Any channel that acts on both sides lowers JSD.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo import jsd, quadrature
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.pairs import (
    LOG2,
    SHIFTED,
    SHIFTS,
    Points,
    lopsided,
    normal,
    random_points,
)
from nelbo.derivation.places import Said, below, equal, single
from nelbo.lattices import Box

POINTS, DENSITIES = "two laws on four points", "two densities"
PHI, KAPPA, JSD = "nelbo.jsd.phi", "nelbo.jsd.kappa", "nelbo.quadrature.jsd"

DROPPED = torch.tensor(
    [0.49693, 0.38040, 0.29030, 0.21576, 0.15180, 0.09560, 0.04541], dtype=torch.float64
)
"""φ(k/8), k = 1..7, to the digits shown."""
INVERTED = {0.01: 0.0290, 0.1: 0.3016, 0.3: 1.021, 0.5: 2.102, 0.6: 3.096}
"""κ, to the digits shown."""


def eight_modes(kept: int) -> quadrature.LogDensity:
    """The first modes of eight equal raised cosines on [0, 1], [1, 2], ...; nothing elsewhere."""

    def log_prob(x: Tensor) -> Tensor:
        place = x[:, 0]
        height = (1 - (2 * math.pi * place).cos()) / kept
        return torch.where((place > 0) & (place < kept), height.log(), -math.inf)

    return log_prob


class ModeDrop(Identity):
    id = "I31"
    name = "mode-drop"
    title = "A sampler that copies a part of mass r and drops the rest has JSD = φ(r)"
    latex = (
        r"\mathrm{JSD}(p,\, p|_A) = \varphi(r),\quad r = p(A),\quad "
        r"\varphi(r) = \log 2 + \tfrac12[r\log r - (1+r)\log(1+r)]"
    )
    text = "JSD(p, p restricted to A) = φ(p(A)), φ(r) = log 2 + [r log r - (1+r) log(1+r)]/2"
    assumes = "g = p on A, of p-mass r, renormalised; any other g that lives on A has JSD >= φ(r)"
    steps = (
        "On A the density ratio p/g is r everywhere; outside of A it is infinite.",
        "JSD = ½ E_p log(2p/(p + g)) + ½ E_g log(2g/(p + g)): on A the two logarithms are "
        "log(2r/(1 + r)) and log(2/(1 + r)), outside the first is log 2.",
        "The weights are r/2, ½ and (1 − r)/2; the sum is φ(r).",
        "Another g on A can only be further from p: merging A into one cell lowers JSD to φ(r).",
    )
    functions = ("nelbo.quadrature.jsd", "nelbo.jsd.phi")
    source = "from the definition of the Jensen-Shannon divergence (Lin 1991)"

    def lines(self, seed: int) -> list[Line]:
        box = Box(torch.tensor([-0.01]).double(), torch.tensor([8.01]).double(), 1 / 64)
        whole = eight_modes(8)
        kept = [quadrature.jsd(whole, eight_modes(k), box).value for k in range(1, 8)]
        shares = torch.arange(1, 8, dtype=torch.float64) / 8
        found = torch.tensor(kept, dtype=torch.float64)
        pairs = random_points(500)
        part = pairs.p[:, :2].sum(-1)
        narrow = torch.cat([pairs.g[:, :2], torch.zeros_like(pairs.g[:, 2:])], 1)
        only = Points(pairs.p, narrow / narrow.sum(1, keepdim=True))
        phi = Said("φ(r)", PHI)
        return [
            equal(
                DENSITIES,
                Said("JSD of eight modes and the first k of them", JSD),
                phi._replace(what="φ(k/8)"),
                found,
                jsd.phi(shares),
                of="k",
                tolerance=1e-9,
            ),
            equal(
                DENSITIES,
                phi._replace(what="φ(k/8)"),
                Said("tabulated"),
                jsd.phi(shares),
                DROPPED,
                of="k",
                tolerance=5.1e-6,
            ),
            below(
                POINTS,
                phi,
                Said("JSD of p and any g on the first two points"),
                jsd.phi(part),
                only.jsd(),
                of="random pairs",
            ),
        ]


class KLBound(Identity):
    id = "I32"
    name = "kl-bound"
    title = "A small KL divergence forces a small JSD, and a large JSD a large KL"
    latex = (
        r"\mathrm{JSD}(p,g) \le \varphi\!\left(e^{-\mathrm{KL}(p\|g)}\right),\qquad "
        r"\mathrm{KL} \ge \kappa(\mathrm{JSD}),\quad \kappa(x) = -\log\varphi^{-1}(x)"
    )
    text = "JSD(p, g) <= φ(exp(-KL(p ‖ g))), and the same with KL(g ‖ p); KL >= kappa(JSD)"
    assumes = "equality only where the density ratio is constant on the support of the first law"
    steps = (
        "With ψ(r) = r log r − (1 + r) log(1 + r), JSD = log 2 + ½ E_p ψ(g/p).",
        "Put r = e^{−u}, u = log(p/g): ψ(e^{−u}) is concave in u, its second derivative is "
        "−r [log(1 + 1/r) − 1/(1 + r)].",
        "Jensen: E_p ψ(e^{−u}) <= ψ(e^{−E_p u}), and E_p u = KL(p‖g).",
        "φ falls, so it has an inverse: JSD >= x forces KL >= κ(x) = −log φ⁻¹(x).",
    )
    functions = (
        "nelbo.quadrature.jsd",
        "nelbo.quadrature.kl",
        "nelbo.jsd.phi",
        "nelbo.jsd.kappa",
    )
    source = "Jensen's inequality applied to an f-divergence; Lin 1991 for JSD"

    def lines(self, seed: int) -> list[Line]:
        p, g = lopsided()
        apart = [quadrature.kl(*pair).value for pair in ((p, g), (g, p))]
        upper = jsd.phi((-torch.tensor(apart, dtype=torch.float64)).exp())
        pairs = random_points(2000)
        forward = (pairs.p * pairs.ideal).sum(-1)
        backward = -(pairs.g * pairs.ideal).sum(-1)
        bounds = jsd.phi((-torch.stack([forward, backward])).exp())
        return [
            below(
                DENSITIES,
                Said("JSD", JSD),
                Said("φ(exp(-KL)), KL by quadrature", PHI),
                single(quadrature.jsd(p, g).value),
                upper,
                of="directions of KL",
            ),
            below(
                POINTS,
                Said("JSD from the masses"),
                Said("φ(exp(-KL))", PHI),
                pairs.jsd(),
                bounds,
                of="random pairs and directions",
            ),
            below(
                POINTS,
                Said("kappa(JSD)", KAPPA),
                Said("the smaller KL"),
                jsd.kappa(pairs.jsd()),
                torch.minimum(forward, backward),
                of="random pairs",
            ),
            *self._exact(),
        ]

    def _exact(self) -> list[Line]:
        """Where the bound is reached, and what its inverse is."""
        mass = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
        dropped = Points(torch.stack([mass, 1 - mass], 1), torch.tensor([[1.0, 0.0]]).double())
        at = torch.tensor(list(INVERTED), dtype=torch.float64)
        return [
            equal(
                POINTS,
                Said("JSD where g = p on one of two points"),
                Said("φ(exp(-KL(g ‖ p)))", PHI),
                dropped.jsd(),
                jsd.phi((mass.log()).exp()),
                of="masses r",
            ),
            equal(
                POINTS,
                Said("kappa(x)", KAPPA),
                Said("tabulated"),
                jsd.kappa(at),
                torch.tensor(list(INVERTED.values()), dtype=torch.float64),
                of="x",
                tolerance=5.1e-4,
            ),
            equal(
                POINTS,
                Said("kappa(x)", KAPPA),
                Said("2 x/log 2, for a small x"),
                jsd.kappa(1e-7),
                single(2e-7 / LOG2),
                tolerance=1e-12,
            ),
        ]


class Ladder(Identity):
    id = "I33"
    name = "ladder"
    title = "Noise on both sides only lowers JSD"
    latex = (
        r"t \mapsto \mathrm{JSD}(p_t, g_t)\ \text{falls},\qquad "
        r"\mathrm{JSD}(Tp, Tg) \le \mathrm{JSD}(p,g)"
    )
    text = "JSD of the two forward marginals falls with t; any channel on both sides lowers JSD"
    assumes = "the same channel acts on both laws"
    steps = (
        "Put a fair coin behind (p, g): JSD is the mutual information of the coin and a draw.",
        "A channel that sees the draw and not the coin cannot add to that information.",
        "The forward process from s to t is such a channel, so JSD falls along it.",
        "N(0, 1) and N(d, 1) keep their variance and stay √k d apart: their ladder is known.",
    )
    functions = ("nelbo.quadrature.exact_ladder", "nelbo.quadrature.jsd")
    source = "the data processing inequality, Cover and Thomas 2006, theorem 2.8.1"

    def lines(self, seed: int) -> list[Line]:
        p, g = lopsided()
        levels = [6.0, 3.0, 1.0, 0.0, -1.0, -3.0, -6.0]
        rungs = [rung.value for rung in quadrature.exact_ladder(p, g, levels)]
        names = [f"at log-SNR {level:g}" for level in levels]
        sides = [Side("JSD of the data", quadrature.jsd(p, g).value, 0.0, JSD)]
        sides += [
            Side(name, rung, 0.0, "nelbo.quadrature.exact_ladder")
            for name, rung in zip(names, rungs, strict=True)
        ]
        keep = (SHIFTS[:-1] / 4).square()
        known = quadrature.exact_ladder(normal(0), normal(4), (keep / (1 - keep)).log().tolist())
        return [
            Line(DENSITIES, tuple(sides), ">=", note="both laws sent through the forward process"),
            equal(
                DENSITIES,
                Said("JSD of N(0, 1) and N(4, 1) at keep k", "nelbo.quadrature.exact_ladder"),
                Said("JSD of N(0, 1) and N(4 √k, 1), tabulated"),
                torch.tensor([rung.value for rung in known], dtype=torch.float64),
                SHIFTED[:-1],
                of="times",
                tolerance=5.1e-7,
            ),
            below(
                DENSITIES,
                Said("JSD of the signs alone"),
                Said("JSD", JSD),
                signs(SHIFTS).jsd(),
                SHIFTED,
                of="pairs N(0, 1), N(d, 1)",
                tolerance=5e-7,
            ),
        ]


def signs(shift: Tensor) -> Points:
    """The laws of the sign of x − d/2 under N(0, 1) and N(d, 1): a channel with two outcomes."""
    right = torch.special.ndtr(shift / 2)
    one = torch.stack([right, 1 - right], 1)
    return Points(one, one.flip(1))


IDENTITIES: tuple[Identity, ...] = (ModeDrop(), KLBound(), Ladder())
ERRATA: tuple[Erratum, ...] = ()
