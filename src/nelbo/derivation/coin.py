r"""One bit under diffusion, every state of which is enumerated.

x_0 is 1 with probability r, the stationary rate is π, and the model says logit w = a + b x_t +
evidence of x_t. a = logit r and b = 0 is the exact posterior P(x_0=1|x_t); another a belongs to
other data, and with b ≠ 0 the kernels are those of no data. For one bit the factorised kernels are
all kernels, so that the exact w makes the exact reverse chain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nelbo.binary import BernoulliDecoder, Context
from nelbo.processes.bernoulli import Bernoulli
from nelbo.reverse import Prediction, Reverse
from nelbo.schedules import Schedule

RATE, DATA = 0.3, 0.7
"""π, and r of the data."""


def logit(p: float) -> float:
    """log p − log(1 − p)."""
    return math.log(p) - math.log1p(-p)


class Sloped(nn.Module):
    """a + b x_t."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return self.a + self.b * x_t


def coin(schedule: Schedule, off: float = 0.0) -> Reverse:
    """The model of the bit, exact with off = 0; else a is lower and b higher by `off`."""
    network = Sloped(logit(DATA) - off, off)
    return Reverse(Bernoulli(schedule, RATE), network, Context(), BernoulliDecoder())


def states(model: Reverse, times: Tensor) -> tuple[Prediction, Tensor, Tensor, Tensor]:
    """All (x_0, x_t) at all times, 4 N rows: prediction, x_0, the place of the time, probability.

    The probabilities sum to one at each time.
    """
    bits = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    rows = bits.repeat_interleave(len(times), 0)
    index = torch.arange(len(times)).repeat(4)
    x_0, x_t, t = rows[:, :1], rows[:, 1:], times[index]
    prior = (x_0 * DATA + (1 - x_0) * (1 - DATA))[:, 0]
    reached = model.process.marginal(x_0, t).log_prob(x_t).exp()[:, 0]
    return model.at(x_t, t), x_0, index, prior * reached


def by_time(values: Tensor, probability: Tensor) -> Tensor:
    """(N,) expectations of values (4 N,)."""
    return (values * probability).view(4, -1).sum(0)


def entropy(p: float) -> float:
    """h(p) = −p log p − (1−p) log(1−p)."""
    return -p * math.log(p) - (1 - p) * math.log1p(-p)


def divergence(a: float, b: float) -> float:
    """KL(Bern(a) ‖ Bern(b))."""
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
