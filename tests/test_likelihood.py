"""Importance weights of joint trajectories against chains whose −log p_θ is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from goldens import load
from oracles import (
    Exact,
    GaussianData,
    assert_mean,
    at_logsnr,
    chains,
    exact_model,
    variants,
    z_limit,
)
from torch import Tensor, nn

from nelbo.bits import Bits
from nelbo.bound import bound, draw
from nelbo.decoders import Density
from nelbo.distributions import per_example
from nelbo.errors import InputRefused, NumericalFailure, UsageError
from nelbo.likelihood import ImportanceWeighted, importance_weighted
from nelbo.parameterizations import X0
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.recipes.build import build
from nelbo.recipes.options import SwissRoll
from nelbo.reverse import Decoder, Parameterization, Prediction, Reverse
from nelbo.schedules import Cosine, LogSNRLinear, Tabulated

LN2 = math.log(2)


def golden_case(variant: str, steps: int = 4) -> tuple[Reverse, Tensor, Tensor, Tensor]:
    """gaussian3, cosine grid: model, points, times, and the exact log p_θ of the points."""
    golden = load("gaussian3")
    data = GaussianData(golden["mean"], golden["cov"])
    q = chains(steps)["cosine"]
    v = golden["variants"].tolist().index(variant)
    truth = torch.from_numpy(golden[f"cosine_N{steps}/model_log_p_points"][v])
    points = torch.from_numpy(golden["points"])
    return variants(data, q, q.grid(steps))[variant], points, q.grid(steps), truth


# --- the truth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["large_copy", "opt_scalar", "opt_diag"])
def test_mean_weight_is_the_exact_density_of_the_chain(variant: str) -> None:
    """E w = p_θ(x_0), 8192 trajectories of three points each (3 comparisons per chain)."""
    model, points, times, truth = golden_case(variant)
    found = importance_weighted(model, points[:3], times, 8192, seed=1)
    for k in range(3):
        assert_mean((found.log_w[k] - truth[k]).exp(), 1.0, 3, f"{variant}, point {k}")
    errors = (1 / found.ess - 1 / found.draws).sqrt()
    assert bool(((found.values + truth[:3]).abs() < z_limit(3) * errors).all())


def test_one_trajectory_gives_the_bound_in_expectation() -> None:
    """L_1 = L of gaussian3, golden point_nelbo_nats (2 comparisons)."""
    golden = load("gaussian3")
    v = golden["point_variants"].tolist().index("opt_scalar")
    model, points, times, _ = golden_case("opt_scalar")
    found = importance_weighted(model, points[:2], times, 4096, seed=2)
    for k in range(2):
        truth = golden["cosine_N4/point_nelbo_nats"][v][k]
        assert_mean(found.table(1)[k], float(truth), 2, f"point {k}")


def test_more_trajectories_are_tighter_and_never_below() -> None:
    """−log p_θ ≤ E L_{2m} ≤ E L_m, and strictly so at the start."""
    model, points, times, truth = golden_case("large_copy")
    found = importance_weighted(model, points[:1], times, 8192, seed=3)
    tables = [found.table(2**k)[0] for k in range(8)]
    means = [float(t.mean()) for t in tables]
    errors = [float(t.std()) / math.sqrt(len(t)) for t in tables]
    assert all(b <= a for a, b in zip(means, means[1:], strict=False)), means
    limit = z_limit(len(means))
    below = [m + float(truth[0]) + limit * e for m, e in zip(means, errors, strict=True)]
    assert all(b > 0 for b in below), below
    assert means[0] - means[3] > limit * math.hypot(errors[0], errors[3])


def test_the_gap_is_chi_square_over_twice_the_number() -> None:
    """L_M + log p_θ ≈ χ²/(2M), ESS ≈ M/(1 + χ²), M = 8; χ² = .08.

    As E u = 1 for a mean weight u, −log u + u − 1 has the mean of the gap; with 2048 of them the
    ratio to the prediction has a standard error of 3 %, and 15 % are allowed.
    """
    model, points, times, truth = golden_case("opt_diag", 20)
    found = importance_weighted(model, points[:1], times, 8 * 2048, seed=4)
    gap = found.table(8)[0] + truth[0]
    excess = gap + (-gap).exp() - 1
    chi_square = float((found.log_w[0] - truth[0]).exp().var())
    assert float(excess.mean()) / (chi_square / 16) == pytest.approx(1, abs=0.15)
    assert float(found.ess[0]) / found.draws == pytest.approx(1 / (1 + chi_square), rel=0.01)
    assert chi_square == pytest.approx(0.08, abs=0.02)


def independent_ratios(model: Reverse, x_0: Tensor, times: Tensor) -> Tensor:
    """The log-ratios of the three terms, every x_t drawn on its own: not a trajectory."""
    process = model.process
    x_t = draw(model, x_0, times[-1])
    value = per_example(
        process.prior(x_t).log_prob(x_t) - process.marginal(x_0, times[-1]).log_prob(x_t)
    )
    for i in range(1, len(times)):
        x_t = draw(model, x_0, times[i])
        posterior = process.posterior(x_t, x_0, times[i], times[i - 1])
        x_s = posterior.sample()
        kernel = model.kernel(x_t, times[i], times[i - 1])
        value = value + per_example(kernel.log_prob(x_s) - posterior.log_prob(x_s))
    return value + per_example(model.decoder(draw(model, x_0, times[0]), times[0]).log_prob(x_0))


def test_neither_divergences_nor_independent_draws_estimate_the_density() -> None:
    """Same bound, another mean of exponentials: both are off by more than 12 standard errors."""
    model, points, times, truth = golden_case("large_copy")
    x_0 = points[1:2].expand(20_000, 3)
    torch.manual_seed(0)
    joint = importance_weighted(model, points[1:2], times, 20_000, seed=6).log_w[0]
    wrong = {
        "divergences": -bound(model, x_0, times).total,
        "independent": independent_ratios(model, x_0, times),
    }
    for what, log_w in wrong.items():
        error = math.hypot(float(log_w.std()), float(joint.std())) / math.sqrt(20_000)
        assert abs(float(log_w.mean() - joint.mean())) < z_limit(2) * error, what
        w = (log_w - truth[1]).exp()
        z = (float(w.mean()) - 1) / (float(w.std()) / math.sqrt(len(w)))
        assert abs(z) > 12, f"{what}: z = {z}"
    assert_mean((joint - truth[1]).exp(), 1.0, 1, "joint")


class Direct(Parameterization):
    """The network's output is the logit of the bit before."""

    def convert(self, at: Prediction) -> Tensor:
        return at.output.sigmoid()

    x_0 = convert

    def kernel(self, at: Prediction, s: Tensor) -> Bits:
        return Bits(at.output)

    def detach_mean(self, output: Tensor) -> Tensor:
        return output

    def channels(self, data_channels: int) -> int:
        return data_channels


class DirectDecoder(Decoder):
    def distribution(self, at: Prediction) -> Bits:
        return Bits(at.output)


class DirectNetwork(nn.Module):
    """The closed form `direct` of tests/golden/README.md."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        i = (t * 4).round() - 1
        j = torch.arange(x.shape[1])
        mean = x.mean(1, keepdim=True)
        return 1.5 * (x - 0.5) + 0.4 * torch.sin(i) + 0.3 * mean - 0.2 * j


def test_binomial_chain_of_the_golden_enumeration() -> None:
    """Bits: E w against the enumerated likelihood of all 8 patterns (8 comparisons)."""
    golden = load("bernoulli")
    q = Tabulated([0.05, 0.2, 0.4, 0.7])
    model = Reverse(Bernoulli(q, 0.2), DirectNetwork(), Direct(), DirectDecoder())
    patterns = torch.from_numpy(golden["patterns"]).double()
    found = importance_weighted(model, patterns, q.grid(), 4096, seed=7)
    truth = torch.from_numpy(golden["case1/direct_log2_px0"]) * LN2
    for k in range(8):
        assert_mean((found.log_w[k] - truth[k]).exp(), 1.0, 8, f"pattern {k}")


# --- figures -------------------------------------------------------------------------------------


def test_batches_change_rounding_and_seeds_change_draws() -> None:
    model, points, times, _ = golden_case("opt_diag")
    x_0 = points.repeat(14, 1)
    told: list[tuple[int, int]] = []
    a = importance_weighted(
        model, x_0, times, 24, batch=1, track=lambda done, total: told.append((done, total))
    )
    b = importance_weighted(model, x_0, times, 24, batch=10_000)
    torch.testing.assert_close(a.log_w, b.log_w, rtol=1e-12, atol=1e-11)
    assert not torch.equal(a.log_w, importance_weighted(model, x_0, times, 24, seed=1).log_w)
    assert a.log_w.unique().numel() == a.log_w.numel() and a.log_w.shape == (70, 24)
    assert told[-1] == (70 * 24 * 4, 70 * 24 * 4) and len(told) > 3


def test_latents_are_float64_and_the_network_sees_its_own_dtype() -> None:
    """At log-SNR 13.3 a float32 latent is 1e-4 standard deviations off; the weights are not."""
    seen: list[tuple[torch.dtype, bool]] = []

    class Spy(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            seen.append((x_t.dtype, self.training))
            return 0.9 * x_t

    q = LogSNRLinear(13.3, -5.0)
    model = Reverse(Gaussian(q), Spy(), X0(), Density()).train()
    x_0 = torch.full((2, 3), 0.25)
    found = importance_weighted(model, x_0, q.grid(5), 4)
    assert set(seen) == {(torch.float32, False)} and model.training
    exact = importance_weighted(model, x_0.double(), q.grid(5), 4)
    assert found.log_w.dtype == torch.float64
    # the rounded network input moves x̂_0 by 1e-8 of snr 6e5; float32 latents would by far more
    torch.testing.assert_close(found.log_w, exact.log_w, rtol=1e-4, atol=0.05)


def test_estimates_have_errors_and_units() -> None:
    """n = 400 examples of the data: the standard error covers, and se_mc is its small part."""
    data = GaussianData([0.5], [[0.49]])
    q = at_logsnr([4.0, 2.0, 0.0, -2.0, -6.0])
    model = exact_model(data, q, Exact())
    torch.manual_seed(0)
    x_0 = 0.5 + 0.7 * torch.randn(400, 1, dtype=torch.float64)
    found = importance_weighted(model, x_0, q.grid(), 32, offset=2.0)
    estimate = found.estimate()
    assert estimate.n == 400 and estimate.unit == "nats/example"
    assert abs(estimate.mean - 2.0 - 1.062264) < z_limit(1) * estimate.se
    assert 0 < estimate.se_mc < estimate.se
    bits = found.bits_per_dim(1)
    assert bits.mean == pytest.approx(estimate.mean / LN2) and bits.unit == "bits/dim"
    assert [m for m, _ in found.curve()] == [1, 2, 4, 8, 16, 32]
    again = [importance_weighted(model, x_0, q.grid(), 32, seed=s).values for s in range(1, 9)]
    spread = float(torch.stack(again).mean(1).std())
    assert 0.3 < spread / estimate.se_mc < 3


def test_no_figure_goes_without_its_number_and_effective_sample_size() -> None:
    good = ImportanceWeighted(torch.randn(50, 16, dtype=torch.float64) * 0.1)
    for text in (str(good), good.describe(8)):
        assert "M = 16" in text and "effective sample size 15." in text and "<=" in text
        assert "far below" not in text
    poor = ImportanceWeighted(torch.linspace(0, 100, 16, dtype=torch.float64).expand(3, 16))
    assert "effective sample size 1.0" in str(poor) and "may lie far below" in str(poor)
    zero = ImportanceWeighted(torch.full((2, 4), -math.inf, dtype=torch.float64))
    assert bool(zero.values.isposinf().all()) and "far below" in zero.describe()


def test_what_cannot_be_measured_is_refused() -> None:
    model, points, times, _ = golden_case("opt_diag")
    with pytest.raises(UsageError, match="at least one"):
        importance_weighted(model, points, times, 0)
    with pytest.raises(InputRefused, match="no examples"):
        importance_weighted(model, points[:0], times, 2)
    with pytest.raises(UsageError, match="9 trajectories"):
        importance_weighted(model, points, times, 8).table(9)
    q = Cosine(4)

    class Broken(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return x_t * math.nan

    broken = Reverse(Gaussian(q), Broken(), X0(), Density())
    with pytest.raises(NumericalFailure, match="5 of 5"):
        importance_weighted(broken, points, q.grid(), 2)


def test_a_roll_of_forty_latents_is_within_a_quarter_of_a_bit() -> None:
    """Exact denoiser, T = 40, M = 32: the bound is more than a bit too high, L_32 hardly.

    p_θ integrates to one, so a mean weight over the true density, u, has the mean one over data,
    and −log u + u − 1 that of the gap, with a third of its variance and never below zero.
    """
    recipe = build(SwissRoll(latents=40, examples=1000))
    data = recipe.dataset
    assert recipe.exact is not None and data.truth is not None
    rows = data.test[:64]
    found = importance_weighted(
        recipe.exact, data.encode(rows), recipe.times, 32, offset=data.offset()
    )
    log_p = data.truth.log_prob(rows)
    gap = found.values + log_p
    better = (gap + (-gap).exp() - 1) / LN2
    error = float(better.std()) / math.sqrt(len(rows))
    assert float(better.mean()) + z_limit(1) * error < 0.25
    assert abs(float(gap.mean())) / LN2 < 0.25
    assert float((found.table(1).mean(1) + log_p).mean()) / LN2 > 1.0
    assert 4 < float(found.ess.median()) < 20
