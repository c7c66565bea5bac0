"""Every process satisfies the laws of laws.py; the Gaussian coefficients have their forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import FAMILIES, LAWS, Case, name_of

from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian
from nelbo.schedules import Cosine, Harmonic, LogSNRLinear


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", FAMILIES, ids=name_of)
def test_law(case: Case, law: Callable[[Case], None]) -> None:
    law(case)


def test_pair_coefficients_agree_with_the_classical_forms() -> None:
    """√k_s β/l_t, √α l_s/l_t, β l_s/l_t with α = k_t/k_s, where those do not cancel."""
    q = LogSNRLinear(4.0, -4.0)
    s, t = (
        torch.tensor([0.1, 0.3, 0.0], dtype=torch.float64),
        torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64),
    )
    pair = Gaussian(q).pair(s, t)
    alpha = q.keep(t) / q.keep(s)
    beta = 1 - alpha
    expected = {
        "c": 1 - (q.logsnr(t) - q.logsnr(s)).exp(),
        "log_alpha": alpha.log(),
        "log_beta": beta.log(),
        "log_posterior": (beta * q.lose(s) / q.lose(t)).log(),
        "from_data": q.keep(s).sqrt() * beta / q.lose(t),
        "from_latent": alpha.sqrt() * q.lose(s) / q.lose(t),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(pair, name), value, rtol=1e-12, atol=1e-12)


def test_pair_is_exact_for_tiny_steps() -> None:
    """At λ = 13.3 and a step of 1e-9 in λ, β = l_t c to 1e-7; 1 − k_t/k_s would be 6 % off."""
    q = LogSNRLinear(13.3, 13.3 - 1.0)
    s, t = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1e-9, dtype=torch.float64)
    step = float(q.logsnr(s) - q.logsnr(t))
    pair = Gaussian(q).pair(s, t)
    expected = float(q.lose(t)) * step
    assert abs(float(pair.log_beta.exp()) / expected - 1) < 1e-8
    assert abs(float(-pair.log_alpha) / expected - 1) < 1e-8


def test_the_last_step_of_harmonic_erases() -> None:
    """keep = 0: the posterior forgets x_t, β = 1 and β̃ = l_s."""
    q = Harmonic(5)
    s, t = q.grid()[-2:]
    pair = Gaussian(q).pair(s, t)
    assert float(pair.c) == 1 and float(pair.from_latent) == 0 and float(pair.log_beta) == 0
    torch.testing.assert_close(pair.log_posterior.exp(), q.lose(s))


def test_variance_preservation() -> None:
    """Data of unit second moment keeps it: k + l = 1 and α + β = 1, to rounding."""
    q = Cosine(100)
    times = q.grid()
    torch.testing.assert_close(q.keep(times) + q.lose(times), torch.ones(100, dtype=torch.float64))
    pair = Gaussian(q).pair(times[:-1], times[1:])
    total = pair.log_alpha.exp() + pair.log_beta.exp()
    torch.testing.assert_close(total, torch.ones(99, dtype=torch.float64), rtol=1e-14, atol=0)


def test_start_is_a_standard_normal_of_the_asked_shape() -> None:
    torch.manual_seed(0)
    x = Gaussian(Cosine(10)).start((20000, 3))
    assert x.shape == (20000, 3) and x.dtype == torch.float32
    # 60000 draws: |mean| and |variance − 1| beyond 5.5 errors by chance at a rate below 1e-7
    assert abs(float(x.mean())) < 5.5 / 60000**0.5
    assert abs(float(x.var()) - 1) < 5.5 * (2 / 60000) ** 0.5


def test_along_shapes_a_coefficient_per_example() -> None:
    x = torch.zeros(2, 3, 4)
    assert along(torch.tensor(2.0, dtype=torch.float64), x).shape == ()
    assert along(torch.tensor([2.0, 3.0], dtype=torch.float64), x).shape == (2, 1, 1)
    assert along(torch.tensor([2.0, 3.0], dtype=torch.float64), x).dtype == x.dtype
