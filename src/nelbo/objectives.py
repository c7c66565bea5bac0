r"""Training objectives: one network call per example, per-example losses.

With term_0 = −log p_θ(x_0|x_1) and term_i the KL of pair i, the index i of an example is drawn
with probability p_i and its term is divided by it, so that

    Vlb         prior + term_i/p_i                 is unbiased for the bound, in nats;
    Simple      ‖ε − ε̂‖²                           uniform i, no bound;
    Mean        ‖μ̃ − μ_θ‖²                         uniform i, no bound;
    Hybrid      ‖ε − ε̂‖²/d + .001 N term_i/(d log 2), the second part training the variance only.

How i is drawn is in `timesampling`: with low discrepancy or independently, with probabilities that
are fixed or follow the terms that were seen. It is drawn on the CPU, and everything after that is
computed where x_0 is (`given`). The bound of infinitely many latents is in `continuous`.

References:
    Ho, Jain, Abbeel 2020, eq. 5, 14; Nichol, Dhariwal 2021, section 3.1, eq. 16.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nelbo.bound import draw, prior_term, term_of
from nelbo.distributions import per_example
from nelbo.estimate import NATS
from nelbo.processes.base import along
from nelbo.reverse import Prediction, Reverse, gaussian_process
from nelbo.timesampling import Places, SecondMoment, ladder, scattered


class Objective(ABC):
    """A training loss per example.

    Arguments:
        times: (N,) the grid on which the model is trained.
        probabilities: (N,) with which terms are drawn; uniform if None.
    """

    unit = "squared error per example"
    """What a value of the loss is."""
    independent = False
    """Draw the indices of a batch independently, instead of with low discrepancy."""
    history: SecondMoment | None = None
    """Takes the place of the probabilities, and is the objective's state."""

    def __init__(self, times: Tensor, probabilities: Tensor | None = None) -> None:
        n = len(times)
        p = torch.ones(n, dtype=torch.float64) if probabilities is None else probabilities.double()
        if p.shape != (n,) or not bool((p > 0).all()):
            raise ValueError(f"every one of the {n} terms needs a positive probability")
        self.times = times
        self.probabilities = p / p.sum()
        self._copies: dict[torch.device, Tensor] = {}

    def __call__(self, model: Reverse, x_0: Tensor, cond: Any = None) -> Tensor:
        """(B,) losses of a batch x_0 (B, *shape); draws from the global generator."""
        x_0, index, fraction, probability = self.inputs(x_0)
        return self.given(model, x_0, index, fraction, probability, cond)

    def inputs(self, x_0: Tensor) -> tuple[Tensor, ...]:
        """What `given` takes after the model: x_0, and the `Places` of its rows, on its device."""
        u = scattered(len(x_0)) if self.independent else ladder(len(x_0))
        return x_0, *Places.of(self.current(), u, x_0.device)

    def given(
        self,
        model: Reverse,
        x_0: Tensor,
        index: Tensor,
        fraction: Tensor,
        probability: Tensor,
        cond: Any = None,
    ) -> Tensor:
        """(B,) losses at given places; only noise is drawn, on the device of x_0."""
        t = self.grid(x_0.device)[index]
        at = model.at(draw(model, x_0, t), t, cond)
        return self.loss(at, x_0, index, probability)

    @property
    def fixed(self) -> bool:
        """Whether `given` asks nothing of the host: it can be captured as a CUDA graph."""
        return self.history is None

    def grid(self, device: torch.device) -> Tensor:
        """The times (N,) on a device; copied there once."""
        if device.type == "cpu":
            return self.times
        if device not in self._copies:
            self._copies[device] = self.times.to(device)
        return self._copies[device]

    def current(self) -> Tensor:
        """(N,) the probabilities of the next draw."""
        return self.probabilities if self.history is None else self.history.probabilities()

    def loss(self, at: Prediction, x_0: Tensor, index: Tensor, probability: Tensor) -> Tensor:
        """(B,) from the prediction at times[index]: what is always there, plus part/p."""
        part = self.part(at, x_0, index)
        if self.history is not None:
            self.history.remember(index, part)
        return self.always(at, x_0) + part / probability

    def always(self, at: Prediction, x_0: Tensor) -> Tensor:
        """What does not depend on the index, (B,) or ()."""
        return torch.zeros((), dtype=torch.float64, device=x_0.device)

    @abstractmethod
    def part(self, at: Prediction, x_0: Tensor, index: Tensor) -> Tensor:
        """(B,) what index i adds to Σ_i, from the prediction at times[index]."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a run must remember of the objective to continue; empty for most."""
        return {} if self.history is None else self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        if self.history is not None:
            self.history.load_state_dict(state)


class Vlb(Objective):
    """The bound itself: prior + term_i/p_i, nats per example, unbiased for any p."""

    unit = NATS

    def always(self, at: Prediction, x_0: Tensor) -> Tensor:
        return prior_term(at.model, x_0, self.grid(x_0.device))

    def part(self, at: Prediction, x_0: Tensor, index: Tensor) -> Tensor:
        return term_of(at, x_0, self.grid(index.device), index)


def noise_error(at: Prediction, x_0: Tensor) -> Tensor:
    """‖ε − ε̂‖² = snr_t ‖x_0 − x̂_0‖², (B,)."""
    process = gaussian_process(at.model.process, "the noise error")
    root = (0.5 * process.schedule.logsnr(at.t)).exp()
    return per_example((along(root, x_0) * (x_0 - at.x_0)) ** 2)


class Simple(Objective):
    """‖ε − ε̂‖², summed over dimensions; a weighted sum of the bound's terms, not a bound."""

    def part(self, at: Prediction, x_0: Tensor, index: Tensor) -> Tensor:
        return noise_error(at, x_0) / len(self.times)


class Mean(Objective):
    """‖μ̃ − μ_θ‖² = k_s c² ‖x_0 − x̂_0‖² of the pair, ‖x_0 − x̂_0‖² at the first time."""

    def part(self, at: Prediction, x_0: Tensor, index: Tensor) -> Tensor:
        process = gaussian_process(at.model.process, "the error of the mean")
        first = index == 0
        times = self.grid(index.device)
        t, s = times[index.clamp(min=min(1, len(times) - 1))], times[(index - 1).clamp(min=0)]
        factor = torch.ones_like(t)
        if len(self.times) > 1:
            factor = torch.where(first, factor, process.pair(s, t).from_data)
        return per_example((along(factor, x_0) * (x_0 - at.x_0)) ** 2) / len(self.times)


class Hybrid(Objective):
    """‖ε − ε̂‖²/d + λ N term_i/(d log 2): the mean learns from the first part only.

    The gradient is stopped at the mean channels inside term_i, so the bound trains the variance
    alone. Needs a learned variance (`Between`).

    Arguments:
        weight: λ.
    """

    def __init__(
        self, times: Tensor, probabilities: Tensor | None = None, weight: float = 0.001
    ) -> None:
        super().__init__(times, probabilities)
        self.weight = weight

    def part(self, at: Prediction, x_0: Tensor, index: Tensor) -> Tensor:
        dims = x_0[0].numel()
        times = self.grid(index.device)
        bits = term_of(at.mean_detached(), x_0, times, index) / (dims * math.log(2))
        return noise_error(at, x_0) / (dims * len(self.times)) + self.weight * bits
