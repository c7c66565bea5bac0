r"""Decoders p(x_0|x_1): how data is read off the first latent, and with which variance.

β̃ of the step to data is 0, so the variance of a normal decoder is a choice of its own (`Edge`),
worth about a tenth of a bit per dimension; every figure names it.

References:
    Ho, Jain, Abbeel 2020, eq. 13 (`Discretized`); Nichol, Dhariwal 2021 (`Following`);
    Kingma et al. 2021 (`Ratio`); Sohl-Dickstein et al. 2015 (`EdgeFixed`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.distributions import Distribution

from nelbo.distributions import DiagonalNormal, DiscretizedNormal, LevelCategorical
from nelbo.parameterizations import GaussianParameterization, Levels
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Decoder, Prediction, gaussian_process


class Edge(ABC):
    """The decoder's variance: β̃ of the step to data is 0, so something must stand in its place."""

    @abstractmethod
    def log_variance(self, process: Gaussian, t: Tensor) -> Tensor:
        """log σ², () or (B,), float64."""

    def on(self, times: Tensor) -> Edge:
        """The same rule for another grid (K,)."""
        return self


class Lose(Edge):
    """σ² = lose(t_1) = β_1 (Ho et al. 2020 with σ² = β)."""

    def log_variance(self, process: Gaussian, t: Tensor) -> Tensor:
        return process.schedule.log_lose(t)


class Ratio(Edge):
    """σ² = lose/keep = 1/snr(t_1): the spread of x_1/√k around x_0 (Kingma et al. 2021)."""

    def log_variance(self, process: Gaussian, t: Tensor) -> Tensor:
        return -process.schedule.logsnr(t)


class Following(Edge):
    """σ² = β̃ of the first pair (t_1, t_2), as improved DDPM copies it.

    Arguments:
        t_2: the second time of the grid.
    """

    def __init__(self, t_2: Tensor) -> None:
        self.t_2 = t_2

    def log_variance(self, process: Gaussian, t: Tensor) -> Tensor:
        # a number, so that nothing is copied to the device of t
        return process.pair(t, torch.full_like(t, float(self.t_2))).log_posterior

    def on(self, times: Tensor) -> Following:
        if len(times) < 2:
            raise ValueError(
                "the decoder's variance follows the first pair, and a chain of one latent has "
                "none: keep two latents or more"
            )
        return Following(times[1])


class Constant(Edge):
    """σ² given as its logarithm."""

    def __init__(self, logvar: float) -> None:
        self.logvar = logvar

    def log_variance(self, process: Gaussian, t: Tensor) -> Tensor:
        return torch.full_like(t, self.logvar)


class Density(Decoder):
    """N(x_0; x̂_0, σ²): data without levels; the bound may be negative."""

    def __init__(self, edge: Edge | None = None) -> None:
        self.edge = Lose() if edge is None else edge

    def on(self, times: Tensor) -> Density:
        return Density(self.edge.on(times))

    def with_edge(self, edge: Edge) -> Density:
        """The same with another variance."""
        return Density(edge)

    def distribution(self, at: Prediction) -> DiagonalNormal:
        process = gaussian_process(at.model.process, "Density")
        parameterization = at.model.parameterization
        assert isinstance(parameterization, GaussianParameterization)
        log_low = self.edge.log_variance(process, at.t)
        log_lose = process.schedule.log_lose(at.t)
        extra = parameterization.variance_part(at.output)
        return DiagonalNormal(
            at.x_0, parameterization.variance.edge(log_low, log_lose, extra, at.x_t)
        )


class Discretized(Decoder):
    """The mass of N(x̂_0, σ²) in the bin of each level (exact normal cdf, open edge bins).

    Arguments:
        levels: n; level j sits at 2j/(n−1) − 1.
        edge: the variance.
    """

    def __init__(self, levels: int, edge: Edge | None = None) -> None:
        self.levels = levels
        self.density = Density(edge)

    @property
    def edge(self) -> Edge:
        """The variance."""
        return self.density.edge

    def on(self, times: Tensor) -> Discretized:
        return Discretized(self.levels, self.edge.on(times))

    def with_edge(self, edge: Edge) -> Discretized:
        """The same with another variance."""
        return Discretized(self.levels, edge)

    def distribution(self, at: Prediction) -> DiscretizedNormal:
        normal = self.density.distribution(at)
        return DiscretizedNormal(normal.mean, normal.logvar, self.levels)


class LevelMass(Decoder):
    """p(x_0 = v_j|x_1) = w_j of the parameterisation `Levels`: no variance to choose."""

    def distribution(self, at: Prediction) -> LevelCategorical:
        parameterization = at.model.parameterization
        if not isinstance(parameterization, Levels):
            raise ValueError("LevelMass reads the masses of Levels; use Discretized(levels) here")
        return LevelCategorical(parameterization.logits(at))


class EdgeFixed(Decoder):
    """p(x_0|x_1) = q(x_1|x_0) π(x_0)/π(x_1), with no parameters: the step of the forward process.

    The processes are reversible under π, so that this is the law of a forward step from x_1 over
    the same time: N(√k_1 x_1, l_1 I) for Gaussians, P(x_0=1) = k_1 x_1 + l_1 π for bits. It keeps
    a free density from closing on the lattice of the data at the edge of the chain.

    References:
        Sohl-Dickstein et al. 2015, appendix B.3 ("edge effect").
    """

    def distribution(self, at: Prediction) -> Distribution:
        return at.model.process.marginal(at.x_t, at.t)
