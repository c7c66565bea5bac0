"""Exact values of the game between two known densities p and g, in one or two dimensions.

With s* = log p - log g, m = (p + g)/2 and sp the softplus,

    JSD(p, g) = 1/2 E_p[log 2 - sp(-s*)] + 1/2 E_g[log 2 - sp(s*)],
    V(D) = -E_p sp(-s) - E_g sp(s) = 2 JSD - log 4 - 2 E_m KL(Bern(D*) || Bern(D)),

where s is the logit of D and D* = p/(p + g) the best discriminator. The integrals are sums over a
square lattice. For a smooth integrand that dies out the trapezoidal rule converges exponentially
in the inverse step (Trefethen and Weideman, 2014): Gaussian mixtures need a step below the
smallest standard deviation, and a smaller one where log(p + g) bends sharply between two modes.
The step is therefore halved until two sums agree; four times their last change is the error of
the result. Both masses are summed as well and must be one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from nelbo.data.mixture import GaussianMixture
from nelbo.errors import InputRefused, NumericalFailure
from nelbo.lattices import LATTICE, Region, around

LogDensity = Callable[[Tensor], Tensor]
"""(B, D) float64 -> (B,) nats, -inf where the density is zero."""
Density = GaussianMixture | LogDensity
Logit = Callable[[Tensor], Tensor]
"""(B, D) float64 -> (B,), the logit of D."""

Pair = tuple[Tensor, Tensor]
Payoffs = Callable[[Tensor, Tensor], Pair]
"""Of rows (B, D) and log p - log g there: what p pays for each, and what g pays, (B,) float64."""

AGREEMENT = 1e-9
MARGIN = 4
"""A smooth integrand's error lies far below the last change, that of one with kinks near it."""
ROUNDING = 1e-12
MASS = 1e-6
ROUGH = 1e-3
HALVINGS = 6
_LOG2 = math.log(2)


@dataclass(frozen=True)
class Exact:
    """A value in nats and what its absolute numerical error stays below."""

    value: float
    error: float


class OptimalDiscriminator(nn.Module):
    """D* = p/(p + g) of two known densities; its logit is log p - log g.

    References:
        Goodfellow et al. 2014, proposition 1.
    """

    def __init__(self, log_p: LogDensity, log_g: LogDensity) -> None:
        super().__init__()
        self.log_p = log_p
        self.log_g = log_g

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B,) of rows (B, D); 0 where both densities vanish."""
        return _logit(self.log_p(x), self.log_g(x))


def jsd(p: Density, g: Density, region: Region | None = None) -> Exact:
    """The Jensen-Shannon divergence in nats.

    Arguments:
        p, g: two mixtures, or log densities of (B, D) rows.
        region: where both live; needed unless both are mixtures.

    Raises:
        InputRefused: more than two dimensions, no region, a mass that is not one, or modes too
            narrow for their range.
        NumericalFailure: the sums do not settle.
    """

    def gained(_: Tensor, ideal: Tensor) -> Pair:
        return (_LOG2 - softplus(-ideal)) / 2, (_LOG2 - softplus(ideal)) / 2

    return _expectation(gained, p, g, region)


def kl(p: Density, g: Density, region: Region | None = None) -> Exact:
    """KL(p || g) = E_p[log p - log g] in nats; arguments and errors as in `jsd`."""
    return _expectation(lambda _, ideal: (ideal, torch.zeros_like(ideal)), p, g, region)


def value(
    p: Density,
    g: Density,
    logit: Logit,
    region: Region | None = None,
    agreement: float = AGREEMENT,
) -> Exact:
    """V(D) = E_p log D + E_g log(1 - D) in nats, for any D.

    Arguments:
        p, g, region: as in `jsd`, with its errors.
        agreement: two sums this close end the halving. A network's logit may have kinks, which
            the rule meets with an error of the order of the step squared: 1e-6 is soon reached,
            1e-9 hardly ever, and the result's own error tells how far it came.
    """

    def paid(x: Tensor, _: Tensor) -> Pair:
        given = logit(x).double()
        return -softplus(-given), -softplus(given)

    return _expectation(paid, p, g, region, agreement)


def slack(
    p: Density,
    g: Density,
    logit: Logit,
    region: Region | None = None,
    agreement: float = AGREEMENT,
) -> Exact:
    """E_m KL(Bern(D*) || Bern(D)) in nats, what D leaves of JSD = (V + log 4)/2 + slack.

    Summed by itself, without a difference of large numbers; arguments and errors as in `value`.
    """

    def lost(x: Tensor, ideal: Tensor) -> Pair:
        given = logit(x).double()
        return (softplus(-given) - softplus(-ideal)) / 2, (softplus(given) - softplus(ideal)) / 2

    return _expectation(lost, p, g, region, agreement)


def exact_ladder(p: GaussianMixture, g: GaussianMixture, logsnrs: Sequence[float]) -> list[Exact]:
    """JSD of the two forward marginals at each log-SNR; it falls with more noise.

    Arguments:
        p, g: mixtures on the model's scale, where keep = sigmoid(log-SNR), lose = 1 - keep.
    """
    levels = torch.tensor(list(logsnrs), dtype=torch.float64)
    pairs = zip(levels.sigmoid(), (-levels).sigmoid(), strict=True)
    return [jsd(p.diffused(keep, lose), g.diffused(keep, lose)) for keep, lose in pairs]


def _logit(log_p: Tensor, log_g: Tensor) -> Tensor:
    nowhere = (log_p == -math.inf) & (log_g == -math.inf)
    return torch.where(nowhere, torch.zeros_like(log_p), log_p - log_g)


def _log(density: Density) -> LogDensity:
    return density.log_prob if isinstance(density, GaussianMixture) else density


def _expectation(
    payoffs: Payoffs,
    p: Density,
    g: Density,
    region: Region | None,
    agreement: float = AGREEMENT,
) -> Exact:
    """E_p a + E_g b of payoffs (a, b), by halving the step until two sums agree."""
    region = region or _around_both(p, g)
    if region.dims > 2:
        raise InputRefused(f"quadrature: at most 2 dimensions, not {region.dims}")
    step = region.step
    total, *masses = _sums(payoffs, _log(p), _log(g), region, step)
    change = math.inf
    for _ in range(HALVINGS):
        step /= 2
        previous = total
        total, *masses = _sums(payoffs, _log(p), _log(g), region, step)
        change = abs(total - previous)
        if change < agreement or region.size(step / 2) > LATTICE:
            break
    _refuse_mass(masses)
    if not change < ROUGH:
        raise NumericalFailure(
            f"quadrature: halving the step to {step:.3g} moves {total} by {change}"
        )
    return Exact(total, MARGIN * change + ROUNDING)


def _around_both(p: Density, g: Density) -> Region:
    if isinstance(p, GaussianMixture) and isinstance(g, GaussianMixture):
        return around(p, g)
    raise InputRefused("quadrature: of two mixtures the region is known; else give it, as a Box")


def _sums(
    payoffs: Payoffs, log_p: LogDensity, log_g: LogDensity, region: Region, step: float
) -> tuple[float, float, float]:
    """Step^D times the sums of p a + g b, p and g over the lattice."""
    totals = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for x in region.lattice(step):
            at_p, at_g = log_p(x).double(), log_g(x).double()
            a, b = payoffs(x, _logit(at_p, at_g))
            p, g = at_p.exp(), at_g.exp()
            # What has no mass counts for nothing, even where its payoff is infinite.
            zero = torch.zeros_like(p)
            paid = torch.where(p > 0, p * a, zero) + torch.where(g > 0, g * b, zero)
            totals += torch.stack([paid.sum(), p.sum(), g.sum()])
    whole, mass_p, mass_g = (totals * step**region.dims).tolist()
    return whole, mass_p, mass_g


def _refuse_mass(masses: Sequence[float]) -> None:
    for name, mass in zip("pg", masses, strict=True):
        if not abs(mass - 1) < MASS:
            raise InputRefused(
                f"quadrature: the mass of {name} over the region is {mass:.8g} and not 1: give a "
                "larger region, a smaller step, or a normalised density"
            )
