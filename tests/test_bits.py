"""Bits as a distribution: exact at its edges, and for laws that almost agree."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import nelbo.bits
from nelbo.bits import Bits
from nelbo.distributions import kl_divergence

INF = math.inf


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def test_log_prob_mean_variance_and_entropy_at_plain_rates() -> None:
    for p in (0.5, 0.2, 1e-9, 1 - 1e-9):
        law = Bits(tensor(logit(p)))
        expected = -p * math.log(p) - (1 - p) * math.log1p(-p)
        assert float(law.log_prob(tensor(1.0))) == pytest.approx(math.log(p), rel=1e-12)
        assert float(law.log_prob(tensor(0.0))) == pytest.approx(math.log1p(-p), rel=1e-12)
        assert float(law.mean) == pytest.approx(p, rel=1e-12)
        assert float(law.variance) == pytest.approx(p * (1 - p), rel=1e-12)
        assert float(law.entropy()) == pytest.approx(expected, rel=1e-12)


def test_certain_bits_have_numbers() -> None:
    """0 log 0 = 0: no NaN where a probability is exactly 0 or 1."""
    one, zero, coin = Bits(tensor(INF)), Bits(tensor(-INF)), Bits(tensor(0.0))
    assert one.entropy().item() == 0 and zero.entropy().item() == 0
    assert one.log_prob(tensor(1.0)).item() == 0 and one.log_prob(tensor(0.0)).item() == -INF
    for certain in (one, zero):
        assert kl_divergence(certain, certain).item() == 0
        assert kl_divergence(certain, coin).item() == pytest.approx(math.log(2), rel=1e-15)
        assert kl_divergence(coin, certain).item() == INF
    assert kl_divergence(one, zero).item() == INF
    assert one.sample((100,)).eq(1).all() and zero.sample((100,)).eq(0).all()


def exact_kl(a: Fraction, b: Fraction) -> float:
    """KL of nearly equal rates by its series in d = b − a, to fifth order."""
    d = b - a
    total = Fraction(0)
    for n in range(2, 8):
        total += Fraction(1, n) * d**n * ((-1) ** n / a ** (n - 1) + 1 / (1 - a) ** (n - 1))
    return float(total)


def check_close_laws() -> None:
    """Relative precision of the KL of rates a and a(1 + ε), down to ε = 1e-12."""
    for a in (Fraction(1, 2), Fraction(1, 5), Fraction(1, 1000), Fraction(4, 5)):
        for epsilon in (Fraction(1, 10**4), Fraction(1, 10**8), Fraction(1, 10**12)):
            b = a * (1 + epsilon)
            start = math.log(a / (1 - a))
            # logit b − logit a = log(1 + ε) − log(1 − aε/(1 − a)), rounded once
            delta = math.log1p(float(epsilon)) - math.log1p(-float(a * epsilon / (1 - a)))
            p, q = Bits(tensor(start)), Bits(tensor(start + delta))
            # the logits are rounded to 1e-16: what is compared is the KL of the rounded ones
            rounded = Fraction(float(q.logits)) - Fraction(float(p.logits))
            scale = float(rounded) / delta
            value = float(kl_divergence(p, q))
            assert value == pytest.approx(exact_kl(a, b) * scale**2, rel=1e-3, abs=0)


def test_close_laws() -> None:
    check_close_laws()


def test_the_plain_formula_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nelbo.bits, "_minus_log1p", lambda y: y - torch.log1p(y))
    monkeypatch.setattr(nelbo.bits, "expm1_minus", lambda d: torch.exp(d) - 1 - d)
    with pytest.raises(AssertionError):
        check_close_laws()


def test_kl_is_that_of_the_formula_everywhere() -> None:
    grid = torch.linspace(-30, 30, 121, dtype=torch.float64)
    of, other = torch.meshgrid(grid, grid, indexing="ij")
    a, b = torch.sigmoid(of), torch.sigmoid(other)
    ls = torch.nn.functional.logsigmoid
    one, zero = ls(of) - ls(other), ls(-of) - ls(-other)
    expected = a * one + torch.sigmoid(-of) * zero
    actual = kl_divergence(Bits(of), Bits(other))
    assert bool((actual >= 0).all())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert float(kl_divergence(Bits(of), Bits(of)).abs().max()) == 0
    assert b.shape == a.shape


def test_kl_gradient_is_that_of_the_formula() -> None:
    """∂KL/∂logit b = b − a; finite and right on both sides of the switch between the forms."""
    of = tensor(-3.0, 0.4, 2.0, -INF, INF, 5.0)
    other = tensor(-2.9, 3.0, -6.0, 1.0, 1.0, 5.9).requires_grad_()
    value = kl_divergence(Bits(of), Bits(other)).sum()
    (gradient,) = torch.autograd.grad(value, other)
    expected = torch.sigmoid(other) - torch.sigmoid(of)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-15)


def test_sampling_frequencies() -> None:
    """4e5 draws each: |z| < 5.2 fails by chance at a rate of 2e-7."""
    torch.manual_seed(0)
    for p in (0.5, 0.03):
        draws = Bits(torch.full((400_000,), logit(p))).sample()
        z = (float(draws.double().mean()) - p) / (p * (1 - p) / 400_000) ** 0.5
        assert abs(z) < 5.2 and draws.dtype == torch.float32
