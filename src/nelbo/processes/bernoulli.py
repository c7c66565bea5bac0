r"""Bernoulli diffusion of bits with any stationary rate π.

Each step keeps a bit or draws it anew from π. With k = keep(t), l = lose(t), and for a pair s < t
α = k_t/k_s, β = 1 − α,

    q(x_t=1|x_0) = k_t x_0 + l_t π,      q(x_t=1|x_s) = α x_s + β π,

    logit q(x_s=1|x_t, x_0) = log[(k_s x_0 + l_s π)/(k_s (1−x_0) + l_s (1−π))]
                              + log(1 + α/(βπ))          if x_t = 1
                              − log(1 + α/(β(1−π)))      if x_t = 0.

Every sum is one of positive numbers, so nothing cancels, next to the data or next to the prior.

References:
    Sohl-Dickstein et al. 2015, table App.1 (π = ½, and the rate of the data for the heartbeat).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.bits import Bits
from nelbo.processes.base import Process, along, ratio
from nelbo.schedules import Float64, Schedule


class Bernoulli(Process, Float64):
    """Bits that are kept or drawn anew, bit by bit.

    Arguments:
        schedule: keep(t) is the probability that a bit has not been drawn anew by t.
        rate: π in (0, 1), a number, or one per dimension, broadcastable to (*shape).
    Raises:
        ValueError: a rate is not inside (0, 1).
    """

    log_rate: Tensor
    log_other: Tensor

    def __init__(self, schedule: Schedule, rate: float | Tensor = 0.5) -> None:
        super().__init__(schedule)
        rate = torch.as_tensor(rate, dtype=torch.float64).detach()
        if not bool(((rate > 0) & (rate < 1)).all()):
            raise ValueError(
                "the stationary rate of every bit must lie inside (0, 1), found values from "
                f"{float(rate.min()):.6g} to {float(rate.max()):.6g}"
            )
        self.register_buffer("log_rate", rate.log(), persistent=False)
        self.register_buffer("log_other", torch.log1p(-rate), persistent=False)

    def _rates(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """log π and log(1 − π), each () or (*shape), for x like this."""
        return self.log_rate.to(like), self.log_other.to(like)

    def _mixed(self, x: Tensor, log_kept: Tensor, log_drawn: Tensor) -> Tensor:
        """logit of kept·x + drawn·π, kept + drawn = 1."""
        rate, other = self._rates(x)
        kept, drawn = along(log_kept.exp(), x), along(log_drawn.exp(), x)
        one, zero = kept * x + drawn * rate.exp(), kept * (1 - x) + drawn * other.exp()
        return one.log() - zero.log()

    def evidence(self, x_t: Tensor, log_kept: Tensor, log_drawn: Tensor) -> Tensor:
        """log P(x_t|x=1)/P(x_t|x=0) if x was kept or drawn anew before it became x_t.

        Arguments:
            x_t: (B, *shape) bits.
            log_kept, log_drawn: () or (B,), log of k_t and l_t, or of α and β.
        """
        rate, other = self._rates(x_t)
        odds = along(log_kept - log_drawn, x_t)
        nothing = torch.zeros_like(x_t)
        for_one = torch.logaddexp(odds - rate, nothing)
        for_zero = -torch.logaddexp(odds - other, nothing)
        return torch.where(x_t > 0.5, for_one, for_zero)

    def prior(self, like: Tensor) -> Bits:
        rate, other = self._rates(like)
        return Bits((rate - other).expand_as(like))

    def marginal(self, x_0: Tensor, t: Tensor) -> Bits:
        return Bits(self._mixed(x_0, self.schedule.log_keep(t), self.schedule.log_lose(t)))

    def transition(self, x_s: Tensor, s: Tensor, t: Tensor) -> Bits:
        step = ratio(self.schedule, s, t)
        return Bits(self._mixed(x_s, step.log_alpha, step.log_beta))

    def posterior(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Bits:
        step = ratio(self.schedule, s, t)
        before = self.marginal(x_0, s).logits
        return Bits(before + self.evidence(x_t, step.log_alpha, step.log_beta))
