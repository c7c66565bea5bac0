"""The error curve: exact on Gaussian data, subsets predicted, limits, and planted errors."""

from __future__ import annotations

import math

import pytest
import torch
from goldens import TOLERANCES, assert_near, build, chain, combinations, load, schedule, terms
from oracles import (
    Exact,
    GaussianData,
    chains,
    exact_model,
    expected_bound,
    gaussian_points,
    ring,
    z_limit,
)
from torch import Tensor

from nelbo import curve as curves
from nelbo.bound import decoder_term
from nelbo.curve import Curve, measure
from nelbo.decoders import Discretized, Edge, Following, Lose
from nelbo.drawing import Drawer
from nelbo.errors import NumericalFailure
from nelbo.estimate import Estimate
from nelbo.evaluation import evaluate
from nelbo.parameterizations import with_variance
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse, strided
from nelbo.schedules import Cosine, Harmonic, Linear, LogSNRLinear, Schedule, even
from nelbo.variances import Between, Optimal, Posterior, Transition, Variance

DATA = GaussianData([0.5, -1.0], [[0.49, 0.2], [0.2, 0.3]])


def exact_curve(data: GaussianData, q: Schedule, times: Tensor, edge: Edge | None = None) -> Curve:
    """The curve of the exact denoiser in closed form: one example that is the expectation."""
    model = exact_model(data, q, Posterior(), edge or Lose())
    points = gaussian_points(data)
    prior = expected_bound(model, points, times).prior
    decoders = [expected_bound(model, points, t[None]).reconstruction for t in times]
    error = data.mmse(q.logsnr(times))[None] / data.dims
    return Curve(times, Gaussian(q), error, prior, torch.stack(decoders, 1), data.dims)


def rules(curve: Curve) -> dict[str, Variance]:
    return {"posterior": Posterior(), "transition": Transition(), "optimal": curve.optimal()}


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "logsnr", "harmonic"])
def test_every_chain_follows_from_the_curve(name: str) -> None:
    """Random subsets, three variances: the prediction is the closed-form bound of that chain."""
    q = chains(30)[name]
    times = q.grid(30)
    curve, generator = exact_curve(DATA, q, times), torch.Generator().manual_seed(0)
    points = gaussian_points(DATA)
    for size in (1, 2, 5, 30):
        inner = torch.randperm(29, generator=generator)[: size - 1].sort().values
        kept = torch.cat([inner, torch.tensor([29])])
        for rule, variance in rules(curve).items():
            model = exact_model(DATA, q, variance, Lose())
            truth = float(expected_bound(strided(model, times[kept]), points, times[kept]).total)
            value = float(curve.values(variance, kept))
            assert abs(value - truth) < 1e-9 * max(1, abs(truth)), (name, size, rule)


def test_optimal_variance_of_the_golden_gaussian() -> None:
    """opt_scalar of gaussian3.npz, every pair term, to 1e-9 relative."""
    golden = load("gaussian3")
    data = GaussianData(golden["mean"], golden["cov"])
    v = golden["variants"].tolist().index("opt_scalar")
    for steps in golden["N"].tolist():
        for name, q in chains(steps).items():
            times, key = q.grid(steps), f"{name}_N{steps}/"
            curve = exact_curve(data, q, times)
            model = exact_model(data, q, curve.optimal(), Lose())
            terms = expected_bound(model, gaussian_points(data), times).diffusion[0]
            expected = golden[f"{key}terms_nats"][v][1:]
            assert_near(terms, expected, 1e-9, 1e-12, key)
            consecutive = torch.arange(steps - 1)
            costs = curve.costs(curve.optimal())[consecutive, consecutive + 1]
            assert_near(costs, expected, 1e-9, 1e-12, f"{key} costs")


def test_costs_are_the_closed_forms() -> None:
    """½ d (snr_s − snr_t) M for β̃ and (d/2) log(1 + (snr_s − snr_t) M) for the best variance."""
    q = Linear(40)
    times = q.grid()
    curve = exact_curve(DATA, q, times)
    snr, error = q.logsnr(times).exp(), curve.error[0]
    gain = (snr[:, None] - snr[None]) * error
    above = torch.ones(40, 40, dtype=torch.bool).triu(1)
    for variance, form in ((Posterior(), gain), (curve.optimal(), torch.log1p(gain.clamp(min=0)))):
        table = curve.costs(variance)
        assert_near(table[above], form[above], 1e-9, 1e-14)
        assert bool(table[~above].isinf().all())


def test_the_optimal_variance_is_the_best_scalar() -> None:
    """Any factor on σ² costs more, and β̃ and β cost at least as much."""
    q = Cosine(20)
    times = q.grid()
    curve = exact_curve(DATA, q, times)
    best = curve.optimal()
    everything = torch.arange(20)
    value = float(curve.values(best, everything))
    for factor in (0.8, 0.98, 1.02, 1.3):

        class Scaled(Optimal):
            def between(self, pair, extra, like, factor=factor):  # type: ignore[no-untyped-def]
                return super().between(pair, extra, like) + math.log(factor)

        scaled = Scaled(times, best.error)
        assert float(curve.values(scaled, everything)) > value + 1e-6
    for variance in (Posterior(), Transition()):
        assert bool((curve.costs(variance) >= curve.costs(best) - 1e-12)[:-1, 1:].all())


def test_the_optimal_variance_knows_only_its_own_times() -> None:
    q = LogSNRLinear(6.0, -6.0)
    times = q.grid(5)
    variance = Optimal(times, torch.ones(5))
    pair = Gaussian(q).pair(times[0], torch.tensor(0.6, dtype=torch.float64))
    with pytest.raises(ValueError, match="other times"):
        variance.between(pair, None, torch.zeros(1))
    with pytest.raises(ValueError, match="every time"):
        Optimal(times, torch.ones(4))
    half = variance.half()
    assert half.error.dtype == torch.float64 and set(half.state_dict()) == {"times", "error"}


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["posterior", "transition", "optimal"])
def test_the_gap_to_continuous_time_halves(rule: str) -> None:
    """The bound falls to the limit like 1/N for every variance, and the limit is one."""
    q = LogSNRLinear(6.0, -6.0)
    fine = exact_curve(DATA, q, q.grid(3201))
    limit = float(fine.continuous())
    assert fine.resolution() < 1e-5
    gaps = []
    for steps in (101, 201, 401):
        curve = exact_curve(DATA, q, q.grid(steps))
        gaps.append(float(curve.values(rules(curve)[rule], torch.arange(steps))) - limit)
        # the limit needs no fine grid, and the extrapolation comes near it
        assert abs(float(curve.continuous()) - limit) < 0.02 * abs(gaps[-1])
        value, gap = curve.richardson(rules(curve)[rule])
        assert abs(float(value) - limit) < 0.1 * abs(gaps[-1])
        assert float(gap) == pytest.approx(gaps[-1], rel=0.1)
    assert gaps[-1] > 0
    assert 1.8 < gaps[0] / gaps[1] < 2.2 and 1.9 < gaps[1] / gaps[2] < 2.1


def test_the_limit_of_the_exact_denoiser_is_the_entropy() -> None:
    """L_∞ of exact Gaussian data with an exact decoder is H(q) + KL(q(x_N)‖π), to quadrature."""
    q = LogSNRLinear(12.0, -8.0)
    times = q.grid(2001)
    curve = exact_curve(DATA, q, times)
    points = gaussian_points(DATA)
    exact = exact_model(DATA, q, Exact())
    decoder = float(expected_bound(exact, points, times[:1]).reconstruction)
    swap = decoder - float(curve.decoder[0, 0])
    truth = DATA.entropy() + DATA.prior_kl(float(q.keep(times[-1])))
    assert abs(float(curve.continuous()) + swap - truth) < 1e-4


def test_a_last_step_that_erases_everything_has_a_limit() -> None:
    """½ ∫ M d snr from 0 to snr_1 is ½ Σ log(1 + snr_1 v) over the eigenvalues v."""
    q = Harmonic(4000)
    curve = exact_curve(DATA, q, q.grid())
    truth = 0.5 * float(torch.log1p(q.logsnr(q.grid()[0]).exp() * DATA.eigenvalues).sum())
    value = float(curve.continuous() - curve.prior - curve.decoder[0, 0])
    assert abs(value - truth) < 0.02 + 2 * curve.resolution()
    assert value == pytest.approx(truth, rel=5e-3)


def test_inserting_a_time_never_costs() -> None:
    """I37 for the error curve of an exact denoiser: the bound with β̃ falls at every insertion."""
    q = Linear(100)
    curve = exact_curve(DATA, q, q.grid())
    kept = [0, 99]
    values = [float(curve.values(Posterior(), torch.tensor(kept)))]
    for new in torch.randperm(98, generator=torch.Generator().manual_seed(1)).tolist():
        kept = sorted([*kept, new + 1])
        values.append(float(curve.values(Posterior(), torch.tensor(kept))))
    assert all(b < a for a, b in zip(values, values[1:], strict=False))


# --- the best grids ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "logsnr"])
def test_best_grids_are_never_worse_than_even_ones(name: str) -> None:
    q = chains(200)[name]
    curve = exact_curve(DATA, q, q.grid(200))
    for variance in rules(curve).values():
        found = curve.subsets(variance, 60)
        for size in (2, 3, 5, 10, 30, 60):
            best, plain = found.best(size), even(200, size)
            assert best[-1] == 199 and len(best) == size
            value = float(curve.values(variance, best))
            assert value <= float(curve.values(variance, plain)) + 1e-12
            known = float(found.costs[size - 1] + curve.prior)
            assert value == pytest.approx(known, abs=1e-9)


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_a_decoder_that_follows_the_first_pair(steps: int) -> None:
    """Its cost belongs to the first edge: the table is that of brute force over models."""
    q = schedule("cosine", 50)
    times = q.grid()
    model = build(q, "x0", "fixed_small", True, times, "copy")
    data = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    data = (data * 127.5).round() / 127.5
    curve = measure(model, data, times, seed=1)
    assert curve.decoder.shape == (3, 50, curves.NODES)
    table = curve.first()
    for i, j in ((0, 1), (0, 49), (5, 6), (5, 20), (30, 40), (48, 49)):
        chain = strided(model, times[[i, j]])
        truth = decoder_by_hand(chain, data, times, i, seed=1)
        value = float(table[i, j])
        assert abs(value - truth) < 2e-3 * abs(truth) + 1e-3, (i, j, value, truth)
    found = curve.subsets(Posterior(), steps)
    best = found.best(steps)
    assert float(found.costs[-1]) <= float(
        curve.values(Posterior(), even(50, steps)).mean() - curve.prior.mean()
    )
    total = float(curve.values(Posterior(), best).mean())
    assert total == pytest.approx(float(found.costs[-1] + curve.prior.mean()), rel=1e-9)
    assert not math.isfinite(float(found.costs[0]))


def decoder_by_hand(chain: Reverse, data: Tensor, times: Tensor, i: int, seed: int) -> float:
    """The mean decoder term at the latents of the curve."""
    drawer = Drawer(chain, data, lambda y: y, times, 512, seed, "cpu", lambda a, b: None)
    x_t = drawer.latent(data, torch.arange(len(data)), times[i], "curve", i)
    return float(decoder_term(chain.at(x_t, times[i]), data).mean())


# --- strided models ------------------------------------------------------------------------------


def test_a_strided_model_follows_its_own_first_pair() -> None:
    """The golden subsets with the rule `copy`, from the model of the whole chain."""
    golden = load("strided")
    allow = TOLERANCES[torch.float64]
    for subset in sorted({key.split("/")[0] for key in golden if "/" in key} - {"one"}):
        for where, (name, kind, variance, clip) in combinations(golden):
            q = schedule(name, 1000)
            c = chain(q, golden[f"{subset}/steps"].tolist(), torch.float64)
            whole = build(q, kind, variance, clip, q.grid())
            values, _ = terms(strided(whole, c.times), c)
            expected = golden[f"{subset}/vb"][where]
            assert_near(values[:, 0], expected[:, 0], allow.decoder, allow.absolute, subset)
            assert_near(values[:, 1:], expected[:, 1:], allow.pair, allow.absolute, subset)
            if subset == "two":
                stale = terms(whole, c)[0][:, 0]
                assert bool(((stale - values[:, 0]).abs() > 1e-3).any())


def test_strided_and_varied_models_share_and_leave_the_original() -> None:
    q = Linear(20)
    model = build(q, "epsilon", "learned_range", True, q.grid()).eval()
    other = with_variance(strided(model, q.grid(4)), Posterior())
    assert other.network is model.network and not other.training
    assert isinstance(model.parameterization.variance, Between)
    assert isinstance(model.decoder_rule, Discretized)
    edge = model.decoder_rule.edge
    assert isinstance(edge, Following) and edge.t_2 == q.grid()[1]
    x = torch.rand(2, 3, 4, 4).double()
    t, s = q.grid()[10], q.grid()[3]
    first, second = model.at(x, t), other.at(x, t)
    assert torch.equal(first.x_0, second.x_0)
    assert torch.equal(first.kernel(s).mean, second.kernel(s).mean)
    low = model.process.pair(s, t).log_posterior
    assert_near(second.kernel(s).logvar, low, 1e-12, 0)
    # the decoder reads the network's own channels under both
    whole = with_variance(model, Posterior())
    a, b = (m.at(x, q.grid()[0]).decoder().logvar for m in (model, whole))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="two latents"):
        strided(model, q.grid(1))


# --- measured ------------------------------------------------------------------------------------


def agreement(sizes: tuple[int, ...], shift: int = 0) -> float:
    """The largest |z| between predicted and evaluated bounds of a ring, 4 chains for each size.

    The curve comes from one half of the data, the evaluations from the other. `shift` takes the
    decoder term of a wrong time.
    """
    data, q = ring(8, 1.0, 0.15), LogSNRLinear(7.0, -6.0)
    times = q.grid(60)
    model = exact_model(data, q, Posterior(), Lose())
    torch.manual_seed(0)
    train, test = data.draw(2000), data.draw(2000)
    curve = measure(model, train, times, seed=2, batch=4096)
    wrong = curve.decoder.roll(-shift, 1)
    curve = Curve(times, curve.process, curve.error, curve.prior, wrong, 2)
    worst = 0.0
    for variance in (Posterior(), curve.optimal()):
        for size in sizes:
            for kept in (even(60, size), curve.subsets(variance, size).best(size)):
                chain = with_variance(strided(model, times[kept]), variance)
                found = evaluate(chain, test, times[kept], batch=4096, replicates=2, seed=3)
                worst = max(worst, z_between(curve.values(variance, kept), found.values()))
    return worst


def test_best_grids_are_better_where_it_is_measured_too() -> None:
    """Paired over test examples: far below the even grid, for both variances (2 comparisons)."""
    data, q = ring(8, 1.0, 0.15), LogSNRLinear(7.0, -6.0)
    times = q.grid(60)
    model = exact_model(data, q, Posterior(), Lose())
    torch.manual_seed(1)
    train, test = data.draw(300), data.draw(1000)
    curve = measure(model, train, times, batch=4096)
    for variance in (Posterior(), curve.optimal()):
        totals = []
        for kept in (even(60, 6), curve.subsets(variance, 6).best(6)):
            chain = with_variance(strided(model, times[kept]), variance)
            found = evaluate(chain, test, times[kept], batch=4096, replicates=4)
            totals.append(found.values()["total"])
        change = Estimate.of(totals[1] - totals[0])
        assert change.mean < -z_limit(2) * change.se


def z_between(predicted: Tensor, found: dict[str, Tensor]) -> float:
    a, b = Estimate.of(predicted), Estimate.of(found["total"])
    return abs(a.mean - b.mean) / math.hypot(a.se, b.se)


def test_predicted_and_evaluated_bounds_agree() -> None:
    """12 comparisons with false alarms ≤ 1e-6 together; a wrong decoder cost is found out."""
    assert agreement((3, 8, 20)) < z_limit(12)
    assert agreement((8,), shift=4) > 2 * z_limit(12)


def test_optimal_variance_of_the_golden_ring() -> None:
    """opt_scalar of mixture2d.npz: six measured curves within 1e-6 together."""
    golden, data = load("mixture2d"), ring(8, 1.0, 0.15)
    v = golden["variants"].tolist().index("opt_scalar")
    torch.manual_seed(0)
    for name in ("cosine", "logsnr"):
        for steps, n in ((4, 10_000), (20, 5000), (200, 500)):
            q = Cosine(steps) if name == "cosine" else LogSNRLinear(10.0, -8.0)
            times = q.grid(steps)
            model = exact_model(data, q, Posterior(), Lose())
            curve = measure(model, data.draw(n), times, batch=4096)
            key = f"bound_{name}_N{steps}/"
            truth = float(golden[f"{key}terms_nats"][v][1:].sum())
            free = Curve(times, curve.process, curve.error, 0 * curve.prior, 0 * curve.decoder, 2)
            value = free.predicted(curve.optimal(), torch.arange(steps))
            assert abs(value.mean - truth) < z_limit(6) * value.se, (key, value, truth)


def test_the_curve_does_not_depend_on_the_batch_size() -> None:
    q = Linear(10)
    model = exact_model(DATA, q, Posterior(), Lose())
    data = torch.randn(130, 2, generator=torch.Generator().manual_seed(0)).double()
    a, b = (measure(model, data, q.grid(), batch=n) for n in (64, 512))
    torch.testing.assert_close(a.error, b.error, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.decoder, b.decoder, rtol=1e-12, atol=0)


def test_a_network_that_diverges_is_named() -> None:
    q = Linear(4)
    model = exact_model(DATA, q, Posterior(), Lose())
    data = torch.zeros(3, 2).double()
    data[1] = torch.inf
    with pytest.raises(NumericalFailure, match="first ones \\[1\\]"):
        measure(model, data, q.grid())


def test_smoothing_hides_noise_from_the_search_and_moves_no_figure() -> None:
    """The best grid of a noisy curve promises too much; smoothed it keeps its promise.

    Noise of 30 % at every time of one averaged example; the truth is the exact curve.
    """
    q = LogSNRLinear(8.0, -6.0)
    exact = exact_curve(DATA, q, q.grid(1000))
    torch.manual_seed(0)
    error = exact.error * (1 + 0.3 * torch.randn(1, 1000).double()).clamp(min=0.05)
    raw = Curve(exact.times, exact.process, error, exact.prior, exact.decoder, 2)
    smooth = raw.smoothed()
    everything = torch.arange(1000)
    for kept in (everything, even(1000, 20)):
        clean, same = (float(c.values(Posterior(), kept)) for c in (exact, exact.smoothed()))
        assert abs(clean - same) < 2e-3 * abs(clean)
    short = {}
    for name, c in (("raw", raw), ("smooth", smooth)):
        kept = c.subsets(Posterior(), 50).best(50)
        promised, true = (float(x.values(Posterior(), kept)) for x in (c, exact))
        short[name] = true - promised
    assert abs(short["smooth"]) < 0.25 * short["raw"]
