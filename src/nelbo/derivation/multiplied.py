r"""A kernel times a factor: the product, and the constant Z that makes it a law again.

    N(x; m, v) N(y; x, τ²) = Z N(x; m', v'),   v' = 1/(1/v + 1/τ²),   Z = N(y; m, v + τ²),

for a delta x = y and Z = N(y; m, v), for a tilt e^{gx} N(m + v g, v), for bits a sum of two terms.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal

from nelbo.bits import Bits
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.derivation.models import BERNOULLI, GAUSSIAN, MEAN, VARIANCE
from nelbo.derivation.places import Said, equal, single
from nelbo.distributions import DiagonalNormal, per_example
from nelbo.factors import Factor, Noisy, Observed, Tilt
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.schedules import LogSNRLinear, Tabulated

MULTIPLY, LOG_R = "nelbo.factors.Factor.multiply", "nelbo.factors.Factor.log_r"
NOISE = 0.5
"""τ of what was measured."""
SEEN = torch.tensor([[1.5]], dtype=torch.float64)
SEEN_BITS = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
MOMENTS = (
    torch.tensor([MEAN], dtype=torch.float64),
    torch.tensor([VARIANCE], dtype=torch.float64),
)


def steep(x: Tensor, s: Tensor | None) -> Tensor:
    """log r = −1.3 x + .4: linear."""
    return (0.4 - 1.3 * x).sum(1)


def normal_factors() -> list[Factor]:
    """Three factors in one dimension, each widened by a Gaussian process."""
    process = Gaussian(LogSNRLinear(4.0, -4.0))
    factors = [
        Noisy(SEEN, NOISE),
        Noisy(SEEN, NOISE, None, MOMENTS),
        Tilt(steep, lambda x, s: torch.full_like(x, -1.3)),
    ]
    return [factor.bind(process) for factor in factors]


def summed(kernel: DiagonalNormal, factor: Factor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """log Z (B,) and the mean (B,) of p·r/Z, as sums over a lattice of ±12 standard deviations."""
    z = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    logs, means = [], []
    for mean, std in zip(kernel.mean, kernel.variance.sqrt(), strict=True):
        x = mean + std * z[:, None]
        law = DiagonalNormal(mean.expand_as(x), 2 * std.log().expand_as(x))
        log_mass = per_example(law.log_prob(x)) + factor.log_r(x, s) + (std * (z[1] - z[0])).log()
        logs.append(log_mass.logsumexp(0))
        means.append(log_mass.softmax(0) @ x[:, 0])
    return torch.stack(logs), torch.stack(means)


class Products(Identity):
    id = "I53"
    name = "products"
    title = "A kernel times a factor is again a kernel, with a known constant"
    latex = (
        r"N(x;m,v)\,N(y;x,\tau^2) = Z\,N(x;m',v'),\quad v' = (1/v+1/\tau^2)^{-1},\quad "
        r"m' = v'(m/v+y/\tau^2),\quad Z = N(y;m,v+\tau^2)"
    )
    text = "N(x; m, v) N(y; x, t²) = N(y; m, v + t²) N(x; m', v'); bits: Z = f r(1) + (1-f) r(0)"
    assumes = "r normal in x, or log r linear (a tilt), or a finite support"
    steps = (
        "Add the two quadratic forms in x and complete the square: precisions add.",
        "What does not depend on x is the law of y, the sum of two normal draws.",
        "τ → 0: x = y and Z = N(y; m, v). A tilt e^{gx} moves the mean by v g, with "
        "log Z = g m + ½ v g².",
        "For a bit the integral is a sum of two terms.",
    )
    functions = (MULTIPLY, LOG_R)
    source = "Sohl-Dickstein et al. 2015, section 2.5 and table App.1"

    def lines(self, seed: int) -> list[Line]:
        kernel = DiagonalNormal(*torch.tensor([[[0.3], [-1.0]], [[-0.5], [0.7]]]).double())
        s = single(0.4)
        done = [factor.multiply(kernel, s) for factor in normal_factors()]
        sums = [summed(kernel, factor, s) for factor in normal_factors()]
        at_data = Noisy(SEEN, NOISE).multiply(kernel, None)[1]
        delta = Observed(SEEN, torch.tensor([True])).multiply(kernel, None)[1]
        wide = Normal(kernel.mean[:, 0], (kernel.variance[:, 0] + NOISE**2).sqrt())
        narrow = Normal(kernel.mean[:, 0], kernel.variance[:, 0].sqrt())
        found = Said("log Z", MULTIPLY)
        return [
            equal(
                GAUSSIAN,
                found,
                Said("log of the sum of p r over a lattice", LOG_R),
                torch.stack([log_z for _, log_z in done]),
                torch.stack([log_z for log_z, _ in sums]),
                of="factors and kernels",
            ),
            equal(
                GAUSSIAN,
                Said("mean of p r/Z", MULTIPLY),
                Said("the same over a lattice", LOG_R),
                torch.stack([law.mean[:, 0] for law, _ in done]),
                torch.stack([mean for _, mean in sums]),
                of="factors and kernels",
                unit="",
            ),
            equal(
                GAUSSIAN,
                Said("log Z at the data, noise t and none", MULTIPLY),
                Said("log N(y; m, v + t²) and log N(y; m, v)"),
                torch.stack([at_data, delta]),
                torch.stack([wide.log_prob(SEEN[0]), narrow.log_prob(SEEN[0])]),
                of="kernels",
            ),
            *self._bits(),
        ]

    @staticmethod
    def _bits() -> list[Line]:
        process = Bernoulli(Tabulated([0.1, 0.3, 0.5]), 0.2)
        factor, s = Noisy(SEEN_BITS, 0.8).bind(process), single(2 / 3)
        law = Bits(torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)[:, None].expand(-1, 2))
        ends = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
        log_p = torch.stack([per_example(law.log_prob(x.expand_as(law.mean))) for x in ends])
        total = (log_p + factor.log_r(ends, s)[:, None]).logsumexp(0)
        one, zero = (Normal(single(j), 0.8).log_prob(SEEN_BITS).exp() for j in (1.0, 0.0))
        closed = (law.mean * one + (1 - law.mean) * zero).log().sum(1)
        found = Said("log Z", MULTIPLY)
        return [
            equal(
                BERNOULLI,
                found,
                Said("log of the sum of p r over all patterns", LOG_R),
                factor.multiply(law, s)[1],
                total,
                of="kernels",
            ),
            equal(
                BERNOULLI,
                found._replace(what="log Z at the data"),
                Said("log(f N(y; 1, t²) + (1 - f) N(y; 0, t²)), summed over bits"),
                factor.multiply(law, None)[1],
                closed,
                of="kernels",
            ),
        ]


IDENTITIES: tuple[Identity, ...] = (Products(),)
ERRATA: tuple[Erratum, ...] = ()
