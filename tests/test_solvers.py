"""Second-order solvers: golden trajectories, order of convergence, ends of the walk, spacing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from goldens import build, load, schedule
from oracles import GaussianData, exact_model, ring
from torch import Tensor

from nelbo.errors import UsageError
from nelbo.parameterizations import Epsilon
from nelbo.processes.bernoulli import Bernoulli
from nelbo.reverse import Reverse
from nelbo.samplers import DDIM, Sampler, sample
from nelbo.schedules import Cosine, Harmonic, Linear, LogSNRLinear, Schedule
from nelbo.solvers import DPMSolverPP, Heun
from nelbo.spacing import Interpolated, even_logsnr, time_at
from nelbo.variances import Posterior
from nelbo.walks.sample import _check_flow

RUNS = load("solver")["runs"].tolist()


# --- golden trajectories -------------------------------------------------------------------------


def trajectory(model: Reverse, sampler: Sampler, times: Tensor, x: Tensor) -> list[Tensor]:
    """Every state of a walk from x at the last time to x_0."""
    state, states = sampler.init(model, x), [x]
    for i in range(len(times) - 1, 0, -1):
        x, state = sampler.step(model, x, times[i], times[i - 1], state)
        states.append(x)
    return [*states, sampler.finish(model, x, times[0], state)]


def golden_error(run: str, s: int, p: int, dtype: torch.dtype, sampler: Sampler) -> float:
    """max|state − golden| over max|golden| of one trajectory."""
    golden = load("solver")
    q = schedule(str(golden["schedules"][s]), int(golden["T"]))
    times = q.times(golden[f"{run}/timesteps"].tolist()[::-1])
    model = build(q, str(golden["params"][p]), "fixed_small", False, times)
    start = torch.from_numpy(golden["start"]).to(dtype)
    expected = torch.from_numpy(golden[f"{run}/trajectory"][s, p])
    states = torch.cat(trajectory(model, sampler, times, start)).double()
    assert states.shape == expected.shape
    return float((states - expected).abs().max() / expected.abs().max())


def golden_sampler(run: str) -> DPMSolverPP:
    golden = load("solver")
    kind, final = (str(golden[f"{run}/{key}"]) for key in ("kind", "final"))
    return DPMSolverPP(int(golden[f"{run}/order"]), kind, final)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", RUNS)
def test_trajectories_are_the_golden_ones(run: str) -> None:
    """Both schedules, three parametrisations, as the golden README allows: 1e-10 and 1e-3.

    In float32 the cosine schedule with the epsilon network is left out, as the README asks.
    """
    for s in range(2):
        for p in range(3):
            assert golden_error(run, s, p, torch.float64, golden_sampler(run)) < 1e-10
            if (s, p) != (1, 0):
                assert golden_error(run, s, p, torch.float32, golden_sampler(run)) < 1e-3


@pytest.mark.parametrize(
    ("run", "wrong"),
    [
        ("2m_zero_20", DPMSolverPP(1)),
        ("2m_zero_20", DPMSolverPP(2, "heun")),
        ("2m_sigma_min_20", DPMSolverPP(2, "midpoint", "zero")),
        ("first_order_zero_10", DPMSolverPP(2)),
        ("2m_zero_20", Heun()),
    ],
)
def test_another_solver_misses_the_trajectory(run: str, wrong: Sampler) -> None:
    assert golden_error(run, 0, 1, torch.float64, wrong) > 1e-6


def test_the_short_walk_ends_in_first_order() -> None:
    """Below 15 calls the step to sigma_min forgets its history; with 15 it does not."""
    q = Cosine(100)
    model = exact_model(GaussianData([0.5], [[0.49]]), q, Posterior())
    x = torch.tensor([[0.3]], dtype=torch.float64)
    for count, short in ((14, True), (15, False)):
        times = q.times([6 * k + 6 for k in range(count)])
        solver = DPMSolverPP(final="sigma_min")
        state, x_t = solver.init(model, x), x
        for i in range(count - 1, 0, -1):
            x_t, state = solver.step(model, x_t, times[i], times[i - 1], state)
        one, _ = DPMSolverPP(1).step(model, x_t, times[0], q.times([0])[0], state)
        end = solver.finish(model, x_t, times[0], state)
        assert bool(torch.allclose(end, one, rtol=0, atol=1e-14)) == short


# --- order ---------------------------------------------------------------------------------------


def at_first_time(model: Reverse, sampler: Sampler, times: Tensor, x: Tensor) -> Tensor:
    return trajectory(model, sampler, times, x)[-2]


def slope(errors: list[float], counts: list[int]) -> float:
    """Least-squares slope of −log error over log steps."""
    x = torch.tensor(counts, dtype=torch.float64).log()
    y = -torch.tensor(errors, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


SAMPLERS: list[tuple[Callable[[], Sampler], float]] = [
    (DDIM, 1.0),
    (lambda: DPMSolverPP(1), 1.0),
    (lambda: DPMSolverPP(2, "midpoint"), 2.0),
    (lambda: DPMSolverPP(2, "heun"), 2.0),
    (Heun, 2.0),
]


@pytest.mark.parametrize(("make", "order"), SAMPLERS)
def test_order_on_gaussian_data(make: Callable[[], Sampler], order: float) -> None:
    """x_1 = √k_1 m + √(k_1 v + l_1) (x_N − √k_N m)/√(k_N v + l_N), exactly."""
    m, v = 0.5, 0.09
    q = LogSNRLinear(5.0, -8.0)
    model = exact_model(GaussianData([m], [[v]]), q, Posterior())
    keep, lose = q.keep(q.grid(2)), q.lose(q.grid(2))
    x = torch.tensor([[-2.0], [0.3], [1.5]], dtype=torch.float64)
    scale = ((keep[0] * v + lose[0]) / (keep[1] * v + lose[1])).sqrt()
    truth = keep[0].sqrt() * m + scale * (x - keep[1].sqrt() * m)
    counts = [80, 160, 320, 640]
    errors = [
        float((at_first_time(model, make(), q.grid(n + 1), x) - truth).abs().max()) for n in counts
    ]
    assert abs(slope(errors, counts) - order) < 0.15, errors


@pytest.mark.parametrize(("make", "order"), SAMPLERS)
def test_order_on_a_mixture(make: Callable[[], Sampler], order: float) -> None:
    """Ring of eight Gaussians; the truth is Heun's walk extrapolated from 2560 and 5120 steps."""
    q = LogSNRLinear(5.0, -8.0)
    model = exact_model(ring(8, 1.0, 0.15), q, Posterior())
    x = torch.tensor([[-1.0, 0.2], [0.3, 1.4], [0.9, -0.7]], dtype=torch.float64)
    coarse, fine = (at_first_time(model, Heun(), q.grid(n + 1), x) for n in (1280, 2560))
    truth = fine + (fine - coarse) / 3
    counts = [80, 160, 320]
    errors = [
        float((at_first_time(model, make(), q.grid(n + 1), x) - truth).abs().max()) for n in counts
    ]
    assert abs(slope(errors, counts) - order) < 0.3, errors


# --- the ends ------------------------------------------------------------------------------------


def test_first_order_is_ddim() -> None:
    q = Cosine(50)
    model = exact_model(ring(5, 1.0, 0.2), q, Posterior())
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(
        trajectory(model, DPMSolverPP(1), q.grid(9), x),
        trajectory(model, DDIM(), q.grid(9), x),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sampler", [DPMSolverPP(), DPMSolverPP(2, "heun"), Heun()])
def test_a_last_keep_of_zero_is_a_first_order_start(sampler: Sampler) -> None:
    """keep = 0 at the last time (harmonic): the first step is DDIM's, all states finite."""
    q, data = Harmonic(20), ring(4, 1.0, 0.2)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model, times = exact_model(data, q, Posterior()), q.grid()
    states = trajectory(model, sampler, times, x)
    first, _ = DDIM().step(model, x, times[-1], times[-2], None)
    torch.testing.assert_close(states[1], first, rtol=1e-12, atol=1e-12)
    assert all(bool(state.isfinite().all()) for state in states)


def test_predicted_noise_cannot_start_at_a_keep_of_zero() -> None:
    model = exact_model(GaussianData([0.5], [[0.49]]), Harmonic(5), Posterior())
    _check_flow("heun", model, Harmonic(5).grid())
    model.parameterization = Epsilon()
    _check_flow("heun", model, Harmonic(5).grid()[:-1])
    with pytest.raises(UsageError, match="keep = 0"):
        _check_flow("heun", model, Harmonic(5).grid())


@pytest.mark.parametrize("sampler", [DPMSolverPP(), Heun()])
def test_walks_keep_float32_and_end_at_the_prediction(sampler: Sampler) -> None:
    q = Linear(40)
    model = exact_model(ring(5, 1.0, 0.2), q, Posterior())
    torch.manual_seed(0)
    states = list(sample(model, sampler, q.grid(8), (3, 2)))
    assert all(x.dtype == torch.float32 for _, x in states)
    t_1, x_1 = states[-2]
    assert t_1 is not None
    torch.testing.assert_close(states[-1][1], model.predict(x_1, t_1))


def test_network_calls() -> None:
    """One per latent, and two per step plus one for Heun."""
    q = Cosine(30)
    for sampler, calls in ((DPMSolverPP(), 8), (Heun(), 15), (DPMSolverPP(final="sigma_min"), 8)):
        model = exact_model(GaussianData([0.5], [[0.49]]), q, Posterior())
        seen: list[float] = []
        model.network.register_forward_pre_hook(lambda _, a, seen=seen: seen.append(float(a[1])))
        list(sample(model, sampler, q.grid(8), (2, 1)))
        assert len(seen) == calls


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="order 3"):
        DPMSolverPP(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="final"):
        DPMSolverPP(final="nothing")  # type: ignore[arg-type]


# --- spacing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 999, 1000])
def test_even_logsnr_is_a_subset_of_a_chain_with_both_ends(steps: int) -> None:
    for q in (Linear(1000), Cosine(1000), Harmonic(1000)):
        kept = even_logsnr(q, q.grid(), steps)
        assert len(kept) == steps and bool((kept.diff() > 0).all())
        assert kept[-1] == 999 and (steps == 1 or kept[0] == 0)


def test_even_logsnr_is_even_where_the_chain_is_fine() -> None:
    q = Linear(1000)
    logsnr = q.logsnr(q.grid()[even_logsnr(q, q.grid(), 10)])
    gaps = -logsnr.diff()
    assert float(gaps.max() / gaps.min()) < 1.4
    uneven = -q.logsnr(q.grid(10)).diff()
    assert float(uneven.max() / uneven.min()) > 4


class Bent(Schedule):
    """λ = 5 − 9 t²."""

    def logsnr(self, t: Tensor) -> Tensor:
        return 5 - 9 * t.double() ** 2

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(0, 1, steps, dtype=torch.float64)


@pytest.mark.parametrize(
    "q", [LogSNRLinear(5.0, -4.0), Bent(), Interpolated(Linear(1000)), Interpolated(Cosine(50))]
)
def test_time_at_inverts_the_schedule(q: Schedule) -> None:
    wanted = torch.linspace(4.9, -3.9, 12, dtype=torch.float64)
    torch.testing.assert_close(q.logsnr(time_at(q, wanted)), wanted, rtol=1e-12, atol=1e-12)


def test_a_continuous_schedule_keeps_to_the_grid_of_the_model() -> None:
    times = Bent().grid(1000)
    gaps = Bent().logsnr(times[even_logsnr(Bent(), times, 7)]).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(6), rtol=0.02, atol=0)


def test_between_the_steps_of_a_chain_the_logsnr_is_linear() -> None:
    q = Linear(4)
    bridge = Interpolated(q)
    torch.testing.assert_close(bridge.logsnr(q.grid()), q.logsnrs)
    middle = bridge.logsnr(torch.tensor([0.375, 0.9375], dtype=torch.float64))
    a, b, c, d = q.logsnrs
    expected = torch.stack([(a + b) / 2, c / 4 + 3 * d / 4])
    torch.testing.assert_close(middle, expected)
    with pytest.raises(ValueError, match="erases everything"):
        Interpolated(Harmonic(4))


def test_solvers_refuse_bits() -> None:
    q = Cosine(5)
    model = exact_model(GaussianData([0.5], [[0.49]]), q, Posterior())
    bits = Reverse(Bernoulli(q), model.network, model.parameterization, model.decoder_rule)
    for sampler in (DPMSolverPP(), Heun()):
        with pytest.raises(ValueError, match="Gaussian process"):
            list(sample(bits, sampler, q.grid(), (2, 1)))
