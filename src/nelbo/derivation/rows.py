r"""Trajectories with weights, and the log-probabilities of their steps by nelbo's own pieces.

    log w = log p(x_N) + Σ_pairs log p_θ(x_s|x_t) + log p_θ(x_0|x_1)
            − log q(x_1|x_0) − Σ_pairs log q(x_t|x_s)

Each function returns its steps apart, (R, number of steps), so that an identity can sum, swap and
telescope them. Nothing here knows a family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nelbo.distributions import per_example
from nelbo.reverse import Reverse


class Mean(NamedTuple):
    """Means by group and their standard errors (zero where exact), (groups,) each."""

    value: Tensor
    se: Tensor


@dataclass(frozen=True)
class Rows:
    """Latents of weighted examples: what an expectation over q(.|x_0) is summed over.

    Arguments:
        x_0: (R, *shape), the rows of a group adjacent.
        latents: (R, K, *shape): whole trajectories, K = N, or one time, K = 1.
        weight: (R,) mass of each row in its group; sums to one there.
        groups: one for each x_0 where exact; one for all where sampled.
        sampled: whether the rows are independent draws.
    """

    x_0: Tensor
    latents: Tensor
    weight: Tensor
    groups: int
    sampled: bool = False

    def mean(self, values: Tensor) -> Mean:
        """Σ weight · values by group; values (R,) nats."""
        value = (self.weight * values.double()).view(self.groups, -1).sum(1)
        if not self.sampled:
            return Mean(value, torch.zeros_like(value))
        spread = values.double().view(self.groups, -1).std(1)
        return Mean(value, spread / math.sqrt(len(values) / self.groups))


# --- log-probabilities of a trajectory -----------------------------------------------------------


def forward_steps(model: Reverse, times: Tensor, rows: Rows) -> Tensor:
    """log q(x_1|x_0), log q(x_t|x_s), ...; (R, N), their sum is log q(x_{1:N}|x_0)."""
    process, x = model.process, rows.latents
    steps = [process.marginal(rows.x_0, times[0]).log_prob(x[:, 0])]
    for i in range(1, len(times)):
        step = process.transition(x[:, i - 1], times[i - 1], times[i])
        steps.append(step.log_prob(x[:, i]))
    return torch.stack([per_example(v) for v in steps], 1)


def posterior_steps(model: Reverse, times: Tensor, rows: Rows) -> Tensor:
    """log q(x_s|x_t, x_0) of every pair; (R, N−1), column i−1 is the pair (i−1, i)."""
    process, x = model.process, rows.latents
    laws = [
        process.posterior(x[:, i], rows.x_0, times[i], times[i - 1]).log_prob(x[:, i - 1])
        for i in range(1, len(times))
    ]
    return torch.stack([per_example(v) for v in laws], 1)


def marginals(model: Reverse, times: Tensor, rows: Rows) -> Tensor:
    """log q(x_t|x_0) of every latent; (R, N)."""
    laws = [
        model.process.marginal(rows.x_0, t).log_prob(rows.latents[:, i])
        for i, t in enumerate(times)
    ]
    return torch.stack([per_example(v) for v in laws], 1)


def reverse_steps(model: Reverse, times: Tensor, rows: Rows) -> Tensor:
    """log p_θ(x_0|x_1), log p_θ(x_s|x_t) of every pair, log p(x_N); (R, N+1)."""
    x = rows.latents
    steps = [model.decoder(x[:, 0], times[0]).log_prob(rows.x_0)]
    for i in range(1, len(times)):
        kernel = model.kernel(x[:, i], times[i], times[i - 1])
        steps.append(kernel.log_prob(x[:, i - 1]))
    steps.append(model.process.prior(x[:, -1]).log_prob(x[:, -1]))
    return torch.stack([per_example(v) for v in steps], 1)


def log_weights(model: Reverse, times: Tensor, rows: Rows) -> Tensor:
    """log w = log p_θ(x_{0:N}) − log q(x_{1:N}|x_0) by the forward steps; (R,) nats."""
    forward = forward_steps(model, times, rows).sum(1)
    return reverse_steps(model, times, rows).sum(1) - forward
