r"""Settings: a model, data, and rows over which every expectation is taken.

    Enumerated   bits: every trajectory, weighted by q;
    Sampled      any model at all, by Monte Carlo;
    Affine, Levelled (module `line`)    one dimension, by cubature.

What is said of a `Setting` can be said of a trained model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nelbo.bound import Bound, prior_term, term_of
from nelbo.derivation.rows import Mean, Rows, forward_steps, log_weights, reverse_steps
from nelbo.distributions import per_example
from nelbo.randomness import seeded
from nelbo.reverse import Reverse


@dataclass(frozen=True)
class Setting(ABC):
    """A model with data, and rows over which expectations are taken.

    Arguments:
        model: the reverse process. times: (N,) its grid.
        x_0: (n, *shape) float64. weight: (n,) their masses under q(x_0).
        family: as in `Line`.
    """

    model: Reverse
    times: Tensor
    x_0: Tensor
    weight: Tensor
    family: str

    @abstractmethod
    def trajectories(self) -> Rows:
        """x_{1:N} ~ q(x_{1:N}|x_0), forwards from x_0."""

    @abstractmethod
    def at(self, index: int) -> Rows:
        """x_t ~ q(x_t|x_0) alone, t = times[index]."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.times)

    def term(self, index: int) -> Mean:
        """E_{q(x_t|x_0)} of one term of the bound, by `nelbo.bound.term_of`."""
        rows = self.at(index)
        at = self.model.at(rows.latents[:, 0], self.times[index])
        return rows.mean(term_of(at, rows.x_0, self.times, torch.tensor(index)))


class Known(Setting, ABC):
    """A setting whose p_θ(x_0) is known, with exact expectations: one group for each x_0."""

    @abstractmethod
    def log_likelihood(self) -> Tensor:
        """log p_θ(x_0), (n,) nats: kernels pushed forward from the prior, no trajectory of q."""

    def bound(self) -> Bound:
        """The expectation of `nelbo.bound.bound` of every x_0, exact."""
        terms = torch.stack([self.term(i).value for i in range(self.count)], 1)
        return Bound(prior_term(self.model, self.x_0, self.times), terms[:, 1:], terms[:, 0])

    def average(self, values: Tensor) -> float:
        """E_{q(x_0)} of values (n,)."""
        return float(self.weight @ values)


class Joint(Known, ABC):
    """A setting whose joint law p_θ(x_{0:N}) is known too."""

    @abstractmethod
    def log_evidence(self) -> Tensor:
        """log E_{q(x_{1:N}|x_0)} w, (n,) nats: the sum or integral over whole trajectories."""

    @abstractmethod
    def gap(self) -> Tensor:
        """KL(q(x_{1:N}|x_0) ‖ p_θ(x_{1:N}|x_0)), (n,) nats, of the two joint laws."""


def patterns(bits: int) -> Tensor:
    """(2^bits, bits) float64: bit j of the row's number."""
    rows = torch.arange(2**bits)[:, None] >> torch.arange(bits)
    return (rows & 1).double()


class Enumerated(Joint):
    """Bits: all of them, over all latents."""

    def trajectories(self) -> Rows:
        one = patterns(self.x_0.shape[1] * self.count).unflatten(1, (self.count, -1))
        return self._weighted(one, self.times)

    def at(self, index: int) -> Rows:
        return self._weighted(patterns(self.x_0.shape[1])[:, None], self.times[index, None])

    def _weighted(self, latents: Tensor, times: Tensor) -> Rows:
        """Each x_0 with all these latents, weighted by the forward steps between the times."""
        n, size = len(self.x_0), len(latents)
        x_0 = self.x_0.repeat_interleave(size, 0)
        rows = Rows(x_0, latents.repeat(n, 1, 1), torch.empty(0), n)
        weight = forward_steps(self.model, times, rows).sum(1).exp()
        return Rows(x_0, rows.latents, weight, n)

    def log_likelihood(self) -> Tensor:
        latents = patterns(self.x_0.shape[1])
        mass = per_example(self.model.process.prior(latents).log_prob(latents)).exp()
        for i in range(self.count - 1, 0, -1):
            kernel = self.model.kernel(latents, self.times[i], self.times[i - 1])
            mass = mass @ _table(kernel, latents)
        return (mass @ _table(self.model.decoder(latents, self.times[0]), self.x_0)).log()

    def log_evidence(self) -> Tensor:
        rows = self.trajectories()
        return rows.mean(log_weights(self.model, self.times, rows).exp()).value.log()

    def gap(self) -> Tensor:
        rows = self.trajectories()
        joint = reverse_steps(self.model, self.times, rows).sum(1).view(rows.groups, -1)
        log_posterior = joint.log_softmax(1)
        q = rows.weight.view(rows.groups, -1)
        return (q * (q.log() - log_posterior)).sum(1)


def _table(law: Any, targets: Tensor) -> Tensor:
    """(rows of the law, targets) of probabilities."""
    columns = [per_example(law.log_prob(x.expand(law.mean.shape))) for x in targets]
    return torch.stack(columns, 1).exp()


@dataclass(frozen=True)
class Sampled(Setting):
    """Any model, by Monte Carlo: one group, every row an independent draw.

    Arguments:
        model: in float64 (`model.double()`), as pointwise lines agree to rounding.
        x_0: (n, *shape) rows of the data, float64, drawn independently. weight: not read.
        seed: of the latents.
    """

    seed: int = 0

    def trajectories(self) -> Rows:
        process = self.model.process
        x: list[Tensor] = []
        with seeded(self.seed, "derivation"):
            for i, t in enumerate(self.times):
                step = process.transition(x[-1], self.times[i - 1], t) if i else None
                x.append((process.marginal(self.x_0, t) if step is None else step).sample())
        return self._rows(torch.stack(x, 1))

    def at(self, index: int) -> Rows:
        with seeded(self.seed, "derivation", index):
            law = self.model.process.marginal(self.x_0, self.times[index])
            return self._rows(law.sample()[:, None])

    def _rows(self, latents: Tensor) -> Rows:
        n = len(self.x_0)
        weight = torch.full((n,), 1 / n, dtype=torch.float64)
        return Rows(self.x_0, latents, weight, 1, sampled=True)
