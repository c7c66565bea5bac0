"""Parameterisations, variances and decoders: the same model said in different words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from goldens import build, chain, check_steps, schedule
from oracles import Points, expected_bound, hermite
from torch import Tensor, nn

from nelbo.bound import pair_term, term_of
from nelbo.decoders import Constant, Density, Discretized, Following, LevelMass, Lose, Ratio
from nelbo.distributions import DiagonalNormal, DiscretizedNormal, LevelCategorical, level_values
from nelbo.parameterizations import X0, Epsilon, GaussianParameterization, Levels, Mean, Velocity
from nelbo.processes.base import Process
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import Cosine, Harmonic, Linear, LogSNRLinear, Schedule
from nelbo.variances import Between, Posterior, Transition

DTYPES = [torch.float64, torch.float32]
SHAPE = (4, 3, 2, 2)


class Wave(nn.Module):
    """Any smooth prediction of x_0."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return 0.9 * torch.tanh(1.3 * x_t) + 0.05 * torch.cos(3 * x_t)


class Told(nn.Module):
    """A network that says its prediction of x_0 as noise, velocity or posterior mean."""

    def __init__(self, schedule: Schedule, says: str, times: Tensor) -> None:
        super().__init__()
        self.process = Gaussian(schedule)
        self.says = says
        self.times = times

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        q = self.process.schedule
        x_0 = Wave()(x_t, t)
        shape = (-1, *([1] * (x_t.dim() - 1)))
        keep, lose = (v.reshape(shape).to(x_t.dtype) for v in (q.keep(t), q.lose(t)))
        noise = (x_t - keep.sqrt() * x_0) / lose.sqrt()
        if self.says == "epsilon":
            return noise
        if self.says == "v":
            return keep.sqrt() * noise - lose.sqrt() * x_0
        return torch.stack(
            [self.before(*row) for row in zip(x_t, x_0, t.expand(len(x_t)), strict=True)]
        )

    def before(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """The posterior mean at the chain's neighbour; at its first time, x̂_0 itself."""
        i = int((self.times - t).abs().argmin())
        return x_0 if i == 0 else self.process.posterior(x_t, x_0, t, self.times[i - 1]).mean


def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, dtype=torch.float64, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_steps(dtype: torch.dtype) -> None:
    check_steps(dtype)


# --- parameterisations ---------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("says", ["epsilon", "v", "mean"])
@pytest.mark.parametrize("q", [Linear(20), Cosine(20)], ids=["linear", "cosine"])
def test_every_parameterisation_says_the_same_model(
    q: Schedule, says: str, clip: float | None
) -> None:
    """x̂_0, the kernel of every pair and the decoder equal those of X0, neighbours or not."""
    times = q.grid(20)
    options: dict[str, GaussianParameterization] = {
        "epsilon": Epsilon(clip=clip),
        "v": Velocity(clip=clip),
        "mean": Mean(times, clip=clip),
    }
    decoder = Density(Lose())
    told = Reverse(Gaussian(q), Told(q, says, times), options[says], decoder)
    plain = Reverse(Gaussian(q), Wave(), X0(clip=clip), decoder)
    x_t = draw()
    for t, s in ((times[[19, 7, 3, 1]], times[[18, 6, 2, 0]]), (times[[19] * 4], times[[4] * 4])):
        a, b = told.at(x_t, t), plain.at(x_t, t)
        torch.testing.assert_close(a.x_0, b.x_0, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(a.kernel(s).mean, b.kernel(s).mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.noise(), b.noise(), rtol=1e-8, atol=1e-8)
    first = told.at(x_t, times[0]).decoder(), plain.at(x_t, times[0]).decoder()
    torch.testing.assert_close(first[0].mean, first[1].mean, rtol=1e-10, atol=1e-10)


def test_mean_is_the_network_output_between_neighbours() -> None:
    """The kernel of a neighbouring pair has the network's output as its mean, for any output."""
    q = Linear(20)
    times = q.grid()
    model = Reverse(Gaussian(q), nn.Module(), Mean(times), Density())
    model.network.forward = lambda x, t, cond: torch.sin(5 * x)  # type: ignore[method-assign]
    x_t, t = draw(), times[[1, 5, 10, 19]]
    kernel = model.kernel(x_t, t, times[[0, 4, 9, 18]])
    torch.testing.assert_close(kernel.mean, torch.sin(5 * x_t), rtol=1e-9, atol=1e-9)


def test_mean_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="X0"):
        Mean(torch.tensor([1.0]))


def test_clip_acts_on_x0_and_through_it_on_kernel_and_decoder() -> None:
    q = Cosine(10)
    model = Reverse(Gaussian(q), Wave(), X0(clip=0.3), Density())
    at = model.at(3 * draw(), q.grid()[5])
    assert float(at.x_0.abs().max()) == 0.3
    assert float(model.parameterization.convert(at).abs().max()) > 0.8
    expected = model.process.posterior(at.x_t, at.x_0, at.t, q.grid()[2]).mean
    torch.testing.assert_close(at.kernel(q.grid()[2]).mean, expected)
    assert float(at.decoder().mean.abs().max()) == 0.3
    difference = at.noise() - at.noise(clipped=False)
    assert float(difference.abs().max()) > 0.1


def test_rows_of_a_prediction() -> None:
    """Index and mask select the same examples, with a vector of times or a single one."""
    q = schedule("cosine", 10)
    c = chain(q, [0, 3, 9], torch.float64)
    model = build(q, "epsilon", "learned_range", True, c.times)
    at = model.at(c.x_t, c.times[c.index])
    rows = torch.tensor([1, 4, 7])
    mask = torch.zeros(12, dtype=torch.bool).index_fill(0, rows, True)
    for some in (at[rows], at[mask]):
        torch.testing.assert_close(some.x_0, at.x_0[rows])
        kernel = some.kernel(c.times[0])
        assert isinstance(kernel, DiagonalNormal)
        assert kernel.logvar.shape == c.x_t[rows].shape
    single = model.at(c.x_t[rows], c.times[1])
    torch.testing.assert_close(single[torch.tensor([2])].x_0, at.x_0[rows[2:]])


# --- variances -----------------------------------------------------------------------------------


def between_model(extra: float, edge: float) -> tuple[Reverse, Tensor]:
    class Constantly(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return torch.cat([Wave()(x_t, t), torch.full_like(x_t, extra)], 1)

    q = Cosine(10)
    return Reverse(Gaussian(q), Constantly(), X0(Between()), Density(Constant(edge))), q.grid()


@pytest.mark.parametrize("extra", [-1.0, 1.0, 0.0, 3.0])
def test_between_interpolates_and_extrapolates_the_log_variance(extra: float) -> None:
    """v = −1 is β̃, v = 1 is β, and v is not clamped; the decoder goes from its rule to lose."""
    model, times = between_model(extra, edge=-7.0)
    at = model.at(draw(), times[5])
    process = model.process
    assert isinstance(process, Gaussian)
    pair = process.pair(times[2], times[5])
    weight = (extra + 1) / 2
    kernel, decoder = at.kernel(times[2]), model.at(draw(), times[0]).decoder()
    assert isinstance(kernel, DiagonalNormal) and isinstance(decoder, DiagonalNormal)
    expected = float(weight * pair.log_beta + (1 - weight) * pair.log_posterior)
    torch.testing.assert_close(kernel.logvar, torch.full(SHAPE, expected, dtype=torch.float64))
    edge = weight * float(process.schedule.log_lose(times[0])) + (1 - weight) * -7.0
    torch.testing.assert_close(decoder.logvar, torch.full(SHAPE, edge, dtype=torch.float64))


def test_fixed_variances_and_edges() -> None:
    q = LogSNRLinear(5.0, -5.0)
    times, process = q.grid(6), Gaussian(q)
    s, t = times[[0, 1, 2, 0]], times[[3, 2, 5, 1]]
    pair = process.pair(s, t)
    for variance, expected in ((Posterior(), pair.log_posterior), (Transition(), pair.log_beta)):
        kernel = Reverse(process, Wave(), X0(variance), Density()).kernel(draw(), t, s)
        assert isinstance(kernel, DiagonalNormal)
        torch.testing.assert_close(kernel.logvar.flatten(), expected)
    first = times[:1].expand(2)
    edges = {
        Lose(): q.log_lose(first),
        Ratio(): -q.logsnr(first),
        Following(times[1]): process.pair(first, times[1].expand(2)).log_posterior,
        Constant(-3.0): torch.full((2,), -3.0, dtype=torch.float64),
    }
    for edge, expected in edges.items():
        torch.testing.assert_close(edge.log_variance(process, first), expected)


def test_mean_detached_leaves_gradients_to_the_variance_alone() -> None:
    """Hybrid's stop-gradient: the same values, no gradient to the first half of the channels."""
    q = schedule("cosine", 10)
    c = chain(q, list(range(10)), torch.float64)
    model = build(q, "epsilon", "learned_range", False, c.times)
    at = model.at(c.x_t, c.times[c.index])
    at.output.requires_grad_()
    detached = at.mean_detached()
    values = [term_of(a, c.x_0, c.times, c.index) for a in (at, detached)]
    torch.testing.assert_close(values[0], values[1])
    full, part = (torch.autograd.grad(v.sum(), at.output)[0] for v in values)
    assert float(part[:, :3].abs().max()) == 0 and float(full[:, :3].abs().max()) > 0
    torch.testing.assert_close(part[:, 3:], full[:, 3:])
    with pytest.raises(ValueError, match="Between"):
        build(q, "x0", "fixed_small", False, c.times).parameterization.detach_mean(at.output)


def test_channels() -> None:
    assert Epsilon().channels(3) == 3
    assert Epsilon(Between()).channels(3) == 6
    assert Levels(17).channels(3) == 51


# --- decoders ------------------------------------------------------------------------------------


def test_density_and_discretized_share_mean_and_variance() -> None:
    q = Cosine(10)
    times = q.grid()
    for clip in (None, 0.2):
        laws = [
            Reverse(Gaussian(q), Wave(), X0(clip=clip), decoder).decoder(draw(), times[0])
            for decoder in (Density(Following(times[1])), Discretized(9, Following(times[1])))
        ]
        assert isinstance(laws[0], DiagonalNormal) and isinstance(laws[1], DiscretizedNormal)
        assert laws[1].levels == 9
        torch.testing.assert_close(laws[0].mean, laws[1].mean)
        torch.testing.assert_close(laws[0].logvar, laws[1].logvar)


def test_a_network_in_lower_precision_is_read_in_the_precision_of_x() -> None:
    class Half(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return (0.5 * x_t).to(torch.bfloat16)

    q = Cosine(10)
    model = Reverse(Gaussian(q), Half(), X0(), Density())
    assert model.predict(draw(dtype=torch.float32), q.grid()[3]).dtype == torch.float32


def test_gaussian_parts_refuse_another_family() -> None:
    class Other(Process):
        prior = marginal = transition = posterior = None  # type: ignore[assignment]

    Other.__abstractmethods__ = frozenset()
    model = Reverse(Other(Cosine(10)), Wave(), X0(), Density())
    with pytest.raises(ValueError, match="Gaussian process, not Other"):
        model.kernel(draw(), Cosine(10).grid()[5], Cosine(10).grid()[2])


# --- levels --------------------------------------------------------------------------------------


class Logits(nn.Module):
    """The same logits for every dimension, (B, C·n, H, W), channel-major."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        shape = (len(x_t), x_t.shape[1], len(self.logits), *x_t.shape[2:])
        tail = [1] * (x_t.dim() - 2)
        return self.logits.to(x_t.dtype).view(1, 1, -1, *tail).expand(shape).flatten(1, 2)


def levels_model(logits: Tensor, q: Schedule) -> Reverse:
    return Reverse(Gaussian(q), Logits(logits), Levels(len(logits)), LevelMass())


def brute_masses(x_t: Tensor, log_prior: Tensor, keep: float, lose: float) -> Tensor:
    """p(level | x_t) by Bayes' rule, (..., n)."""
    v = level_values(len(log_prior), x_t)
    square = (x_t[..., None] - math.sqrt(keep) * v) ** 2
    return (log_prior - square / (2 * lose)).softmax(-1)


@pytest.mark.parametrize("q", [LogSNRLinear(8.0, -8.0), Harmonic(9)], ids=["logsnr", "harmonic"])
def test_levels_with_zero_logits_know_the_grid_of_levels(q: Schedule) -> None:
    """x̂_0 is the exact mean under independent uniform levels, down to keep = 0."""
    x_t = draw()
    for t in q.grid(9):
        keep, lose = float(q.keep(t)), float(q.lose(t))
        for prior in (
            torch.zeros(17, dtype=torch.float64),
            torch.linspace(-2, 1, 17, dtype=torch.float64) ** 2,
        ):
            model = levels_model(prior, q)
            masses = brute_masses(x_t, prior, keep, lose)
            x_0 = masses @ level_values(17, x_t)
            torch.testing.assert_close(model.predict(x_t, t), x_0, rtol=1e-11, atol=1e-12)
            decoder = model.decoder(x_t, t)
            assert isinstance(decoder, LevelCategorical)
            torch.testing.assert_close(decoder.logits.exp(), masses, rtol=1e-9, atol=1e-12)


def test_levels_read_their_channels_in_order() -> None:
    """Logits that differ by channel: channel c of the data owns outputs c·n … c·n + n − 1."""
    logits = torch.randn(1, 6, 2, 2, generator=torch.Generator().manual_seed(0)).double()

    class Fixed(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return logits

    q = LogSNRLinear(2.0, -60.0)  # at t = 1 the evidence of x_t vanishes: the logits remain
    model = Reverse(Gaussian(q), Fixed(), Levels(3), LevelMass())
    decoder = model.decoder(
        torch.zeros(1, 2, 2, 2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    assert isinstance(decoder, LevelCategorical)
    expected = logits.view(1, 2, 3, 2, 2).movedim(2, -1).log_softmax(-1)
    torch.testing.assert_close(decoder.logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("levels", [17, 256])
def test_levels_keep_their_digits_in_float32(levels: int) -> None:
    """At log-SNR 10 the squares are of size 1e4; the masses must stay good to 1e-4."""
    q = LogSNRLinear(10.0, -5.0)
    t, prior = torch.tensor(0.0, dtype=torch.float64), torch.zeros(levels, dtype=torch.float64)
    x_t = level_values(levels, draw())[torch.arange(4 * 3 * 2 * 2) * 5 % levels].view(SHAPE)
    x_t = (x_t + math.exp(-5) * draw()).float().double()
    exact = levels_model(prior, q).decoder(x_t, t)
    single = levels_model(prior, q).decoder(x_t.float(), t)
    assert isinstance(exact, LevelCategorical) and isinstance(single, LevelCategorical)
    error = (single.logits.double().exp() - exact.logits.exp()).abs().max()
    assert float(error) < 1e-4


@pytest.mark.parametrize("steps", [4, 20])
def test_bound_of_exact_levels_equals_theory(steps: int) -> None:
    """17 levels, known frequencies, one dimension: every term by Bayes' rule and quadrature.

    Theory: decoder −E log p(level|x_1), pairs ½ (snr_s − snr_t) E Var(x_0|x_t).
    """
    frequency = (torch.linspace(-2, 1, 17, dtype=torch.float64) ** 2).softmax(0)
    q = LogSNRLinear(9.0, -9.0)
    times, model = q.grid(steps), levels_model(frequency.log(), q)
    z = torch.linspace(-9, 9, 721, dtype=torch.float64)
    weight = torch.exp(-0.5 * z**2) / torch.exp(-0.5 * z**2).sum()
    values = level_values(17, z)
    x_0 = values.repeat_interleave(721)[:, None]
    weight = (frequency[:, None] * weight).flatten()
    snr = q.logsnr(times).exp()
    for i in range(steps):
        keep, lose = float(q.keep(times[i])), float(q.lose(times[i]))
        x_t = math.sqrt(keep) * x_0 + math.sqrt(lose) * z.repeat(17)[:, None]
        at = model.at(x_t, times[i])
        term = float(weight @ term_of(at, x_0, times, torch.tensor(i)))
        masses = brute_masses(x_t[:, 0], frequency.log(), keep, lose)
        spread = masses @ values**2 - (masses @ values) ** 2
        level = torch.arange(17).repeat_interleave(721)
        nll = -masses.gather(1, level[:, None])[:, 0].log()
        mean = weight @ (nll if i == 0 else 0.5 * (snr[i - 1] - snr[i]) * spread)
        assert abs(term - float(mean)) < 1e-8, (i, term, float(mean))


def test_bound_of_exact_levels_closes_on_the_entropy_like_1_over_n() -> None:
    """E L − H for the same law; it halves when the grid doubles."""
    frequency = (torch.linspace(-2, 1, 17, dtype=torch.float64) ** 2).softmax(0)
    entropy = -float(frequency @ frequency.log())
    z, weight = hermite(60)
    values = level_values(17, z)
    pairs = torch.cartesian_prod(values, z)
    points = Points(pairs[:, :1], pairs[:, 1:], torch.outer(frequency, weight).flatten())
    q = LogSNRLinear(9.0, -12.0)
    model = levels_model(frequency.log(), q)
    gaps = [
        float(expected_bound(model, points, q.grid(steps)).total) - entropy
        for steps in (101, 201, 401)
    ]
    assert gaps[2] > 0
    assert all(1.9 < a / b < 2.1 for a, b in zip(gaps, gaps[1:], strict=False)), gaps


def test_level_mass_needs_levels() -> None:
    model = Reverse(Gaussian(Cosine(10)), Wave(), X0(), LevelMass())
    with pytest.raises(ValueError, match="Discretized"):
        model.decoder(draw(), Cosine(10).grid()[0])


def test_pair_term_of_a_perfect_prediction_is_zero() -> None:
    """x̂_0 = x_0 and σ² = β̃: the kernel is the posterior, and its divergence is exactly 0."""

    class Constantly(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return draw(7)

    q = Cosine(10)
    model = Reverse(Gaussian(q), Constantly(), X0(), Density())
    at = model.at(draw(), q.grid()[5])
    assert pair_term(at, draw(7), q.grid()[4]).tolist() == [0.0] * 4
