r"""The game and its best discriminator.

V(D, G) = E_p log D + E_g log(1 − D), where g is the law of G(z), z ~ p_z. For a fixed G the
integrand is a log y + b log(1 − y) at every x, with a = p(x), b = g(x) and y = D(x). Its maximum
is at y = a/(a + b), hence D* = p/(p + g).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nelbo import gan, quadrature
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.pairs import (
    Logit,
    climbed,
    guesses,
    lopsided,
    normal,
    on_lattice,
    paid,
)
from nelbo.derivation.places import Said, below, equal, single
from nelbo.lattices import Box
from nelbo.randomness import generator

NUMBERS, DENSITIES = "two numbers", "two densities"
VALUE = "nelbo.quadrature.value"
DRAWS = 200_000


@torch.enable_grad()
def curvature(a: float, b: float, y: float) -> float:
    """d²/dy² of a log y + b log(1 − y), by differentiating `gan.value` twice."""
    at = single(y).requires_grad_()
    f = paid(single(a), single(b), at.log() - torch.log1p(-at))
    (slope,) = torch.autograd.grad(f, at, create_graph=True)
    return float(torch.autograd.grad(slope, at)[0])


def at_place(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a log y + b log(1 − y), by `gan.value`."""
    return paid(a, b, torch.logit(y))


class Pointwise(Identity):
    id = "I26"
    name = "pointwise"
    title = "a log y + b log(1 − y) is largest at y = a/(a + b)"
    latex = r"\arg\max_{y\in[0,1]}\; a\log y + b\log(1-y) = \frac{a}{a+b}"
    text = "argmax over y in [0, 1] of a log y + b log(1 - y) = a/(a + b)"
    assumes = "a, b >= 0 and not both 0"
    steps = (
        "The derivative a/y − b/(1 − y) is zero where a(1 − y) = by, so at y = a/(a + b).",
        "The second derivative −a/y² − b/(1 − y)² is negative: it is a maximum, and the only one.",
        "At that place it is −(a + b)²/a − (a + b)²/b = −(a + b)³/(ab).",
        "If b = 0 the function a log y grows up to y = 1, if a = 0 it falls from y = 0; both "
        "times the largest value is 0, and a/(a + b) is that end.",
    )
    functions = ("nelbo.gan.value",)
    source = "Goodfellow et al. 2014, proof of proposition 1"

    def lines(self, seed: int) -> list[Line]:
        counts = [(3, 1), (1, 4), (7, 2), (5, 5)]
        a, b = (torch.tensor(v, dtype=torch.float64) for v in zip(*counts, strict=True))
        best = a / (a + b)
        highest = torch.xlogy(a, best) + torch.xlogy(b, 1 - best)
        y = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None]
        bends = [curvature(float(m), float(n), m / (m + n)) for m, n in counts]
        corners = ((3.0, 0.0, math.inf), (0.0, 3.0, -math.inf))
        ends = [paid(single(m), single(n), single(logit)) for m, n, logit in corners]
        value = Said("a log y + b log(1 - y)", "nelbo.gan.value")
        return [
            equal(
                NUMBERS,
                Said("the y where the slope is 0", value.by),
                Said("a/(a + b)"),
                climbed(a, b).sigmoid(),
                best,
                of="pairs a, b",
                unit="",
            ),
            equal(
                NUMBERS,
                Said("a log y + b log(1 - y) at y = a/(a + b)", value.by),
                Said("-(a + b) h(a/(a + b)), h the entropy of a coin"),
                at_place(a, b, best),
                highest,
                of="pairs a, b",
            ),
            below(
                NUMBERS,
                value,
                Said("its value at a/(a + b)"),
                at_place(a, b, y),
                highest,
                of="places y and pairs a, b",
            ),
            equal(
                NUMBERS,
                Said("second derivative at a/(a + b)", value.by),
                Said("-(a + b)^3/(ab)"),
                torch.tensor(bends, dtype=torch.float64),
                -((a + b) ** 3) / (a * b),
                of="pairs a, b",
                tolerance=1e-9,
                unit="",
            ),
            equal(
                NUMBERS,
                Said("value at y = 1 for b = 0, at y = 0 for a = 0", value.by),
                Said("0"),
                torch.stack(ends),
                single(0),
                of="ends",
            ),
        ]


class Mapped(nn.Module):
    """A function as a player."""

    def __init__(self, function: Logit) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x)


def log_square_density(y: Tensor) -> Tensor:
    """log density of log z², z ~ N(0, 1), at rows (B, 1)."""
    u = y[:, 0]
    return 0.5 * (u - u.exp() - math.log(2 * math.pi))


class PushForward(Identity):
    id = "I27"
    name = "push-forward"
    title = "An average over z of what G makes is an average over the law of G(z)"
    latex = r"\mathbb E_{z\sim p_z}\log(1-D(G(z)))=\mathbb E_{x\sim g}\log(1-D(x))"
    text = "E over z of log(1 - D(G(z))) = E over x ~ g of log(1 - D(x))"
    assumes = "g is the law of G(z); G need not have an inverse, nor g a density"
    steps = (
        "g is defined by g(A) = P(G(z) in A) for every set A.",
        "For the indicator of a set the two averages are this definition.",
        "Any function is a limit of sums of indicators, and averages are linear in them.",
    )
    functions = ("nelbo.gan.Game.value", "nelbo.quadrature.value")
    source = "Goodfellow et al. 2014, eq. 1; the change of variables of measure theory"

    def lines(self, seed: int) -> list[Line]:
        p, g = normal(0.5, 1.5).log_prob, log_square_density
        logit: Logit = lambda x: 0.3 + 0.5 * x[:, 0]  # noqa: E731
        game = gan.Game(Mapped(lambda z: z.square().log()), Mapped(logit), 1)
        draws = generator(seed, "derivation", "push-forward")
        z, e = torch.randn(2, DRAWS, 1, dtype=torch.float64, generator=draws)
        mean, se = mean_se(game.value(0.5 + 1.5 * e, z))
        box = Box(torch.tensor([-80.0]).double(), torch.tensor([16.0]).double(), 0.25)
        exact = quadrature.value(p, g, logit, box)
        return [
            Line(
                DENSITIES,
                (
                    Side(
                        "V over draws of x and of G(z) = log z²", mean, se, "nelbo.gan.Game.value"
                    ),
                    Side("V over p and the density of log z²", exact.value, 0.0, VALUE),
                ),
                tolerance=exact.error,
                note=f"{DRAWS} draws; two z lead to each fake",
            )
        ]


class BestDiscriminator(Identity):
    id = "I28"
    name = "best-discriminator"
    title = "The best discriminator is p/(p + g)"
    latex = r"D^*(x) = \frac{p(x)}{p(x)+g(x)},\qquad \mathrm{logit}\, D^* = \log p - \log g"
    text = "D*(x) = p(x)/(p(x) + g(x)), its logit log p - log g"
    assumes = "D may be any function; where neither p nor g has mass, D is arbitrary"
    steps = (
        "V is an integral over x of p(x) log D(x) + g(x) log(1 − D(x)).",
        "D(x) may be chosen at each x by itself, so the integrand is maximised there.",
        "That is I26 with a = p(x) and b = g(x).",
    )
    functions = (
        "nelbo.quadrature.OptimalDiscriminator",
        "nelbo.quadrature.value",
        "nelbo.gan.value",
    )
    source = "Goodfellow et al. 2014, proposition 1"

    def lines(self, seed: int) -> list[Line]:
        p, g = lopsided()
        best = quadrature.OptimalDiscriminator(p.log_prob, g.log_prob)
        x = torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None]
        density = [law.log_prob(x).exp() for law in (p, g)]
        _, masses = on_lattice(p, g)
        top = masses.value(masses.ideal)
        others = [quadrature.value(p, g, logit).value for logit in guesses()]
        return [
            equal(
                DENSITIES,
                Said("the logit where d/ds [p log D + g log(1 - D)] = 0", "nelbo.gan.value"),
                Said("the logit of p/(p + g)", "nelbo.quadrature.OptimalDiscriminator"),
                climbed(*density),
                best(x),
                of="places x",
                tolerance=1e-9,
            ),
            below(
                DENSITIES,
                Said("V of another D", VALUE),
                Said("V of D*", "nelbo.gan.value"),
                torch.tensor(others, dtype=torch.float64),
                top,
                of="discriminators",
            ),
        ]


class AnySign(Erratum):
    id = "E17"
    identity = "I26"
    printed = "for all (a, b) in R² except (0, 0) the maximum is at a/(a + b)"
    right = "for a, b >= 0, not both 0"
    why = "for a = b = −1 the place y = ½ is a minimum, and the function has no largest value"

    def line(self, seed: int) -> Line:
        minus = single(-1)
        at = [float(at_place(minus, minus, single(y))) for y in (0.1, 0.5)]
        sides = (
            Side("-log y - log(1 - y) at y = 0.1", at[0], 0.0, "nelbo.gan.value"),
            Side("its value at a/(a + b) = ½", at[1], 0.0, "nelbo.gan.value"),
        )
        return Line(NUMBERS, sides, "<=", note="a = b = -1")


class SecondDerivative(Erratum):
    id = "E18"
    identity = "I26"
    printed = "f″(a/(a + b)) = −(a + b)²/a − b(a + b)²/a²"
    right = "f″(a/(a + b)) = −(a + b)²/a − (a + b)²/b"
    why = "1 − a/(a + b) is b/(a + b): for a = 1, b = 3 it is −21.3, and −64 was printed"

    def line(self, seed: int) -> Line:
        a, b = 1.0, 3.0
        sides = (
            Side("-(a+b)²/a - b (a+b)²/a²", -((a + b) ** 2) / a - b * (a + b) ** 2 / a**2),
            Side("f'' at a/(a + b)", curvature(a, b, a / (a + b)), 0.0, "nelbo.gan.value"),
        )
        return Line(NUMBERS, sides, note="a = 1, b = 3", unit="")


class NonZero(Erratum):
    id = "E19"
    identity = "I26"
    printed = "a and b are not zero, so f″ < 0"
    right = "a, b > 0, so f″ < 0; a = 0 and b = 0 are cases of their own, at the ends"
    why = "with a = b = −1, neither of them zero, f″(½) = +8"

    def line(self, seed: int) -> Line:
        found = curvature(-1.0, -1.0, 0.5)
        sides = (Side("f'' at a/(a + b)", found, 0.0, "nelbo.gan.value"), Side("0", 0.0))
        return Line(NUMBERS, sides, "<=", note="a = b = -1", unit="")


class NotOfX(Erratum):
    id = "E20"
    identity = "I28"
    printed = "the maximum of f does not depend on x"
    right = "D*(x) does; the integrand is maximised at every x by itself"
    why = "the best D that is the same everywhere reaches −log 4 only, whatever p and g"

    def line(self, seed: int) -> Line:
        p, g = lopsided()
        x, masses = on_lattice(p, g)
        offset = gan.best_offset(torch.zeros(1), torch.zeros(1))
        flat = float(masses.value(torch.full_like(x[:, 0], offset)))
        best = quadrature.OptimalDiscriminator(p.log_prob, g.log_prob)
        sides = (
            Side("V of the best D that does not depend on x", flat, 0.0, "nelbo.gan.value"),
            Side("V of D*", quadrature.value(p, g, best).value, 0.0, VALUE),
        )
        return Line(DENSITIES, sides, tolerance=1e-8)


IDENTITIES: tuple[Identity, ...] = (
    Pointwise(),
    PushForward(),
    BestDiscriminator(),
)
ERRATA: tuple[Erratum, ...] = (AnySign(), SecondDerivative(), NonZero(), NotOfX())
