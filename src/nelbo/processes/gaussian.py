r"""Gaussian diffusion.

With k = keep(t), l = lose(t), λ = logsnr(t), and for a pair s < t

    α = k_t/k_s,   c = 1 − snr_t/snr_s = −expm1(λ_t − λ_s),   β = 1 − α = l_t c,   β̃ = l_s c,

    q(x_t|x_0)      = N(√k_t x_0, l_t I)
    q(x_t|x_s)      = N(√α x_s, β I)
    q(x_s|x_t, x_0) = N(√k_s c x_0 + √α (l_s/l_t) x_t, β̃ I).

References:
    Sohl-Dickstein et al. 2015, table App.1; Ho, Jain, Abbeel 2020, eq. 2, 4, 6, 7;
    Kingma et al. 2021, Variational diffusion models, appendix A.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nelbo.distributions import DiagonalNormal
from nelbo.processes.base import Process, along, ratio


class Pair(NamedTuple):
    """The coefficients of a pair of times s < t, float64, each () or (B,)."""

    c: Tensor
    log_alpha: Tensor
    log_beta: Tensor
    """log β, the variance of q(x_t|x_s)."""
    log_posterior: Tensor
    """log β̃, the variance of q(x_s|x_t, x_0)."""
    from_data: Tensor
    """√k_s c, the coefficient of x_0 in the posterior mean."""
    from_latent: Tensor
    """√α l_s/l_t, the coefficient of x_t in the posterior mean."""
    t: Tensor
    """The later time."""


class Gaussian(Process):
    """Variance-preserving Gaussian diffusion with prior N(0, I) under any schedule."""

    def pair(self, s: Tensor, t: Tensor) -> Pair:
        """All coefficients of the pair s < t, from log-SNR alone."""
        q = self.schedule
        step = ratio(q, s, t)
        log_lose_s, log_lose_t = q.log_lose(s), q.log_lose(t)
        return Pair(
            c=step.log_c.exp(),
            log_alpha=step.log_alpha,
            log_beta=step.log_beta,
            log_posterior=log_lose_s + step.log_c,
            from_data=(0.5 * q.log_keep(s) + step.log_c).exp(),
            from_latent=(0.5 * step.log_alpha + log_lose_s - log_lose_t).exp(),
            t=t,
        )

    def prior(self, like: Tensor) -> DiagonalNormal:
        return DiagonalNormal(torch.zeros_like(like), like.new_zeros(()))

    def marginal(self, x_0: Tensor, t: Tensor) -> DiagonalNormal:
        mean = along((0.5 * self.schedule.log_keep(t)).exp(), x_0) * x_0
        return DiagonalNormal(mean, along(self.schedule.log_lose(t), x_0))

    def transition(self, x_s: Tensor, s: Tensor, t: Tensor) -> DiagonalNormal:
        pair = self.pair(s, t)
        return DiagonalNormal(
            along((0.5 * pair.log_alpha).exp(), x_s) * x_s, along(pair.log_beta, x_s)
        )

    def posterior(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> DiagonalNormal:
        pair = self.pair(s, t)
        mean = along(pair.from_data, x_t) * x_0 + along(pair.from_latent, x_t) * x_t
        return DiagonalNormal(mean, along(pair.log_posterior, x_t))
