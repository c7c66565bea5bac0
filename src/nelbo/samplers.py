r"""Samplers walk back from noise to data along any grid of times.

`Ancestral` draws from the model's own kernels and decoder: it is the p_θ that the bound speaks of.
`DDIM` (Song, Meng, Ermon 2021, eq. 12) moves x̂_0 and ε̂ to the next time,

    x_s = √k_s x̂_0 + √(l_s − σ²) ε̂ + σ z,   σ = η √(l_s/l_t) √β,

deterministic for η = 0 and equal to the ancestral step with σ² = β̃ for η = 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nelbo.processes.base import along
from nelbo.reverse import Reverse, gaussian_process

State = Any


class Sampler(ABC):
    """A way back. State is explicit, so that a multistep method needs no second loop."""

    def init(self, model: Reverse, x_t: Tensor) -> State:
        """The state before the first step; a one-step method has none."""
        return None

    @abstractmethod
    def step(
        self, model: Reverse, x_t: Tensor, t: Tensor, s: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """x_s from x_t, s < t scalars of the grid."""

    @abstractmethod
    def finish(self, model: Reverse, x_1: Tensor, t_1: Tensor, state: State) -> Tensor:
        """x_0 from the first latent."""


class Ancestral(Sampler):
    """x_s ~ p_θ(x_s|x_t), x_0 ~ p_θ(x_0|x_1): any family."""

    def step(
        self, model: Reverse, x_t: Tensor, t: Tensor, s: Tensor, state: State
    ) -> tuple[Tensor, State]:
        return model.kernel(x_t, t, s).sample(), state

    def finish(self, model: Reverse, x_1: Tensor, t_1: Tensor, state: State) -> Tensor:
        return model.decoder(x_1, t_1).sample()


class DDIM(Sampler):
    """Song, Meng, Ermon 2021. Another p_θ than the one that the bound measures.

    Arguments:
        eta: 0 deterministic, 1 the ancestral step with σ² = β̃.
        clipped_noise: ε̂ from x̂_0 as the model clips it (consistent), or from the raw output
            (what several code bases do by default).
    """

    def __init__(self, eta: float = 0.0, clipped_noise: bool = True) -> None:
        self.eta = eta
        self.clipped_noise = clipped_noise

    def mean_and_sigma(
        self, model: Reverse, x_t: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean of x_s (B, *shape) and σ (), float64."""
        process = gaussian_process(model.process, "DDIM")
        at = model.at(x_t, t)
        q = process.schedule
        sigma = self.eta * (0.5 * process.pair(s, t).log_posterior).exp()
        # l_s − σ² = l_s (1 − η² c) = l_s [(1 − η²) + η² snr_t/snr_s]: a sum that cannot cancel
        ratio = (q.logsnr(t) - q.logsnr(s)).exp()
        direction = (q.lose(s) * ((1 - self.eta**2) + self.eta**2 * ratio)).sqrt()
        noise = at.noise(self.clipped_noise)
        return along(q.keep(s).sqrt(), x_t) * at.x_0 + along(direction, x_t) * noise, sigma

    def step(
        self, model: Reverse, x_t: Tensor, t: Tensor, s: Tensor, state: State
    ) -> tuple[Tensor, State]:
        mean, sigma = self.mean_and_sigma(model, x_t, t, s)
        if self.eta == 0:
            return mean, state
        return mean + along(sigma, mean) * torch.randn_like(mean), state

    def finish(self, model: Reverse, x_1: Tensor, t_1: Tensor, state: State) -> Tensor:
        return model.predict(x_1, t_1)


@torch.no_grad()
def sample(
    model: Reverse,
    sampler: Sampler,
    times: Tensor,
    shape: tuple[int, ...],
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Walk from the prior to data; yields every (t, x_t), and last (None, x_0): data has no time.

    Arguments:
        times: (N,) increasing; any subset of the model's grid.
        shape: (B, *shape) of the batch.
    """
    x_t = model.process.start(shape, str(device))
    state = sampler.init(model, x_t)
    yield times[-1], x_t
    for i in range(len(times) - 1, 0, -1):
        x_t, state = sampler.step(model, x_t, times[i], times[i - 1], state)
        yield times[i - 1], x_t
    yield None, sampler.finish(model, x_t, times[0], state)
