r"""The small models of the derivation, whose answers are known.

    bits      2 bits, 3 latents, π = .3: all 4 · 4³ trajectories are enumerated;
    affine    data N(.5, .49), 5 latents, ε̂ affine in x_t;
    levels    the same chain on 8 integer levels with the discretised decoder.

Their networks are deliberately off, so that the bound has a gap. `exact_bits` and `exact_affine`
have the exact reverse conditionals of data with a known law: 2 independent bits, N(.5, .49).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from nelbo.binary import BernoulliDecoder, Context, Logits
from nelbo.decoders import Constant, Density, Discretized
from nelbo.derivation.line import Affine, Levelled, hermite
from nelbo.derivation.settings import Enumerated, patterns
from nelbo.distributions import level_values
from nelbo.parameterizations import X0, Epsilon, Velocity
from nelbo.processes.base import along
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Decoder, Reverse
from nelbo.schedules import LogSNRLinear, Schedule, Tabulated
from nelbo.variances import Optimal, Transition

GAUSSIAN, BERNOULLI = "Gaussian", "Bernoulli"
"""Names of the families."""
LEVELS = 8
MEAN, VARIANCE = 0.5, 0.49
"""Of the Gaussian data."""
RATE = 0.3
"""π of the bits."""
RATES = (0.7, 0.2)
"""P(x_0 = 1) of the two independent bits of `exact_bits`."""
MASSES = (0.4, 0.1, 0.2, 0.3)
"""q(x_0) of the four patterns 00, 10, 01, 11 of `bits`, which are not independent."""


class BitNetwork(nn.Module):
    """Logits that look at both bits and at the time; nobody's posterior."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        turned = x_t.flip(1)
        return 2.5 * x_t - 1.1 + 0.6 * turned - along(0.8 * t, x_t) * x_t


class LineNetwork(nn.Module):
    """ε̂ affine in x_t, with a slope and an offset that no data has."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return along(0.3 + 0.5 * t, x_t) * x_t + along(0.1 - 0.2 * t, x_t)


class LinePosterior(nn.Module):
    """E[x_0|x_t] of N(mean, variance) data.

    Arguments:
        schedule: of the process. mean, variance: of the data.
    """

    def __init__(self, schedule: Schedule, mean: float, variance: float) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean, self.variance = mean, variance

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        keep, lose = (along(v, x_t) for v in (self.schedule.keep(t), self.schedule.lose(t)))
        gain = keep.sqrt() * self.variance / (keep * self.variance + lose)
        return self.mean + gain * (x_t - keep.sqrt() * self.mean)


class BitPosterior(nn.Module):
    """logit P(x_0=1|x_t) of independent bits.

    Arguments:
        process: the forward process. prior: (d,) logit P(x_0=1).
    """

    def __init__(self, process: Bernoulli, prior: Tensor) -> None:
        super().__init__()
        self.process = process
        self.prior = prior

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        q = self.process.schedule
        return self.prior + self.process.evidence(x_t, q.log_keep(t), q.log_lose(t))


class Constantly(nn.Module):
    """The same output everywhere.

    Arguments:
        output: (*shape).
    """

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.output.expand_as(x_t)


def line_schedule() -> LogSNRLinear:
    """log-SNR 4, 2, 0, −2, −4 on a grid of 5."""
    return LogSNRLinear(4.0, -4.0)


def bit_schedule() -> Tabulated:
    """Three steps that redraw a bit with probability .15, .4, .6."""
    return Tabulated([0.15, 0.4, 0.6])


def bits(decoder: Decoder | None = None, rate: float = RATE) -> Enumerated:
    """2 dependent bits and a network that is off."""
    schedule = bit_schedule()
    decoder = BernoulliDecoder() if decoder is None else decoder
    model = Reverse(Bernoulli(schedule, rate), BitNetwork(), Logits(), decoder)
    weight = torch.tensor(MASSES, dtype=torch.float64)
    return Enumerated(model, schedule.grid(), patterns(2), weight, BERNOULLI)


def line_data(mean: float = MEAN, variance: float = VARIANCE) -> tuple[Tensor, Tensor]:
    """Three weighted points with the moments of a normal law up to the fifth; (3, 1) and (3,)."""
    z, weight = hermite(3)
    return mean + variance**0.5 * z[:, None], weight


def line_law(mean: float = MEAN, variance: float = VARIANCE) -> Normal:
    """The law of that data, float64."""
    centre = torch.tensor(mean, dtype=torch.float64)
    return Normal(centre, torch.full_like(centre, variance).sqrt())


def affine(decoder: Decoder | None = None, variance: float = VARIANCE) -> Affine:
    """N(.5, variance) and an affine network that is off; σ² = β, decoder variance lose(t_1)."""
    schedule = line_schedule()
    decoder = Density() if decoder is None else decoder
    model = Reverse(Gaussian(schedule), LineNetwork(), Epsilon(Transition()), decoder)
    return Affine(model, schedule.grid(5), *line_data(MEAN, variance), GAUSSIAN)


def levels() -> Levelled:
    """8 levels of unequal masses, and the affine network."""
    schedule = line_schedule()
    decoder = Discretized(LEVELS)
    model = Reverse(Gaussian(schedule), LineNetwork(), Epsilon(Transition()), decoder)
    weight = torch.arange(1, LEVELS + 1, dtype=torch.float64)
    weight = weight / weight.sum()
    x_0 = level_values(LEVELS, weight)[:, None]
    return Levelled(model, schedule.grid(5), x_0, weight, f"{GAUSSIAN}, {LEVELS} levels")


def exact_bits(times: Tensor | None = None) -> Enumerated:
    """Two independent bits and their exact reverse conditionals on any grid."""
    schedule, p = bit_schedule(), torch.tensor(RATES, dtype=torch.float64)
    network = Constantly(p.logit())
    model = Reverse(Bernoulli(schedule, RATE), network, Context(), BernoulliDecoder())
    x_0 = patterns(2)
    weight = (x_0 * p + (1 - x_0) * (1 - p)).prod(1)
    grid = schedule.grid() if times is None else times
    return Enumerated(model, grid, x_0, weight, BERNOULLI)


def exact_affine(
    mean: float = MEAN, variance: float = VARIANCE, times: Tensor | None = None
) -> Affine:
    """A normal law and its exact reverse conditionals on any grid; N(0, 1): the prior itself."""
    schedule = line_schedule()
    grid = schedule.grid(5) if times is None else times
    error = 1 / (1 / variance + schedule.logsnr(grid).exp())
    network = LinePosterior(schedule, mean, variance)
    decoder = Density(Constant(float(error[0].log())))
    model = Reverse(Gaussian(schedule), network, X0(Optimal(grid, error)), decoder)
    return Affine(model, grid, *line_data(mean, variance), GAUSSIAN)


def stationary_line() -> Affine:
    """N(0, 1), the prior itself: no network is needed, v̂ = 0, and σ² = β is exact."""
    schedule = line_schedule()
    network = Constantly(torch.zeros(1, dtype=torch.float64))
    model = Reverse(Gaussian(schedule), network, Velocity(Transition()), Density())
    return Affine(model, schedule.grid(5), *line_data(0.0, 1.0), GAUSSIAN)


def stationary_bits() -> Enumerated:
    """Bits with the rate π, the prior itself, and the logits of their posterior."""
    schedule = bit_schedule()
    process = Bernoulli(schedule, RATE)
    prior = torch.full((2,), RATE, dtype=torch.float64)
    model = Reverse(process, BitPosterior(process, prior.logit()), Logits(), BernoulliDecoder())
    x_0 = patterns(2)
    weight = (x_0 * prior + (1 - x_0) * (1 - prior)).prod(1)
    return Enumerated(model, schedule.grid(), x_0, weight, BERNOULLI)


def settings() -> tuple[Affine, Levelled, Enumerated]:
    """The three with a gap."""
    return affine(), levels(), bits()
