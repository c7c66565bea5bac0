"""Scores of features: closed forms, brute force, published bias, and broken variants.

Thresholds of five standard errors have a false-alarm rate of 6e-7; seeds are fixed.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.neighbours import (
    density_coverage,
    neighbourhoods,
    precision_recall,
    training_distance_ratio,
)
from nelbo.randomness import generator
from nelbo.scores import fid, kid, mmd_test, sliced_wasserstein


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed, "test scores"))


def off(values: list[float], truth: float) -> float:
    """Standard errors between the mean of values and the truth."""
    table = torch.tensor(values, dtype=torch.float64)
    return float((table.mean() - truth).abs() / (table.std() / math.sqrt(len(values))))


def cubic(a: Tensor, b: Tensor) -> float:
    return (float(a @ b) / len(a) + 1) ** 3


def test_kid_is_its_definition_pair_by_pair() -> None:
    x, y = normal(0, 5, 3), normal(1, 4, 3) + 1
    within = [
        sum(cubic(a, b) for a, b in itertools.permutations(rows, 2)) / (n * (n - 1))
        for rows, n in ((x, 5), (y, 4))
    ]
    across = sum(cubic(a, b) for a in x for b in y) / 20
    assert kid(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)
    assert kid(x[[3, 1, 0, 4, 2]], y) == pytest.approx(kid(x, y), rel=1e-12)


def test_kid_is_unbiased_and_a_biased_one_is_not() -> None:
    """For k = 1 its mean is known, with moments m_i: 3 (dm_1)^2 + 3 (dm_2)^2 + (dm_3)^2."""
    same, shifted, biased = [], [], []
    shift = 0.5
    for seed in range(300):
        x, y, z = normal(seed, 3, 30, 1)
        same.append(kid(x, y))
        shifted.append(kid(x, z + shift))
        every = sum(float((rows @ rows.T + 1).pow(3).mean()) for rows in (x, y))
        biased.append(every - 2 * float((x @ y.T + 1).pow(3).mean()))
    truth = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    assert off(same, 0) < 5 and off(shifted, truth) < 5
    assert off(biased, 0) > 8
    assert min(same) < 0, "no clamp"


def test_fid_of_an_affine_image_is_closed_form() -> None:
    """y = x A + b with A symmetric and positive: |shift|^2 + tr (I - A) S (I - A), exactly."""
    x = normal(2, 50, 4) @ normal(3, 4, 4)
    root = normal(4, 4, 4)
    a = root @ root.T + torch.eye(4, dtype=torch.float64)
    y = x @ a + torch.tensor([1.0, 0, -2, 3], dtype=torch.float64)
    rest = torch.eye(4, dtype=torch.float64) - a
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.trace(rest @ torch.cov(x.T) @ rest)
    assert fid(x, y) == pytest.approx(float(expected), rel=1e-10)
    of_variances_alone = x.mean(0) - y.mean(0), x.std(0) - y.std(0)
    assert sum(float(d.square().sum()) for d in of_variances_alone) < 0.99 * float(expected)
    assert abs(fid(x, x)) < 1e-9 and fid(y, x) == pytest.approx(fid(x, y), rel=1e-10)


def test_fid_is_that_of_the_matrix_square_root() -> None:
    x, y = normal(5, 60, 6) @ normal(6, 6, 6), normal(7, 40, 6)
    first, second = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    trace = np.trace(first + second - 2 * sqrtm(first @ second).real)
    apart = float((x.mean(0) - y.mean(0)).square().sum())
    assert fid(x, y) == pytest.approx(apart + trace, rel=1e-9)


def test_fid_of_one_law_is_the_published_bias() -> None:
    """N(0, I_64) at n = 500: 4.43 as measured independently (its own error taken as .03)."""
    found = [fid(*normal(seed, 2, 500, 64)) for seed in range(20)]
    error = float(torch.tensor(found).std()) / math.sqrt(20)
    mean = sum(found) / 20
    assert abs(mean - 4.43) < 5 * error + 0.03


def test_fid_of_features_without_spread_needs_no_ridge() -> None:
    x = normal(8, 40, 3)
    flat = torch.cat((x, torch.zeros(40, 2, dtype=torch.float64)), 1)
    assert fid(flat, 2 * flat) == pytest.approx(fid(x, 2 * x), rel=1e-10)


@pytest.mark.parametrize("n", [3, 4])
def test_fid_of_too_few_rows_is_refused(n: int) -> None:
    with pytest.raises(InputRefused, match="more than 4 examples"):
        fid(normal(0, n, 4), normal(1, 50, 4))


def balls(x: list[Tensor], k: int, own: int = 0) -> list[float]:
    return [sorted(float((a - b).norm()) for b in x)[k - own] for a in x]


def brute(real: Tensor, fake: Tensor, k: int, own: int = 0) -> tuple[float, ...]:
    """Precision, recall (closed balls), density, coverage (open balls), one by one."""
    x, y = list(real), list(fake)
    around, behind = balls(x, k, own), balls(y, k, own)
    precise = [any(float((a - b).norm()) <= r for a, r in zip(x, around, strict=True)) for b in y]
    recalled = [any(float((a - b).norm()) <= r for b, r in zip(y, behind, strict=True)) for a in x]
    inside = [[float((a - b).norm()) < r for b in y] for a, r in zip(x, around, strict=True)]
    density = sum(map(sum, inside)) / (k * len(y))
    coverage = sum(map(any, inside)) / len(x)
    return sum(precise) / len(y), sum(recalled) / len(x), density, coverage


@pytest.mark.parametrize("k", [1, 2, 3])
def test_neighbourhoods_by_brute_force_on_a_lattice_full_of_ties(k: int) -> None:
    differs = 0
    for seed in range(12):
        draws = generator(seed, "lattice")
        x = torch.randint(0, 4, (7, 2), generator=draws).double()
        y = torch.randint(1, 6, (9, 2), generator=draws).double()
        found = (*precision_recall(x, y, k), *density_coverage(x, y, k))
        assert found == pytest.approx(brute(x, y, k), abs=1e-14)
        both = neighbourhoods(x, y, manifold=k, balls=k)
        assert (both.precision, both.recall, both.density, both.coverage) == found
        turned = neighbourhoods(x.flip(0), y.roll(3, 0), manifold=k, balls=k)
        assert turned == both
        differs += found != pytest.approx(brute(x, y, k, own=1), abs=1e-14)
    assert differs >= 6, "a row that counts itself as its own neighbour would not be seen"


def test_neighbourhoods_by_hand() -> None:
    real = torch.tensor([[0.0], [1], [3], [7]])
    fake = torch.tensor([[1.0], [2], [20], [11]])
    # Radii 1, 1, 2, 4 of real rows; 1, 1, 9, 9 of fake ones.
    assert precision_recall(real, fake, k=1) == (3 / 4, 4 / 4)
    assert density_coverage(real, fake, k=1) == (2 / 4, 2 / 4)


def test_where_all_features_are_equal_closed_balls_hold_all_and_open_ones_nothing() -> None:
    same = torch.ones(8, 3)
    assert precision_recall(same, same) == (1.0, 1.0)
    assert density_coverage(same, same) == (0.0, 0.0)


def test_density_and_coverage_of_one_law_are_those_of_theory() -> None:
    """Coverage 1 - prod_i (n - i)/(2n - i), density 1. A dropped mode costs recall alone."""
    n, k = 20, 5
    found = [density_coverage(*normal(seed, 2, n, 3), k) for seed in range(400)]
    missed = math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert off([coverage for _, coverage in found], 1 - missed) < 5
    assert off([density for density, _ in found], 1) < 5
    assert off([coverage for _, coverage in found], 1 - 2.0**-k) > 5, "the limit is not the value"
    n = 60
    far = torch.where(torch.arange(n) % 2 == 0, 20.0, 0.0)[:, None]
    precision, recall = precision_recall(normal(0, n, 3) + far, normal(1, n, 3))
    assert precision > 0.8 and recall == pytest.approx(0.5, abs=0.1)


def test_sliced_wasserstein_of_shifted_points_in_one_dimension() -> None:
    x = normal(0, 40, 1)
    assert sliced_wasserstein(x, x[torch.randperm(40)] + 1.5) == pytest.approx(2.25, rel=1e-12)
    assert sliced_wasserstein(x, x.flip(0)) == 0
    spread = float(((2 * x).sort(0).values - x.sort(0).values).square().mean())
    assert sliced_wasserstein(x, 2 * x) == pytest.approx(spread, rel=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_square_over_the_dimensions() -> None:
    """E (u.v)^2 = |v|^2/k over directions; (u.v)^2 has the variance 2 (k-1)/(k^2 (k+2)) |v|^4."""
    x, shift = normal(0, 30, 5), torch.tensor([3.0, 0, 0, 4, 0], dtype=torch.float64)
    found = sliced_wasserstein(x, x + shift, projections=4000)
    error = 25 * math.sqrt(2 * 4 / (25 * 7)) / math.sqrt(4000)
    assert abs(found - 5.0) < 5 * error
    assert abs(math.sqrt(found) - 5.0) > 5 * error
    with pytest.raises(InputRefused, match="same number"):
        sliced_wasserstein(x, x[:7])


def test_the_permutation_p_value_is_exact_under_the_null() -> None:
    """P(p <= 1/20) = 1/20: of 400 at most 44 and at least 2 (false alarms 5e-7 and 3e-8).

    Features that were fitted on the scored real rows break it, and the count tells.
    """
    hits, spoilt, values = 0, 0, []
    for seed in range(400):
        x, y = normal(seed, 2, 16, 10)
        p = mmd_test(x, y, frequencies=32, permutations=19, seed=seed).p
        values.append(p)
        hits += p <= 0.05
        fitted = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
        pair = ((rows - x.mean(0)) @ fitted for rows in (x, y))
        spoilt += mmd_test(*pair, frequencies=32, permutations=19, seed=seed).p <= 0.05
    assert 2 <= hits <= 44
    assert off(values, 21 / 40) < 5
    assert spoilt > 100


def test_the_permutation_test_sees_a_shift_and_no_difference_where_there_is_none() -> None:
    x = normal(0, 60, 4)
    seen = mmd_test(x, normal(1, 60, 4) + 1)
    assert seen.p == 1 / 200 and seen.mmd2 > 0.1
    same = mmd_test(torch.ones(5, 2), torch.ones(6, 2))
    assert same.mmd2 == pytest.approx(0, abs=1e-12) and same.p == 1
    turned = mmd_test(x.flip(0), normal(1, 60, 4) + 1)
    assert turned.mmd2 == pytest.approx(seen.mmd2, rel=1e-9)


def test_random_frequencies_give_the_gaussian_kernel() -> None:
    """With many of them the statistic is that of exp(-|a-b|^2/(2 h^2)), here for h = total sd."""
    x, y = normal(0, 12, 2), normal(1, 12, 2) + 2
    pooled = torch.cat((x, y))
    gram = (-torch.cdist(pooled, pooled).square() / (2 * pooled.var(0).sum())).exp()
    off_diagonal = [(g.sum() - g.trace()) / 132 for g in (gram[:12, :12], gram[12:, 12:])]
    exact = float(sum(off_diagonal) - 2 * gram[:12, 12:].mean())
    found = mmd_test(x, y, frequencies=40_000, permutations=1).mmd2
    assert found == pytest.approx(exact, abs=5 / math.sqrt(40_000))


def test_copies_of_training_rows_are_near_and_new_draws_are_not() -> None:
    training, unseen, new = normal(0, 200, 3), normal(1, 100, 3), normal(2, 100, 3)
    assert training_distance_ratio(unseen, training[:100], training) == 0
    assert training_distance_ratio(unseen, training[:100] + 1e-3, training) < 0.02
    assert training_distance_ratio(unseen, new, training) == pytest.approx(1, abs=0.25)
    with pytest.raises(InputRefused, match="no denominator"):
        training_distance_ratio(training, new, training)


@pytest.mark.parametrize("score", [kid, fid, precision_recall, sliced_wasserstein, mmd_test])
def test_tables_that_are_none_are_refused(score) -> None:  # type: ignore[no-untyped-def]
    x = normal(0, 20, 3)
    bad = x.clone()
    bad[3, 1] = math.nan
    for real, fake, words in (
        (x, bad, "NaN"),
        (x, normal(1, 20, 2), "columns"),
        (x[:0], x, "at least"),
        (x[:, 0], x, "table"),
    ):
        with pytest.raises(InputRefused, match=words):
            score(real, fake)
