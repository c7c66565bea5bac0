"""Distributions: golden values, masses that sum to one, divergences, draws."""

from __future__ import annotations

import math

import pytest
import torch
from goldens import check_decoder, check_kl
from oracles import assert_mean, hermite, z_limit
from torch import Tensor

from nelbo.distributions import (
    DiagonalNormal,
    DiscretizedNormal,
    LevelCategorical,
    expm1_minus,
    kl_divergence,
    level_of,
    level_values,
    log_cdf,
    per_example,
)

DTYPES = [torch.float64, torch.float32]
LEVELS = [2, 17, 256, 65536]


def check_masses_sum_to_one(levels: int, dtype: torch.dtype) -> None:
    """Σ_j P(j) = 1 for means inside, on and far outside the range, and any spread."""
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6
    for mean in (0.0, 0.3, -1.0, 1.0, 1.7, -30.0, 1000.0):
        for logvar in (-12.0, -5.0, 0.0, 9.0):
            normal = DiscretizedNormal(*torch.tensor([mean, logvar], dtype=dtype), levels)
            log_mass = normal.log_mass(torch.arange(levels))
            total = float(log_mass.double().exp().sum())
            assert log_mass.dtype == dtype
            assert abs(total - 1) < tolerance, f"{levels} {mean} {logvar}: {total}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_decoder(dtype: torch.dtype) -> None:
    check_decoder(dtype)


def test_golden_kl() -> None:
    check_kl()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_masses_sum_to_one(levels: int, dtype: torch.dtype) -> None:
    check_masses_sum_to_one(levels, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_mass_gradients_are_finite_everywhere(levels: int, dtype: torch.dtype) -> None:
    """Both edges and the middle, for means and variances that a bad network may give."""
    level = torch.tensor([0, 1, levels // 2, levels - 2, levels - 1]).clamp(0, levels - 1)
    for mean in (0.0, 1.0, -1.0, 30.0, -1000.0):
        for logvar in (-46.0, -12.0, 0.0, 9.0):
            m, v = (torch.tensor(a, dtype=dtype, requires_grad=True) for a in (mean, logvar))
            log_mass = DiscretizedNormal(m, v, levels).log_mass(level)
            gradients = torch.autograd.grad(log_mass.sum(), [m, v])
            assert bool(log_mass.isfinite().all()), (mean, logvar)
            assert all(bool(g.isfinite()) for g in gradients), (mean, logvar)


def test_mass_gradient_is_right() -> None:
    level = torch.tensor([0, 3, 16])
    mean = torch.tensor([-0.9, 0.1, 0.4], dtype=torch.float64, requires_grad=True)
    logvar = torch.tensor([-3.0, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, v: DiscretizedNormal(m, v, 17).log_mass(level), (mean, logvar)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_cdf_and_its_gradient_in_both_tails(dtype: torch.dtype) -> None:
    """Against φ(x)/Φ(x) ≈ −x (1 + x⁻² − 2x⁻⁴) far to the left, and known values."""
    x = torch.tensor([-1e12, -1e6, -1e4, -1e2, -1.0, 0.0, 1.0, 1e2, 1e12], dtype=dtype)
    x.requires_grad_()
    value = log_cdf(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    left = x.detach()[:4].double()
    series = -left * (1 + left**-2 - 2 * left**-4)
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    middle = x.detach()[4:7].double()
    ratio = normal.log_prob(middle).exp() / normal.cdf(middle)
    expected = torch.cat([series, ratio, torch.zeros(2, dtype=torch.float64)])
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        value[4:7].double(), normal.cdf(middle).log(), rtol=tolerance, atol=0
    )


def test_narrow_bins_approach_the_density() -> None:
    """With 65536 levels, log P(j) = log density + log width up to O(width²)."""
    mean = torch.linspace(-0.8, 0.8, 9, dtype=torch.float64)
    logvar = torch.tensor(-3.0, dtype=torch.float64)
    level = torch.arange(3000, 63001, 7500)
    x = level_values(65536, mean)[level]
    expected = DiagonalNormal(mean, logvar).log_prob(x) + math.log(2 / 65535)
    actual = DiscretizedNormal(mean, logvar, 65536).log_prob(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_levels_survive_the_model_scale(levels: int, dtype: torch.dtype) -> None:
    level = torch.arange(levels)
    values = level_values(levels, torch.zeros((), dtype=dtype))
    assert torch.equal(level_of(values, levels), level)
    assert float(values[0]) == -1 and float(values[-1]) == 1


def test_draws_of_levels_have_the_masses() -> None:
    """Frequencies of 5 levels over 200000 draws against P(j)."""
    torch.manual_seed(0)
    mean, logvar, n = (
        torch.tensor([0.4], dtype=torch.float64),
        torch.tensor(-0.5, dtype=torch.float64),
        200_000,
    )
    normal = DiscretizedNormal(mean, logvar, 5)
    draw = level_of(normal.sample(torch.Size([n])), 5)[:, 0]
    assert_frequencies(draw, normal.log_mass(torch.arange(5)))


def test_draws_of_a_categorical_have_the_masses() -> None:
    torch.manual_seed(1)
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]], dtype=torch.float64)
    law = LevelCategorical(logits)
    draw = level_of(law.sample(torch.Size([200_000])), 4)[:, 0]
    assert_frequencies(draw, logits.log_softmax(-1)[0])


def assert_frequencies(draw: Tensor, log_mass: Tensor) -> None:
    """Binomial z of every level; false alarms at most 1e-6 together."""
    p = log_mass.exp()
    frequency = torch.bincount(draw, minlength=len(p)) / len(draw)
    z = (frequency - p) / (p * (1 - p) / len(draw)).sqrt()
    assert float(z.abs().max()) < z_limit(len(p)), z


def test_categorical_log_prob_and_mean() -> None:
    logits = torch.randn(2, 3, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law = LevelCategorical(logits)
    assert law.batch_shape == (2, 3)
    values = level_values(17, logits)
    each = torch.stack([law.log_prob(v.expand(2, 3)) for v in values], -1)
    torch.testing.assert_close(each, logits.log_softmax(-1))
    torch.testing.assert_close(law.mean, (each.exp() * values).sum(-1))


def test_normal_agrees_with_torch() -> None:
    g = torch.Generator().manual_seed(0)
    m1, v1, m2, v2, x = (torch.randn(50, dtype=torch.float64, generator=g) for _ in range(5))
    p, q = DiagonalNormal(m1, v1), DiagonalNormal(m2, v2)
    p_ref, q_ref = (
        torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((m1, v1), (m2, v2))
    )
    torch.testing.assert_close(p.log_prob(x), p_ref.log_prob(x))
    torch.testing.assert_close(p.entropy(), p_ref.entropy())
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p_ref, q_ref))
    torch.testing.assert_close(p.variance, p_ref.variance)


def test_kl_is_the_expected_log_ratio() -> None:
    """KL = E_p[log p − log q] by quadrature, and its reparameterised draws have p's law."""
    p = DiagonalNormal(*torch.tensor([0.3, -1.0], dtype=torch.float64))
    q = DiagonalNormal(*torch.tensor([-0.2, 0.4], dtype=torch.float64))
    z, w = hermite(20)
    x = p.mean + p.variance.sqrt() * z
    expected = w @ (p.log_prob(x) - q.log_prob(x))
    torch.testing.assert_close(kl_divergence(p, q), expected, rtol=1e-12, atol=0)
    torch.manual_seed(0)
    draw = p.sample(torch.Size([200_000]))
    assert_mean(draw, 0.3, 2, "mean")
    assert_mean((draw - 0.3) ** 2, math.exp(-1), 2, "variance")


@pytest.mark.parametrize("dtype", DTYPES)
def test_expm1_minus_keeps_its_digits(dtype: torch.dtype) -> None:
    """Against δ²/2 (1 + δ/3 + δ²/12 + …) with 20 terms, from 1e-15 to 0.5 and both signs."""
    delta = torch.logspace(-15, math.log10(0.5), 60, dtype=torch.float64)
    delta = torch.cat([delta, -delta]).to(dtype)
    d = delta.double()
    terms = [d**n / float(math.factorial(n)) for n in range(2, 22)]
    series = torch.stack(terms[::-1]).sum(0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(expm1_minus(delta).double(), series, rtol=tolerance, atol=0)


def test_expm1_minus_gradient_is_right_across_the_switch() -> None:
    delta = torch.tensor([-1.0, -0.0101, -0.0099, 0.0, 0.0099, 0.0101, 2.0], dtype=torch.float64)
    delta.requires_grad_()
    (gradient,) = torch.autograd.grad(expm1_minus(delta).sum(), delta)
    torch.testing.assert_close(gradient, torch.expm1(delta.detach()), rtol=1e-10, atol=1e-14)


def test_per_example_sums_in_float64() -> None:
    """2^24 + 1 ones: a float32 sum of the tail would lose the last one."""
    values = torch.full((1, 2, 8), 1.0)
    values[0, 0, 0] = 2.0**24
    total = per_example(values)
    assert total.dtype == torch.float64 and total.tolist() == [2.0**24 + 15]
