r"""Modes of a Gaussian mixture that a sampler finds, by the definitions of the GAN papers.

For K equal modes N(m_j, s^2 I) and samples y_1..y_n: a sample is of *high quality* if it lies
within three standard deviations of the nearest mode, |y - m_j| <= 3 s; a mode is *found* if at
least one high-quality sample has it nearest; and the *reverse KL* is that of the histogram h of
nearest modes over all samples against the uniform law,

    KL(h || u) = sum_j h_j log(K h_j) nats.

One sample suffices to find a mode, and three deviations are wide: all modes found, 99 % of high
quality and no reverse KL are compatible with standard deviations half as wide again. So the count
of modes that hold at least 1 % of their mass stands beside it, and the floor that a perfect
generator reaches at the same n, which is exact:

    high quality   P(chi^2_D <= 9), in two dimensions 1 - exp(-9/2) = 98.9 %
    reverse KL     log K + K E[(c/n) log(c/n)], c ~ Binomial(n, 1/K), about (K - 1)/(2n).

References:
    Srivastava et al. 2017 (VEEGAN), section 4.1, for modes and high quality; Lin, Khetan, Fanti,
    Oh 2018 (PacGAN), section 4.1, for the reverse KL. Their text assigns every sample to its
    nearest mode, their code high-quality samples alone: both are given here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nelbo.data.mixture import GaussianMixture
from nelbo.errors import InputRefused

REACH = 3.0
SHARE = 0.01
EQUAL = 1e-9
BLOCK = 2**22
RULE = (
    "high quality: within 3 sd of the nearest mode; found: at least one high-quality sample; "
    "held: high-quality samples for at least 1 % of the mode's mass; reverse KL in nats: "
    "histogram of the nearest modes of all samples against uniform"
)


@dataclass(frozen=True)
class Floor:
    """What a perfect generator reaches with n exact draws.

    Arguments:
        high_quality: expected share; exact for modes so far apart that their balls are disjoint,
            below it where neighbours overlap.
        reverse_kl_nats: expected plug-in value.
    """

    high_quality: float
    reverse_kl_nats: float


@dataclass(frozen=True)
class Modes:
    """Modes found by n samples.

    Arguments:
        found: modes with a high-quality sample. held: with at least 1 % of their mass. of: K.
        high_quality: share of the samples.
        reverse_kl_nats: over all samples by their nearest mode.
        reverse_kl_nats_high_quality: over high-quality samples; None if there are none.
        counts: high-quality samples of every mode.
    """

    found: int
    held: int
    of: int
    high_quality: float
    reverse_kl_nats: float
    reverse_kl_nats_high_quality: float | None
    counts: tuple[int, ...]
    n: int
    floor: Floor

    def as_json(self) -> dict[str, Any]:
        """A JSON object with the floor of a perfect generator and the rule in words."""
        return {
            "found": self.found,
            "held": self.held,
            "of": self.of,
            "high_quality": self.high_quality,
            "reverse_kl_nats": self.reverse_kl_nats,
            "reverse_kl_nats_high_quality": self.reverse_kl_nats_high_quality,
            "n": self.n,
            "perfect": {
                "high_quality": self.floor.high_quality,
                "reverse_kl_nats": self.floor.reverse_kl_nats,
            },
            "rule": RULE,
        }

    def text(self) -> str:
        """Two lines that fit 80 columns: the samples, and a perfect generator."""
        held = f"({self.held} with at least 1 % of their mass)"
        return (
            f"modes {self.found} of {self.of} {held}, n = {self.n}\n"
            f"high quality {100 * self.high_quality:.1f} % (perfect: "
            f"{100 * self.floor.high_quality:.1f} %), reverse KL {self.reverse_kl_nats:.4f} nats "
            f"({self.floor.reverse_kl_nats:.4f})"
        )


def modes(mixture: GaussianMixture, samples: Tensor) -> Modes:
    """Count the modes of a mixture of equal isotropic Gaussians that samples hit.

    Arguments:
        mixture: K components of equal weight and covariance s^2 I, in the units of the samples.
        samples: (n, D), any real dtype.
    Raises:
        InputRefused: another mixture, or samples of another shape, none, or not finite.
    References:
        PacGAN's figures are of n = 2500 samples, sd .01 on the ring and .05 on the grid.
    """
    deviation = _deviation(mixture)
    _check(mixture, samples)
    nearest, distance = _nearest(samples.double(), mixture.means)
    near = distance <= REACH * deviation
    n, count = len(samples), len(mixture.weights)
    every = torch.bincount(nearest, minlength=count)
    those = torch.bincount(nearest[near], minlength=count)
    return Modes(
        found=int((those > 0).sum()),
        held=int((those >= SHARE * n / count).logical_and(those > 0).sum()),
        of=count,
        high_quality=float(near.double().mean()),
        reverse_kl_nats=_reverse_kl(every),
        reverse_kl_nats_high_quality=_reverse_kl(those) if bool(near.any()) else None,
        counts=tuple(those.tolist()),
        n=n,
        floor=floor(count, mixture.dims, n),
    )


def floor(count: int, dims: int, n: int) -> Floor:
    """What n exact draws from `count` separate modes in `dims` dimensions give on average.

    Arguments:
        count: K >= 1. dims: D >= 1. n: at least one draw.
    """
    assert min(count, dims, n) >= 1
    half = torch.tensor([dims / 2, REACH**2 / 2], dtype=torch.float64)
    inside = float(torch.special.gammainc(half[0], half[1]))
    if count == 1:
        return Floor(inside, 0.0)
    c = torch.arange(1, n + 1, dtype=torch.float64)
    chance = torch.tensor(1 / count, dtype=torch.float64)
    log_mass = (
        math.lgamma(n + 1)
        - torch.lgamma(c + 1)
        - torch.lgamma(n - c + 1)
        + c * chance.log()
        + (n - c) * (-chance).log1p()
    )
    mean = float((log_mass.exp() * (c / n) * (c / n).log()).sum())
    return Floor(inside, math.log(count) + count * mean)


def _reverse_kl(counts: Tensor) -> float:
    share = counts.double() / counts.sum()
    return float(torch.special.xlogy(share, share * len(counts)).sum())


def _nearest(samples: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest mean and the distance to it, (n,) each."""
    found = []
    for rows in torch.split(samples, max(1, BLOCK // means.numel())):
        distances = torch.cdist(rows, means, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.min(1))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _deviation(mixture: GaussianMixture) -> float:
    """s, after making sure that all components are s^2 I with equal weights."""
    variance = float(mixture.covariances[0, 0, 0])
    same = variance * torch.eye(mixture.dims, dtype=torch.float64)
    alike = float((mixture.covariances - same).abs().max()) <= EQUAL * variance
    equal = float((mixture.weights * len(mixture.weights) - 1).abs().max()) <= EQUAL
    if not (alike and equal):
        raise InputRefused(
            "modes are counted for mixtures of equal weights and one isotropic covariance (ring, "
            "grid25); for other laws read the certificate and density/coverage"
        )
    return math.sqrt(variance)


def _check(mixture: GaussianMixture, samples: Tensor) -> None:
    if samples.dim() != 2 or len(samples) < 1 or samples.shape[1] != mixture.dims:
        raise InputRefused(
            f"samples are {tuple(samples.shape)}: to count modes in {mixture.dims} dimensions "
            f"they must be (n, {mixture.dims}), in the units of the data"
        )
    if not bool(torch.isfinite(samples).all()):
        raise InputRefused("samples hold NaN or infinite values: their modes cannot be counted")
