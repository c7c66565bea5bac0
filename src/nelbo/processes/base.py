r"""The forward process: a Markov chain that turns data into noise, as distributions.

q(x_{1:N}|x_0) = q(x_1|x_0) Π q(x_t|x_s) leaves a stationary law π invariant, so that q(x_t|x_0) is
known for every t at once. By Bayes' rule, for every s < t,

    q(x_t|x_s) = q(x_s|x_t, x_0) · q(x_t|x_0) / q(x_s|x_0).

A family implements these four conditionals; the bound, the samplers and the trainer know no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from nelbo.schedules import Schedule


def along(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient per example, shaped to multiply x.

    Arguments:
        coefficient: () or (B,), float64.
        x: (B, *shape).
    Returns:
        () or (B, 1, ..., 1) in the dtype and on the device of x.
    """
    value = coefficient.to(device=x.device, dtype=x.dtype)
    return value if value.dim() == 0 else value.reshape(-1, *([1] * (x.dim() - 1)))


class Ratio(NamedTuple):
    """What a pair s < t keeps and loses between its times, float64, each () or (B,)."""

    log_c: Tensor
    """log(1 − snr_t/snr_s)."""
    log_alpha: Tensor
    """log(k_t/k_s)."""
    log_beta: Tensor
    """log(1 − k_t/k_s)."""


def ratio(schedule: Schedule, s: Tensor, t: Tensor) -> Ratio:
    """α = k_t/k_s, β = 1 − α = l_t c and c of a pair, from log-SNR alone."""
    log_c = torch.log(-torch.expm1(schedule.logsnr(t) - schedule.logsnr(s)))
    log_beta = schedule.log_lose(t) + log_c
    # each form of log α is exact where the other one cancels
    small = log_beta < -0.7
    difference = schedule.log_keep(t) - schedule.log_keep(s)
    log_alpha = torch.where(small, torch.log1p(-log_beta.exp()), difference)
    return Ratio(log_c, log_alpha, log_beta)


class Process(nn.Module, ABC):
    """A family of forward processes under a schedule.

    Times are float64 tensors, () or (B,), with s < t; x is (B, *shape). Every method returns a
    distribution over single dimensions (its batch_shape is the shape of x), so that `log_prob` and
    `kl_divergence` are elementwise.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    @abstractmethod
    def prior(self, like: Tensor) -> Distribution:
        """π for a batch of the shape, dtype and device of `like`."""

    @abstractmethod
    def marginal(self, x_0: Tensor, t: Tensor) -> Distribution:
        """q(x_t|x_0)."""

    @abstractmethod
    def transition(self, x_s: Tensor, s: Tensor, t: Tensor) -> Distribution:
        """q(x_t|x_s)."""

    @abstractmethod
    def posterior(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Distribution:
        """q(x_s|x_t, x_0)."""

    def start(self, shape: torch.Size | tuple[int, ...], device: str = "cpu") -> Tensor:
        """x_N ~ π, float32, of the given shape."""
        return self.prior(torch.empty(shape, device=device)).sample()
