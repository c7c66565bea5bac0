"""What a sampler without a density is worth on a toy: JSD after the same blur of both laws.

A generator's law has no density that could be evaluated, yet with N(0, s^2 I) added it has one,
and many samples find it. The mixture p becomes another mixture, exactly. Of n samples of g each is
shared among the four lattice points around it (which keeps its mean), and the transform of these
counts is multiplied by exp(-s^2 k^2/2) over the window of the sharing, sinc^2(k h/2) on either
axis. With a step h of s/4 this is the blurred law of those samples to many digits (JSD to 2e-4 for
one lone point, the worst case), and a sum over the lattice gives JSD. A channel applied to both
laws only lowers JSD: the figure lies below that of the pair itself, and approaches it as s falls
below every width.

The plug-in value exceeds the truth by about c/n: from one sample even p = g would seem apart. The
samples come in blocks, and leaving out one after the other (the jackknife of Quenouille and Tukey)
measures both this excess, which is subtracted, and the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from nelbo.data.mixture import GaussianMixture
from nelbo.errors import InputRefused, NumericalFailure
from nelbo.estimate import student95

Sampler = Callable[[int], Tensor]
"""n -> (n, 2)."""

REACH = 10.0
PER_WIDTH = 4
"""Lattice steps in one standard deviation of the blur."""
BLOCKS = 16
CELLS = 2**22
LEAST = 1000
"""Samples."""
RIPPLE = 1e-9
_LOG2 = math.log(2)


@dataclass(frozen=True)
class Blurred:
    """JSD in nats of a sampler and a mixture, both blurred by N(0, std^2 I).

    Arguments:
        value: after the excess was subtracted; below 0 by chance where the laws agree.
        se: standard error from the blocks. excess: what was subtracted, about c/n.
        n: samples. std: of the blur.
        outside: share of the samples beyond the reach of the mixture.
    """

    value: float
    se: float
    excess: float
    n: int
    std: float
    outside: float

    @property
    def reach(self) -> float:
        """Half of the asymptotic 95 % interval: Student's quantile for the blocks times se."""
        return student95(BLOCKS - 1) * self.se

    @property
    def what(self) -> str:
        """The words for this figure: which blur it is after, and of how many samples."""
        return f"both blurred by N(0, {self.std:g}^2 I), n = {self.n}"

    def as_json(self) -> dict[str, float | int]:
        """A JSON object {jsd_nats, se, excess, n, std, outside}."""
        return {
            "jsd_nats": self.value,
            "se": self.se,
            "excess": self.excess,
            "n": self.n,
            "std": self.std,
            "outside": self.outside,
        }


def blurred(
    sampler: Sampler, mixture: GaussianMixture, std: float, n: int = 1_000_000, chunk: int = 2**17
) -> Blurred:
    """JSD in nats between a sampler and a known mixture in the plane, both blurred.

    Arguments:
        sampler: n -> (n, 2) independent samples, called with at most `chunk`.
        mixture: the law p in the same units, two-dimensional.
        std: of the blur, positive; at least 1/400 or so of the range of the mixture.
        n: samples in all; the excess falls with 1/n, the standard error with 1/sqrt(n).

    Raises:
        InputRefused: another dimension, a blur too fine for the range, samples of another shape
            or not finite, fewer than 1000 samples.

    References:
        Silverman 1982, Appl. Stat. 31 (density estimates by fast Fourier transform); Efron 1982
        (the jackknife).
    """
    grid = _lattice(mixture, std, n)
    counts, away = _counted(sampler, grid, n, chunk)
    return _jackknifed(grid.log_prob(mixture.diffused(1.0, std**2)), counts, away, grid, n)


def smoothed(centres: Tensor, mixture: GaussianMixture, std: float) -> Blurred:
    """JSD in nats of a known mixture and the law N(c, std^2 I) with c the law of some points.

    A chain in the plane whose decoder is normal is of this form, and this is its own divergence,
    not that of a blurred pair.

    Arguments:
        centres: (n, 2) independent draws of c, in the units of the mixture.
        mixture: p, as it is. std: of the normal law around a centre.

    Raises:
        InputRefused: see `blurred`.
    """
    n = len(centres)
    grid = _lattice(mixture, std, n)
    dealt = iter(centres.split([n // BLOCKS + (b < n % BLOCKS) for b in range(BLOCKS)]))
    counts, away = _counted(lambda _: next(dealt), grid, n, n)
    return _jackknifed(grid.log_prob(mixture), counts, away, grid, n)


def _jackknifed(log_p: Tensor, counts: Tensor, away: Tensor, grid: _Lattice, n: int) -> Blurred:
    """The divergence with its excess subtracted, from the counts of every block."""
    total, gone = counts.sum(0), away.sum()
    whole = _divergence(log_p, total, gone, grid)
    without = torch.tensor(
        [
            _divergence(log_p, total - block, gone - part, grid)
            for block, part in zip(counts, away, strict=True)
        ],
        dtype=torch.float64,
    )
    excess = (BLOCKS - 1) * (float(without.mean()) - whole)
    spread = (BLOCKS - 1) / BLOCKS * float((without - without.mean()).square().sum())
    return Blurred(whole - excess, math.sqrt(spread), excess, n, grid.std, float(gone) / n)


@dataclass(frozen=True, eq=False)
class _Lattice:
    """A square lattice around a blurred mixture, with a margin into which samples are smeared."""

    low: Tensor
    shape: tuple[int, int]
    step: float
    std: float
    margin: int

    def log_prob(self, mixture: GaussianMixture) -> Tensor:
        axes = [
            float(start) + self.step * torch.arange(count, dtype=torch.float64)
            for start, count in zip(self.low, self.shape, strict=True)
        ]
        return mixture.log_prob(torch.cartesian_prod(*axes)).reshape(self.shape)

    def share(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Samples (n, 2) shared among the points around each (H, W), and how many lie away."""
        place = (x.double() - self.low) / self.step
        top = torch.tensor(self.shape).double() - 1 - self.margin
        inside = ((place >= self.margin) & (place < top)).all(1)
        first = place[inside].floor()
        after = place[inside] - first
        rows, columns = first.long().unbind(1)
        total = torch.zeros(math.prod(self.shape), dtype=torch.float64)
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (after[:, 0] if down else 1 - after[:, 0]) * (
                after[:, 1] if right else 1 - after[:, 1]
            )
            total.index_add_(0, (rows + down) * self.shape[1] + columns + right, weight)
        return total.reshape(self.shape), (~inside).sum().double()

    def blur(self, counts: Tensor) -> Tensor:
        """The density (H, W) of N(0, std^2 I) around counted samples, times their number."""
        spectrum = torch.fft.rfft2(counts)
        for axis, frequency in (
            (0, torch.fft.fftfreq(self.shape[0], dtype=torch.float64)),
            (1, torch.fft.rfftfreq(self.shape[1], dtype=torch.float64)),
        ):
            angle = 2 * math.pi * frequency * self.std / self.step
            kernel = (-angle.square() / 2).exp() / torch.sinc(frequency).square()
            spectrum = spectrum * (kernel[:, None] if axis == 0 else kernel)
        density: Tensor = torch.fft.irfft2(spectrum, s=self.shape) / self.step**2
        return density


def too_fine(mixture: GaussianMixture, std: float) -> bool:
    """Whether a blur asks for more cells over the range of the mixture than are computed."""
    _, (rows, columns) = _frame(mixture, std)
    return rows * columns > CELLS


def _frame(mixture: GaussianMixture, std: float) -> tuple[Tensor, tuple[int, int]]:
    """The lower corner of a lattice around a blurred mixture, and its cells on either side."""
    spread = math.sqrt(float(torch.linalg.eigvalsh(mixture.covariances).max()) + std**2)
    reach = REACH * (spread + std)
    low, high = mixture.means.amin(0) - reach, mixture.means.amax(0) + reach
    # Lengths that are multiples of 32 transform fast.
    down, across = (
        32 * math.ceil(float(side) * PER_WIDTH / std / 32 + 1 / 32) for side in high - low
    )
    return low, (down, across)


def _lattice(mixture: GaussianMixture, std: float, n: int) -> _Lattice:
    """Where the blurred mixture has mass, plus the reach of the blur on every side."""
    if mixture.dims != 2:
        raise InputRefused(f"blurred: laws in the plane, not in {mixture.dims} dimensions")
    if not std > 0 or n < LEAST:
        raise InputRefused(f"blurred: give a positive std and at least {LEAST} samples")
    low, (rows, columns) = _frame(mixture, std)
    step = std / PER_WIDTH
    if rows * columns > CELLS:
        raise InputRefused(
            f"blurred: a std of {std:g} needs {rows * columns} cells over the range of the "
            f"mixture, and the most is {CELLS}: give a larger one"
        )
    return _Lattice(low, (rows, columns), step, std, math.ceil(REACH * PER_WIDTH))


def _counted(sampler: Sampler, grid: _Lattice, n: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Shared counts (BLOCKS, H, W) and samples away from the lattice (BLOCKS,)."""
    counts = torch.zeros(BLOCKS, *grid.shape, dtype=torch.float64)
    away = torch.zeros(BLOCKS, dtype=torch.float64)
    for block in range(BLOCKS):
        left = n // BLOCKS + (block < n % BLOCKS)
        while left > 0:
            ask = min(left, chunk)
            shared, gone = grid.share(_drawn(sampler, ask))
            counts[block] += shared
            away[block] += gone
            left -= ask
    return counts, away


def _drawn(sampler: Sampler, count: int) -> Tensor:
    x = torch.as_tensor(sampler(count))
    if x.shape != (count, 2):
        raise InputRefused(f"blurred: asked for ({count}, 2) samples and got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise InputRefused("blurred: the sampler gives values that are not finite")
    return x


def _divergence(log_p: Tensor, counts: Tensor, away: Tensor, grid: _Lattice) -> float:
    """JSD of the blurred samples against exp(log_p); away from p a sample costs log 2/2."""
    n = counts.sum() + away
    g = grid.blur(counts) / n
    lost = -float(g.clamp(max=0).sum()) * grid.step**2
    if lost > RIPPLE:
        raise NumericalFailure(
            f"blurred: the transform leaves a density below 0, mass {-lost:.2g}"
        )
    # Within rounding of 0 there is no sample near, and p pays log 2/2 for all of its mass.
    logit = torch.where(g > 0, log_p - g.clamp(min=torch.finfo(g.dtype).tiny).log(), math.inf)
    paid_p = log_p.exp() * (_LOG2 - softplus(-logit))
    paid_g = torch.where(g > 0, g * (_LOG2 - softplus(logit)), torch.zeros_like(g))
    inside = float((paid_p + paid_g).sum()) * grid.step**2
    return (inside + float(away / n) * _LOG2) / 2
