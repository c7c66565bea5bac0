r"""Control variates for the terms of the bound: cheap stand-ins whose expectation is known.

A term of the bound fluctuates with the noise in x_t and with t. A stand-in G_i that needs no
network, fluctuates alike and has known expectation E[G_i|x_0] takes its share of that variance
away: term_i − b (G_i − E[G_i|x_0]) has the expectation of term_i for every b.

For Gaussian diffusion the Wiener filter of the training data is such a stand-in. With data mean m
and covariance UΛUᵀ, σ² = 1/snr_t, W = Λ/(Λ + σ²), ξ = Uᵀ(x_0 − m) and η = Uᵀε,

    G_i = ½ (snr_s − snr_t) ‖(I − W)ξ − σ W η‖²,
    E[G_i|x_0] = ½ (snr_s − snr_t) Σ_j [(1 − W_j)² ξ_j² + σ² W_j²].

Were the data Gaussian and the network exact, G_i would be the term itself.

References:
    Wiener 1949 (the linear minimum-mean-square-error filter); Hammersley, Handscomb 1964, ch. 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian


class Control(ABC):
    """A stand-in for the pair terms, computed without the network."""

    @abstractmethod
    def fluctuation(self, x_0: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """G − E[G|x_0] (B,) float64, nats, at x_t ~ q(x_t|x_0), for the pair s < t, () or (B,)."""

    @abstractmethod
    def expected(self, x_0: Tensor, times: Tensor) -> Tensor:
        """E[G_i|x_0] (B, N−1) float64, nats, for all pairs of the grid."""


class Wiener(Control):
    """The error of the linear denoiser of the data.

    Arguments:
        process: the Gaussian process that drew x_t.
        mean: (D,) and covariance (D, D) of the data on the model's scale; see `of`.
    """

    def __init__(self, process: Gaussian, mean: Tensor, covariance: Tensor) -> None:
        self.process = process
        self.mean = mean.double()
        spectrum, self.axes = torch.linalg.eigh(covariance.double())
        # rounding can leave the eigenvalues of constant dimensions slightly negative
        self.spectrum = spectrum.clamp(min=0)

    @classmethod
    def of(cls, process: Gaussian, x_0: Tensor) -> Wiener:
        """Fit mean and covariance to training examples (n, *shape), n ≥ 2."""
        rows = x_0.flatten(1).double()
        return cls(process, rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], -1))

    def _centred(self, x_0: Tensor) -> Tensor:
        """ξ (B, D)."""
        x = x_0.flatten(1).double()
        xi: Tensor = (x - self.mean.to(x.device)) @ self.axes.to(x.device)
        return xi

    def fluctuation(self, x_0: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        schedule = self.process.schedule
        x, noisy = x_0.flatten(1).double(), x_t.flatten(1).double()
        keep, lose = along(schedule.keep(t).sqrt(), x), along(schedule.lose(t).sqrt(), x)
        eta = ((noisy - keep * x) / lose) @ self.axes.to(x.device)
        snr = along(schedule.logsnr(t).exp(), x)
        left = 1 / (1 + self.spectrum.to(x.device) * snr)
        still, passed = left * self._centred(x_0), left * self.spectrum.to(x.device) * snr.sqrt()
        moved = 0.5 * ((still - passed * eta) ** 2 - still**2 - passed**2).sum(1)
        width = _drop(schedule.logsnr(s), schedule.logsnr(t)).to(x.device)
        out: Tensor = moved * width
        return out

    def expected(self, x_0: Tensor, times: Tensor) -> Tensor:
        logsnr = self.process.schedule.logsnr(times).to(x_0.device)
        snr = logsnr[1:].exp()
        spectrum = self.spectrum.to(x_0.device)[:, None]
        left = 1 / (1 + spectrum * snr)
        energy = self._centred(x_0) ** 2 @ left**2 + (left**2 * spectrum**2 * snr).sum(0)
        terms: Tensor = 0.5 * _drop(logsnr[:-1], logsnr[1:]) * energy
        return terms


def _drop(logsnr_s: Tensor, logsnr_t: Tensor) -> Tensor:
    """snr_s − snr_t without cancellation, and finite where snr_t is 0."""
    return -logsnr_s.exp() * torch.expm1(logsnr_t - logsnr_s)
