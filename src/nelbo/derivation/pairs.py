r"""Small pairs of laws p and g: on a few points, where sums are exact, and on the line.

On points the value of the game is a sum over `nelbo.gan.value` with its two halves taken apart,
log D = value(s, −∞) and log(1 − D) = value(∞, s); on the line it is the same sum over a lattice.
`nelbo.quadrature` knows nothing of `nelbo.gan`, so that the two can be held against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo import gan
from nelbo.bits import Bits
from nelbo.data.mixture import GaussianMixture
from nelbo.randomness import generator

LOG2, LOG4 = math.log(2), math.log(4)
REACH, POINTS = 14.0, 5601

SHIFTS = torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
SHIFTED = torch.tensor([0.004975, 0.030311, 0.111421, 0.336831, 0.632720], dtype=torch.float64)
"""JSD of N(0, 1) and N(d, 1) in nats for d in `SHIFTS`, to the digits shown."""


def log_d(logits: Tensor) -> Tensor:
    """log D of logits, by the half of `gan.value` that a real pays for."""
    return gan.value(logits, torch.full_like(logits, -math.inf))


def log_not_d(logits: Tensor) -> Tensor:
    """log(1 − D) of logits, by the half of `gan.value` that a fake pays for."""
    return gan.value(torch.full_like(logits, math.inf), logits)


def paid(a: Tensor, b: Tensor, logits: Tensor) -> Tensor:
    """a log D + b log(1 − D), a weight of 0 counting for nothing whatever its logarithm."""
    zero = torch.zeros((), dtype=torch.float64)
    real = torch.where(a != 0, a * log_d(logits), zero)
    return real + torch.where(b != 0, b * log_not_d(logits), zero)


@dataclass(frozen=True)
class Points:
    """Pairs of laws on K points.

    Arguments:
        p, g: (..., K) masses, float64, each row summing to one.
    """

    p: Tensor
    g: Tensor

    @property
    def ideal(self) -> Tensor:
        """log p − log g, the logit of the best D; nan where neither has mass."""
        return self.p.log() - self.g.log()

    def value(self, logits: Tensor) -> Tensor:
        """V = Σ p log D + g log(1 − D), (...) nats, by `gan.value`."""
        return paid(self.p, self.g, logits).sum(-1)

    def jsd(self) -> Tensor:
        """½ KL(p‖m) + ½ KL(g‖m) from the masses alone, (...) nats."""
        middle = (self.p + self.g) / 2
        return sum(
            (torch.xlogy(law, law) - torch.xlogy(law, middle)).sum(-1) / 2
            for law in (self.p, self.g)
        )  # type: ignore[return-value]

    def slack(self, logits: Tensor) -> Tensor:
        """E_m KL(Bern(D*)‖Bern(D)), (...) nats, by the divergence of `nelbo.bits`."""
        apart = kl_divergence(Bits(self.ideal), Bits(logits.expand_as(self.p)))
        return ((self.p + self.g) / 2 * apart).sum(-1)


def random_points(count: int, size: int = 4, seed: int = 0) -> Points:
    """(count, size) random pairs: flat Dirichlet draws, strictly positive."""
    draws = generator(seed, "derivation", "points")
    waits = -torch.rand(2, count, size, dtype=torch.float64, generator=draws).log()
    return Points(*(waits / waits.sum(-1, keepdim=True)))


def mixture(means: list[float], stds: list[float], weights: list[float]) -> GaussianMixture:
    """Σ w_k N(m_k, s_k²) on the line."""
    m, s, w = (torch.tensor(v, dtype=torch.float64) for v in (means, stds, weights))
    return GaussianMixture(w, m[:, None], s.square()[:, None, None])


def normal(mean: float, std: float = 1.0) -> GaussianMixture:
    """N(mean, std²) on the line."""
    return mixture([mean], [std], [1.0])


def lopsided() -> tuple[GaussianMixture, GaussianMixture]:
    """Two different laws, neither symmetric."""
    p = mixture([-1.5, 0.4, 2.0], [0.6, 0.8, 0.5], [0.5, 0.3, 0.2])
    return p, mixture([-0.8, 1.4], [0.9, 0.7], [0.6, 0.4])


def on_lattice(p: GaussianMixture, g: GaussianMixture) -> tuple[Tensor, Points]:
    """Rows (5601, 1) from −14 to 14, and the masses of p and g there, density times step."""
    x = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)[:, None]
    step = 2 * REACH / (POINTS - 1)
    return x, Points(p.log_prob(x).exp() * step, g.log_prob(x).exp() * step)


Logit = Callable[[Tensor], Tensor]


def guesses() -> list[Logit]:
    """Discriminators that are not the best one: flat, tilted, wavy, over-confident."""
    return [
        lambda x: torch.full_like(x[:, 0], 0.2),
        lambda x: 0.3 - 0.8 * x[:, 0],
        lambda x: (2 * x[:, 0]).sin(),
        lambda x: 4 * x[:, 0].tanh(),
    ]


@torch.enable_grad()
def climbed(p: Tensor, g: Tensor) -> Tensor:
    """The logit at which the slope of p log D + g log(1 − D) changes sign, by bisection."""
    low, high = torch.full_like(p, -60.0), torch.full_like(p, 60.0)
    for _ in range(60):
        middle = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(paid(p, g, middle).sum(), middle)
        middle = middle.detach()
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
    return (low + high) / 2


def unequal() -> Points:
    """Two laws on four points, JSD = .11 nats."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    return Points(p, p.flip(0))
