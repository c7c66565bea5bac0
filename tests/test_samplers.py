"""Samplers on exact models: the law of what they draw, and how fast DDIM converges."""

from __future__ import annotations

import math

import pytest
import torch
from goldens import load
from oracles import Exact, GaussianData, assert_mean, chains, exact_model, variants, z_limit
from torch import Tensor

from nelbo.decoders import Density, Lose
from nelbo.parameterizations import X0
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.samplers import DDIM, Ancestral, Sampler, sample
from nelbo.schedules import Cosine, Harmonic, LogSNRLinear
from nelbo.variances import Posterior


def last(model: Reverse, sampler: Sampler, times: Tensor, shape: tuple[int, ...]) -> Tensor:
    return list(sample(model, sampler, times, shape))[-1][1]


def gaussian_model(q: Cosine | Harmonic | LogSNRLinear) -> Reverse:
    return exact_model(GaussianData([0.5, -1.0], [[0.49, 0.2], [0.2, 0.3]]), q, Posterior())


# --- DDIM ----------------------------------------------------------------------------------------


def test_ddim_with_eta_one_is_the_ancestral_step() -> None:
    """Mean and variance of every pair, neighbours or not, keep = 0 included (η = 1, σ² = β̃)."""
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(5, 2, dtype=torch.float64, generator=g)
    for q in (Cosine(20), Harmonic(20), LogSNRLinear(10.0, -10.0)):
        model, times = gaussian_model(q), q.grid(20)
        for i, j in ((0, 1), (5, 6), (3, 17), (0, 19), (18, 19)):
            kernel = model.kernel(x_t, times[j], times[i])
            mean, sigma = DDIM(eta=1.0).mean_and_sigma(model, x_t, times[j], times[i])
            torch.testing.assert_close(mean, kernel.mean, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(sigma**2, kernel.variance.flatten()[0], rtol=1e-11, atol=0)


def walk(model: Reverse, times: Tensor, x: Tensor) -> Tensor:
    """DDIM from the last time to the first, in the precision of x."""
    for i in range(len(times) - 1, 0, -1):
        x, _ = DDIM().step(model, x, times[i], times[i - 1], None)
    return x


def test_ddim_converges_at_first_order() -> None:
    """On an exact Gaussian model the probability flow is known: error ~ 1/N, ratio 2 per halving.

    x_1 = √k_1 m + √(k_1 v + l_1) (x_N − √k_N m)/√(k_N v + l_N).
    """
    m, v = 0.5, 0.09
    q = LogSNRLinear(5.0, -8.0)
    model = exact_model(GaussianData([m], [[v]]), q, Posterior())
    ends = q.grid(2)
    keep, lose = q.keep(ends), q.lose(ends)
    x_last = torch.tensor([[-2.0], [0.3], [1.5]], dtype=torch.float64)
    scale = ((keep[0] * v + lose[0]) / (keep[1] * v + lose[1])).sqrt()
    truth = keep[0].sqrt() * m + scale * (x_last - keep[1].sqrt() * m)
    errors = [
        float((walk(model, q.grid(n + 1), x_last) - truth).abs().max()) for n in (40, 80, 160, 320)
    ]
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.8 < r < 2.25 for r in ratios) and errors[-1] < 0.01, (errors, ratios)


def test_ddim_is_deterministic_and_ends_at_the_prediction() -> None:
    q = Cosine(12)
    model = gaussian_model(q)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(list(sample(model, DDIM(), q.grid(), (4, 2))))
    for (_, a), (_, b) in zip(*runs, strict=True):
        assert torch.equal(a, b)
    t_1, x_1 = runs[0][-2]
    assert t_1 is not None
    torch.testing.assert_close(runs[0][-1][1], model.predict(x_1, t_1))
    torch.manual_seed(3)
    x_last = model.process.start((4, 2))
    torch.testing.assert_close(x_1, walk(model, q.grid(), x_last))


def test_ddim_with_noise_has_the_marginal_of_its_step() -> None:
    """x_s = mean + σ z: variance of 200000 steps from one x_t against σ² (2 comparisons)."""
    q = Cosine(10)
    model, times = gaussian_model(q), q.grid()
    x_t = torch.tensor([[0.4, -0.7]], dtype=torch.float64).expand(200_000, 2)
    mean, sigma = DDIM(eta=0.5).mean_and_sigma(model, x_t, times[7], times[3])
    torch.manual_seed(0)
    x_s, _ = DDIM(eta=0.5).step(model, x_t, times[7], times[3], None)
    z = (x_s - mean) / sigma
    assert_mean(z[:, 0], 0.0, 2, "mean")
    assert_mean(z[:, 1] ** 2, 1.0, 2, "variance")


# --- ancestral sampling --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_exact_ancestral_samples_have_the_law_of_the_data(steps: int) -> None:
    """Harmonic chains end at N(0, I) exactly, so x_0 ~ N(m, v) at any N (6 comparisons)."""
    mean, variance, n = (0.5, -1.0), (0.49, 2.0), 100_000
    data = GaussianData(mean, torch.diag(torch.tensor(variance, dtype=torch.float64)))
    q = Harmonic(20)
    model = exact_model(data, q, Exact(), Lose())
    torch.manual_seed(steps)
    x = last(model, Ancestral(), q.grid(steps), (n, 2)).double()
    for d in range(2):
        z = (x[:, d] - mean[d]) / math.sqrt(variance[d])
        for power, truth in ((1, 0.0), (2, 1.0), (3, 0.0)):
            assert_mean(z**power, truth, 6, f"dimension {d}, moment {power}")


def test_the_law_test_detects_a_wrong_variance() -> None:
    """σ² = β̃ in place of the exact variance, four latents: the samples are too narrow."""
    data = GaussianData([0.5], [[0.49]])
    model = exact_model(data, Harmonic(4), Posterior(), Lose())
    torch.manual_seed(0)
    z = (last(model, Ancestral(), Harmonic(4).grid(), (100_000, 1)).double() - 0.5) / 0.7
    square = z**2
    error = float(square.std()) / math.sqrt(len(square))
    assert abs(float(square.mean()) - 1) > 2 * z_limit(6) * error


@pytest.mark.parametrize("variant", ["small_copy", "large_copy", "small_beta"])
def test_ancestral_samples_have_the_golden_law_of_the_model(variant: str) -> None:
    """gaussian3, cosine grid of 4: mean and covariance of p_θ, not of the data (9 comparisons)."""
    golden, n = load("gaussian3"), 100_000
    data = GaussianData(golden["mean"], golden["cov"])
    q = chains(4)["cosine"]
    v = golden["variants"].tolist().index(variant)
    model = variants(data, q, q.grid(4))[variant]
    torch.manual_seed(v)
    x = last(model, Ancestral(), q.grid(4), (n, 3)).double()
    mean = torch.from_numpy(golden["cosine_N4/model_mean"][v])
    cov = torch.from_numpy(golden["cosine_N4/model_cov"][v])
    for i in range(3):
        assert_mean(x[:, i], float(mean[i]), 9, f"mean {i}")
        for j in range(i + 1):
            product = (x[:, i] - mean[i]) * (x[:, j] - mean[j])
            assert_mean(product, float(cov[i, j]), 9, f"covariance {i}{j}")


# --- the walk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(), DDIM(eta=0.7)])
@pytest.mark.parametrize("kept", [[0, 3, 11], [11], [2, 5], list(range(12))])
def test_a_walk_visits_its_times_and_ends_at_data(sampler: Sampler, kept: list[int]) -> None:
    q = Cosine(12)
    times = q.times(kept)
    torch.manual_seed(0)
    states = list(sample(gaussian_model(q), sampler, times, (3, 2)))
    assert [t for t, _ in states[:-1]] == times.flip(0).tolist()
    assert states[-1][0] is None
    assert all(x.shape == (3, 2) and x.dtype == torch.float32 for _, x in states)
    assert all(bool(x.isfinite().all()) and not x.requires_grad for _, x in states)


def test_the_network_is_called_once_per_latent_with_the_times_of_the_grid() -> None:
    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
            self.seen.append(float(t))
            return 0.5 * x_t

    q = Cosine(1000)
    for sampler in (Ancestral(), DDIM()):
        spy = Spy()
        model = Reverse(Gaussian(q), spy, X0(), Density(Lose()))
        list(sample(model, sampler, q.times([0, 40, 300, 999]), (2, 3)))
        assert spy.seen == [1.0, 0.301, 0.041, 0.001]
