r"""Which K times of a grid to keep: the best subsets of every size by dynamic programming.

A chain that keeps the times j_1 < … < j_K of N costs first[j_1] + Σ pair[j_k, j_{k+1}], and always
ends at the last time, where sampling starts:

    D_1[j] = first[j],   D_{k+1}[j] = min_{i<j} (D_k[i] + pair[i, j]),   cost of size K: D_K[N−1].

One run gives the best subset of every size up to K in O(K N²). Where the first latent's cost
depends on the second one (a decoder whose variance follows the first pair), it belongs to the
first edge: D_2[j] = min_i (first[i, j] + pair[i, j]), and a chain of one latent has no cost.

References:
    Watson, Ho, Norouzi, Chan 2021, Learning to efficiently sample from diffusion probabilistic
    models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256
"""Rows of the table that are added at a time: the working memory is ROWS N numbers."""


@dataclass(frozen=True)
class Subsets:
    """The best subset of every size.

    Arguments:
        costs: (K,) of the sizes 1..K, infinite where there is none.
        before: (K, N) the place before each time in the best chain of that size that ends there.
    """

    costs: Tensor
    before: Tensor

    def best(self, size: int) -> Tensor:
        """(size,) increasing places 0..N−1, the last one N−1."""
        assert 1 <= size <= len(self.costs) and bool(self.costs[size - 1].isfinite())
        path = [self.before.shape[1] - 1]
        for k in range(size - 1, 0, -1):
            path.append(int(self.before[k, path[-1]]))
        return torch.tensor(path[::-1])


def best_subsets(pair: Tensor, first: Tensor, most: int) -> Subsets:
    """The best subsets of all sizes up to `most`.

    Arguments:
        pair: (N, N) float64, the cost of i < j above the diagonal; the rest is not read.
        first: (N,) cost of the first latent, or (N, N) where it depends on the second one too.
        most: K ≤ N.
    Raises:
        ValueError: a cost is not a number.
    """
    count = len(pair)
    assert pair.shape == (count, count) and 1 <= most <= count
    allowed = torch.ones(count, count, dtype=torch.bool, device=pair.device).triu(1)
    bad = pair.isnan().logical_and_(allowed).any() | first.isnan().any()
    if bool(bad):
        raise ValueError("a cost of the grid is not a number: the error curve is not finite")
    edge = pair.double().masked_fill(~allowed, torch.inf)
    start = first.double() if first.dim() == 1 else first.new_full((count,), torch.inf).double()
    costs = [start]
    before = torch.zeros(most, count, dtype=torch.int64)
    for k in range(1, most):
        table = edge if first.dim() == 1 or k > 1 else edge + first.double()
        reached = costs[-1] if first.dim() == 1 or k > 1 else torch.zeros_like(start)
        lowest, place = _step(reached, table)
        costs.append(lowest)
        before[k] = place
    return Subsets(torch.stack([c[-1] for c in costs]), before)


def _step(reached: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """min_i (reached[i] + edge[i, j]) and where it is taken, (N,) each."""
    lowest = torch.full_like(reached, torch.inf)
    place = torch.zeros(len(reached), dtype=torch.int64)
    for start in range(0, len(reached), ROWS):
        part = reached[start : start + ROWS, None] + edge[start : start + ROWS]
        value, row = part.min(0)
        better = value < lowest
        lowest = torch.where(better, value, lowest)
        place = torch.where(better, row + start, place)
    return lowest, place
