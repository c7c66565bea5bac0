r"""Which terms of the bound a batch measures: how the indices of an update are drawn.

An index i is drawn with a probability p_i that is fixed beforehand, and its term is divided by
p_i: whatever p is, the mean is the sum over all terms.

Low discrepancy: u_b = (u + b/B) mod 1 with one u per batch, i_b = F⁻¹(u_b). Each is distributed as
p, and together they cover all of it. *Second moment*: p_i ∝ √(mean of the last 10 squared terms
of i), mixed with .001 of uniform; uniform until every i has 10 values. What is remembered is part
of a run's state.

References:
    Kingma et al. 2021, Variational diffusion models, appendix I.1 (low-discrepancy times);
    Nichol, Dhariwal 2021, section 3.3 (`SecondMoment`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nelbo.distributed import gather
from nelbo.errors import InputRefused
from nelbo.randomness import by_row, for_all, place_of
from nelbo.transfer import sent

MEMORY = 10
"""Values that are remembered of every term."""
UNIFORM = 0.001
"""Share of uniform probability: no term is ever left out."""


def ladder(batch: int) -> Tensor:
    """(B,) float64 in [0, 1): each uniform, together evenly spread.

    Of a piece of a batch they are its rungs of the ladder of the whole batch.
    """
    first, whole = place_of(batch)
    rungs = torch.arange(first, first + batch, dtype=torch.float64) / whole
    return (for_all(lambda g: torch.rand((), dtype=torch.float64, generator=g)) + rungs) % 1


def scattered(batch: int) -> Tensor:
    """(B,) float64 in [0, 1): uniform and independent."""
    return by_row(batch, lambda n, g: torch.rand(n, dtype=torch.float64, generator=g))


def place(probabilities: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of the distribution function, and where in its step u lies.

    Arguments:
        probabilities: (N,) float64, positive, summing to one. u: (B,) in [0, 1).
    Returns:
        index (B,) int64, distributed as p if u is uniform; fraction (B,) in [0, 1], which is then
        uniform and independent of the index.
    """
    cdf = probabilities.cumsum(0)
    scaled = u * cdf[-1]
    index = torch.searchsorted(cdf, scaled, right=True).clamp(max=len(cdf) - 1)
    width = probabilities[index]
    return index, ((scaled - (cdf[index] - width)) / width).clamp(0, 1)


class Places(NamedTuple):
    """Which terms a batch measures."""

    term: Tensor
    """(B,) int64, its index 0..N−1."""
    fraction: Tensor
    """(B,) float64 in [0, 1], where in the step of its index."""
    probability: Tensor
    """(B,) float64, with which the index was drawn."""

    @classmethod
    def of(cls, probabilities: Tensor, u: Tensor, device: torch.device) -> Places:
        """The places of u (B,), found on the CPU, so that they are the same on any device."""
        index, fraction = place(probabilities, u)
        found = (index, fraction, probabilities[index])
        return cls(*(sent(x, device) for x in found))


class SecondMoment:
    """Probabilities from the terms that were seen: the root of their second moment.

    p_i = .999 r_i/Σ r + .001/N, r_i = √(mean of the last 10 squared values of i), as soon as every
    index has 10; 1/N before. The variance of term_i/p_i is least at p_i ∝ √E term_i². Under
    several ranks all remember the values of all, in the order of ranks.

    Arguments:
        count: N.

    References:
        Nichol, Dhariwal 2021, Improved denoising diffusion probabilistic models, section 3.3.
    """

    def __init__(self, count: int) -> None:
        self.values = torch.zeros(count, MEMORY, dtype=torch.float64)
        self.counts = torch.zeros(count, dtype=torch.int64)

    @property
    def warm(self) -> bool:
        """Whether every index has 10 values."""
        return bool((self.counts >= MEMORY).all())

    def probabilities(self) -> Tensor:
        """(N,) float64, for the next draw."""
        n = len(self.counts)
        even = torch.full((n,), 1 / n, dtype=torch.float64)
        root = self.values.square().mean(1).sqrt()
        if not self.warm or not bool(root.sum() > 0):
            return even
        return (1 - UNIFORM) * root / root.sum() + UNIFORM * even

    def remember(self, index: Tensor, terms: Tensor) -> None:
        """Add the terms of a batch, on every rank at once; of each index the last 10 stay.

        Arguments:
            index: (B,) int64. terms: (B,) as they were measured, not divided by p.
        """
        index, terms = (torch.cat(gather(x.detach().cpu())) for x in (index, terms.double()))
        order = index.argsort(stable=True)
        index, terms = index[order], terms[order]
        number = torch.bincount(index, minlength=len(self.counts))
        first = (number.cumsum(0) - number)[index]
        rank = torch.arange(len(index)) - first
        kept = rank >= number[index] - MEMORY
        slot = (self.counts[index] + rank) % MEMORY
        self.values[index[kept], slot[kept]] = terms[kept]
        self.counts += number

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered: values (N, 10) float64 and counts (N,) int64."""
        return {"values": self.values.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            InputRefused: it is of another number of terms, or holds what cannot have been seen.
        """
        values, counts = state["values"], state["counts"]
        if values.shape != self.values.shape or counts.shape != self.counts.shape:
            raise InputRefused(
                f"the history of terms has shape {tuple(values.shape)}, this objective has "
                f"{len(self.counts)} terms: continue with the options of the run"
            )
        if bool((counts < 0).any()) or not bool(values.isfinite().all()):
            raise InputRefused(
                "the history of terms holds negative counts or values that are not numbers: "
                "continue from an earlier checkpoint"
            )
        self.values, self.counts = values.double().clone(), counts.long().clone()
