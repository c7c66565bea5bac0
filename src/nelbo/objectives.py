r"""Training objectives: one network call per example, per-example losses.

With term_0 = −log p_θ(x_0|x_1) and term_i the KL of pair i, the index i of an example is drawn
with probability p_i and its term is divided by it, so that

    Vlb     prior + term_i/p_i                 is unbiased for the bound, in nats;
    Simple  ‖ε − ε̂‖²                           uniform i, no bound;
    Mean    ‖μ̃ − μ_θ‖²                         uniform i, no bound;
    Hybrid  ‖ε − ε̂‖²/d + .001 N term_i/(d log 2), the second part training the variance only.

The indices of a batch are drawn with low discrepancy, t_b = F⁻¹((u + b/B) mod 1) with one u per
batch: each is distributed as p, and together they cover all of it.

References:
    Ho, Jain, Abbeel 2020, eq. 5, 14; Nichol, Dhariwal 2021, section 3.1, eq. 16;
    Kingma et al. 2021, Variational diffusion models, appendix I.1 (low-discrepancy times).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nelbo.bound import draw, prior_term, term_of
from nelbo.distributions import per_example
from nelbo.estimate import NATS
from nelbo.processes.base import along
from nelbo.reverse import Prediction, Reverse, gaussian_process


def low_discrepancy(probabilities: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """B indices, each distributed as p, that cover p evenly.

    Arguments:
        probabilities: (N,) float64, positive, summing to one.
        batch: B.
    Returns:
        index (B,) int64, and the probability (B,) with which each was drawn.
    """
    ladder = torch.arange(batch, dtype=torch.float64) / batch
    u = (torch.rand((), dtype=torch.float64) + ladder) % 1
    cdf = probabilities.cumsum(0)
    index = torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=len(cdf) - 1)
    return index, probabilities[index]


class Objective(ABC):
    """A training loss per example.

    Arguments:
        times: (N,) the grid on which the model is trained.
        probabilities: (N,) with which terms are drawn; uniform if None.
    """

    unit = "squared error per example"
    """What a value of the loss is."""

    def __init__(self, times: Tensor, probabilities: Tensor | None = None) -> None:
        n = len(times)
        p = torch.ones(n, dtype=torch.float64) if probabilities is None else probabilities.double()
        if p.shape != (n,) or not bool((p > 0).all()):
            raise ValueError(f"every one of the {n} terms needs a positive probability")
        self.times = times
        self.probabilities = p / p.sum()

    def __call__(self, model: Reverse, x_0: Tensor, cond: Any = None) -> Tensor:
        """(B,) losses of a batch x_0 (B, *shape); draws from the global generator."""
        index, probability = low_discrepancy(self.probabilities, len(x_0))
        t = self.times[index]
        at = model.at(draw(model, x_0, t), t, cond)
        return self.loss(at, x_0, index, probability.to(x_0.device))

    @abstractmethod
    def loss(self, at: Prediction, x_0: Tensor, index: Tensor, probability: Tensor) -> Tensor:
        """(B,) from the prediction at times[index]."""


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


class Vlb(Objective):
    """The bound itself: prior + term_i/p_i, nats per example, unbiased for any p."""

    unit = NATS

    def loss(self, at: Prediction, x_0: Tensor, index: Tensor, probability: Tensor) -> Tensor:
        prior = prior_term(at.model, x_0, self.times)
        return prior + term_of(at, x_0, self.times, index) / probability


def noise_error(at: Prediction, x_0: Tensor) -> Tensor:
    """‖ε − ε̂‖² = snr_t ‖x_0 − x̂_0‖², (B,)."""
    process = gaussian_process(at.model.process, "the noise error")
    root = (0.5 * process.schedule.logsnr(at.t)).exp()
    return per_example((along(root, x_0) * (x_0 - at.x_0)) ** 2)


class Simple(Objective):
    """‖ε − ε̂‖², summed over dimensions; a weighted sum of the bound's terms, not a bound."""

    def loss(self, at: Prediction, x_0: Tensor, index: Tensor, probability: Tensor) -> Tensor:
        weight = 1 / (len(self.times) * probability)
        return noise_error(at, x_0) * weight


class Mean(Objective):
    """‖μ̃ − μ_θ‖² = k_s c² ‖x_0 − x̂_0‖² of the pair, ‖x_0 − x̂_0‖² at the first time."""

    def loss(self, at: Prediction, x_0: Tensor, index: Tensor, probability: Tensor) -> Tensor:
        process = gaussian_process(at.model.process, "the error of the mean")
        first = index == 0
        t = self.times[index.clamp(min=min(1, len(self.times) - 1))]
        s = self.times[(index - 1).clamp(min=0)]
        factor = torch.ones_like(t)
        if len(self.times) > 1:
            factor = torch.where(first, factor, process.pair(s, t).from_data)
        weight = 1 / (len(self.times) * probability)
        return per_example((along(factor, x_0) * (x_0 - at.x_0)) ** 2) * weight


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

    def loss(self, at: Prediction, x_0: Tensor, index: Tensor, probability: Tensor) -> Tensor:
        dims = x_0[0].numel()
        n = len(self.times)
        bits = term_of(at.mean_detached(), x_0, self.times, index) / (dims * math.log(2))
        return (noise_error(at, x_0) / dims + self.weight * n * bits) / (n * probability)
