r"""Variances of the reverse steps: objects that give log σ² for a pair s < t.

    Posterior    β̃      the lower end: right when the data is a point
    Transition   β      right when the data is N(0, I)
    Between      ω log β + (1 − ω) log β̃, ω from the network
    Free         log β̃ + v, v from the network: any diagonal covariance

At the first time β̃ is 0, and the decoder puts something in its place (`decoders`); `edge` carries
the interpolation over to there.

References:
    Sohl-Dickstein et al. 2015, section 2.2 (`Free`); Ho, Jain, Abbeel 2020, section 3.2;
    Nichol, Dhariwal 2021, eq. 15.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from nelbo.processes.base import along
from nelbo.processes.gaussian import Pair


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
