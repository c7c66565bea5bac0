r"""The reverse process: a network, what its output means, and how data is read off at the end.

    p_θ(x_{0:N}) = π(x_N) Π_pairs p_θ(x_s|x_t) · p_θ(x_0|x_1).

Every parameterisation converts to one coin, x̂_0 = E[x_0|x_t], and from there to the kernel of any
pair s < t. One network call is a `Prediction`; it serves every kernel and the decoder at its time.
What the output means is in `parameterizations`, the kernel's variance in `variances`, the last
step in `decoders`.

References:
    Ho, Jain, Abbeel 2020, section 3.2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from nelbo.processes.base import Process, along
from nelbo.processes.gaussian import Gaussian


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

    def sharing(
        self, parameterization: Parameterization | None = None, decoder: Decoder | None = None
    ) -> Reverse:
        """A model with the same process and network, and another parameterisation or decoder."""
        other = Reverse(
            self.process,
            self.network,
            self.parameterization if parameterization is None else parameterization,
            self.decoder_rule if decoder is None else decoder,
        )
        other.training = self.training
        return other

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


def strided(model: Reverse, times: Tensor) -> Reverse:
    """The model on a subset of its grid, sharing the network, which sees the original times.

    Only a decoder whose variance speaks of the first pair changes: it follows the first pair of
    the subset.

    Arguments:
        times: (K,) increasing.
    Raises:
        ValueError: the decoder needs a pair, and one time has none.
    """
    return model.sharing(decoder=model.decoder_rule.on(times))


def gaussian_process(process: Process, what: str) -> Gaussian:
    """The process, if it is Gaussian; otherwise a ValueError that says what needed it."""
    if not isinstance(process, Gaussian):
        raise ValueError(f"{what} is defined for a Gaussian process, not {type(process).__name__}")
    return process


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


class Decoder(ABC):
    """p(x_0|x_1), read off a prediction at the first time."""

    def on(self, times: Tensor) -> Decoder:
        """The same rule for another grid (K,)."""
        return self

    @abstractmethod
    def distribution(self, at: Prediction) -> Distribution:
        """The distribution of x_0, elementwise."""
