r"""Variances of the reverse steps: objects that give log σ² for a pair s < t.

    Posterior    β̃      the lower end: right when the data is a point
    Transition   β      right when the data is N(0, I)
    Between      ω log β + (1 − ω) log β̃, ω from the network
    Free         log β̃ + v, v from the network: any diagonal covariance
    Optimal      β̃ (1 + (snr_s − snr_t) M_t), M_t a measured error: the best scalar at each step

At the first time β̃ is 0, and the decoder puts something in its place (`decoders`); `edge` carries
the interpolation over to there.

References:
    Sohl-Dickstein et al. 2015, section 2.2 (`Free`); Ho, Jain, Abbeel 2020, section 3.2;
    Nichol, Dhariwal 2021, eq. 15; Bao, Li, Zhu, Zhang 2022, Analytic-DPM (`Optimal`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nelbo.processes.base import along
from nelbo.processes.gaussian import Pair
from nelbo.schedules import Float64


class Variance(nn.Module, ABC):
    """log σ² of p_θ(x_s|x_t), and how it extends to the decoder at the first time."""

    learned = False
    """Whether the network gives a second set of channels (the last half of its output)."""

    @abstractmethod
    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        """log σ² for a pair, broadcastable to `like`; `extra` are the network's own channels."""

    def edge(
        self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor
    ) -> Tensor:
        """log σ² of the decoder; β̃ is 0 there, `log_low` is what the decoder puts in its place."""
        return along(log_low, like)


class Posterior(Variance):
    """σ² = β̃, the variance of q(x_s|x_t, x_0): right when the data is a point."""

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return along(pair.log_posterior, like)


class Transition(Variance):
    """σ² = β, the variance of q(x_t|x_s): right when the data is N(0, I)."""

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return along(pair.log_beta, like)


class Between(Variance):
    """log σ² = ω log β + (1 − ω) log β̃ with ω = (v + 1)/2 from the network, not clamped.

    References:
        Nichol, Dhariwal 2021, eq. 15.
    """

    learned = True

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return self.edge(pair.log_posterior, pair.log_beta, extra, like)

    def edge(
        self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor
    ) -> Tensor:
        assert extra is not None
        low, high = along(log_low, like), along(log_lose, like)
        return low + 0.5 * (extra + 1) * (high - low)


class Free(Variance):
    """log σ² = log β̃ + v with v from the network, any real number: a free diagonal covariance.

    The output v is a log ratio: 0 is the posterior's β̃, log β/β̃ the transition's β. At the first
    time it is taken from what the decoder puts in the place of β̃.

    References:
        Sohl-Dickstein et al. 2015, section 2.2.
    """

    learned = True

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return self.edge(pair.log_posterior, pair.log_beta, extra, like)

    def edge(
        self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor
    ) -> Tensor:
        assert extra is not None
        return along(log_low, like) + extra


class Optimal(Variance, Float64):
    """σ² = β̃ (1 + (snr_s − snr_t) M_t) = β̃ + k_s c² M_t, M_t = E‖x_0 − x̂_0(x_t)‖²/d.

    The scalar variance with the least divergence, for any pair s < t and any network, exact or
    not, clipped or not: the expected divergence is (d/2) log(1 + (snr_s − snr_t) M_t). It is a
    parameter of the model, so M_t is measured on training data (`curve`). The decoder is left to
    its own rule.

    Arguments:
        times: (N,) increasing, the times t of all pairs. error: (N,) M_t on the model's scale.

    References:
        Bao, Li, Zhu, Zhang 2022, Analytic-DPM, theorem 1 (for an exact denoiser).
    """

    times: Tensor
    error: Tensor

    def __init__(self, times: Tensor, error: Tensor) -> None:
        super().__init__()
        if times.shape != error.shape or not bool((error >= 0).all()):
            raise ValueError("the optimal variance needs one mean squared error for every time")
        self.register_buffer("times", times.detach().double().clone())
        self.register_buffer("error", error.detach().double().clone())

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        learned = 2 * pair.from_data.log() + self._error(pair.t).log()
        return along(torch.logaddexp(pair.log_posterior, learned), like)

    def _error(self, t: Tensor) -> Tensor:
        here = t.to(self.times.device)
        index = torch.searchsorted(self.times, here - 1e-9).clamp(max=len(self.times) - 1)
        # elsewhere the check would stall the queue at every step
        if here.device.type == "cpu" and bool(((self.times[index] - here).abs() > 1e-6).any()):
            raise ValueError(
                "the optimal variance was measured at other times: take times from the grid on "
                "which its error curve was fitted"
            )
        return self.error[index].to(t.device)


class Instead(Variance):
    """Another variance for the pairs of a model; its decoder keeps the rule that it has.

    Channels that the network has for a learned variance are left unread by the pairs.

    Arguments:
        variance: a rule that needs no channels. own: the rule of the model.
    """

    def __init__(self, variance: Variance, own: Variance) -> None:
        super().__init__()
        assert not variance.learned
        self.variance = variance
        self.own = own
        self.learned = own.learned

    def between(self, pair: Pair, extra: Tensor | None, like: Tensor) -> Tensor:
        return self.variance.between(pair, None, like)

    def edge(
        self, log_low: Tensor, log_lose: Tensor, extra: Tensor | None, like: Tensor
    ) -> Tensor:
        return self.own.edge(log_low, log_lose, extra, like)
