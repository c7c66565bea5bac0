r"""Small models whose expectations are exact: known data, its denoiser, and weighted points.

The data is a Gaussian or a Gaussian mixture, so that x̂_0 = E[x_0|x_t] is known; a model may be
that denoiser itself or a spoiled one, x̂_0 = a E[x_0|x_t] + b, and its network may speak of data,
noise or velocity. Expectations over (x_0, ε) are sums over weighted points:

    ±√n e_i of n dimensions       exact for what is quadratic in Gaussian variables,
    Gauss-Hermite nodes           for mixtures in one dimension, converging geometrically,

and those over x_t alone are sums over a lattice, which converge geometrically as well.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nelbo.data.mixture import GaussianMixture
from nelbo.decoders import Density, Edge
from nelbo.derivation.identity import Line, Side
from nelbo.parameterizations import X0, Epsilon, Velocity
from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian, Pair
from nelbo.reverse import Prediction, Reverse
from nelbo.schedules import Schedule, Stepped, Tabulated
from nelbo.variances import Variance

Shown = tuple[str, Tensor | float, str]
"""What a side is, its values, and the function that computed them."""


def compared(
    family: str,
    *sides: Shown,
    tolerance: float = 1e-10,
    relation: str = "=",
    note: str = "",
    unit: str = "nats",
) -> Line:
    """A line that shows all sides at the place where they differ most."""
    values = torch.broadcast_tensors(
        *[torch.as_tensor(value, dtype=torch.float64) for _, value, _ in sides]
    )
    table = torch.stack([value.flatten() for value in values])
    gap = table.max(0).values - table.min(0).values
    place = int(torch.where(gap.isnan(), math.inf, gap).argmax())
    said = f"the worst of {table.shape[1]}" if table.shape[1] > 1 else ""
    shown = [
        Side(w, float(v), by=by) for (w, _, by), v in zip(sides, table[:, place], strict=True)
    ]
    note = ", ".join(part for part in (note, said) if part)
    return Line(family, tuple(shown), relation, tolerance, note=note, unit=unit)


# --- data ----------------------------------------------------------------------------------------


def normal(mean: list[float], covariance: list[list[float]]) -> GaussianMixture:
    """N(mean, covariance)."""
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(
        one, torch.tensor([mean], dtype=one.dtype), torch.tensor([covariance], dtype=one.dtype)
    )


def two_modes(apart: float = 0.8) -> GaussianMixture:
    """Two normals at ±`apart` of variance 1 − apart², in one dimension: mean 0, variance 1."""
    half = torch.full((2,), 0.5, dtype=torch.float64)
    means = torch.tensor([[-apart], [apart]], dtype=torch.float64)
    return GaussianMixture(half, means, torch.full_like(means, 1 - apart**2)[:, :, None])


def at_logsnr(values: list[float]) -> Stepped:
    """The chain whose latents have these decreasing log-SNRs."""
    keep = torch.sigmoid(torch.tensor(values, dtype=torch.float64))
    before = torch.cat([torch.ones(1, dtype=torch.float64), keep[:-1]])
    return Tabulated(1 - keep / before)


# --- models --------------------------------------------------------------------------------------


class Denoiser(nn.Module, ABC):
    """A network that knows x̂_0 = scale E[x_0|x_t] + shift, and says it in one of three ways."""

    def __init__(
        self, data: GaussianMixture, schedule: Schedule, scale: float = 1.0, shift: float = 0.0
    ) -> None:
        super().__init__()
        self.data, self.schedule = data, schedule
        self.scale, self.shift = scale, shift

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        keep, lose = self.schedule.keep(t), self.schedule.lose(t)
        x_0 = self.scale * self.data.denoise(x_t, keep, lose) + self.shift
        return self.said(x_t, x_0, along(keep, x_t), along(lose, x_t))

    @abstractmethod
    def said(self, x_t: Tensor, x_0: Tensor, keep: Tensor, lose: Tensor) -> Tensor:
        """The output, (B, D) like x_0."""


class DataDenoiser(Denoiser):
    """x̂_0."""

    def said(self, x_t: Tensor, x_0: Tensor, keep: Tensor, lose: Tensor) -> Tensor:
        return x_0


class SpreadDenoiser(Denoiser):
    """x̂_0 and then Var(x_0|x_t), in one dimension."""

    def said(self, x_t: Tensor, x_0: Tensor, keep: Tensor, lose: Tensor) -> Tensor:
        spread = self.data.spread(x_t, keep.flatten(), lose.flatten())
        return torch.cat([x_0, spread[:, None]], 1)


class NoiseDenoiser(Denoiser):
    """ε̂ = (x_t − √k x̂_0)/√l."""

    def said(self, x_t: Tensor, x_0: Tensor, keep: Tensor, lose: Tensor) -> Tensor:
        out: Tensor = (x_t - keep.sqrt() * x_0) / lose.sqrt()
        return out


class VelocityDenoiser(Denoiser):
    """v̂ = (√k x_t − x̂_0)/√l."""

    def said(self, x_t: Tensor, x_0: Tensor, keep: Tensor, lose: Tensor) -> Tensor:
        out: Tensor = (keep.sqrt() * x_t - x_0) / lose.sqrt()
        return out


class Exact(Variance):
    """σ² = β̃ + (√k_s c)² Var(x_0|x_t), the exact variance of x_s given x_t in one dimension."""

    learned = True

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        assert extra is not None
        low, gain = along(pair.log_posterior.exp(), like), along(pair.from_data, like)
        return (low + gain**2 * extra).log()

    def edge(
        self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor
    ) -> Tensor:
        assert extra is not None
        return extra.log()


def model_of(
    data: GaussianMixture,
    schedule: Schedule,
    variance: Variance | None = None,
    edge: Edge | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Reverse:
    """The model of this denoiser, in x̂_0."""
    kind = SpreadDenoiser if variance is not None and variance.learned else DataDenoiser
    network = kind(data, schedule, scale, shift)
    return Reverse(Gaussian(schedule), network, X0(variance), Density(edge))


def in_three_ways(
    data: GaussianMixture, schedule: Schedule, scale: float, shift: float
) -> tuple[Reverse, Reverse, Reverse]:
    """One denoiser as a network of noise, of data and of velocity, σ² = β̃."""
    ways = ((NoiseDenoiser, Epsilon()), (DataDenoiser, X0()), (VelocityDenoiser, Velocity()))
    noise, x_0, speed = (
        Reverse(Gaussian(schedule), kind(data, schedule, scale, shift), rule, Density())
        for kind, rule in ways
    )
    return noise, x_0, speed


# --- expectations --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """Points x_0 (P, D) and ε (P, D) with weights (P,) that sum to one."""

    x_0: Tensor
    noise: Tensor
    weight: Tensor


def sphere(dims: int) -> tuple[Tensor, Tensor]:
    """±√n e_i (2n, n) and their weights: E f of N(0, I) exactly for every quadratic f."""
    axes = math.sqrt(dims) * torch.eye(dims, dtype=torch.float64)
    return torch.cat([axes, -axes]), torch.full((2 * dims,), 0.5 / dims, dtype=torch.float64)


def hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes (n,) and weights (n,) of E f(z), z ~ N(0, 1)."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.from_numpy(z), torch.from_numpy(w / w.sum())


def legendre(low: float, high: float, nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes (n,) and weights (n,) of the integral from `low` to `high`."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = 0.5 * (high - low)
    return low + half * (torch.from_numpy(x) + 1), half * torch.from_numpy(w)


def quadratic_points(data: GaussianMixture) -> Points:
    """(x_0, ε) of one Gaussian: exact for terms that are quadratic in both."""
    z, weight = sphere(2 * data.dims)
    root = torch.linalg.cholesky(data.covariances[0])
    return Points(data.means[0] + z[:, : data.dims] @ root.T, z[:, data.dims :], weight)


def mixture_points(data: GaussianMixture, nodes: int = 48) -> Points:
    """(component, x_0, ε) of a mixture in one dimension by Gauss-Hermite."""
    z, w = hermite(nodes)
    x_0 = (data.means + data.covariances[:, 0].sqrt() * z).flatten()
    weight = (data.weights[:, None] * w).flatten()
    grid = torch.cartesian_prod(x_0, z)
    return Points(grid[:, :1], grid[:, 1:], torch.outer(weight, w).flatten())


def noise_points(x_0: Tensor, nodes: int = 48) -> Points:
    """ε by Gauss-Hermite beside each of x_0 (n, 1); the weights sum to one for each of them."""
    z, w = hermite(nodes)
    grid = torch.cartesian_prod(x_0[:, 0], z)
    return Points(grid[:, :1], grid[:, 1:], w.repeat(len(x_0)))


def lattice(data: GaussianMixture, count: int = 600) -> tuple[Tensor, Tensor]:
    """Places (n, 1) and weights (n,) of E f(x) under a mixture in one dimension."""
    reach = 10 * float(data.covariances.max().sqrt())
    low, high = float(data.means.min()) - reach, float(data.means.max()) + reach
    x = torch.linspace(low, high, count, dtype=torch.float64)[:, None]
    return x, data.log_prob(x).exp() * (high - low) / (count - 1)


def mmse(data: GaussianMixture, logsnr: Tensor) -> Tensor:
    """E Var(x_0|x_t) at log-SNRs (n,), one dimension: the error that no denoiser avoids."""
    found = []
    for keep, lose in zip(logsnr.sigmoid(), (-logsnr).sigmoid(), strict=True):
        x_t, weight = lattice(data.diffused(keep, lose))
        found.append(weight @ data.spread(x_t, keep, lose))
    return torch.stack(found)


def called(model: Reverse, points: Points, times: Tensor) -> tuple[Prediction, Tensor, Tensor]:
    """One call at every point and time: the prediction, x_0 (P N, D) and the place (P N,)."""
    count = len(points.x_0)
    index = torch.arange(len(times)).repeat(count)
    x_0, noise = (v.repeat_interleave(len(times), 0) for v in (points.x_0, points.noise))
    law = model.process.marginal(x_0, times[index])
    return model.at(law.mean + law.variance.sqrt() * noise, times[index]), x_0, index


def averaged(values: Tensor, points: Points) -> Tensor:
    """(N,) expectations over the points of values (P N,)."""
    out: Tensor = points.weight @ values.view(len(points.weight), -1)
    return out
