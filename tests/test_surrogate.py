"""The stand-in: what is summed is what is subtracted, and no fold is fitted on itself."""

from __future__ import annotations

import pytest
import torch

from nelbo.surrogate import (
    Basis,
    Gram,
    Nodes,
    columns,
    crossfit,
    groups,
    hat_count,
    hats,
    totals,
    unaffordable,
)

N, Q, L, K = 13, 2, 3, 5


def nodes(index: torch.Tensor, seed: int = 0) -> Nodes:
    draws = torch.Generator().manual_seed(seed)
    m = len(index)
    parts = [torch.randn(m, w, generator=draws, dtype=torch.float64) for w in (Q, Q, L)]
    return Nodes(index, *parts)


def basis() -> Basis:
    return Basis.of(torch.linspace(0, 1, N - 1, dtype=torch.float64), K)


def test_hats_sum_to_one_and_the_decoder_has_none() -> None:
    both = basis()
    for table, count in ((both.fine, K), (both.coarse, K // 2)):
        assert table.shape == (N, count)
        torch.testing.assert_close(table[1:].sum(1), torch.ones(N - 1, dtype=torch.float64))
        assert not bool(table[0].any())
    assert torch.equal(hats(torch.rand(4), 1), torch.ones(4, 1, dtype=torch.float64))


def test_the_sum_over_all_terms_is_the_sum_of_the_columns() -> None:
    """One example at every term, without fluctuation: Σ_i columns = totals."""
    at = nodes(torch.arange(N))
    features = at.features[:1].expand(N, L)
    stand_in = torch.where((at.index > 0)[:, None], at.stand_in, 0.0)
    at = Nodes(at.index, stand_in, torch.zeros(N, Q, dtype=torch.float64), features)
    both = basis()
    sums = torch.einsum("nq,nk->kq", stand_in, both.fine)[None]
    torch.testing.assert_close(columns(both, at).sum(0), totals(both, sums, features[:1])[0])


def test_groups_name_every_column() -> None:
    both = basis()
    z = columns(both, nodes(torch.arange(N)))
    kinds = groups(both, Q, L)
    assert all(mask.shape == (z.shape[1],) for mask in kinds.values())
    assert int(kinds["control"].sum()) == 2 * K * Q
    assert int(kinds["features"].sum()) == (K // 2) * L + L
    assert int(kinds["decoder"].sum()) == 1 + L
    assert not bool(z[0, ~kinds["decoder"]].any()), "the decoder has columns of its own"
    assert not bool(z[1:, kinds["decoder"]].any())


def test_a_fold_is_not_fitted_on_itself() -> None:
    draws = torch.Generator().manual_seed(1)
    m = 400
    z = torch.randn(m, 6, generator=draws, dtype=torch.float64)
    y, p = torch.randn(m, generator=draws, dtype=torch.float64), torch.rand(m).double() + 0.5
    fold, keep = torch.arange(m) % 4, torch.ones(6, dtype=torch.bool)
    none = Gram(torch.zeros(6, 6).double(), torch.zeros(6).double(), 0)
    before = crossfit(z, y, p, fold, none, keep)
    changed = torch.where(fold == 2, y + 100, y)
    after = crossfit(z, changed, p, fold, none, keep)
    torch.testing.assert_close(before[2], after[2], rtol=1e-9, atol=1e-12)
    assert all(float((before[f] - after[f]).abs().max()) > 0.1 for f in (0, 1, 3))


def test_least_squares_finds_the_coefficients_and_keeps_to_its_columns() -> None:
    draws = torch.Generator().manual_seed(2)
    z = torch.randn(500, 4, generator=draws, dtype=torch.float64)
    truth = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    p = torch.rand(500, generator=draws).double() + 0.1
    keep = torch.tensor([True, True, True, False])
    found = Gram.of(z, z @ truth, p).solve(keep)
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3)
    assert float(found[3]) == 0
    assert not bool(Gram.of(z, z @ truth, p).solve(torch.zeros(4, dtype=torch.bool)).any())


@pytest.mark.parametrize(
    ("draws", "out"),
    [
        (20, {"decoder features", "features", "control"}),
        (40, {"decoder features", "features"}),
        (400, {"decoder features"}),
    ],
)
def test_few_draws_bear_few_columns(draws: int, out: set[str]) -> None:
    index = torch.ones(draws, dtype=torch.int64)
    assert set(unaffordable(draws, 0, nodes(index))) == out
    assert hat_count(draws, nodes(index), N - 1) <= max(1, draws // 60)


def test_many_draws_of_the_decoder_bear_its_features() -> None:
    assert unaffordable(400, 200, nodes(torch.arange(400) % 2)) == []
