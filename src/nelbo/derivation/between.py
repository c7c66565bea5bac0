r"""The sandwich: a certificate from below and the variational bound from above, of one sampler.

If g is the law of the model's own samples, KL(p‖g) ≤ E L − H(p), and so

    LCB ≤ JSD(p, g) ≤ φ(exp(−(E L − H(p)))),     E L ≥ H(p) + κ(JSD).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo import jsd, quadrature
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.line import Affine
from nelbo.derivation.models import MEAN, VARIANCE, affine, bits, exact_affine, exact_bits
from nelbo.derivation.pairs import Points, normal
from nelbo.derivation.settings import Enumerated, Known
from nelbo.estimate import Estimate
from nelbo.randomness import generator
from nelbo.sandwich import Sandwich

PAIRS, ALPHA, CLIP = 3000, 1e-6, 2.0
UPPER, BOUND = "nelbo.sandwich.Sandwich.upper", "nelbo.bound.term_of"


@dataclass(frozen=True)
class Case:
    """A model, its data and its samples.

    Arguments:
        setting: with the bound. divergence, entropy: JSD(p, g) and H(p), exact nats.
        real, fake: (PAIRS,) logits log p − log g at draws of p and of g.
    """

    setting: Known
    divergence: float
    entropy: float
    real: Tensor
    fake: Tensor

    def lines(self) -> list[Line]:
        """The order of the divergences, and the bound that the divergence forces."""
        loss = self.setting.average(self.setting.bound().total)
        lower = min(max(self.divergence, 0.0), jsd.LOG2)
        both = Sandwich(lower, 1 - ALPHA, Estimate(loss, 0.0, 0.0, 1), self.entropy)
        assert both.upper is not None
        certificate = jsd.lower_bound(self.real, self.fake, CLIP, ALPHA)
        order = (
            Side(f"LCB of {PAIRS} pairs", certificate, 0.0, "nelbo.jsd.lower_bound"),
            Side("JSD(p, g)", self.divergence),
            Side("φ(exp(-(E L - H)))", both.upper, 0.0, UPPER),
        )
        forced = (
            Side("H + kappa(JSD)", self.entropy + both.kappa, 0.0, "nelbo.jsd.kappa"),
            Side("E L", loss, 0.0, BOUND),
        )
        note, family = f"the certificate at delta = {ALPHA:g}", self.setting.family
        return [
            Line(family, order, "<=", 1e-8, note=note),
            Line(family, forced, "<=", 1e-8),
        ]


def on_points(setting: Enumerated, seed: int) -> Case:
    """Patterns of bits: p and g are tables, and so are JSD and H."""
    laws = Points(setting.weight, setting.log_likelihood().exp())
    draws = generator(seed, "derivation", "sandwich", "bits")
    x, y = (torch.multinomial(v, PAIRS, True, generator=draws) for v in (laws.p, laws.g))
    entropy = -float(torch.xlogy(laws.p, laws.p).sum())
    return Case(setting, float(laws.jsd()), entropy, laws.ideal[x], laws.ideal[y])


def on_line(setting: Affine, seed: int) -> Case:
    """Normal data and a normal model law."""
    law = setting.data_law()
    p, g = normal(MEAN, VARIANCE**0.5), normal(float(law.mean), float(law.stddev))
    best = quadrature.OptimalDiscriminator(p.log_prob, g.log_prob)
    draws = generator(seed, "derivation", "sandwich", "line")
    logits = [best(v.sample(PAIRS, draws)) for v in (p, g)]
    return Case(setting, quadrature.jsd(p, g).value, p.entropy()[0], logits[0], logits[1])


class SandwichOrder(Identity):
    id = "I65"
    name = "sandwich"
    title = "The certified JSD and the variational bound hold the divergence from both sides"
    latex = (
        r"\mathrm{LCB} \le \mathrm{JSD}(p,g) \le \varphi\!\left(e^{-(\mathbb E L - H(p))}\right),"
        r"\qquad \mathbb E L \ge H(p) + \kappa(\mathrm{JSD})"
    )
    text = "LCB <= JSD(p, g) <= φ(exp(-(E L - H(p)))); E L >= H(p) + kappa(JSD)"
    assumes = "g is the law of the model's own ancestral samples, decoder included"
    steps = (
        "E L >= E_p[−log g] = H(p) + KL(p‖g): the bound is an upper bound of the cross-entropy.",
        "So KL(p‖g) <= E L − H(p), and by I32 JSD <= φ(e^{−KL}) <= φ(e^{−(E L − H)}).",
        "From below JSD is certified by samples of the same g, which know nothing of the bound.",
        "Turned round: E L >= H(p) + κ(JSD). A violation is a bug in one of the two halves.",
    )
    functions = (UPPER, BOUND, "nelbo.jsd.lower_bound", "nelbo.jsd.kappa", "nelbo.quadrature.jsd")
    source = "I11 and I32 together; Nguyen, Wainwright and Jordan 2010 for such lower bounds"

    def lines(self, seed: int) -> list[Line]:
        cases = [on_points(setting, seed) for setting in (bits(), exact_bits())]
        cases += [on_line(setting, seed) for setting in (affine(), exact_affine())]
        return [line for case in cases for line in case.lines()]


IDENTITIES: tuple[Identity, ...] = (SandwichOrder(),)
ERRATA: tuple[Erratum, ...] = ()
