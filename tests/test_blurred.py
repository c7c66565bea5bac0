"""Samplers whose law is known: the blurred figure is that of quadrature, within its own error.

An estimate z standard errors off (Student, 15 degrees of freedom) has probability 1e-7 at z = 9;
the file makes fewer than ten such comparisons, with fixed seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_quadrature import lopsided, mixture, ring
from torch import Tensor

from nelbo import blurred as module
from nelbo.blurred import Blurred, blurred
from nelbo.data.mixture import GaussianMixture
from nelbo.errors import InputRefused
from nelbo.quadrature import Exact, jsd
from nelbo.randomness import generator

SIGMAS = 9


def draws(law: GaussianMixture, seed: int = 0) -> Callable[[int], Tensor]:
    rng = generator(seed, "draws")
    return lambda count: law.sample(count, rng)


def truth(p: GaussianMixture, g: GaussianMixture, std: float) -> Exact:
    return jsd(p.diffused(1.0, std**2), g.diffused(1.0, std**2))


def assert_agrees(found: Blurred, exact: Exact) -> None:
    assert abs(found.value - exact.value) < SIGMAS * found.se + exact.error, (found, exact)


@pytest.mark.parametrize("kept", [8, 7, 3])
def test_dropped_modes(kept: int) -> None:
    p, g = ring(8, 1.0, 0.15), ring(8, 1.0, 0.15, kept)
    found = blurred(draws(g), p, 0.1, 200_000)
    assert_agrees(found, truth(p, g, 0.1))
    assert found.se < 2e-4 and found.outside == 0
    assert found.reach == pytest.approx(2.13 * found.se, rel=0.01)


def test_tight_modes_that_are_too_wide() -> None:
    p, g = ring(8, 1.0, 0.02), ring(8, 1.0, 0.03)
    found, exact = blurred(draws(g), p, 0.02, 200_000), truth(p, g, 0.02)
    assert_agrees(found, exact)
    assert exact.value > 0.02 and found.se < 0.02 * exact.value


def test_the_excess_of_few_samples_is_subtracted() -> None:
    """16 seeds of p = g: the mean excess is c/n, and what is left has mean 0."""
    p = lopsided()[0]
    few = [blurred(draws(p, seed), p, 0.6, 2_000) for seed in range(16)]
    rest = torch.tensor([found.value for found in few]).double()
    excess = torch.tensor([found.excess for found in few]).double()
    error = float(rest.std() / math.sqrt(len(few)))
    assert abs(float(rest.mean())) < 5 * error
    assert float(excess.mean()) > 8 * error  # left in, it would be found
    more = torch.tensor([blurred(draws(p, seed), p, 0.6, 8_000).excess for seed in range(16)])
    assert 2.5 < float(excess.mean() / more.mean()) < 6


def test_the_standard_error_is_that_of_repetitions() -> None:
    """40 seeds: their deviation lies within a factor 2 of the stated se (1e-7 by chi-squared)."""
    p, g = lopsided()
    found = [blurred(draws(g, seed), p, 0.6, 4_000) for seed in range(40)]
    spread = float(torch.tensor([one.value for one in found]).double().std())
    stated = math.sqrt(sum(one.se**2 for one in found) / len(found))
    assert stated / 2 < spread < 2 * stated


def test_samples_far_away_cost_half_a_bit_of_their_share() -> None:
    """A collapsed half and a lost half: both log 2 apart where the laws do not meet."""
    p, inside = ring(8, 1.0, 0.15), draws(ring(8, 1.0, 0.15), 3)

    def partly_lost(count: int) -> Tensor:
        x = inside(count)
        x[::4] = 1e6
        return x

    found = blurred(partly_lost, p, 0.1, 100_000)
    assert found.outside == pytest.approx(0.25, abs=1e-3)
    quarter = 0.25 * math.log(2) / 2
    rest = (math.log(2 / 1.75) + 0.75 * math.log(1.5 / 1.75)) / 2
    assert found.value == pytest.approx(quarter + rest, abs=2e-4)


def test_a_generator_of_one_point() -> None:
    p = lopsided()[0]
    point = torch.tensor([[0.3123, 0.7877]], dtype=torch.float64)
    found = blurred(lambda count: point.expand(count, 2), p, 0.2, 5_000)
    exact = truth(p, mixture(point.tolist(), 1e-3), 0.2)
    assert found.value == pytest.approx(exact.value, abs=3e-4)
    assert found.se < 1e-12


def test_the_step_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    p, g = lopsided()
    coarse = blurred(draws(g), p, 0.3, 20_000)
    monkeypatch.setattr(module, "PER_WIDTH", 8)
    fine = blurred(draws(g), p, 0.3, 20_000)
    assert fine.value == pytest.approx(coarse.value, abs=0.02 * coarse.se)


def test_what_is_no_sampler_of_the_plane_is_refused() -> None:
    p = lopsided()[0]
    with pytest.raises(InputRefused, match=r"asked for \(63, 2\) samples and got \(63, 3\)"):
        blurred(lambda count: torch.zeros(count, 3), p, 0.3, 1_000)
    with pytest.raises(InputRefused, match="not finite"):
        blurred(lambda count: torch.full((count, 2), math.nan), p, 0.3, 1_000)
    with pytest.raises(InputRefused, match="larger one"):
        blurred(draws(p), p, 1e-4, 1_000)
    with pytest.raises(InputRefused, match="plane"):
        blurred(draws(p), mixture([[0.0] * 3], 1.0), 0.3, 1_000)
    with pytest.raises(InputRefused, match="at least 1000"):
        blurred(draws(p), p, 0.3, 10)
