"""The adaptive solver: against closed forms and scipy, row by row, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from nelbo.dormand_prince import ERROR, NODES, STAGES, integrate
from nelbo.errors import NumericalFailure


def test_the_tableau_is_consistent() -> None:
    """Row sums are the nodes, the weights of both orders sum to one, order 5 to 1e-15."""
    for node, row in zip(NODES, STAGES, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    weights, nodes = (*STAGES[-1], 0.0), (0.0, *NODES)
    for power in range(5):
        moment = sum(w * c**power for w, c in zip(weights, nodes, strict=True))
        assert moment == pytest.approx(1 / (power + 1), abs=1e-14)
    fourth = [w - e for w, e in zip(weights, ERROR, strict=True)]
    for power in range(4):
        moment = sum(w * c**power for w, c in zip(fourth, nodes, strict=True))
        assert moment == pytest.approx(1 / (power + 1), abs=1e-14)
    assert abs(sum(w * c**4 for w, c in zip(fourth, nodes, strict=True)) - 0.2) > 1e-4


def van_der_pol(rows: Tensor, s: Tensor, y: Tensor) -> Tensor:
    stiff = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64)[rows]
    return torch.stack([y[:, 1], stiff * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-8, 1e-10])
def test_it_agrees_with_scipy(tolerance: float) -> None:
    """Four oscillators of different stiffness, one row each, forward and back in time."""
    y = torch.tensor([[2.0, 0.0], [1.0, 0.5], [0.3, -0.2], [2.0, 0.0]], dtype=torch.float64)
    ends = torch.tensor([7.0, -0.4, 4.0, 3.0], dtype=torch.float64)
    done = integrate(van_der_pol, y, 0.0, ends, relative=tolerance, absolute=tolerance)
    for k in range(4):

        def slope(s: float, state: np.ndarray, k: int = k) -> np.ndarray:
            return van_der_pol(torch.tensor([k]), torch.tensor([s]), torch.tensor(state)[None])[
                0
            ].numpy()

        span = (0.0, float(ends[k]))
        truth = solve_ivp(slope, span, y[k].numpy(), "DOP853", rtol=1e-12, atol=1e-12)
        error = np.abs(done.y[k].numpy() - truth.y[:, -1]).max()
        assert error < 300 * tolerance
        theirs = solve_ivp(slope, span, y[k].numpy(), "RK45", rtol=tolerance, atol=tolerance)
        assert int(done.evaluations[k]) < 1.5 * theirs.nfev + 20


def test_a_tighter_tolerance_costs_the_fifth_root() -> None:
    counts, errors = [], []
    for tolerance in (1e-5, 1e-10):
        y = torch.ones(1, 1, dtype=torch.float64)
        done = integrate(
            lambda _, s, y: y * s.cos()[:, None], y, 0.0, 20.0, relative=tolerance, absolute=0.0
        )
        counts.append(int(done.accepted[0]))
        errors.append(abs(float(done.y[0, 0]) - math.exp(math.sin(20.0))))
    assert 6 < counts[1] / counts[0] < 16
    assert errors[1] < 1e-4 * errors[0]


def test_a_row_does_not_know_its_companions() -> None:
    """Alone, in a batch, next to a stiff one: value and counts are the same, bit by bit."""
    y = torch.tensor([[2.0, 0.0], [1.0, 0.5], [0.3, -0.2], [2.0, 0.0]], dtype=torch.float64)
    together = integrate(van_der_pol, y, 0.0, 5.0)
    for k in range(4):

        def alone(rows: Tensor, s: Tensor, y: Tensor, k: int = k) -> Tensor:
            return van_der_pol(rows + k, s, y)

        single = integrate(alone, y[k : k + 1], 0.0, 5.0)
        assert torch.equal(single.y[0], together.y[k])
        for name in ("evaluations", "accepted", "rejected"):
            assert int(getattr(single, name)[0]) == int(getattr(together, name)[k])
    assert len(set(together.evaluations.tolist())) > 2


def test_evaluations_are_counted_per_row() -> None:
    seen = torch.zeros(3, dtype=torch.long)
    rates = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)

    def field(rows: Tensor, s: Tensor, y: Tensor) -> Tensor:
        seen[rows] += 1
        return -rates[rows, None] * y

    done = integrate(field, torch.ones(3, 2, dtype=torch.float64), 0.0, 2.0)
    assert torch.equal(seen, done.evaluations)
    assert torch.equal(done.evaluations, 2 + 6 * (done.accepted + done.rejected))
    torch.testing.assert_close(done.y[:, 0], (-2 * rates).exp(), rtol=0, atol=1e-5)


def test_a_way_of_no_length_stays() -> None:
    y = torch.ones(2, 1, dtype=torch.float64)
    done = integrate(lambda _, s, y: y, y, torch.tensor([0.0, 1.0]), 1.0)
    assert float(done.y[1, 0]) == 1.0
    assert float(done.y[0, 0]) == pytest.approx(math.e, abs=1e-4)


def test_a_rough_field_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(rows: Tensor, s: Tensor, y: Tensor) -> Tensor:
        return torch.randn(y.shape, dtype=y.dtype, generator=generator)

    with pytest.raises(NumericalFailure, match="larger --tolerance"):
        integrate(
            noise, torch.ones(1, 1, dtype=torch.float64), 0.0, 1.0, relative=0.0, absolute=1e-14
        )


def test_a_field_without_value_is_refused() -> None:
    def nothing(rows: Tensor, s: Tensor, y: Tensor) -> Tensor:
        return y * math.nan

    with pytest.raises(NumericalFailure, match="not finite"):
        integrate(nothing, torch.ones(1, 1, dtype=torch.float64), 0.0, 1.0)
