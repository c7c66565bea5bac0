r"""The game on trained players: the value, what it says of JSD, and what D leaves.

The law of a generator has no density that could be evaluated. But K of its samples, each blurred
by N(0, s² I), are a law g that can: a mixture of K components. Between it and the data's law p,
where that is a known mixture in the plane or on the line, blurred alike, everything is an integral
by quadrature, for the very discriminator that was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nelbo import gan, jsd, quadrature
from nelbo.blurred import BLOCKS, Blurred, blurred
from nelbo.data.mixture import GaussianMixture
from nelbo.derivation.identity import Line, Side, mean_se
from nelbo.derivation.trained import widened
from nelbo.randomness import seeded

Said = list[Line] | str
LOG2, LOG4 = math.log(2), math.log(4)
COMPONENTS, SAMPLES = 16, 100_000
"""Samples of G that make a mixture, and that make a blurred law."""
AGREEMENT = 1e-6
"""A network's logit may have kinks."""
UNKNOWN = "the law of its data is not a known mixture in the plane"


@dataclass(frozen=True, eq=False)
class Players:
    """Trained players before data of their kind, on the model's scale.

    Arguments:
        name: of the run. game: D and G in float32 on `device`, G averaged.
        real: (n, *shape) rows of data as D sees them. draw: z (n, latent) -> fakes.
        law: the data's law, if it is a known mixture in one or two dimensions.
        blur: s.
        centred: whether D is trained up to a constant only, which is then fitted to `tuning`.
    """

    name: str
    game: gan.Game
    real: Tensor
    tuning: Tensor
    law: GaussianMixture | None
    blur: float
    seed: int
    centred: bool
    device: str

    def fakes(self, count: int, purpose: str) -> Tensor:
        """G(z) of as many draws."""
        with seeded(self.seed, "derive", purpose):
            z = self.game.noise(count)
        return self._batched(self.game.generator, z)

    def logit(self, x: Tensor) -> Tensor:
        """s(x) in float64, the fitted constant added."""
        return self.bare(x) + self.offset

    def bare(self, x: Tensor) -> Tensor:
        """s(x) as the network gives it."""
        return self._batched(self.game.discriminator, x).double()

    @cached_property
    def offset(self) -> float:
        """The constant that makes the value largest on training data; 0 where D has its own."""
        if not self.centred:
            return 0.0
        fake = self.fakes(len(self.tuning), "tuning")
        return gan.best_offset(self.bare(self.tuning), self.bare(fake))

    def _batched(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        parts = [network(rows.to(self.device, torch.float32)).cpu() for rows in x.split(8192)]
        return torch.cat(parts)

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Of the reals and of as many fakes."""
        return self.logit(self.real), self.logit(self.fakes(len(self.real), "fakes"))

    @cached_property
    def laws(self) -> tuple[GaussianMixture, GaussianMixture]:
        """p and g, both blurred; g of a few samples of G."""
        assert self.law is not None
        means = self.fakes(COMPONENTS, "components").double()
        eye = self.blur**2 * torch.eye(means.shape[1], dtype=torch.float64)
        weights = torch.full((len(means),), 1 / len(means), dtype=torch.float64)
        g = GaussianMixture(weights, means, eye.expand(len(means), -1, -1).contiguous())
        return self.law.diffused(1.0, self.blur**2), g

    @cached_property
    def value(self) -> quadrature.Exact:
        """V(D) between the two laws."""
        return quadrature.value(*self.laws, self.logit, agreement=AGREEMENT)

    @cached_property
    def best(self) -> quadrature.Exact:
        """V(D*) between them."""
        p, g = self.laws
        ideal = quadrature.OptimalDiscriminator(p.log_prob, g.log_prob)
        return quadrature.value(p, g, ideal)

    @cached_property
    def jsd(self) -> quadrature.Exact:
        """JSD of them."""
        return quadrature.jsd(*self.laws)

    @property
    def where(self) -> str:
        """What the two laws are."""
        return f"p and {COMPONENTS} samples of G, both blurred by N(0, {self.blur:.3g}²)"

    def blurred(self, std: float) -> Blurred:
        """JSD of the data's law and G's, both blurred, from many samples."""
        assert self.law is not None
        count = iter(range(10**6))
        return blurred(lambda n: self.fakes(n, f"blurred {next(count)}"), self.law, std, SAMPLES)


def push_forward(t: Players) -> Said:
    """I27: averages over z, and over samples that were drawn before."""
    count = len(t.real)
    with seeded(t.seed, "derive", "z"):
        z = t.game.noise(count)
    values = torch.cat(
        [
            t.game.value(x.to(t.device), w.to(t.device)).cpu()
            for x, w in zip(t.real.split(4096), z.split(4096), strict=True)
        ]
    )
    fake = t.bare(t.fakes(count, "fakes"))
    other = gan.value(t.bare(t.real), fake)
    # both have the same reals, whose part cancels
    sides = (
        Side("E_z: log D(x) + log(1 - D(G(z)))", *mean_se(values), "nelbo.gan.Game.value"),
        Side("E_g: log D(x) + log(1 - D(y))", *mean_se(other), "nelbo.gan.value"),
    )
    halves = [
        mean_se(v - gan.value(t.bare(t.real), -torch.inf + fake * 0))[1] for v in (values, other)
    ]
    return [
        Line(t.name, sides, paired_se=math.hypot(*halves), tolerance=1e-5, note=f"{count} pairs")
    ]


def best_discriminator(t: Players) -> Said:
    """I28: no D has a larger value than p/(p + g)."""
    if t.law is None:
        return UNKNOWN
    sides = (
        Side("V of the trained D", t.value.value, 0.0, "nelbo.quadrature.value"),
        Side("V of D* = p/(p + g)", t.best.value, 0.0, "nelbo.quadrature.OptimalDiscriminator"),
    )
    return [Line(t.name, sides, "<=", t.value.error + t.best.error, note=t.where)]


def value_at_best(t: Players) -> Said:
    """I29."""
    if t.law is None:
        return UNKNOWN
    sides = (
        Side("V of D*", t.best.value, 0.0, "nelbo.quadrature.value"),
        Side("2 JSD - log 4", 2 * t.jsd.value - LOG4, 0.0, "nelbo.quadrature.jsd"),
    )
    least = (Side("2 JSD - log 4", sides[1].value, 0.0, sides[1].by), Side("-log 4", -LOG4))
    error = t.best.error + 2 * t.jsd.error
    return [
        Line(t.name, sides, "=", error, note=t.where),
        Line(t.name, least, ">=", 2 * t.jsd.error, note=t.where),
    ]


def slack(t: Players) -> Said:
    """I30: the value on held-out data, and where p is known what D leaves."""
    real, fake = t.logits
    value, plug_in = mean_se(gan.value(real, fake)), jsd.plug_in(real, fake)
    held = f"{len(real)} held-out examples, as many samples of G"
    sides = (
        Side("log 2 + V/2", LOG2 + value[0] / 2, value[1] / 2, "nelbo.gan.value"),
        Side("L_D", *plug_in, "nelbo.jsd.plug_in"),
    )
    most = (Side("L_D", *plug_in, "nelbo.jsd.plug_in"), Side("log 2, the largest JSD", LOG2))
    lines = [
        Line(t.name, sides, "=", 1e-9, paired_se=0.0, note=held),
        Line(t.name, most, "<=", 0.0, note=held),
    ]
    if t.law is not None:
        lines += [_left(t), _below(t)]
    return lines


def _left(t: Players) -> Line:
    """L_D plus what D leaves is JSD, by quadrature."""
    lost = quadrature.slack(*t.laws, t.logit, agreement=AGREEMENT)
    sides = (
        Side(
            "log 2 + V/2 + E_m KL(Bern(D*)‖Bern(D))",
            LOG2 + t.value.value / 2 + lost.value,
            0.0,
            "nelbo.quadrature.value, nelbo.quadrature.slack",
        ),
        Side("JSD", t.jsd.value, 0.0, "nelbo.quadrature.jsd"),
    )
    error = t.value.error / 2 + lost.error + t.jsd.error
    note = f"{t.where}; D leaves {lost.value:.4g} nats"
    return Line(t.name, sides, "=", error, note=note)


def _below(t: Players) -> Line:
    """L_D on blurred draws is below JSD of the blurred laws."""
    found = t.blurred(t.blur)
    with seeded(t.seed, "derive", "noise"):
        real, fake = (
            x + t.blur * torch.randn_like(x) for x in (t.real, t.fakes(len(t.real), "to blur"))
        )
    plug_in = jsd.plug_in(t.logit(real), t.logit(fake))
    sides = (
        Side("L_D on blurred draws", *plug_in, "nelbo.jsd.plug_in"),
        Side("JSD", found.value, found.se * widened(BLOCKS), "nelbo.blurred.blurred"),
    )
    note = f"p and the law of G, both blurred by N(0, {t.blur:.3g}²)"
    return Line(t.name, sides, "<=", 1e-6, note=note)


def ladder(t: Players) -> Said:
    """I33: more noise on both sides, less JSD."""
    if t.law is None:
        return UNKNOWN
    stds = (t.blur, 2 * t.blur, 4 * t.blur)
    found = [t.blurred(std) for std in stds]
    sides = tuple(
        Side(f"JSD, blur {std:.3g}", one.value, one.se * widened(BLOCKS), "nelbo.blurred.blurred")
        for std, one in zip(stds, found, strict=True)
    )
    return [Line(t.name, sides, ">=", 1e-6, note="p and the law of G, both blurred")]


TABLE: dict[str, Callable[[Players], Said]] = {
    "I27": push_forward,
    "I28": best_discriminator,
    "I29": value_at_best,
    "I30": slack,
    "I33": ladder,
}
