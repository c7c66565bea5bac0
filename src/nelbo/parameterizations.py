r"""What a network's output means: conversions to x̂_0 = E[x_0|x_t], and the Gaussian kernel.

    x̂_0 = (x_t − √l ε̂)/√k = √k x_t − √l v̂ = [μ̂/√k_s − (1 − c) x_t/√k_t]/c,
    p_θ(x_s|x_t) = N(√k_s c x̂_0 + √α (l_s/l_t) x_t, σ²).

Clipping x̂_0 is part of the model, so sampler and bound speak of the same p_θ.

References:
    Ho, Jain, Abbeel 2020, section 3.2 (`Epsilon`, `X0`, `Mean`);
    Salimans, Ho 2022, Progressive distillation, appendix D (`Velocity`).
"""

from __future__ import annotations

import copy
from abc import ABC

import torch
from torch import Tensor

from nelbo.distributions import DiagonalNormal, level_values
from nelbo.processes.base import along
from nelbo.reverse import Parameterization, Prediction, Reverse, gaussian_process
from nelbo.schedules import Float64
from nelbo.variances import Instead, Posterior, Variance


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


def with_variance(model: Reverse, variance: Variance) -> Reverse:
    """The model with another variance of its pairs; network, mean and decoder are shared.

    Arguments:
        variance: a rule that needs no channels of its own.
    Raises:
        ValueError: the model is not Gaussian.
    """
    own = model.parameterization
    if not isinstance(own, GaussianParameterization):
        raise ValueError("only Gaussian kernels have a variance apart from their mean")
    other = copy.copy(own)
    # a shallow copy of a module shares the table of its parts
    other._modules = {**own._modules}
    other.variance = Instead(variance, own.variance)
    return model.sharing(parameterization=other)


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
    """The network gives the context's view of a level; the pixel's own evidence is added exactly.

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
        logits: Tensor = context - 0.5 * z**2
        return logits

    def convert(self, at: Prediction) -> Tensor:
        logits = self.logits(at)
        x_0: Tensor = logits.softmax(-1) @ level_values(self.levels, logits)
        return x_0

    def channels(self, data_channels: int) -> int:
        assert not self.variance.learned
        return data_channels * self.levels
