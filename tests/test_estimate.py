"""Estimates: the formulas against numpy, coverage by simulation, merging, units, printing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nelbo.errors import InputRefused, NumericalFailure
from nelbo.estimate import Estimate, at_least, at_most


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7,), (500,), (2, 2), (40, 5), (3, 200)])
def test_the_formulas_against_numpy(shape: tuple[int, ...]) -> None:
    values = 3 + 2 * _draw(1, *shape)
    table = values.numpy().reshape(shape[0], -1)
    n, replicates = table.shape
    found = Estimate.of(values)
    assert found.n == n and found.unit == "nats/example"
    assert found.mean == pytest.approx(table.mean(), rel=1e-14)
    assert found.se == pytest.approx(table.mean(1).std(ddof=1) / math.sqrt(n), rel=1e-12)
    if replicates > 1:
        within = table.var(1, ddof=1).mean()
        assert found.se_mc == pytest.approx(math.sqrt(within / (n * replicates)), rel=1e-12)


def test_two_examples_by_hand() -> None:
    # Means 1 and 5, B = 8, W = (2 + 8) / 2 = 5.
    found = Estimate.of(torch.tensor([[0.0, 2.0], [3.0, 7.0]]))
    assert (found.mean, found.se, found.n) == (3.0, 2.0, 2)
    assert found.se_mc == pytest.approx(math.sqrt(5 / 4), rel=1e-15)


def test_what_cannot_be_measured_is_nan() -> None:
    assert math.isnan(Estimate.of(torch.tensor([1.0, 2.0])).se_mc)
    assert math.isnan(Estimate.of(torch.tensor([[1.0], [2.0]])).se_mc)
    assert math.isnan(Estimate.of(torch.tensor([1.0])).se)
    assert Estimate.of(torch.tensor([1.0, 2.0]), exact=True).se_mc == 0.0
    assert Estimate.of(torch.tensor([1.0, 2.0]), se_mc_known=0.3).se_mc == 0.3
    assert Estimate.of(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), se_mc_known=0.3).se_mc == 0.3


def test_float32_values_are_summed_in_float64() -> None:
    values = torch.full((100_001,), 0.1, dtype=torch.float32)
    values[0] = 1e8
    exact = (1e8 + 100_000 * float(np.float32(0.1))) / 100_001
    assert Estimate.of(values).mean == pytest.approx(exact, rel=1e-15)


def test_a_large_offset_costs_no_digits_of_the_error() -> None:
    values = torch.tensor([1e9, 1e9 + 1, 1e9 + 2], dtype=torch.float64)
    assert Estimate.of(values).se == pytest.approx(math.sqrt(1 / 3), rel=1e-12)


def test_order_does_not_matter() -> None:
    values = _draw(2, 1000) * 10 ** _draw(3, 1000)
    assert Estimate.of(values) != Estimate.of(values[:-1])
    forward, backward = Estimate.of(values, exact=True), Estimate.of(values.flip(0), exact=True)
    assert forward == backward


def test_empty_and_nan_are_refused() -> None:
    with pytest.raises(InputRefused, match="no examples"):
        Estimate.of(torch.zeros(0))
    with pytest.raises(NumericalFailure, match=r"1 of 3 examples .* \[1\]"):
        Estimate.of(torch.tensor([[1.0, 2.0], [math.nan, 1.0], [1.0, 1.0]]))
    with pytest.raises(NumericalFailure):
        Estimate.of(torch.tensor([math.inf, -math.inf]))


def test_an_infinite_bound_is_shown() -> None:
    found = Estimate.of(torch.tensor([math.inf, 1.0]))
    assert found.mean == math.inf and math.isnan(found.se)
    assert str(found) == "inf ± ? nats/example (n=2)"
    assert found.as_json() == {
        "mean": None, "se": None, "se_mc": None, "n": 2, "unit": "nats/example"
    }  # fmt: skip


# 4,000 repeats of n = 60 examples with R = 4 replicates, examples N(0, 1), noise N(0, 2^2).
# The z scores below are of sums of 4,000 independent terms: |z| < 5.5 has a false-alarm rate of
# 4e-8 each by the normal approximation, below 1e-6 for all. Leaving out the noise within examples
# or giving one error for the other is caught with certainty, as the last line of each test shows.
_REPEATS, _N, _R, _NOISE = 4_000, 60, 4, 2.0


@pytest.fixture(scope="module")
def simulated() -> tuple[Tensor, Tensor]:
    """Per repeat: values (repeats, n, R) and the truth of the very set, (repeats,)."""
    truth = _draw(10, _REPEATS, _N)
    values = truth[:, :, None] + _NOISE * _draw(11, _REPEATS, _N, _R)
    return values, truth.mean(1)


def _z_of_mean(sample: Tensor, expected: float) -> float:
    return float((sample.mean() - expected) / (sample.std() / math.sqrt(len(sample))))


def test_squared_errors_are_unbiased(simulated: tuple[Tensor, Tensor]) -> None:
    found = [Estimate.of(values) for values in simulated[0]]
    se = torch.tensor([e.se**2 for e in found], dtype=torch.float64)
    se_mc = torch.tensor([e.se_mc**2 for e in found], dtype=torch.float64)
    assert abs(_z_of_mean(se, (1 + _NOISE**2 / _R) / _N)) < 5.5
    assert abs(_z_of_mean(se_mc, _NOISE**2 / (_N * _R))) < 5.5
    assert abs(_z_of_mean(se, 1 / _N)) > 50, "the test sees Monte-Carlo noise left out"


def test_coverage_of_two_standard_errors(simulated: tuple[Tensor, Tensor]) -> None:
    values, truth = simulated
    found = [Estimate.of(v) for v in values]
    mean, se, se_mc = (
        torch.tensor([getattr(e, f) for e in found], dtype=torch.float64)
        for f in ("mean", "se", "se_mc")
    )
    # The population mean is 0 and (mean / se) has Student's t with n - 1 degrees of freedom;
    # 0.94989 and 0.95300 are P(|t_59| < 2) and P(|t_180| < 2).
    for error, scale, expected in [(mean, se, 0.94989), (mean - truth, se_mc, 0.95300)]:
        inside = float((error.abs() < 2 * scale).double().mean())
        deviation = math.sqrt(expected * (1 - expected) / _REPEATS)
        assert abs(inside - expected) < 5.5 * deviation
    wrong = float((mean.abs() < 2 * se_mc).double().mean())
    assert wrong < 0.9, "the test sees one error given for the other"


@pytest.mark.parametrize("shape", [(11,), (12, 3)])
@pytest.mark.parametrize("cut", [1, 5, 10])
def test_merge_equals_all_at_once(shape: tuple[int, ...], cut: int) -> None:
    values = 100 + _draw(4, *shape)
    whole = Estimate.of(values)
    merged = Estimate.of(values[:cut]).merge(Estimate.of(values[cut:]))
    assert merged.n == whole.n
    for field in ("mean", "se", "se_mc"):
        assert getattr(merged, field) == pytest.approx(
            getattr(whole, field), rel=1e-11, nan_ok=True
        )


def test_merge_of_singles_and_of_exact_values() -> None:
    values = torch.tensor([1.0, 4.0, 5.0])
    one, two, three = (Estimate.of(values[i : i + 1], exact=True) for i in range(3))
    merged = one.merge(two).merge(three)
    assert merged.se == pytest.approx(Estimate.of(values).se, rel=1e-14)
    assert merged.se_mc == 0.0 and merged.n == 3


def test_merge_refuses_other_units_and_there_is_no_sum() -> None:
    nats = Estimate(1.0, 0.1, 0.1, 5)
    with pytest.raises(ValueError, match="bits/dim"):
        nats.merge(nats.bits_per_dim(3))
    with pytest.raises(TypeError):
        nats + nats  # type: ignore[operator]


def test_units() -> None:
    nats = Estimate(64 * math.log(2), 32 * math.log(2), 16 * math.log(2), 9)
    for found, factor in [(nats.bits_per_dim(64), 1.0), (nats.bits(), 64.0)]:
        assert found.mean == pytest.approx(factor, rel=1e-15)
        assert found.se == pytest.approx(factor / 2, rel=1e-15)
        assert found.se_mc == pytest.approx(factor / 4, rel=1e-15)
        assert found.n == 9
    assert (nats.bits_per_dim(64).unit, nats.bits().unit) == ("bits/dim", "bits/example")
    with pytest.raises(ValueError, match="this is bits/example"):
        nats.bits().bits_per_dim(64)


@pytest.mark.parametrize(
    ("mean", "se", "text"),
    [
        (3.02104, 0.0040, "3.0210 ± 0.0040"),
        (3.02104, 0.00996, "3.021 ± 0.010"),
        (3.02104, 0.0996, "3.02 ± 0.10"),
        (3.02104, 0.25, "3.02 ± 0.25"),
        (3.02104, 9.6, "3.0 ± 9.6"),
        (4567.8, 123.4, "4568 ± 123"),
        (-1.5, 1e-9, "-1.5000000000 ± 0.0000000010"),
        (3.02104, math.nan, "3.021 ± ?"),
        (3.0, 0.0, "3 ± 0"),
    ],
)
def test_printing(mean: float, se: float, text: str) -> None:
    assert str(Estimate(mean, se, math.nan, 10_000, "bits/dim")) == f"{text} bits/dim (n=10000)"


def test_json() -> None:
    found = json.loads(json.dumps(Estimate(1.5, 0.25, math.nan, 7).as_json(), allow_nan=False))
    assert found == {"mean": 1.5, "se": 0.25, "se_mc": None, "n": 7, "unit": "nats/example"}


def test_bounds_are_rounded_to_the_side_that_claims_less() -> None:
    assert at_least(0.00998, 3) == "0.009" and at_most(0.00901, 3) == "0.010"
    assert at_least(0.5, 4) == "0.5000" == at_most(0.5, 4)
    assert at_least(0.1 + 0.2, 1) == "0.3" == at_most(0.1 + 0.2, 1)  # rounding of the sum aside
