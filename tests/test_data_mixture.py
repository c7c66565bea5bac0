"""Mixtures against closed forms, golden values and draws; toys against their own truth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from nelbo.data import toys
from nelbo.data.mixture import GaussianMixture
from nelbo.errors import InputRefused
from nelbo.randomness import generator

GOLDEN = Path(__file__).parent / "golden"
# Two-sided normal tail of 1e-7 for one comparison: the file makes fewer than ten of them.
SIGMAS = 5.4


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name, allow_pickle=False) as stored:
        return dict(stored)


def lopsided() -> GaussianMixture:
    """Three components in two dimensions, unequal and correlated."""
    return GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([[0.0, 1.0], [2.0, -1.0], [-1.5, 0.3]], dtype=torch.float64),
        torch.tensor(
            [[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.9]], [[1.0, -0.6], [-0.6, 0.5]]],
            dtype=torch.float64,
        ),
    )


def test_log_prob_is_that_of_scipy():
    mixture, x = lopsided(), torch.randn(50, 2, dtype=torch.float64, generator=generator(1))
    parts = zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    density = sum(
        float(w) * multivariate_normal(m.numpy(), c.numpy()).pdf(x.numpy()) for w, m, c in parts
    )
    np.testing.assert_allclose(mixture.log_prob(x), np.log(density), rtol=1e-12)


def test_log_prob_does_not_depend_on_blocks(monkeypatch):
    mixture, x = lopsided(), torch.randn(50, 2, dtype=torch.float64, generator=generator(1))
    whole = mixture.denoise(x, 0.3, 0.7)
    monkeypatch.setattr("nelbo.data.mixture.ENTRIES", 20)
    torch.testing.assert_close(mixture.denoise(x, 0.3, 0.7), whole, rtol=1e-14, atol=1e-14)


def test_draws_have_the_moments_of_the_mixture():
    mixture, n = lopsided(), 40_000
    x = mixture.sample(n, generator(2))
    apart = x - mixture.mean()
    errors = apart.std(0) / math.sqrt(n)
    assert (apart.mean(0).abs() < SIGMAS * errors).all()
    products = apart[:, :, None] * apart[:, None]
    wrong = (products.mean(0) - mixture.covariance()).abs()
    assert (wrong < SIGMAS * products.std(0) / math.sqrt(n)).all()


def test_diffused_is_the_convolution_with_noise():
    mixture, keep = lopsided(), 0.36
    later = mixture.diffused(keep, 1 - keep)
    expected = keep * mixture.covariance() + (1 - keep) * torch.eye(2)
    torch.testing.assert_close(later.covariance(), expected.double())
    # Two steps are one: keep 0.36 = 0.6 * 0.6.
    twice = mixture.diffused(0.6, 0.4).diffused(0.6, 0.4)
    x = torch.randn(20, 2, dtype=torch.float64, generator=generator(3))
    torch.testing.assert_close(twice.log_prob(x), later.log_prob(x))


def test_denoiser_obeys_tweedie():
    """x_0_hat = (x_t + lose * score)/sqrt(keep), the score by automatic differentiation."""
    mixture, keep, lose = lopsided(), 0.4, 0.6
    x_t = torch.randn(30, 2, dtype=torch.float64, generator=generator(4)).requires_grad_()
    (score,) = torch.autograd.grad(mixture.diffused(keep, lose).log_prob(x_t).sum(), x_t)
    expected = (x_t + lose * score).detach() / math.sqrt(keep)
    torch.testing.assert_close(mixture.denoise(x_t, keep, lose).detach(), expected)


def test_denoiser_equals_the_golden_values():
    stored = golden("mixture2d.npz")
    mixture = toys.ring(2, 2, std=0.15).truth.components
    x_t, keep = (torch.from_numpy(stored[f"denoiser_{name}"]) for name in ("xt", "abar"))
    found = mixture.denoise(x_t, keep, 1 - keep)
    np.testing.assert_allclose(found, stored["denoiser_x0_hat"], atol=1e-9)
    spread = mixture.spread(x_t, keep, 1 - keep)
    np.testing.assert_allclose(spread, stored["denoiser_trace_cov"], atol=1e-9)
    log_p = [
        float(mixture.diffused(k, 1 - k).log_prob(x[None])) for x, k in zip(x_t, keep, strict=True)
    ]
    np.testing.assert_allclose(log_p, stored["denoiser_log_pt"], atol=1e-9)


@pytest.mark.parametrize("q", [0, 1, 2])
def test_ring_entropy_equals_the_golden_value_within_its_error(q):
    stored = golden("mixture2d.npz")
    std, radius = float(stored[f"ring{q}/std"]), float(stored[f"ring{q}/radius"])
    truth = toys.ring(2, 2, modes=int(stored[f"ring{q}/n"]), radius=radius, std=std).truth
    assert abs(truth.entropy - float(stored[f"ring{q}/entropy_nats"])) < truth.entropy_error
    assert truth.entropy_error < 1e-8


@pytest.mark.parametrize("q", [0, 1])
def test_grid_entropy_equals_the_golden_value_within_its_error(q):
    stored = golden("mixture2d.npz")
    std, step = float(stored[f"grid{q}/std"]), float(stored[f"grid{q}/step"])
    truth = toys.grid25(2, 2, side=int(stored[f"grid{q}/n"]), step=step, std=std).truth
    assert abs(truth.entropy - float(stored[f"grid{q}/entropy_nats"])) < truth.entropy_error
    assert truth.entropy_error < 1e-8


def test_one_dimensional_entropy():
    """Two far components: their entropies' mean plus log 2."""
    mixture = GaussianMixture(
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.tensor([[-50.0], [50.0]], dtype=torch.float64),
        torch.tensor([[[1.0]], [[4.0]]], dtype=torch.float64),
    )
    entropy, error = mixture.entropy()
    expected = math.log(2) + 0.5 * math.log(2 * math.pi * math.e) + 0.5 * math.log(2)
    assert abs(entropy - expected) < error < 1e-8


def test_entropy_refuses_what_it_cannot_do():
    three = GaussianMixture(
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64).repeat(2, 1, 1),
    )
    with pytest.raises(ValueError, match="at most 2 dimensions"):
        three.entropy()
    thin = GaussianMixture(
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.tensor([[0.0, 0.0], [1e4, 1e4]], dtype=torch.float64),
        1e-4 * torch.eye(2, dtype=torch.float64).repeat(2, 1, 1),
    )
    with pytest.raises(ValueError, match="too narrow"):
        thin.entropy()


def test_correlated_gaussian_is_the_golden_one():
    stored = golden("gaussian3.npz")
    truth = toys.correlated(2, 2).truth
    assert abs(truth.entropy - float(stored["entropy_nats"])) < truth.entropy_error
    log_p = truth.log_prob(torch.from_numpy(stored["points"]))
    np.testing.assert_allclose(log_p, stored["log_p_points"], rtol=1e-12)
    np.testing.assert_allclose(truth.components.mean(), stored["mean"], atol=1e-15)
    np.testing.assert_allclose(truth.components.covariance(), stored["cov"], atol=1e-15)


@pytest.mark.parametrize("make", [toys.swissroll, toys.ring, toys.grid25, toys.correlated])
def test_toy_draws_have_the_stated_entropy(make):
    """Mean of -log p over draws is the entropy, within 5.4 standard errors."""
    data = make(n_train=100, n_test=4000, seed=5, n_validation=10)
    nats = -data.truth.log_prob(data.test)
    assert abs(float(nats.mean()) - data.truth.entropy) < SIGMAS * float(nats.std()) / 4000**0.5
    sizes = [len(part) for part in (data.train, data.validation, data.test)]
    assert sizes == [100, 10, 4000]


def test_toys_follow_their_seed_and_parts_differ():
    first, again, other = (toys.ring(50, 50, seed=seed, n_validation=50) for seed in (1, 1, 2))
    assert torch.equal(first.train, again.train) and first.record == again.record
    assert not torch.equal(first.train, other.train)
    assert first.record["sha256"] != other.record["sha256"]
    assert not torch.equal(first.train, first.test)
    assert not torch.equal(first.validation, first.test)


def test_swissroll_lies_along_the_curve():
    """Every mean is (u cos u, u sin u)/10: its angle is its radius, modulo a turn."""
    means = toys.swissroll(2, 2).truth.components.means
    assert len(means) == 256
    u = 10 * means.norm(dim=1)
    angle = torch.atan2(means[:, 1], means[:, 0])
    torch.testing.assert_close(torch.cos(angle - u), torch.ones(256, dtype=torch.float64))
    gaps = (means[1:] - means[:-1]).norm(dim=1)
    assert gaps.max() < 1.1 * 0.05


def test_density_on_the_models_scale():
    """-log p(y) = -log p(x) + offset, with the mixture on the model's scale."""
    data = toys.correlated(200, 20, seed=3)
    x = (data.test - data.shift) / data.scale
    back = -data.scaled_components().log_prob(x) + data.offset()
    torch.testing.assert_close(back, -data.truth.log_prob(data.test), rtol=1e-12, atol=1e-12)
    assert data.offset() == pytest.approx(3 * math.log(data.scale))
    torch.testing.assert_close(data.encode(data.test).double(), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(data.decode(x), data.test)
    encoded = data.encode(data.train).double()
    assert float(encoded.var(0).mean()) == pytest.approx(1, abs=1e-5)
    assert float(encoded.mean(0).abs().max()) < 1e-5


def test_too_few_draws_are_refused():
    with pytest.raises(InputRefused, match="at least 2"):
        toys.ring(1, 10)
