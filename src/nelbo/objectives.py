r"""Training objectives: one network call per example, per-example losses.

With term_0 = −log p_θ(x_0|x_1) and term_i the KL of pair i, the index i of an example is drawn
with probability p_i and its term is divided by it, so that

    Vlb         prior + term_i/p_i                 is unbiased for the bound, in nats;
    Continuous  prior + (term_0 or ½ ∫ ‖ε − ε̂‖² dλ over pair i)/p_i   for the bound as N → ∞;
    Simple      ‖ε − ε̂‖²                           uniform i, no bound;
    Mean        ‖μ̃ − μ_θ‖²                         uniform i, no bound;
    Hybrid      ‖ε − ε̂‖²/d + .001 N term_i/(d log 2), the second part training the variance only.

How i is drawn is in `timesampling`: with low discrepancy or independently, with probabilities that
are fixed or follow the terms that were seen.

References:
    Ho, Jain, Abbeel 2020, eq. 5, 14; Nichol, Dhariwal 2021, section 3.1, eq. 16;
    Kingma et al. 2021, Variational diffusion models, eq. 17 (`Continuous`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from nelbo.bound import decoder_term, draw, prior_term, term_of
from nelbo.distributions import per_example
from nelbo.estimate import NATS
from nelbo.learned_schedule import LearnedLogSNR
from nelbo.processes.base import along
from nelbo.reverse import Prediction, Reverse, gaussian_process
from nelbo.schedules import Smooth
from nelbo.timesampling import SecondMoment, ladder, place, scattered

DECODER = 1 / 16
"""How often the decoder is drawn beside a continuum of times."""


def low_discrepancy(probabilities: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """B indices, each distributed as p, that cover p evenly.

    Arguments:
        probabilities: (N,) float64, positive, summing to one.
        batch: B.
    Returns:
        index (B,) int64, and the probability (B,) with which each was drawn.
    """
    index, _ = place(probabilities, ladder(batch))
    return index, probabilities[index]


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

    def __call__(self, model: Reverse, x_0: Tensor, cond: Any = None) -> Tensor:
        """(B,) losses of a batch x_0 (B, *shape); draws from the global generator."""
        probabilities = self.current()
        if self.independent:
            index, _ = place(probabilities, scattered(len(x_0)))
            probability = probabilities[index]
        else:
            index, probability = low_discrepancy(probabilities, len(x_0))
        t = self.times[index]
        at = model.at(draw(model, x_0, t), t, cond)
        return self.loss(at, x_0, index, probability.to(x_0.device))

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


class Augmented:
    """An objective on examples of which a share is changed; the changed ones carry a mark.

    Arguments:
        objective: any objective of this module.
        augment: x_0 -> (x_0, marks (B,)); see `nelbo.data.augmentation`.
    """

    def __init__(
        self, objective: Objective, augment: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self.objective = objective
        self.augment = augment
        self.times = objective.times
        self.unit = objective.unit

    def __call__(self, model: Reverse, x_0: Tensor, cond: Any = None) -> Tensor:
        """(B,) losses; the marks are the condition."""
        assert cond is None, "the condition is the mark"
        return self.objective(model, *self.augment(x_0))

    def state_dict(self) -> dict[str, Tensor]:
        """That of the objective."""
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.objective.load_state_dict(state)


class Vlb(Objective):
    """The bound itself: prior + term_i/p_i, nats per example, unbiased for any p."""

    unit = NATS

    def always(self, at: Prediction, x_0: Tensor) -> Tensor:
        return prior_term(at.model, x_0, self.times)

    def part(self, at: Prediction, x_0: Tensor, index: Tensor) -> Tensor:
        return term_of(at, x_0, self.times, index)


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
        t = self.times[index.clamp(min=min(1, len(self.times) - 1))]
        s = self.times[(index - 1).clamp(min=0)]
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
        bits = term_of(at.mean_detached(), x_0, self.times, index) / (dims * math.log(2))
        return noise_error(at, x_0) / (dims * len(self.times)) + self.weight * bits


class Continuous(Objective):
    """The bound as N → ∞: prior KL at t_N, decoder at t_1, and ½ ∫ E‖ε − ε̂‖² dλ between them.

    The integral is cut at the times of the grid. Index i ≥ 1 stands for (t_{i−1}, t_i), where t is
    uniform and the part is ½ (−λ′(t)) ‖ε − ε̂‖² (t_i − t_{i−1}); index 0 is the decoder. Nothing
    is lost by the cuts: they only let probabilities vary over time. A fixed schedule changes
    nothing between its end points, and of a learned one (`LearnedLogSNR`) this trains the end
    points, and the shape for the least variance of one draw, in the same backward pass.

    Arguments:
        times: (N,), N ≥ 2. probabilities: (N,); if None, the decoder is drawn with `decoder` and
            every time alike with the rest.
        decoder: how often the decoder is drawn.

    References:
        Kingma et al. 2021, eq. 17–18, appendix I.2.
    """

    unit = NATS

    def __init__(
        self, times: Tensor, probabilities: Tensor | None = None, decoder: float = DECODER
    ) -> None:
        if len(times) < 2:
            raise ValueError("an integral over time needs two end points: take N ≥ 2 latents")
        if probabilities is None:
            widths = times.diff() / (times[-1] - times[0])
            probabilities = torch.cat([times.new_full((1,), decoder), (1 - decoder) * widths])
        super().__init__(times, probabilities)

    def __call__(self, model: Reverse, x_0: Tensor, cond: Any = None) -> Tensor:
        """(B,) losses of a batch x_0 (B, *shape); draws from the global generator."""
        count, probabilities = len(x_0), self.current()
        u = scattered(count) if self.independent else ladder(count)
        return self.loss_at(model, x_0, *place(probabilities, u), probabilities, cond)

    def loss_at(
        self,
        model: Reverse,
        x_0: Tensor,
        index: Tensor,
        fraction: Tensor,
        probabilities: Tensor,
        cond: Any = None,
    ) -> Tensor:
        """(B,) losses at given places; see `timesampling.place`."""
        before = self.times[(index - 1).clamp(min=0)]
        t = before + fraction * (self.times[index] - before)
        schedule = _smooth(model)
        learned = schedule if isinstance(schedule, LearnedLogSNR) else None
        with learned.routed(len(x_0)) if learned else nullcontext() as weights:
            at = model.at(draw(model, x_0, t), t, cond)
            loss = self.loss(at, x_0, index, probabilities[index].to(x_0.device))
        if weights is not None:
            # per dimension, so that the gradient keeps its size beside the others
            weights.settle((loss - self.always(at, x_0)).detach() / x_0[0].numel())
        return loss

    def always(self, at: Prediction, x_0: Tensor) -> Tensor:
        return prior_term(at.model, x_0, self.times)

    def part(self, at: Prediction, x_0: Tensor, index: Tensor) -> Tensor:
        width = self.times[index] - self.times[(index - 1).clamp(min=0)]
        rate = (-0.5 * _smooth(at.model).slope(at.t) * width).to(x_0.device)
        # at the decoder's time the width is 0, and with it this part
        value = rate * noise_error(at, x_0)
        rows = (index == 0).nonzero()[:, 0].to(x_0.device)
        return value.index_add(0, rows, decoder_term(at[rows], x_0[rows])) if len(rows) else value


def _smooth(model: Reverse) -> Smooth:
    schedule = model.process.schedule
    if not isinstance(schedule, Smooth):
        raise ValueError(
            f"{type(schedule).__name__} is defined at its own steps only, and the bound in "
            "continuous time needs every time: take LogSNRLinear or LearnedLogSNR"
        )
    return schedule
