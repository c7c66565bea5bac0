"""Products with a factor against quadrature and enumeration; particles against exact laws."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from goldens import load
from laws import integrate
from oracles import Exact, GaussianData, assert_mean, chains, exact_model, model_law
from test_likelihood import Direct, DirectDecoder, DirectNetwork
from torch import Tensor, nn

from nelbo.bits import Bits
from nelbo.bound import term
from nelbo.conditioning import (
    Conditioned,
    Factor,
    Noisy,
    Observed,
    Tilt,
    posterior_samples,
)
from nelbo.decoders import Discretized, LevelMass
from nelbo.distributions import (
    DiagonalNormal,
    DiscretizedNormal,
    LevelCategorical,
    level_values,
    per_example,
)
from nelbo.errors import NumericalFailure, UsageError
from nelbo.parameterizations import X0, Levels
from nelbo.particles import systematic
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.samplers import DDIM, Ancestral, sample
from nelbo.schedules import Cosine, Harmonic, LogSNRLinear, Schedule, Tabulated

Q = LogSNRLinear(8.0, -8.0)
TIMES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
Y = torch.tensor([[1.5, -0.3, 0.2]], dtype=torch.float64)
MASK = torch.tensor([True, False, True])
MOMENTS = (
    torch.tensor([0.5, 0.0, -0.1], dtype=torch.float64),
    torch.tensor([0.49, 1.0, 0.2], dtype=torch.float64),
)


def kernel() -> DiagonalNormal:
    g = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 4, 3, dtype=torch.float64, generator=g)
    return DiagonalNormal(mean, logvar)


def factors() -> dict[str, Factor]:
    return {
        "observed": Observed(Y, MASK),
        "observed, moments": Observed(Y, MASK, MOMENTS),
        "noisy": Noisy(Y, 0.5),
        "noisy, moments": Noisy(Y, 0.5, MASK, MOMENTS),
    }


def elementwise(factor: Factor, x: Tensor, s: Tensor | None) -> Tensor:
    """log r of single dimensions at x (n, B, D): those of a factor that is a product of them."""
    rows = []
    for d in range(x.shape[-1]):
        blank = torch.zeros_like(x.flatten(0, -2))
        moved = blank.clone()
        moved[:, d] = x[..., d].flatten()
        rows.append((factor.log_r(moved, s) - factor.log_r(blank, s)).view(x.shape[:-1]))
    return torch.stack(rows, -1)


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", factors())
def test_normal_products_against_quadrature(name: str) -> None:
    """p r/Z pointwise, and Σ log Z, for latents; r as `log_r` gives it, not as `multiply` does."""
    factor = factors()[name].bind(Gaussian(Q))
    p = kernel()
    for s in TIMES:
        product, log_z = factor.multiply(p, s)
        assert isinstance(product, DiagonalNormal)
        each = integrate(p, lambda x, s=s: elementwise(factor, x, s))  # type: ignore[misc]
        base = factor.log_r(torch.zeros(1, 3, dtype=torch.float64), s)
        torch.testing.assert_close(log_z, each.sum(1) + base, rtol=1e-10, atol=1e-10)
        x = p.sample()
        expected = p.log_prob(x) + elementwise(factor, x[None], s)[0] - each
        torch.testing.assert_close(product.log_prob(x), expected, rtol=1e-9, atol=1e-9)


def test_the_data_itself_is_a_product_or_a_delta() -> None:
    p = kernel()
    each = Noisy(Y, torch.tensor([0.5, 0.2, 1.0])).multiply(p, None)[1]
    parts = [
        Noisy(Y, v, MASK.new_tensor([d == i for d in range(3)])).multiply(p, None)[1]
        for i, v in enumerate((0.5, 0.2, 1.0))
    ]
    torch.testing.assert_close(each, torch.stack(parts).sum(0))
    noisy, log_z = Noisy(Y, 0.5).multiply(p, None)
    r = torch.distributions.Normal(Y, 0.5)
    each = integrate(p, lambda x: r.log_prob(x))
    torch.testing.assert_close(log_z, each.sum(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(noisy.mean, (p.mean / p.variance + Y / 0.25) / (1 / p.variance + 4))
    exact, log_z = Observed(Y, MASK).multiply(p, None)
    expected = p.log_prob(Y.expand(4, 3)) * MASK
    torch.testing.assert_close(log_z, expected.sum(1), rtol=1e-12, atol=1e-12)
    drawn = exact.sample()
    assert bool((drawn[:, MASK] == Y[:, MASK]).all())
    assert torch.equal(exact.mean[:, 1], p.mean[:, 1]) and drawn[:, 1].unique().numel() == 4


def test_widening_is_the_law_of_the_measurement_given_the_latent() -> None:
    """With moments r(x, t) = E[r(X_0)|X_t = x] of independent normal data, by quadrature (I55)."""
    process = Gaussian(Q)
    factor = Noisy(Y, 0.5, None, MOMENTS).bind(process)
    data = DiagonalNormal(MOMENTS[0][None], MOMENTS[1].log()[None])
    x = torch.tensor([[0.3, -1.2, 0.8]], dtype=torch.float64)

    def measured(x_0: Tensor) -> Tensor:
        return torch.distributions.Normal(Y, 0.5).log_prob(x_0)

    for t in TIMES:
        joint, alone = (
            integrate(data, lambda x_0, t=t, f=f: f(x_0) + process.marginal(x_0, t).log_prob(x))  # type: ignore[misc]
            for f in (measured, torch.zeros_like)
        )
        expected = (joint - alone).sum(1)
        torch.testing.assert_close(factor.log_r(x, t), expected, rtol=1e-9, atol=1e-9)


def test_the_grain_of_levels_widens_latents_and_not_the_data() -> None:
    """The rounding of a level to its bin counts as noise of variance Δ²/12 in latents alone."""
    grain = 0.5
    like = Noisy(Y, grain / math.sqrt(12), MASK, MOMENTS).bind(Gaussian(Q))
    fine = Observed(Y, MASK, MOMENTS, grain).bind(Gaussian(Q))
    x = torch.randn(4, 3, dtype=torch.float64)
    for t in TIMES:
        torch.testing.assert_close(fine.log_r(x, t), like.log_r(x, t))
        assert torch.equal(fine.multiply(kernel(), t)[0].mean, like.multiply(kernel(), t)[0].mean)
    assert bool((fine.multiply(kernel(), None)[0].mean[:, MASK] == Y[:, MASK]).all())


def test_flat_widening_is_the_forward_process_of_what_was_observed() -> None:
    process = Gaussian(Q)
    x = torch.randn(4, 3, dtype=torch.float64)
    for t in TIMES:
        log_r = Observed(Y, MASK).bind(process).log_r(x, t)
        expected = (process.marginal(Y, t).log_prob(x) * MASK).sum(1)
        torch.testing.assert_close(log_r, expected, rtol=1e-12, atol=1e-12)
        keep, lose = Q.keep(t), Q.lose(t)
        law = DiagonalNormal(x, (keep * 0.25 + lose).log())
        noisy = Noisy(Y, 0.5).bind(process).log_r(x, t)
        torch.testing.assert_close(noisy, per_example(law.log_prob(keep.sqrt() * Y)))


def test_tilt_of_a_normal_is_exact_if_log_r_is_linear() -> None:
    g = torch.tensor([0.7, -2.0, 0.1], dtype=torch.float64)
    factor = Tilt(lambda x, s: x @ g + 3.0, lambda x, s: g.expand_as(x))
    p = kernel()
    product, log_z = factor.multiply(p, TIMES[0])
    each = integrate(p, lambda x: x * g)
    torch.testing.assert_close(log_z, each.sum(1) + 3.0, rtol=1e-10, atol=1e-10)
    x = p.sample()
    expected = p.log_prob(x) + x * g - each
    torch.testing.assert_close(product.log_prob(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rates", [None, torch.tensor([0.3, 0.9, 0.5], dtype=torch.float64)])
@pytest.mark.parametrize("scale", [0.0, 0.8])
def test_bits_are_multiplied_and_widened_by_enumeration(
    rates: Tensor | None, scale: float
) -> None:
    process = Bernoulli(Tabulated([0.1, 0.3, 0.5]), 0.2)
    y = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    moments = None if rates is None else (rates, torch.ones(3))
    plain = Observed(y, MASK, moments) if scale == 0 else Noisy(y, scale, MASK, moments)
    factor = plain.bind(process)
    f = Bits(torch.randn(4, 3, dtype=torch.float64))
    s = torch.tensor(2 / 3, dtype=torch.float64)

    def r_0(bit: float) -> Tensor:
        if scale == 0:
            return (y[0] == bit).double()
        return torch.distributions.Normal(y[0], scale).log_prob(torch.tensor(bit)).exp()

    def r(bit: float, time: Tensor | None) -> Tensor:
        if time is None:
            return r_0(bit)
        reach = [
            process.marginal(torch.full((1, 3), j).double(), time)
            .log_prob(torch.full((1, 3), bit).double())
            .exp()[0]
            for j in (0.0, 1.0)
        ]
        p = [torch.ones(3), torch.ones(3)] if rates is None else [1 - rates, rates]
        joint = [a * b for a, b in zip(p, reach, strict=True)]
        total = 1.0 if rates is None else sum(joint)
        return (joint[0] * r_0(0.0) + joint[1] * r_0(1.0)) / total

    for time in (s, None):
        one, zero = (torch.where(MASK, r(b, time), torch.ones(3)) for b in (1.0, 0.0))
        z = f.mean * one + (1 - f.mean) * zero
        product, log_z = factor.multiply(f, time)
        torch.testing.assert_close(product.mean, f.mean * one / z)
        torch.testing.assert_close(log_z, z.log().sum(1))
    x = f.sample()
    expected = torch.where(MASK, torch.where(x > 0, r(1.0, s), r(0.0, s)), 1.0).log().sum(1)
    torch.testing.assert_close(factor.log_r(x, s), expected)


@pytest.mark.parametrize("kind", ["normal", "free"])
def test_levels_are_multiplied_level_by_level(kind: str) -> None:
    torch.manual_seed(0)
    levels, values = 5, level_values(5, torch.zeros((), dtype=torch.float64))
    mean = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    logits = torch.randn(2, 1, 2, 2, levels, dtype=torch.float64)
    p = (
        DiscretizedNormal(mean, 0 * mean - 1, levels)
        if kind == "normal"
        else LevelCategorical(logits)
    )
    table = torch.stack([p.log_prob(torch.full_like(mean, float(v))) for v in values], -1)
    y = values[torch.tensor([[[0, 4], [2, 3]]])][None]
    mask = torch.tensor([[[True, False], [True, True]]])

    noisy, log_z = Noisy(y, 0.3, mask).multiply(p, None)
    log_r = torch.distributions.Normal(y[..., None], 0.3).log_prob(values) * mask[..., None]
    joint = table + log_r
    torch.testing.assert_close(log_z, joint.logsumexp(-1).flatten(1).sum(1))
    assert isinstance(noisy, LevelCategorical)
    torch.testing.assert_close(noisy.logits, joint.log_softmax(-1))

    known, log_z = Observed(y, mask).multiply(p, None)
    torch.testing.assert_close(log_z, (p.log_prob(y.expand_as(mean)) * mask).flatten(1).sum(1))
    drawn = known.sample()
    assert torch.equal(drawn[:, mask], y[:, mask].expand(2, -1))

    g = torch.randn_like(mean)
    tilted, log_z = Tilt(lambda x, s: per_example(g * x), lambda x, s: g).multiply(p, None)
    joint = table + g[..., None] * values
    torch.testing.assert_close(log_z, joint.logsumexp(-1).flatten(1).sum(1))
    assert isinstance(tilted, LevelCategorical)
    torch.testing.assert_close(tilted.logits, joint.log_softmax(-1))


# --- exact posteriors ----------------------------------------------------------------------------

TRUE_MEAN, TRUE_VARIANCE = 43 / 37, 0.49 * 0.25 / 0.74
EVIDENCE = math.exp(-1 / 1.48) / math.sqrt(2 * math.pi * 0.74)


def posterior_model(q: Schedule) -> Reverse:
    return exact_model(GaussianData([0.5], [[0.49]]), q, Exact())


STANDARD = (torch.tensor([0.0]), torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("steps", "populations", "moments", "relative"),
    [
        (20, 80, None, 0.04),
        (200, 40, None, 0.05),
        (20, 80, STANDARD, 0.015),
        (200, 40, STANDARD, 0.02),
    ],
)
def test_weighted_samples_have_the_exact_posterior(
    steps: int, populations: int, moments: Any, relative: float
) -> None:
    """N(.5, .49), r = N(1.5; x, .25): mean 1.162, variance .1655, evidence .2360.

    Each within 4 repeat-run standard errors (three comparisons of four cases: a false alarm in
    1 of 1300), which must themselves be small. Widened as if nothing were known, the weights have
    a heavy tail; with N(0, 1) for the data, which is not its law either, errors are much smaller.
    """
    assert pytest.approx(0.2360, abs=5e-5) == EVIDENCE
    assert pytest.approx(1.162, abs=5e-4) == TRUE_MEAN
    q = Harmonic(steps)
    factor = Noisy(torch.tensor([[1.5]]), 0.5, None, moments)
    model = posterior_model(q)
    found = posterior_samples(model, factor, q.grid(), 1000, populations=populations, batch=10**6)
    x = found.x_0[..., 0].double()
    log_z, spread = found.evidence()
    values = {
        "mean": (*found.pooled(x), TRUE_MEAN),
        "variance": (*found.pooled((x - TRUE_MEAN) ** 2), TRUE_VARIANCE),
        "evidence": (math.exp(log_z), math.exp(log_z) * spread, EVIDENCE),
    }
    for what, (value, error, truth) in values.items():
        assert abs(float(value) - truth) < 4 * float(error), f"{what}: {value} ± {error}"
        assert float(error) < relative * truth, f"{what}: ± {error} cannot tell"


@pytest.mark.parametrize("steps", [20, 200])
def test_the_unweighted_product_misses_the_posterior(steps: int) -> None:
    """1.12 and .12 instead of 1.162 and .1655, more than 12 standard errors off, at any N."""
    q = Harmonic(steps)
    model = Conditioned(posterior_model(q), Noisy(torch.tensor([[1.5]]), 0.5))
    torch.manual_seed(0)
    x = list(sample(model, Ancestral(), q.grid(), (20_000, 1)))[-1][1].flatten().double()
    centred = (x - TRUE_MEAN) ** 2
    for values, truth in ((x, TRUE_MEAN), (centred, TRUE_VARIANCE)):
        z = (float(values.mean()) - truth) / (float(values.std()) / math.sqrt(len(x)))
        assert z < -12, z
    assert float(x.mean()) == pytest.approx(1.115, abs=0.02)
    assert float(x.var()) == pytest.approx(0.118, abs=0.01)


def test_weights_are_constant_where_the_factor_is_widened_by_the_law_of_the_data() -> None:
    """I55: no resampling, log W = log evidence for all particles; the plain product is right."""
    q = Harmonic(30)
    moments = (torch.tensor([0.5]), torch.tensor([0.49]))
    factor = Noisy(torch.tensor([[1.5]]), 0.5, None, moments)
    found = posterior_samples(posterior_model(q), factor, q.grid(), 20_000)
    assert not bool(found.resampled.any())
    assert float(found.ess.min()) > 20_000 * (1 - 1e-6)
    assert float(found.log_evidence.exp()) == pytest.approx(EVIDENCE, rel=1e-5)
    x = found.x_0.flatten().double()
    assert_mean(x, TRUE_MEAN, 2)
    assert_mean((x - TRUE_MEAN) ** 2, TRUE_VARIANCE, 2)


def test_a_tilt_that_is_not_linear_is_corrected_by_its_weights() -> None:
    """The same posterior from log r = −2 (x − 1.5)² and its gradient, as a user would write it."""
    q = Harmonic(20)
    steep = [0.0, *torch.linspace(1, 0, 20).tolist()]

    def power(s: Tensor | None) -> float:
        return 1.0 if s is None else steep[round(float(s) * 20)]

    factor = Tilt(
        lambda x, s: -2 * power(s) * ((x - 1.5) ** 2).sum(1),
        lambda x, s: -4 * power(s) * (x - 1.5),
    )
    found = posterior_samples(
        posterior_model(q), factor, q.grid(), 1000, populations=80, shape=(1,)
    )
    assert_mean(found.mean().flatten(), TRUE_MEAN, 3, "mean")
    assert_mean(found.variance().flatten(), TRUE_VARIANCE, 3, "variance")
    evidence = EVIDENCE * 0.5 * math.sqrt(2 * math.pi)
    assert_mean(found.log_evidence.exp(), evidence, 3, "evidence")


@pytest.mark.parametrize("moments", [False, True])
def test_inpainting_of_a_correlated_gaussian(moments: bool) -> None:
    """Two of three coordinates observed: law of the third and density of the two (4 errors).

    The truth is that of the model, whose factorised steps have a law of their own at N = 20; the
    law of the data is a third check that the two differ by less than .05.
    """
    golden = load("gaussian3")
    data = GaussianData(golden["mean"], golden["cov"])
    q = chains(20)["cosine"]
    times = q.grid(20)
    model = exact_model(data, q, Exact())
    mean, cov = model_law(model, times, 3)
    known, y = [0, 2], torch.tensor([1.0, 0.0, -0.3], dtype=torch.float64)
    inner = cov[known][:, known]
    gain = cov[1, known] @ inner.inverse()
    truth = mean[1] + gain @ (y[known] - mean[known])
    variance = cov[1, 1] - gain @ cov[known, 1]
    density = torch.distributions.MultivariateNormal(mean[known], inner).log_prob(y[known])
    mask = torch.tensor([True, False, True])
    spread = (data.mean, data.cov.diagonal()) if moments else None
    factor = Observed(y[None].float(), mask, spread)
    found = posterior_samples(model, factor, times, 1000, populations=60, seed=1)
    assert bool((found.x_0[..., known].double() == y[known].float().double()).all())
    assert_mean(found.mean()[:, 1], float(truth), 3, "mean")
    assert_mean(found.variance()[:, 1], float(variance), 3, "variance")
    assert_mean((found.log_evidence - density).exp(), 1.0, 3, "density of the observed part")
    exact_gain = data.cov[1, known] @ data.cov[known][:, known].inverse()
    exact = data.mean[1] + exact_gain @ (y[known] - data.mean[known])
    assert abs(float(truth - exact)) < 0.05 and abs(float(truth - mean[1])) > 0.2


def test_bits_are_filled_in_with_their_conditional_probabilities() -> None:
    """Golden `direct` chain of 3 bits: p_θ(x | bit 2 = 1) and p_θ(bit 2 = 1) by enumeration."""
    golden = load("bernoulli")
    q = Tabulated([0.05, 0.2, 0.4, 0.7])
    model = Reverse(Bernoulli(q, 0.2), DirectNetwork(), Direct(), DirectDecoder())
    mass = torch.from_numpy(golden["case1/direct_log2_px0"]).mul(math.log(2)).exp()
    patterns = torch.from_numpy(golden["patterns"])
    y, mask = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([False, False, True])
    found = posterior_samples(model, Observed(y, mask), q.grid(), 500, populations=100)
    assert_mean(found.log_evidence.exp(), float(mass[patterns[:, 2] == 1].sum()), 5, "evidence")
    conditional = torch.where(patterns[:, 2] == 1, mass, 0.0)
    conditional = conditional / conditional.sum()
    for pattern, truth in zip(patterns, conditional, strict=True):
        here = (found.x_0 == pattern.float()).all(-1).double()
        share = found.average(here)
        if pattern[2] == 0:
            assert float(share.max()) == 0.0
        else:
            assert_mean(share, float(truth), 5, f"{pattern.tolist()}")


# --- images --------------------------------------------------------------------------------------


class Soft(nn.Module):
    """A fixed network with correlated outputs of `channels` times the input's channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.rows: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.rows.append(len(x_t))
        shared = x_t.mean((1, 2, 3), keepdim=True)
        return (0.5 * x_t + shared).repeat(1, self.channels, 1, 1)


@pytest.mark.parametrize("kind", ["discretized", "mass"])
def test_observed_pixels_are_exact_and_the_others_are_levels(kind: str) -> None:
    q = LogSNRLinear(6.0, -6.0)
    model = (
        Reverse(Gaussian(q), Soft(1), X0(), Discretized(17))
        if kind == "discretized"
        else Reverse(Gaussian(q), Soft(17), Levels(17), LevelMass())
    )
    values = level_values(17, torch.zeros(()))
    torch.manual_seed(0)
    y = values[torch.randint(0, 17, (3, 1, 4, 4))]
    mask = torch.arange(16).view(1, 4, 4) % 3 > 0
    found = posterior_samples(model, Observed(y, mask), q.grid(20), 8, batch=5)
    assert found.x_0.shape == (3, 8, 1, 4, 4)
    assert bool((found.x_0[:, :, mask] == y[:, None][:, :, mask]).all())
    assert bool(torch.isin(found.x_0, values).all())
    assert isinstance(found.decoder, LevelCategorical)
    mass = found.predictive()
    assert mass.shape == (17, 3, 1, 4, 4)
    torch.testing.assert_close(mass.sum(0), torch.ones_like(mass[0]))
    assert bool((mass[:, :, mask].max(0).values > 1 - 1e-6).all())
    table = found.decoder.logits.exp().double().unflatten(0, (3, 8))
    expected = (found.weights[..., None, None, None, None] * table).sum(1)
    torch.testing.assert_close(mass.movedim(0, -1), expected)
    chosen = found.choose(2, seed=3)
    assert chosen.shape == (3, 2, 1, 4, 4) and bool(
        (chosen[:, :, mask] == y[:, None][:, :, mask]).all()
    )
    assert max(model.network.rows) == 5  # type: ignore[arg-type]


# --- the machine ---------------------------------------------------------------------------------


def test_systematic_resampling_rounds_the_expected_counts() -> None:
    torch.manual_seed(0)
    log_w = torch.randn(50, 64, dtype=torch.float64) * 2
    expected = 64 * log_w.softmax(1)
    total = torch.zeros_like(expected)
    for _ in range(200):
        chosen = systematic(log_w)
        counts = torch.stack([row.bincount(minlength=64) for row in chosen])
        assert bool(((counts - expected).abs() < 1 + 1e-9).all())
        total += counts
    assert float((total / 200 - expected).abs().max()) < 0.25


def test_batches_change_rounding_only_and_seeds_change_everything() -> None:
    q = Cosine(12)
    model = exact_model(GaussianData([0.5, 0.0], [[0.49, 0.2], [0.2, 0.3]]), q, Exact())
    y = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    factor = Observed(y, torch.tensor([True, False]))
    told: list[tuple[int, int]] = []
    a, b, c = (
        posterior_samples(
            model,
            factor,
            q.grid(),
            40,
            batch=batch,
            seed=seed,
            track=lambda done, total: told.append((done, total)),
        )
        for batch, seed in ((7, 0), (1000, 0), (1000, 1))
    )
    torch.testing.assert_close(a.x_0, b.x_0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.log_evidence, b.log_evidence, rtol=1e-5, atol=1e-5)
    assert not torch.equal(b.x_0[..., 1], c.x_0[..., 1])
    assert told[11] == (12 * 80, 12 * 80)
    # each population has its own condition, and correlation carries it over
    assert torch.equal(a.x_0[..., 0], y[:, None, 0].expand(2, 40))
    assert float(a.mean()[0, 1] - a.mean()[1, 1]) > 0.3
    torch.testing.assert_close(a.weights.sum(1), torch.ones(2, dtype=torch.float64))
    assert "40 particles" in str(a) and "effective sample size" in str(a) and "limit" in str(a)


def test_without_resampling_the_evidence_is_the_mean_weight() -> None:
    q = Harmonic(10)
    factor = Noisy(torch.tensor([[1.5]]), 0.5)
    found = posterior_samples(
        posterior_model(q), factor, q.grid(), 500, populations=100, threshold=0.0
    )
    assert not bool(found.resampled.any())
    assert_mean(found.log_evidence.exp(), EVIDENCE, 1)


def test_log_z_of_a_step_is_that_of_the_factor() -> None:
    q = Cosine(8)
    model = posterior_model(q)
    factor = Noisy(torch.tensor([[1.5]]), 0.5)
    conditioned = Conditioned(model, factor)
    x, times = torch.randn(5, 1), q.grid()
    kernel = model.kernel(x, times[4], times[3])
    product, log_z = factor.bind(model.process).multiply(kernel, times[3])
    torch.testing.assert_close(conditioned.log_z(x, times[4], times[3]), log_z)
    torch.testing.assert_close(conditioned.kernel(x, times[4], times[3]).mean, product.mean)
    last = factor.multiply(model.decoder(x, times[0]), None)
    torch.testing.assert_close(conditioned.log_z(x, times[0], None), last[1])
    torch.testing.assert_close(conditioned.decoder(x, times[0]).mean, last[0].mean)


def test_samplers_and_models_without_kernels_are_refused_with_the_remedy() -> None:
    q = Cosine(8)
    model = posterior_model(q)
    factor = Noisy(torch.tensor([[1.5]]), 0.5)
    conditioned = Conditioned(model, factor)
    for eta in (0.0, 0.5):
        with pytest.raises(ValueError, match="DDIM.*--sampler ancestral"):
            list(sample(conditioned, DDIM(eta), q.grid(), (3, 1)))
    with pytest.raises(ValueError, match="Ancestral"):
        conditioned.predict(torch.zeros(3, 1), q.grid()[3])
    with pytest.raises(ValueError, match="bound"):
        term(conditioned, torch.zeros(3, 1), q.grid(), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="Reverse"):
        Conditioned(nn.Identity(), factor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="apart"):
        posterior_samples(conditioned, factor, q.grid(), 4)


def test_conditions_that_do_not_fit_are_refused() -> None:
    q = Cosine(8)
    model = posterior_model(q)
    y = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="shape of the data"):
        Observed(y, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        Observed(y, torch.ones(3))
    with pytest.raises(ValueError, match="take Observed"):
        Noisy(y, 0.0)
    with pytest.raises(ValueError, match="at least 0"):
        Noisy(y, math.nan)
    with pytest.raises(ValueError, match="positive"):
        Noisy(y, 1.0, None, (torch.zeros(3), torch.zeros(3)))
    with pytest.raises(ValueError, match="bind"):
        Noisy(y, 1.0).multiply(kernel(), TIMES[0])
    with pytest.raises(ValueError, match="Laplace"):
        Noisy(y, 1.0).multiply(torch.distributions.Laplace(y, 1.0), None)
    with pytest.raises(ValueError, match="2 conditions do not fit 3 populations"):
        posterior_samples(model, Noisy(y, 1.0), q.grid(), 4, populations=3)
    with pytest.raises(ValueError, match="shape of an example"):
        tilt = Tilt(lambda x, s: x.sum(1), lambda x, s: torch.ones_like(x))
        posterior_samples(model, tilt, q.grid(), 4)
    with pytest.raises(UsageError, match="at least one particle"):
        posterior_samples(model, Noisy(y[:, :1], 1.0), q.grid(), 0)


def test_an_impossible_condition_is_a_numerical_failure() -> None:
    """Bits that the model never gives: no particle is left, and the message says so."""

    class Never(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return torch.full_like(x_t, -math.inf)

    q = Tabulated([0.3, 0.5])
    model = Reverse(Bernoulli(q, 0.2), Never(), Direct(), DirectDecoder())
    factor = Observed(torch.ones(1, 2), torch.tensor([True, True]))
    with pytest.raises(NumericalFailure, match="no particle can meet"):
        posterior_samples(model, factor, q.grid(), 10)


def test_every_pair_of_levels_and_scales_is_normalised() -> None:
    """The widened factors of a level model stay finite at both ends of the grid."""
    q = LogSNRLinear(13.3, -12.0)
    x = torch.randn(2, 3, dtype=torch.float64)
    for factor, t in itertools.product(factors().values(), q.grid(5)):
        bound_factor = factor.bind(Gaussian(q))
        product, log_z = bound_factor.multiply(DiagonalNormal(x, x * 0 - 20), t)
        assert bool(log_z.isfinite().all()) and bool(product.mean.isfinite().all())
        assert bool(bound_factor.log_r(x, t).isfinite().all())
