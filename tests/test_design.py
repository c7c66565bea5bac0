"""Designs: nodes uniform on their strata, every cell met once, the calls that were asked for."""

from __future__ import annotations

import pytest
import torch

from nelbo.design import LEAST, design, enough, nodes, replicates
from nelbo.errors import UsageError


@pytest.mark.parametrize("k", [1, 2, 6, 7])
def test_nodes_are_a_latin_hypercube_of_mirrored_pairs(k: int) -> None:
    m = 500
    v = nodes(m, k, torch.Generator().manual_seed(k))
    assert v.shape == (m, k)
    for j in range(k // 2):
        pair = v[:, 2 * j : 2 * j + 2]
        assert ((pair >= 2 * j / k) & (pair <= (2 * j + 2) / k)).all()
        # what is linear within a stratum is measured without error by every example
        torch.testing.assert_close(pair.mean(1), torch.full((m,), (2 * j + 1) / k).double())
        assert sorted(((pair[:, 0] * k / 2 - j) * m).long().tolist()) == list(range(m))
    if k % 2:
        cells = ((v[:, -1] * k - (k - 1)) * m).long()
        assert sorted(cells.tolist()) == list(range(m))


@pytest.mark.parametrize("calls", [0.02, 0.5, 1, 1.05, 1.5, 2, 5, 16])
def test_the_calls_that_were_asked_for(calls: float) -> None:
    n = 6000
    first, second = replicates(n, calls)
    assert first.calls + second.calls == pytest.approx(calls * n, abs=1)
    assert second.examples <= first.examples <= n
    plan = design(n, calls, 5, 0)
    assert plan.calls == pytest.approx(calls * n, rel=0.02)
    seen = plan.first.isfinite().all(1), plan.second.isfinite().all(1)
    assert bool((seen[0] | ~seen[1]).all()), "the second replicate repeats examples of the first"
    for f in range(int(plan.folds.max()) + 1):
        here = plan.folds == f
        assert int((here & seen[0]).sum()) >= 2 and int((here & seen[1]).sum()) >= 2


def test_every_example_has_the_same_chance() -> None:
    """Over 400 designs each of 150 examples is seen as often: binomial, |z| < 6."""
    seen = torch.zeros(150)
    for seed in range(400):
        seen += design(150, 0.8, 5, seed).first.isfinite().any(1).float()
    share = seen.mean() / 400
    z = (seen / 400 - share) / (share * (1 - share) / 400).sqrt()
    assert float(z.abs().max()) < 6


def test_designs_are_functions_of_their_seed() -> None:
    a, b = design(100, 2, 5, 3, "round", 0), design(100, 2, 5, 3, "round", 0)
    assert torch.equal(a.both, b.both) and torch.equal(a.folds, b.folds)
    assert not torch.equal(a.both, design(100, 2, 5, 3, "round", 1).both)


@pytest.mark.parametrize("calls", [0, -1, 0.39])
def test_too_few_calls_are_refused(calls: float) -> None:
    with pytest.raises(UsageError, match=r"do not tell an error; take at least 0\.4$"):
        replicates(LEAST * 10 // 4, calls)
    with pytest.raises(UsageError, match=r"take at least 2$"):
        replicates(10, calls)


def test_two_calls_are_enough_for_two_examples() -> None:
    assert enough(2, 2) == 2 and enough(2, 1) == 2 and enough(200, 0.1) == 0.5
    assert design(2, enough(2, 1), 5, 0).calls == 4
