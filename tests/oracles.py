"""Exact reverse models of data whose law is known, and what the bound must be under them.

The exact denoiser of Gaussian and of Gaussian-mixture data is a closed form, so the bound of the
library can be held against theory: entropies, closed-form terms, identities. Expectations over
data and noise are exact wherever the integrand is quadratic in Gaussian variables (a cubature of
degree 3), by Gauss-Hermite quadrature for mixtures in one dimension, and by Monte Carlo elsewhere.
Monte-Carlo comparisons state their false-alarm rate: `assert_mean` fails by chance with
probability `FALSE_ALARM` over all the comparisons of one test.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from goldens import assert_near, load
from torch import Tensor, nn

from nelbo.bound import Bound, prior_term, term_of
from nelbo.decoders import Density, Edge, Following, Lose
from nelbo.parameterizations import X0
from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian, Pair
from nelbo.reverse import Parameterization, Reverse
from nelbo.schedules import Cosine, Harmonic, Linear, LogSNRLinear, Schedule, Stepped, Tabulated
from nelbo.variances import Posterior, Transition, Variance

FALSE_ALARM = 1e-6


def z_limit(comparisons: int) -> float:
    """|z| that independent standard normal draws exceed with probability ≤ FALSE_ALARM in all."""
    return -NormalDist().inv_cdf(FALSE_ALARM / (2 * comparisons))


def assert_mean(values: Tensor, truth: float, comparisons: int = 1, what: str = "") -> None:
    """The mean of iid `values` (n,) agrees with `truth` within `z_limit(comparisons)` errors."""
    values = values.double()
    error = float(values.std() / math.sqrt(len(values)))
    z = (float(values.mean()) - truth) / error
    assert abs(z) < z_limit(comparisons), f"{what}: {float(values.mean())} ± {error}, not {truth}"


# --- data of known law ---------------------------------------------------------------------------


class Known(ABC):
    """A law of x_0 in D dimensions whose posterior given x_t is a closed form."""

    dims: int

    @abstractmethod
    def posterior(self, x_t: Tensor, keep: Tensor, lose: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0|x_t] (B, D) and Var(x_{0,i}|x_t) (B, D); keep, lose () or (B, 1)."""

    @abstractmethod
    def log_density(self, x_0: Tensor) -> Tensor:
        """log q(x_0), nats (B,)."""


class GaussianData(Known):
    """N(mean, cov)."""

    def __init__(self, mean: Any, cov: Any) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.cov = torch.as_tensor(cov, dtype=torch.float64)
        self.dims = len(self.mean)
        self.eigenvalues, self.axes = torch.linalg.eigh(self.cov)

    def posterior(self, x_t: Tensor, keep: Tensor, lose: Tensor) -> tuple[Tensor, Tensor]:
        values, axes, mean = (v.to(x_t.dtype) for v in (self.eigenvalues, self.axes, self.mean))
        total = keep * values + lose
        along_axes = (x_t - keep.sqrt() * mean) @ axes
        x_0 = mean + (keep.sqrt() * values / total * along_axes) @ axes.T
        spread = (lose * values / total).expand_as(x_t) @ (axes.T**2)
        return x_0, spread

    def log_density(self, x_0: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(self.mean, self.cov).log_prob(x_0)

    def entropy(self) -> float:
        return float(0.5 * torch.log(2 * math.pi * math.e * self.eigenvalues).sum())

    def prior_kl(self, keep: float) -> float:
        """KL(q(x_N)‖N(0, I)) of the marginal after noise, in closed form."""
        values = keep * self.eigenvalues + (1 - keep)
        return float(
            0.5 * (values - 1 - values.log() + keep * (self.axes.T @ self.mean) ** 2).sum()
        )

    def mmse(self, logsnr: Tensor) -> Tensor:
        """trace Cov(x_0|x_t), the shape of logsnr."""
        return (1 / (1 / self.eigenvalues + logsnr.exp().unsqueeze(-1))).sum(-1)


class MixtureData(Known):
    """Σ_j w_j N(mean_j, std² I)."""

    def __init__(self, means: Any, std: float, weights: Any | None = None) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.std = std
        count, self.dims = self.means.shape
        uniform = torch.full((count,), 1 / count, dtype=torch.float64)
        self.weights = (
            uniform if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        )

    def log_marginal(self, x_t: Tensor, keep: Tensor, lose: Tensor) -> tuple[Tensor, Tensor]:
        """log q(x_t) (B,) and the log responsibilities (B, K)."""
        variance = keep * self.std**2 + lose
        offset = x_t[:, None] - keep.sqrt()[..., None] * self.means
        square = (offset**2).sum(-1)
        log_joint = self.weights.log() - 0.5 * square / variance
        log_joint = log_joint - 0.5 * self.dims * torch.log(2 * math.pi * variance)
        return log_joint.logsumexp(-1), log_joint.log_softmax(-1)

    def posterior(self, x_t: Tensor, keep: Tensor, lose: Tensor) -> tuple[Tensor, Tensor]:
        _, log_r = self.log_marginal(x_t.double(), keep.double(), lose.double())
        shrink = self.std**2 / (keep * self.std**2 + lose)
        offset = keep.sqrt() * shrink * x_t
        kept = 1 - keep * shrink
        centre = log_r.exp() @ self.means
        second = log_r.exp() @ self.means**2
        x_0 = offset + kept * centre
        return x_0, lose * shrink + kept**2 * (second - centre**2)

    def log_density(self, x_0: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        return self.log_marginal(x_0, one, 0 * one)[0]

    def draw(self, n: int) -> Tensor:
        j = torch.multinomial(self.weights, n, replacement=True)
        return self.means[j] + self.std * torch.randn(n, self.dims, dtype=torch.float64)


def ring(count: int, radius: float, std: float) -> MixtureData:
    """Equal Gaussians on a circle."""
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return MixtureData(radius * torch.stack([angle.cos(), angle.sin()], 1), std)


# --- exact reverse models ------------------------------------------------------------------------


class ExactDenoiser(nn.Module):
    """E[x_0|x_t]; with `spread`, followed by channels for `Exact`: the variance of x_0 given x_t.

    Arguments:
        spread: None, "each" (per dimension), or a function of log-SNR: one value for all.
    """

    def __init__(
        self, data: Known, schedule: Schedule, spread: str | Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.data = data
        self.schedule = schedule
        self.spread = spread

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        keep, lose = (along(v, x_t) for v in (self.schedule.keep(t), self.schedule.lose(t)))
        x_0, each = self.data.posterior(x_t, keep, lose)
        if self.spread is None:
            return x_0
        if callable(self.spread):
            each = along(self.spread(self.schedule.logsnr(t)), x_t).expand_as(x_t)
        return torch.cat([x_0, each], dim=1)


class Exact(Variance):
    """σ² = β̃ + (√k_s c)² Var(x_0|x_t), Var(x_0|x_t) learned; the decoder takes it."""

    learned = True

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        assert extra is not None
        low, from_data = along(pair.log_posterior.exp(), like), along(pair.from_data, like)
        return (low + from_data**2 * extra).log()

    def edge(
        self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor
    ) -> Tensor:
        assert extra is not None
        return extra.log()


def exact_model(
    data: Known,
    schedule: Schedule,
    variance: Variance,
    edge: Edge | None = None,
    spread: str | Callable[[Tensor], Tensor] = "each",
) -> Reverse:
    """The reverse process with the exact denoiser of `data` and this variance."""
    network = ExactDenoiser(data, schedule, spread if variance.learned else None)
    parameterization: Parameterization = X0(variance)
    return Reverse(Gaussian(schedule), network, parameterization, Density(edge))


def chains(steps: int) -> dict[str, Schedule]:
    """Schedules for a grid of `steps` latents."""
    return {
        "logsnr": LogSNRLinear(8.0, -8.0),
        "linear": Linear(steps),
        "cosine": Cosine(steps),
        "harmonic": Harmonic(steps),
    }


def at_logsnr(values: list[float]) -> Stepped:
    """The chain whose latents have these log-SNRs."""
    keep = torch.sigmoid(torch.tensor(values, dtype=torch.float64))
    before = torch.cat([torch.ones(1, dtype=torch.float64), keep[:-1]])
    return Tabulated(1 - keep / before)


# --- expectations of the bound -------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """Weighted points of (x_0, ε) that integrate the terms of a bound."""

    x_0: Tensor
    noise: Tensor
    weight: Tensor


def sphere(dims: int) -> Tensor:
    """±√n e_i (2n, n): their plain mean is E f of N(0, I) for every quadratic f."""
    axes = math.sqrt(dims) * torch.eye(dims, dtype=torch.float64)
    return torch.cat([axes, -axes])


def gaussian_points(data: GaussianData) -> Points:
    """Exact for terms that are quadratic in (x_0, ε)."""
    z = sphere(2 * data.dims)
    root = data.axes * data.eigenvalues.sqrt()
    x_0 = data.mean + z[:, : data.dims] @ root.T
    return Points(x_0, z[:, data.dims :], torch.full((len(z),), 1 / len(z), dtype=torch.float64))


def noise_points(x_0: Tensor) -> Points:
    """Exact over ε for one x_0 (D,), for terms that are quadratic in ε."""
    z = sphere(len(x_0))
    weight = torch.full((len(z),), 1 / len(z), dtype=torch.float64)
    return Points(x_0.expand_as(z), z, weight)


def hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(z), z ~ N(0, 1)."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.from_numpy(z), torch.from_numpy(w / w.sum())


def mixture_points(data: MixtureData, nodes: int) -> Points:
    """Gauss-Hermite over (component, x_0, ε) of a mixture in one dimension."""
    assert data.dims == 1
    z, w = hermite(nodes)
    x_0 = (data.means + data.std * z).flatten()
    weight = (data.weights[:, None] * w).flatten()
    grid = torch.cartesian_prod(x_0, z)
    return Points(grid[:, :1], grid[:, 1:], torch.outer(weight, w).flatten())


def bound_at(model: Reverse, points: Points, times: Tensor) -> Bound:
    """The library's bound at given (x_0, ε): all terms with the same ε, (P,) and (P, N−1) nats."""
    count, steps = len(points.x_0), len(times)
    index = torch.arange(steps).repeat(count)
    x_0 = points.x_0.repeat_interleave(steps, 0)
    marginal = model.process.marginal(x_0, times[index])
    noise = points.noise.repeat_interleave(steps, 0)
    x_t = marginal.mean + marginal.variance.sqrt() * noise
    at = model.at(x_t, times[index])
    values = term_of(at, x_0, times, index).view(count, steps)
    return Bound(prior_term(model, points.x_0, times), values[:, 1:], values[:, 0])


def expected_bound(model: Reverse, points: Points, times: Tensor) -> Bound:
    """E over the points: prior (1,), diffusion (1, N−1), reconstruction (1,)."""
    each = bound_at(model, points, times)
    w = points.weight
    return Bound(
        (w @ each.prior)[None], (w @ each.diffusion)[None], (w @ each.reconstruction)[None]
    )


# --- checks shared with the planted bugs ---------------------------------------------------------


def check_entropy(steps: int) -> None:
    """I16: with exact kernels E L = H(q) + KL(q(x_N)‖π), on every grid, to rounding."""
    data = GaussianData([0.5, -0.2], [[0.49, 0.0], [0.0, 1.7]])
    points = gaussian_points(data)
    for name, schedule in chains(steps).items():
        times = schedule.grid(steps)
        model = exact_model(data, schedule, Exact())
        total = float(expected_bound(model, points, times).total)
        keep = float(schedule.keep(times[-1]))
        truth = data.entropy() + data.prior_kl(keep)
        assert abs(total - truth) < 1e-9, f"{name} {steps}: {total} != {truth}"


def variants(data: GaussianData, schedule: Schedule, times: Tensor) -> dict[str, Reverse]:
    """The models of gaussian3.npz, one per rule for the variance."""
    copy = Following(times[1])
    scalar = exact_model(
        data, schedule, Exact(), spread=lambda logsnr: data.mmse(logsnr) / data.dims
    )
    return {
        "small_copy": exact_model(data, schedule, Posterior(), copy),
        "large_copy": exact_model(data, schedule, Transition(), copy),
        "small_beta": exact_model(data, schedule, Posterior(), Lose()),
        "opt_scalar": scalar,
        "opt_diag": exact_model(data, schedule, Exact()),
    }


def check_gaussian3() -> None:
    """Every term of gaussian3.npz in closed form, to 1e-9 relative: grids of 4, 20, 200."""
    golden = load("gaussian3")
    data = GaussianData(golden["mean"], golden["cov"])
    points = gaussian_points(data)
    assert_near(data.entropy(), golden["entropy_nats"], 1e-12, 0, "entropy")
    for steps in golden["N"].tolist():
        for name, schedule in chains(steps).items():
            times, key = schedule.grid(steps), f"{name}_N{steps}/"
            mmse = data.mmse(schedule.logsnr(times))
            assert_near(mmse, golden[f"{key}mmse"], 1e-9, 1e-13, f"{key}mmse")
            for variant, model in variants(data, schedule, times).items():
                v = golden["variants"].tolist().index(variant)
                value = expected_bound(model, points, times)
                terms = torch.cat([value.reconstruction, value.diffusion[0]])
                what = f"{key}{variant}"
                assert_near(terms, golden[f"{key}terms_nats"][v], 1e-9, 1e-12, what)
                assert_near(value.prior[0], golden[f"{key}prior_nats"], 1e-9, 1e-13, what)
                assert_near(value.total[0], golden[f"{key}total_nats"][v], 1e-9, 1e-12, what)


def model_law(model: Reverse, times: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 under p_θ, by pushing N(0, I) through its affine kernels."""
    corners = torch.cat([torch.zeros(1, dims), torch.eye(dims)]).double()
    x_t, t = corners.repeat(len(times), 1), times.repeat_interleave(dims + 1)
    at = model.at(x_t, t)
    later = torch.arange(len(x_t)) > dims
    before = times[:-1].repeat_interleave(dims + 1)
    laws = [at[~later].decoder(), at[later].kernel(before)]
    values = torch.cat([law.mean for law in laws]).view(len(times), dims + 1, dims)
    spreads = torch.cat([law.variance for law in laws]).view(len(times), dims + 1, dims)[:, 0]
    mean, cov = torch.zeros(dims, dtype=torch.float64), torch.eye(dims, dtype=torch.float64)
    for value, spread in zip(values.flip(0), spreads.flip(0), strict=True):
        slope = (value[1:] - value[0]).T
        mean, cov = slope @ mean + value[0], slope @ cov @ slope.T + torch.diag(spread)
    return mean, cov
