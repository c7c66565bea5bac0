r"""The reverse process: a network, what its output means, and how data is read off at the end.

    p_θ(x_{0:N}) = π(x_N) Π_pairs p_θ(x_s|x_t) · p_θ(x_0|x_1).

Every parameterisation converts to one coin, x̂_0 = E[x_0|x_t], and from there to the kernel of any
pair s < t. One network call is a `Prediction`; it serves every kernel and the decoder at its time:

    x̂_0 = (x_t − √l ε̂)/√k = √k x_t − √l v̂ = [μ̂/√k_s − (1 − c) x_t/√k_t]/c.

Clipping x̂_0 is part of the model, so sampler and bound speak of the same p_θ.

References:
    Ho, Jain, Abbeel 2020, section 3.2; Nichol, Dhariwal 2021, eq. 15 (`Between`);
    Salimans, Ho 2022, Progressive distillation (`Velocity`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from nelbo.distributions import (
    DiagonalNormal,
    DiscretizedNormal,
    LevelCategorical,
    level_values,
)
from nelbo.processes.base import Process, along
from nelbo.processes.gaussian import Gaussian, Pair
from nelbo.schedules import Float64


class Prediction:
    """What one network call says at (x_t, t): x̂_0, the kernel to every s < t, the decoder.

    Arguments:
        model: the reverse process that made the call.
        x_t: (B, *shape). t: () or (B,) float64.
        output: the network's output, in the dtype of x_t.
    """

    def __init__(self, model: Reverse, x_t: Tensor, t: Tensor, output: Tensor) -> None:
        self.model = model
        self.x_t = x_t
        self.t = t
        self.output = output

    @cached_property
    def x_0(self) -> Tensor:
        """x̂_0 (B, *shape), clipped if the model clips."""
        return self.model.parameterization.x_0(self)

    def kernel(self, s: Tensor) -> Distribution:
        """p_θ(x_s|x_t) for s < t."""
        return self.model.parameterization.kernel(self, s)

    def decoder(self) -> Distribution:
        """p_θ(x_0|x_t), to be read at the first time of a grid."""
        return self.model.decoder_rule.distribution(self)

    def noise(self, clipped: bool = True) -> Tensor:
        """ε̂ = (x_t − √k x̂_0)/√l, from x̂_0 as the model uses it or before clipping."""
        gaussian = gaussian_process(self.model.process, "the predicted noise")
        x_0 = self.x_0 if clipped else self.model.parameterization.convert(self)
        log_keep, log_lose = gaussian.schedule.log_keep(self.t), gaussian.schedule.log_lose(self.t)
        keep, lose = (along((0.5 * v).exp(), x_0) for v in (log_keep, log_lose))
        return (self.x_t - keep * x_0) / lose

    def mean_detached(self) -> Prediction:
        """The same prediction with no gradient through the part that sets the mean."""
        output = self.model.parameterization.detach_mean(self.output)
        return Prediction(self.model, self.x_t, self.t, output)

    def __getitem__(self, rows: Tensor) -> Prediction:
        """The prediction for some examples of the batch (index or mask over dimension 0)."""
        t = self.t if self.t.dim() == 0 else self.t[rows.to(self.t.device)]
        return Prediction(self.model, self.x_t[rows], t, self.output[rows])


class Reverse(nn.Module):
    """A reverse process p_θ: process, network, parameterisation and decoder.

    Arguments:
        process: the forward process that it reverses.
        network: any `network(x_t, t, cond) -> Tensor` with t () or (B,).
        parameterization: what the output means; owns the kernel.
        decoder: p(x_0|x_1), an object of this module.
    """

    def __init__(
        self,
        process: Process,
        network: nn.Module,
        parameterization: Parameterization,
        decoder: Decoder,
    ) -> None:
        super().__init__()
        self.process = process
        self.network = network
        self.parameterization = parameterization
        self.decoder_rule = decoder

    def at(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        """One network call at (x_t, t)."""
        output = self.network(x_t, t, cond).to(x_t.dtype)
        return Prediction(self, x_t, t, output)

    def predict(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """x̂_0 = E[x_0|x_t] as the model sees it, (B, *shape)."""
        return self.at(x_t, t, cond).x_0

    def kernel(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Any = None) -> Distribution:
        """p_θ(x_s|x_t), one network call."""
        return self.at(x_t, t, cond).kernel(s)

    def decoder(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Distribution:
        """p_θ(x_0|x_t) on the data's own space, one network call."""
        return self.at(x_t, t, cond).decoder()


def gaussian_process(process: Process, what: str) -> Gaussian:
    """The process, if it is Gaussian; otherwise a ValueError that says what needed it."""
    if not isinstance(process, Gaussian):
        raise ValueError(f"{what} is defined for a Gaussian process, not {type(process).__name__}")
    return process


# --- variances of the kernel -------------------------------------------------------------------


class Variance(nn.Module, ABC):
    """log σ² of p_θ(x_s|x_t), and how it extends to the decoder at the first time."""

    learned = False
    """Whether the network gives a second set of channels (the last half of its output)."""

    @abstractmethod
    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        """log σ² for a pair, broadcastable to `like`; `extra` are the network's own channels."""

    @abstractmethod
    def edge(self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor) -> Tensor:
        """log σ² of the decoder; β̃ is 0 there, `log_low` is what the decoder puts in its place."""


class Posterior(Variance):
    """σ² = β̃, the variance of q(x_s|x_t, x_0): right when the data is a point."""

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return along(pair.log_posterior, like)

    def edge(self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor) -> Tensor:
        return along(log_low, like)


class Transition(Variance):
    """σ² = β, the variance of q(x_t|x_s): right when the data is N(0, I)."""

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return along(pair.log_beta, like)

    def edge(self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor) -> Tensor:
        return along(log_low, like)


class Between(Variance):
    """log σ² = ω log β + (1 − ω) log β̃ with ω = (v + 1)/2 from the network, not clamped.

    References:
        Nichol, Dhariwal 2021, eq. 15.
    """

    learned = True

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return self.edge(pair.log_posterior, pair.log_beta, extra, like)

    def edge(self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor) -> Tensor:
        assert extra is not None
        low, high = along(log_low, like), along(log_lose, like)
        return low + 0.5 * (extra + 1) * (high - low)


# --- parameterisations ---------------------------------------------------------------------------


class Parameterization(nn.Module, ABC):
    """What a network's output means."""

    @abstractmethod
    def convert(self, at: Prediction) -> Tensor:
        """x̂_0 before any clipping, (B, *shape)."""

    @abstractmethod
    def x_0(self, at: Prediction) -> Tensor:
        """x̂_0 as the model uses it, (B, *shape)."""

    @abstractmethod
    def kernel(self, at: Prediction, s: Tensor) -> Distribution:
        """p_θ(x_s|x_t)."""

    @abstractmethod
    def detach_mean(self, output: Tensor) -> Tensor:
        """The output with no gradient through the part that sets the mean."""

    @abstractmethod
    def channels(self, data_channels: int) -> int:
        """How many output channels the network needs for data with `data_channels`."""


class GaussianParameterization(Parameterization, ABC):
    """Shared by all Gaussian parameterisations: variance, clipping, and the kernel.

    Arguments:
        variance: σ² of the kernel.
        clip: clip x̂_0 to [−clip, clip]; part of the model. None: no clipping.
    """

    def __init__(self, variance: Variance | None = None, clip: float | None = None) -> None:
        super().__init__()
        self.variance = Posterior() if variance is None else variance
        self.clip = clip

    def mean_part(self, output: Tensor) -> Tensor:
        """The channels that set the mean."""
        return output.chunk(2, dim=1)[0] if self.variance.learned else output

    def variance_part(self, output: Tensor) -> Tensor | None:
        """The channels that set the variance, None if it is not learned."""
        return output.chunk(2, dim=1)[1] if self.variance.learned else None

    def x_0(self, at: Prediction) -> Tensor:
        x_0 = self.convert(at)
        return x_0 if self.clip is None else x_0.clamp(-self.clip, self.clip)

    def kernel(self, at: Prediction, s: Tensor) -> DiagonalNormal:
        process = gaussian_process(at.model.process, type(self).__name__)
        pair = process.pair(s, at.t)
        mean = along(pair.from_data, at.x_t) * at.x_0 + along(pair.from_latent, at.x_t) * at.x_t
        extra = self.variance_part(at.output)
        return DiagonalNormal(mean, self.variance.between(pair, extra, at.x_t))

    def detach_mean(self, output: Tensor) -> Tensor:
        if not self.variance.learned:
            raise ValueError(
                "with a fixed variance nothing is left to train once the mean is held: "
                "use Between() for the variance, or the objective Simple instead of Hybrid"
            )
        mean, extra = output.chunk(2, dim=1)
        return torch.cat([mean.detach(), extra], dim=1)

    def channels(self, data_channels: int) -> int:
        return data_channels * (2 if self.variance.learned else 1)


def _scales(at: Prediction) -> tuple[Tensor, Tensor]:
    """√keep and √lose at the time of the prediction, shaped for x_t."""
    schedule = at.model.process.schedule
    keep, lose = (0.5 * schedule.log_keep(at.t)).exp(), (0.5 * schedule.log_lose(at.t)).exp()
    return along(keep, at.x_t), along(lose, at.x_t)


class Epsilon(GaussianParameterization):
    """The network predicts the noise: x̂_0 = (x_t − √l ε̂)/√k (Ho et al. 2020). Needs keep > 0."""

    def convert(self, at: Prediction) -> Tensor:
        keep, lose = _scales(at)
        return (at.x_t - lose * self.mean_part(at.output)) / keep


class X0(GaussianParameterization):
    """The network predicts the data."""

    def convert(self, at: Prediction) -> Tensor:
        return self.mean_part(at.output)


class Velocity(GaussianParameterization):
    """The network predicts v = √k ε − √l x_0: x̂_0 = √k x_t − √l v̂ (Salimans, Ho 2022)."""

    def convert(self, at: Prediction) -> Tensor:
        keep, lose = _scales(at)
        return keep * at.x_t - lose * self.mean_part(at.output)


class Chain(Float64):
    """The times (N,), N ≥ 2, of the chain for which a network was trained."""

    times: Tensor

    def __init__(self, times: Tensor) -> None:
        super().__init__()
        if len(times) < 2:
            raise ValueError("a chain of one latent has no pair: predict x_0 (X0) instead of Mean")
        self.register_buffer("times", times.double(), persistent=False)

    def before(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(s, t, first): the neighbour s of t; where t is the first time, some valid pair."""
        index = torch.searchsorted(self.times, t.to(self.times.device) - 1e-9)
        first = index == 0
        return self.times[(index - 1).clamp(min=0)], torch.where(first, self.times[1], t), first


class Mean(GaussianParameterization):
    """The network predicts the posterior mean μ̃ of the step before, in the chain that it knows.

    x̂_0 = [μ̂ − (√α l_s/l_t) x_t]/(√k_s c) for the neighbours s < t of the chain; at the first time
    the output is x̂_0 itself.

    Arguments:
        times: (N,) the chain for which the network was trained.
    """

    def __init__(
        self, times: Tensor, variance: Variance | None = None, clip: float | None = None
    ) -> None:
        super().__init__(variance, clip)
        self.chain = Chain(times)

    def convert(self, at: Prediction) -> Tensor:
        output = self.mean_part(at.output)
        s, t, first = self.chain.before(at.t)
        pair = gaussian_process(at.model.process, "Mean").pair(s, t)
        x_0 = (output - along(pair.from_latent, output) * at.x_t) / along(pair.from_data, output)
        return torch.where(along(first, output) > 0, output, x_0)


class Levels(GaussianParameterization):
    """The network gives the context's view of each level; the pixel's own evidence is added exactly.

    w_j ∝ exp(logit_j) N(x_t; √k v_j, l),   x̂_0 = Σ_j w_j v_j,   v_j = 2j/(n−1) − 1,

    dimension by dimension. The logits stand for log p(x_0 = v_j | the other dimensions of x_t), so
    the grid of levels is known to the model and need not be learned; x̂_0 lies in [−1, 1].

    Arguments:
        levels: n.
    """

    def __init__(self, levels: int, variance: Variance | None = None) -> None:
        super().__init__(variance, None)
        self.levels = levels

    def logits(self, at: Prediction) -> Tensor:
        """log w, unnormalised, (B, *shape, n)."""
        context = self.mean_part(at.output).unflatten(1, (-1, self.levels)).movedim(2, -1)
        # the square is not multiplied out: its parts grow like the snr and would cancel
        keep, lose = (v.unsqueeze(-1) for v in _scales(at))
        z = (at.x_t.unsqueeze(-1) - keep * level_values(self.levels, at.x_t)) / lose
        return context - 0.5 * z**2

    def convert(self, at: Prediction) -> Tensor:
        logits = self.logits(at)
        return logits.softmax(-1) @ level_values(self.levels, logits)

    def channels(self, data_channels: int) -> int:
        assert not self.variance.learned
        return data_channels * self.levels


# --- decoders ------------------------------------------------------------------------------------


class Edge(ABC):
    """The decoder's variance: β̃ of the step to data is 0, so something must stand in its place."""

    @abstractmethod
    def log_variance(self, process: Gaussian, t: Tensor) -> Tensor:
        """log σ², () or (B,), float64."""


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
        return process.pair(t, self.t_2.to(t.device).expand_as(t)).log_posterior


class Constant(Edge):
    """σ² given as its logarithm."""

    def __init__(self, logvar: float) -> None:
        self.logvar = logvar

    def log_variance(self, process: Gaussian, t: Tensor) -> Tensor:
        return torch.full_like(t, self.logvar)


class Decoder(ABC):
    """p(x_0|x_1), read off a prediction at the first time."""

    @abstractmethod
    def distribution(self, at: Prediction) -> Distribution:
        """The distribution of x_0, elementwise."""


class Density(Decoder):
    """N(x_0; x̂_0, σ²): data without levels; the bound may be negative."""

    def __init__(self, edge: Edge | None = None) -> None:
        self.edge = Lose() if edge is None else edge

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
