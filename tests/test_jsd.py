"""The instrument against tables, closed forms and goldens; its bound against draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from goldens import load
from scipy import stats
from torch import Tensor

from nelbo.data.mixture import GaussianMixture
from nelbo.errors import InputRefused, UsageError
from nelbo.jsd import (
    LOG2,
    empirical_bernstein,
    hoeffding,
    kappa,
    limit_below,
    log_e_value,
    lower_bound,
    payoff,
    phi,
    plug_in,
    predicted_bound,
    two_cells,
)
from nelbo.prequential import boundaries, prequential_bound
from nelbo.randomness import generator

# Two-sided normal tail of 3e-8 for one comparison: the file makes fewer than thirty of them.
SIGMAS = 5.5
PHI = [0.49693, 0.38040, 0.29030, 0.21576, 0.15180, 0.09560, 0.04541]
KAPPA = {0.01: 0.0290, 0.1: 0.3016, 0.3: 1.021, 0.5: 2.102, 0.6: 3.096}
SHIFTS = {0.2: 0.004975, 0.5: 0.030311, 1.0: 0.111421, 2.0: 0.336831, 4.0: 0.632720}


def pairs(n: int, d: float, *seed: int) -> tuple[Tensor, Tensor]:
    """Logits of the best discriminator between N(0, 1) and N(d, 1), at n pairs."""
    x, y = torch.randn(2, n, generator=generator(0, *seed), dtype=torch.float64)
    return tuple(d * d / 2 - d * rows for rows in (x, y + d))  # type: ignore[return-value]


def test_phi_is_the_table():
    for k, value in enumerate(PHI, 1):
        assert float(phi(k / 8)) == pytest.approx(value, abs=6e-6)
    assert float(phi(0.0)) == pytest.approx(LOG2, abs=1e-16)
    assert float(phi(1.0)) == 0
    golden = load("mixture2d")
    k = torch.arange(1, 9, dtype=torch.float64) / 8
    np.testing.assert_allclose(phi(k), golden["ring1/phi_first_k_nats"][:8], atol=1e-12)


def test_kappa_is_the_inverse_of_phi():
    for x, value in KAPPA.items():
        assert float(kappa(x)) == pytest.approx(value, rel=1.1e-3)
    x = torch.tensor([1e-300, 1e-12, 1e-6, 0.01, 0.3, 0.3466, 0.6, 0.69], dtype=torch.float64)
    torch.testing.assert_close(phi(torch.exp(-kappa(x[3:]))), x[3:], rtol=1e-12, atol=0)
    # Small divergences: kappa = 2x/log 2 + O(x^2), where phi(exp(-u)) itself has lost its digits.
    torch.testing.assert_close(kappa(x[:2]), 2 * x[:2] / LOG2, rtol=1e-11, atol=0)
    assert float(kappa(0.0)) == 0 and math.isinf(float(kappa(LOG2)))


def test_kappa_near_log_2_keeps_its_digits():
    """log 2 - phi(exp(-u)) = [(1 + r) log(1 + r) + r u]/2 is small and known to all digits."""
    for u in (5.0, 15.0, 25.0):
        r = math.exp(-u)
        gap = ((1 + r) * math.log1p(r) + r * u) / 2
        # What is left is the rounding of x = log 2 - gap, divided by the slope r u/2.
        assert float(kappa(LOG2 - gap)) == pytest.approx(u, abs=1e-12 + 4e-16 / (r * u))


@pytest.mark.parametrize("value", [-1e-9, 1.1, math.nan])
def test_phi_and_kappa_refuse_what_is_no_mass(value: float):
    for function in (phi, kappa):
        with pytest.raises(UsageError):
            function(value)


def test_the_slack_is_a_mean_divergence():
    """JSD - L(D) = E_m KL(Bern(D*) || Bern(D)) for any D, counted on laws with eighths."""
    p, g = torch.tensor([4.0, 3, 1]).double() / 8, torch.tensor([1.0, 1, 6]).double() / 8
    best = (p / g).log()
    logit = torch.tensor([2.0, -1.0, 0.5]).double()
    rows = [torch.repeat_interleave(torch.arange(3), (8 * q).long()) for q in (p, g)]
    jsd = float(payoff(best[rows[0]], best[rows[1]], math.inf).mean())
    m = (p + g) / 2
    exact = float((p * (p / m).log() + g * (g / m).log()).sum()) / 2
    assert jsd == pytest.approx(exact, abs=1e-14)
    value = float(payoff(logit[rows[0]], logit[rows[1]], math.inf).mean())
    d, s = torch.sigmoid(best), torch.sigmoid(logit)
    slack = float((m * (d * (d / s).log() + (1 - d) * ((1 - d) / (1 - s)).log())).sum())
    assert jsd - value == pytest.approx(slack, abs=1e-14)


def test_the_payoff_stays_within_its_range_and_the_clip_is_its_width():
    s = torch.linspace(-50, 50, 101, dtype=torch.float64)
    for clip in (0.1, 2.0, 8.0):
        z = payoff(s, s.flip(0), clip)
        assert float(z.max() - z.min()) == pytest.approx(clip, rel=1e-12)
    torch.testing.assert_close(payoff(s, s.flip(0), 60.0), payoff(s, s.flip(0), math.inf))


@pytest.mark.parametrize("d", SHIFTS)
def test_the_plug_in_value_of_gaussian_shifts(d: float):
    mean, error = plug_in(*pairs(200_000, d, 1))
    assert abs(mean - SHIFTS[d]) < SIGMAS * error + 1e-6


@pytest.mark.parametrize("k", [1, 4, 7])
def test_the_plug_in_value_of_rings_without_modes(k: int):
    golden = load("mixture2d")
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    means = torch.stack([angle.cos(), angle.sin()], 1)
    eye = torch.eye(2, dtype=torch.float64) * 0.15**2

    def ring(modes: int) -> GaussianMixture:
        weights = torch.full((modes,), 1 / modes, dtype=torch.float64)
        return GaussianMixture(weights, means[:modes], eye.expand(modes, 2, 2))

    p, g = ring(8), ring(k)
    draws = generator(5, k)
    logits = [p.log_prob(x) - g.log_prob(x) for x in (q.sample(40_000, draws) for q in (p, g))]
    mean, error = plug_in(*logits)
    assert abs(mean - float(golden["ring1/jsd_first_k_nats"][k - 1])) < SIGMAS * error


def reference(s_real: np.ndarray, s_fake: np.ndarray, clip: float, level: float) -> float:
    """The published routine, pair by pair."""
    sp = lambda x: math.log1p(math.exp(-abs(x))) + max(x, 0)  # noqa: E731
    low, n = math.log(2) - sp(clip), len(s_real)
    z = []
    for a, b in zip(s_real, s_fake, strict=True):
        a, b = (min(max(s, -clip), clip) for s in (a, b))
        z.append((math.log(2) - (sp(-a) + sp(b)) / 2 - low) / clip)

    def reaches(m: float) -> bool:
        total, squares, variance, capital = 0.5, 0.25, 0.25, 0.0
        for i, x in enumerate(z, 1):
            stake = min(math.sqrt(2 * math.log(1 / level) / (n * variance)), 0.75 / m)
            capital += math.log1p(stake * (x - m))
            if capital >= math.log(1 / level):
                return True
            total += x
            squares += (x - total / (i + 1)) ** 2
            variance = squares / (i + 1)
        return False

    if not reaches(1e-9):
        return 0.0
    a, b = 1e-9, 1.0
    for _ in range(50):
        middle = (a + b) / 2
        a, b = (middle, b) if reaches(middle) else (a, middle)
    return max(0.0, low + clip * a)


@pytest.mark.parametrize(("d", "clip"), [(1.0, 2.0), (2.0, 5.0), (0.2, 0.5), (4.0, 8.0)])
def test_the_bound_is_that_of_the_reference_routine(d: float, clip: float):
    a, b = pairs(300, d, 2)
    expected = reference(a.numpy(), b.numpy(), clip, 0.05)
    assert lower_bound(a, b, clip) == pytest.approx(expected, abs=1e-9)


def test_the_bounds_are_as_large_as_was_measured():
    """Mean of 40 runs at n = 1000, B = 5, against published means; sd of a mean below .003."""
    wanted = {0.5: (0.011, -0.026, -0.105), 1.0: (0.088, 0.042, -0.026), 2.0: (0.309, 0.260, 0.2)}
    for d, means in wanted.items():
        found = [pairs(1000, d, 3, run) for run in range(40)]
        for bound, mean in zip((lower_bound, empirical_bernstein, hoeffding), means, strict=True):
            # Betting is cut at 0, the published mean at .03 is not far from it.
            mine = sum(bound(a, b, 5.0) for a, b in found) / 40
            assert mine == pytest.approx(mean, abs=0.012), (d, bound)


def test_swapping_the_sides_leaves_every_figure():
    a, b = pairs(500, 1.0, 4)
    assert lower_bound(a, b, 3.0) == lower_bound(-b, -a, 3.0)
    assert plug_in(a, b) == plug_in(-b, -a)
    assert log_e_value(a, b) == log_e_value(-b, -a)
    assert two_cells(a, b, 0.1).jsd_nats_lower == pytest.approx(
        two_cells(-b, -a, -0.1).jsd_nats_lower, abs=1e-12
    )


def test_the_e_value_never_overflows():
    huge = torch.full((4,), 1e300, dtype=torch.float64)
    assert log_e_value(huge, -huge) == pytest.approx(8 * LOG2)
    assert log_e_value(-huge, -huge) == pytest.approx(-4e300)
    a, b = pairs(100, 1.0, 5)
    product = float(torch.log(4 * torch.sigmoid(a) * (1 - torch.sigmoid(b))).sum())
    assert log_e_value(a, b) == pytest.approx(product, abs=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float):
    a, b = pairs(50, 1.0, 6)
    a[7] = bad
    calls: list[Callable[[], object]] = [
        lambda: lower_bound(a, b, 2.0),
        lambda: lower_bound(b, a, 2.0),
        lambda: plug_in(a, b),
        lambda: log_e_value(a, b),
        lambda: two_cells(a, b, 0.0),
        lambda: predicted_bound(a, b, 2.0),
    ]
    for call in calls:
        with pytest.raises(InputRefused, match="1 of 50 logits"):
            call()


def test_what_makes_no_pairs_is_refused():
    a, b = pairs(50, 1.0, 6)
    for x, y in ((a, b[:49]), (a[:0], b[:0]), (a[:, None], b[:, None])):
        with pytest.raises(InputRefused, match="one fake per real"):
            lower_bound(x, y, 2.0)
    for options in ({"clip": 0.0}, {"clip": 2.0, "alpha": 0.0}, {"clip": 2.0, "alpha": 1.0}):
        with pytest.raises(UsageError):
            lower_bound(a, b, **options)


def test_the_exact_binomial_limit_is_that_of_the_beta_law():
    for hits, n, alpha in ((0, 10, 0.05), (3, 10, 0.025), (10, 10, 0.025), (4990, 5000, 0.01)):
        wanted = stats.beta.ppf(alpha, hits, n - hits + 1) if hits else 0.0
        assert limit_below(hits, n, alpha) == pytest.approx(wanted, abs=1e-10)


def test_two_cells_of_separate_sides():
    """.627 at n = 300 without one error, where nothing better is known."""
    s = torch.ones(300, dtype=torch.float64)
    cells = two_cells(s, -s, 0.0)
    a = stats.beta.ppf(0.025, 300, 1)
    assert cells.jsd_nats_lower == pytest.approx(0.627, abs=5e-4)
    assert cells.tv_lower == pytest.approx(2 * a - 1, abs=1e-10)
    assert two_cells(-s, s, 0.0).jsd_nats_lower == 0
    mean = sum(two_cells(*pairs(1000, 4.0, 7, i), 0.0).jsd_nats_lower for i in range(20)) / 20
    assert mean == pytest.approx(0.545, abs=0.012)


def normal_bound(a: Tensor, b: Tensor) -> float:
    """What is no certificate: mean less 1.645 standard errors."""
    mean, error = plug_in(a, b)
    return mean - 1.645 * error


def rarely_wrong(n: int, *seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a discriminator that is now and then sure and wrong; its L(D) is known."""
    draws = generator(8, *seed)
    a, b = torch.full((2, n), 1.0, dtype=torch.float64)
    b = -b
    a[torch.rand(n, generator=draws) < 0.004] = -12.0
    return a, b


def test_the_betting_bound_misses_no_more_than_it_may():
    """300 runs at alpha = .05: more than 36 misses have probability below 1e-6."""
    most = int(stats.binom.isf(1e-6, 300, 0.05))
    share, n = 0.004, 100
    sp = lambda x: math.log1p(math.exp(x))  # noqa: E731
    for clip in (1.0, 12.0):
        wrong = sp(min(12.0, clip))
        truth = LOG2 - ((1 - share) * sp(-1.0) + share * wrong + sp(-1.0)) / 2
        found = [rarely_wrong(n, run) for run in range(300)]
        assert sum(lower_bound(a, b, clip) > truth for a, b in found) <= most
    # The unclipped normal approximation, on the very same pairs, is caught.
    assert sum(normal_bound(a, b) > truth for a, b in found) > most


def test_the_prequential_bound_holds_and_finds():
    most = int(stats.binom.isf(1e-6, 300, 0.05))
    clips = torch.cat([torch.full((100,), 1.0), torch.full((100,), 3.0)]).double()
    misses, total = 0, 0.0
    for run in range(300):
        a, b = pairs(200, 1.0, 9, run)
        same, other = (pairs(200, 1.0, seed, run)[0] for seed in (10, 11))
        misses += prequential_bound(same, other, clips) > 0
        total += prequential_bound(a, b, clips) / 300
    assert misses <= most
    assert 0.03 < total < SHIFTS[1.0]
    assert boundaries(1000) == [300, 382, 486, 618, 786, 1000]
