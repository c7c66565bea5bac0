"""Gaussian mixtures: the data whose every quantity under diffusion is known.

With p(x_0) = sum_k w_k N(m_k, C_k), the marginal at keep, lose is again a mixture, q(x_t) = sum_k
w_k N(sqrt(keep) m_k, keep C_k + lose I), and so is the law of x_0 given x_t:

    E[x_0 | x_t] = sum_k r_k(x_t) [m_k + sqrt(keep) C_k S_k^-1 (x_t - sqrt(keep) m_k)]

with S_k = keep C_k + lose I and responsibilities r_k. All of it is evaluated in the eigenbasis C_k
= U_k diag(e_k) U_k^T, where the covariance at any noise level is diagonal, keep e_k + lose: one
decomposition serves all times. The entropy is a sum over a grid: for a smooth density that dies
out, the trapezoidal rule converges exponentially in the inverse step (Trefethen and Weideman,
2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ENTRIES = 2**22
REACH = 10.0
STEPS = (0.8, 0.6, 0.45, 0.3, 0.2)
AGREEMENT = 1e-10
GRID_LIMIT = 2**26

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Reduction = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_k w_k N(m_k, C_k) in float64.

    Arguments:
        weights: (K,), positive, summing to one.
        means: (K, D).
        covariances: (K, D, D), symmetric and positive definite.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        count, dims = self.means.shape
        assert self.weights.shape == (count,) and self.covariances.shape == (count, dims, dims)
        assert {self.weights.dtype, self.means.dtype, self.covariances.dtype} == {torch.float64}
        assert bool((self.weights > 0).all()) and abs(float(self.weights.sum()) - 1) < 1e-12
        assert bool((self._spectrum[0] > 0).all()), "covariances must be positive definite"

    @property
    def dims(self) -> int:
        """D."""
        return self.means.shape[1]

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (K, D) and eigenvectors (K, D, D) of the covariances."""
        values, vectors = torch.linalg.eigh(self.covariances)
        return values, vectors

    def mean(self) -> Tensor:
        """E[x_0], (D,)."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Cov(x_0), (D, D): within the components plus between them."""
        apart = self.means - self.mean()
        within = torch.einsum("k,kde->de", self.weights, self.covariances)
        return within + torch.einsum("k,kd,ke->de", self.weights, apart, apart)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B, D) -> (B,) nats."""
        return self._over_rows(x, 1.0, 0.0, lambda joint, *_: joint.logsumexp(1))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` independent draws, (count, D) float64."""
        kind = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dims, dtype=torch.float64, generator=generator)
        values, vectors = self._spectrum
        root = vectors * values.sqrt()[:, None, :]
        return self.means[kind] + torch.einsum("bde,be->bd", root[kind], noise)

    def diffused(self, keep: float | Tensor, lose: float | Tensor) -> GaussianMixture:
        """The law of x_t = sqrt(keep) x_0 + sqrt(lose) noise, keep and lose scalars."""
        keep = torch.as_tensor(keep, dtype=torch.float64)
        noise = torch.as_tensor(lose, dtype=torch.float64) * torch.eye(
            self.dims, dtype=torch.float64
        )
        return GaussianMixture(
            self.weights, self.means * keep.sqrt(), self.covariances * keep + noise
        )

    def standardized(self, shift: Tensor, scale: float | Tensor) -> GaussianMixture:
        """The law of (x - shift)/scale, scale a positive number or (D,)."""
        scale = torch.as_tensor(scale, dtype=torch.float64).expand(self.dims)
        means = (self.means - shift) / scale
        return GaussianMixture(self.weights, means, self.covariances / torch.outer(scale, scale))

    def denoise(self, x_t: Tensor, keep: float | Tensor, lose: float | Tensor) -> Tensor:
        """E[x_0 | x_t], the minimum mean square error denoiser.

        Arguments:
            x_t: (B, D), any floating type.
            keep, lose: () or (B,).

        Returns:
            (B, D) float64.
        """
        return self._over_rows(x_t, keep, lose, lambda *parts: self._posterior(*parts)[0])

    def spread(self, x_t: Tensor, keep: float | Tensor, lose: float | Tensor) -> Tensor:
        """trace Cov(x_0 | x_t), the square error that no denoiser can avoid.

        Arguments:
            x_t: (B, D), any floating type.
            keep, lose: () or (B,).

        Returns:
            (B,) float64.
        """
        return self._over_rows(x_t, keep, lose, lambda *parts: self._posterior(*parts)[1])

    def entropy(self) -> tuple[float, float]:
        """-E log p and an estimate of its absolute error, both in nats.

        One component: closed form, 1/2 sum log(2 pi e e_d). Otherwise, in one or two dimensions,
        sums over grids of decreasing step until two agree. Their error falls exponentially with
        1/step, so the last change bounds what is left.

        Raises:
            ValueError: a mixture in more than two dimensions, or too fine for its width.
        """
        if len(self.weights) == 1:
            logs = (2 * math.pi * math.e * self._spectrum[0]).log()
            return float(logs.sum()) / 2, AGREEMENT
        if self.dims > 2:
            raise ValueError(f"entropy by quadrature: at most 2 dimensions, not {self.dims}")
        smallest = math.sqrt(float(self._spectrum[0].min()))
        value, change = math.inf, math.inf
        for step in STEPS:
            previous, value = value, self._grid_entropy(step * smallest)
            change = abs(value - previous)
            if change < AGREEMENT:
                break
        return value, change + AGREEMENT

    def _over_rows(
        self, x: Tensor, keep: float | Tensor, lose: float | Tensor, reduce: Reduction
    ) -> Tensor:
        """`reduce` of the joint of component and x_t, over blocks of rows to bound the memory."""
        assert x.ndim == 2 and x.shape[1] == self.dims, f"(B, {self.dims}), not {tuple(x.shape)}"
        device, home = x.device, self.means.device
        x, keep, lose = (_at(value, home) for value in (x, keep, lose))
        keeps, loses = (_per_row(value, len(x)) for value in (keep, lose))
        size = max(1, ENTRIES // self.means.numel())
        blocks = zip(*(torch.split(rows, size) for rows in (x, keeps, loses)), strict=True)
        return torch.cat([reduce(*self._joint(*block)) for block in blocks]).to(device)

    def _joint(self, x: Tensor, keep: Tensor, lose: Tensor) -> Parts:
        """log w_k N(x_t; ...), (B, K), and what the posterior needs, (B, K, D) or (B, 1, 1)."""
        values, vectors = self._spectrum
        keep, lose = keep[:, None, None], lose[:, None, None]
        turned = torch.einsum("kde,bkd->bke", vectors, x[:, None] - keep.sqrt() * self.means)
        variance = keep * values + lose
        exponents = (turned.square() / variance + (2 * math.pi * variance).log()).sum(2) / 2
        return self.weights.log() - exponents, turned, variance, keep, lose

    def _posterior(
        self, joint: Tensor, turned: Tensor, variance: Tensor, keep: Tensor, lose: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean (B, D) and trace of the covariance (B,) of x_0 given x_t."""
        values, vectors = self._spectrum
        kinds = joint.softmax(1)
        gain = keep.sqrt() * values / variance
        centres = self.means + torch.einsum("kde,bke->bkd", vectors, gain * turned)
        mean = torch.einsum("bk,bkd->bd", kinds, centres)
        within = (values * lose / variance).sum(2)
        between = (centres - mean[:, None]).square().sum(2)
        return mean, (kinds * (within + between)).sum(1)

    def _grid_entropy(self, step: float) -> float:
        total = 0.0
        for points in self._grid(step):
            log_p = self.log_prob(points)
            total -= float((log_p.exp() * log_p).sum())
        return total * step**self.dims

    def _grid(self, step: float) -> Iterator[Tensor]:
        """Points of a square lattice, without those far from every component.

        A cell whose points are all beyond REACH standard deviations holds less than
        exp(-REACH^2/2) = 2e-22 of the mass.
        """
        reach = REACH * math.sqrt(float(self._spectrum[0].max()))
        low, high = self.means.amin(0) - reach, self.means.amax(0) + reach
        counts = ((high - low) / step).ceil().long() + 1
        if int(counts.prod()) > GRID_LIMIT:
            raise ValueError("entropy by quadrature: components too narrow for their range")
        axes = [
            start + step * torch.arange(int(count), dtype=torch.float64)
            for start, count in zip(low, counts, strict=True)
        ]
        across = axes[1][:, None] if self.dims == 2 else torch.empty(1, 0, dtype=torch.float64)
        block = max(1, ENTRIES // (len(across) * len(self.means)))
        for first in torch.split(axes[0], block):
            near = (first[:, None] - self.means[:, 0]).abs().amin(1) <= reach
            points = torch.cat(
                [
                    first[near].repeat_interleave(len(across))[:, None],
                    across.repeat(int(near.sum()), 1),
                ],
                1,
            )
            yield points[torch.cdist(points, self.means).amin(1) <= reach]


def _at(value: float | Tensor, device: torch.device) -> Tensor:
    """The mixture computes where it is, whatever device asks."""
    return torch.as_tensor(value, dtype=torch.float64).to(device)


def _per_row(value: float | Tensor, rows: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).expand(rows)
