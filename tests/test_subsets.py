"""The best subsets: equal to brute force, all sizes from one run, even grids."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor

from nelbo.schedules import even
from nelbo.subsets import best_subsets


def brute(pair: Tensor, first: Tensor, size: int) -> tuple[float, tuple[int, ...]]:
    """The cheapest of all chains of this size that end at the last time."""
    count = len(pair)

    def cost(chain: tuple[int, ...]) -> float:
        edges = sum(float(pair[i, j]) for i, j in itertools.pairwise(chain))
        start = first[chain[0]] if first.dim() == 1 else first[chain[0], chain[1]]
        return float(start) + edges

    chains = [(*c, count - 1) for c in itertools.combinations(range(count - 1), size - 1)]
    best = min(chains, key=cost)
    return cost(best), best


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_brute_force(size: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    pair = torch.rand(9, 9, generator=g, dtype=torch.float64)
    first = torch.rand(9, generator=g, dtype=torch.float64)
    cost, chain = brute(pair, first, size)
    found = best_subsets(pair, first, 9)
    assert float(found.costs[size - 1]) == pytest.approx(cost, rel=1e-12)
    assert tuple(found.best(size).tolist()) == chain
    alone = best_subsets(pair, first, size)
    assert torch.equal(alone.best(size), found.best(size))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_a_first_cost_of_the_first_edge(size: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    pair, first = (torch.rand(9, 9, generator=g, dtype=torch.float64) for _ in range(2))
    cost, chain = brute(pair, first, size)
    found = best_subsets(pair, first, size)
    assert float(found.costs[size - 1]) == pytest.approx(cost, rel=1e-12)
    assert tuple(found.best(size).tolist()) == chain
    assert float(found.costs[0]) == float("inf")


def test_the_decoder_decides_where_to_begin() -> None:
    """With free pairs the cheapest first time is taken, if it leaves room for the others."""
    pair = torch.zeros(6, 6)
    first = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert best_subsets(pair, first, 3).best(3)[0] == 3
    assert best_subsets(pair, first.flip(0), 3).best(3)[0] == 0


def test_many_rows_are_searched_in_parts() -> None:
    """More rows than one part holds: the same as a plain search over all."""
    g = torch.Generator().manual_seed(0)
    pair = torch.rand(600, 600, generator=g, dtype=torch.float64)
    first = torch.rand(600, generator=g, dtype=torch.float64)
    found = best_subsets(pair, first, 3)
    edge = pair.masked_fill(~torch.ones(600, 600, dtype=torch.bool).triu(1), torch.inf)
    two = (first[:, None] + edge).min(0).values
    assert float(found.costs[1]) == float(two[-1])
    assert float(found.costs[2]) == float((two + edge[:, -1]).min())


def test_a_thousand_times_and_a_hundred_sizes_take_seconds() -> None:
    snr = torch.logspace(4, -3, 1000, dtype=torch.float64)
    pair = (snr[:, None] - snr[None]) / (1 + snr[None])
    started = time.monotonic()
    found = best_subsets(pair, 1 / snr, 100)
    assert time.monotonic() - started < 60  # about 1 s on an idle core
    finite = found.costs[1:]
    assert bool((finite.diff() <= 0).all())
    assert found.best(100)[-1] == 999


def test_costs_that_are_no_numbers_are_refused() -> None:
    pair, first = torch.rand(4, 4), torch.rand(4)
    pair[0, 2] = torch.nan
    with pytest.raises(ValueError, match="not a number"):
        best_subsets(pair, first, 2)
    with pytest.raises(ValueError, match="not a number"):
        best_subsets(torch.rand(4, 4), torch.full((4,), torch.nan), 2)
    lower = torch.rand(4, 4)
    lower[2, 0] = torch.nan
    assert best_subsets(lower, first, 2).best(2)[-1] == 3


@pytest.mark.parametrize("count", [2, 9, 40, 1000])
def test_even_grids_keep_both_ends(count: int) -> None:
    for size in range(2, min(count, 60) + 1):
        kept = even(count, size)
        assert len(kept.unique()) == size and kept[0] == 0 and kept[-1] == count - 1
        assert bool((kept.diff() > 0).all()) and int(kept.diff().max() - kept.diff().min()) <= 1
    assert even(count, 1).tolist() == [count - 1]
    assert torch.equal(even(count, count), torch.arange(count))
