"""Modes found: hand-made samples, the exact floor of a perfect generator, and its blind spots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nelbo.data.mixture import GaussianMixture
from nelbo.data.toys import correlated, grid25, ring
from nelbo.errors import InputRefused
from nelbo.modes import floor, modes
from nelbo.randomness import generator


def mixture(kind: str = "ring", std: float = 0.01) -> GaussianMixture:
    make = {"ring": ring, "grid": grid25}[kind]
    truth = make(2, 2, std=std, n_validation=2).truth
    assert truth is not None and truth.components is not None
    return truth.components


def draws(law: GaussianMixture, n: int, seed: int = 0) -> Tensor:
    return law.sample(n, generator(seed, "test modes"))


def test_hand_made_samples() -> None:
    """Three on mode 0, one at 2.9 sd of mode 1, one at 3.1 sd of mode 2."""
    law = mixture()
    out = torch.tensor([[0.01, 0.0]], dtype=torch.float64)
    own = law.means
    samples = torch.cat((own[[0, 0, 0]], own[[1]] + 2.9 * out, own[[2]] - 3.1 * out))
    found = modes(law, samples)
    assert (found.found, found.of, found.n) == (2, 8, 5)
    assert found.high_quality == 4 / 5
    every = 3 / 5 * math.log(8 * 3 / 5) + 2 / 5 * math.log(8 / 5)
    assert found.reverse_kl_nats == pytest.approx(every, rel=1e-12)
    those = 3 / 4 * math.log(8 * 3 / 4) + 1 / 4 * math.log(8 / 4)
    assert found.reverse_kl_nats_high_quality == pytest.approx(those, rel=1e-12)
    assert found.counts == (3, 1, 0, 0, 0, 0, 0, 0)
    assert modes(law, samples.flip(0)) == found


def test_a_uniform_histogram_has_no_reverse_kl_and_one_mode_has_log_k() -> None:
    law = mixture("grid", 0.05)
    assert modes(law, law.means.repeat(4, 1)).reverse_kl_nats == pytest.approx(0, abs=1e-12)
    collapsed = modes(law, law.means[:1].repeat(9, 1))
    assert collapsed.found == 1
    assert collapsed.reverse_kl_nats == pytest.approx(math.log(25), rel=1e-12)


def test_far_samples_are_assigned_but_find_nothing() -> None:
    far = modes(mixture(), torch.full((4, 2), 30.0))
    assert (far.found, far.high_quality, far.reverse_kl_nats_high_quality) == (0, 0.0, None)
    assert far.reverse_kl_nats == pytest.approx(math.log(8))


@pytest.mark.parametrize(("kind", "std"), [("ring", 0.01), ("grid", 0.05)])
def test_exact_draws_reach_the_floor(kind: str, std: float) -> None:
    """Five standard errors (false alarms 6e-7); the first-order (K - 1)/(2n) is not used."""
    law = mixture(kind, std)
    n, count = 500, len(law.weights)
    found = [modes(law, draws(law, n, seed)) for seed in range(40)]
    base = found[0].floor
    share = base.high_quality
    assert share == pytest.approx(1 - math.exp(-4.5), abs=1e-12)
    quality = sum(f.high_quality for f in found) / 40
    assert abs(quality - share) < 5 * math.sqrt(share * (1 - share) / (40 * n))
    plugged = torch.tensor([f.reverse_kl_nats for f in found])
    error = float(plugged.std()) / math.sqrt(40)
    assert abs(float(plugged.mean()) - base.reverse_kl_nats) < 5 * error
    assert base.reverse_kl_nats == pytest.approx((count - 1) / (2 * n), rel=0.05)
    assert all(f.found == f.held == count for f in found)


@pytest.mark.parametrize(("dims", "inside"), [(1, math.erf(3 / math.sqrt(2))), (2, 0.988891)])
def test_the_share_within_three_deviations(dims: int, inside: float) -> None:
    assert floor(8, dims, 10).high_quality == pytest.approx(inside, abs=1e-6)


def test_the_floor_of_the_reverse_kl_by_enumeration() -> None:
    """Two modes, three draws: KL log 2 with probability 1/4, else that of (1/3, 2/3)."""
    mixed = math.log(2) + (math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    expected = math.log(2) / 4 + 3 / 4 * mixed
    assert floor(2, 2, 3).reverse_kl_nats == pytest.approx(expected, rel=1e-12)
    assert floor(1, 2, 3).reverse_kl_nats == 0


def test_one_sample_finds_a_mode_but_does_not_hold_it() -> None:
    law = mixture()
    samples = torch.cat((law.means[:7].repeat(357, 1), law.means[[7]]))
    found = modes(law, samples)
    assert (found.n, found.found, found.held) == (2500, 8, 7)


def test_modes_hide_an_error_of_width() -> None:
    """A known trap: sd 1.5 times too large finds all modes, without reverse KL."""
    wide = draws(mixture(std=0.015), 2500)
    found = modes(mixture(std=0.01), wide)
    assert found.found == found.held == 8 and found.reverse_kl_nats < 0.01
    expected = 1 - math.exp(-2)
    error = math.sqrt(expected * (1 - expected) / 2500)
    assert abs(found.high_quality - expected) < 5 * error


def test_text_and_json() -> None:
    law = mixture()
    found = modes(law, draws(law, 2500))
    assert max(map(len, found.text().splitlines())) <= 80
    assert "perfect: 98.9 %" in found.text()
    document = found.as_json()
    assert document["of"] == 8 and "within 3 sd" in document["rule"]
    assert document["perfect"]["reverse_kl_nats"] == found.floor.reverse_kl_nats


def test_other_laws_and_samples_are_refused() -> None:
    truth = correlated(2, 2, n_validation=2).truth
    assert truth is not None and truth.components is not None
    with pytest.raises(InputRefused, match="isotropic"):
        modes(truth.components, torch.zeros(3, 3))
    law = mixture()
    uneven = GaussianMixture(law.weights.roll(0) * 1.0, law.means, law.covariances)
    object.__setattr__(uneven, "weights", torch.tensor([0.3] + [0.1] * 7, dtype=torch.float64))
    with pytest.raises(InputRefused, match="equal weights"):
        modes(uneven, torch.zeros(3, 2))
    for bad in (torch.zeros(3, 3), torch.zeros(0, 2), torch.full((2, 2), math.nan)):
        with pytest.raises(InputRefused, match="samples"):
            modes(law, bad)
