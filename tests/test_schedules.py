"""Schedules: golden values, grids, refusals, and precision that survives a cast of the model."""

from __future__ import annotations

import pytest
import torch
from goldens import check_schedules

from nelbo.schedules import Cosine, Harmonic, Linear, LogSNRLinear, Schedule, Stepped, Tabulated

EVERY: list[Schedule] = [LogSNRLinear(), Linear(50), Cosine(50), Harmonic(50), Tabulated([0.1, 1])]


def test_golden_schedules() -> None:
    check_schedules()


@pytest.mark.parametrize("schedule", EVERY, ids=lambda q: type(q).__name__)
def test_logsnr_falls_and_the_readings_agree(schedule: Schedule) -> None:
    times = schedule.grid(2 if isinstance(schedule, Tabulated) else 50)
    logsnr = schedule.logsnr(times)
    assert logsnr.dtype == torch.float64 and bool((logsnr.diff() < 0).all())
    readings = [(schedule.keep, schedule.log_keep), (schedule.lose, schedule.log_lose)]
    for plain, logarithm in readings:
        torch.testing.assert_close(plain(times), logarithm(times).exp(), rtol=1e-13, atol=0)


def test_extreme_logsnr_keeps_its_digits() -> None:
    """At λ = 40, lose = e^-40 (1 − 1 in float64 would be 0) and log keep = −e^-40."""
    q = LogSNRLinear(40.0, -40.0)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    small = torch.tensor(-40.0, dtype=torch.float64).exp()
    torch.testing.assert_close(q.lose(t)[0], small, rtol=1e-14, atol=0)
    torch.testing.assert_close(q.keep(t)[1], small, rtol=1e-14, atol=0)
    torch.testing.assert_close(q.log_keep(t)[0], -small, rtol=1e-14, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 999, 1000])
def test_a_grid_increases_and_ends_at_the_last_time(steps: int) -> None:
    for q in (LogSNRLinear(), Linear(1000)):
        times = q.grid(steps)
        assert times.shape == (steps,) and float(times[-1]) == 1
        assert bool((times.diff() > 0).all())
        q.logsnr(times)
    if steps > 1:
        assert float(Linear(1000).grid(steps)[0]) == 1e-3


def test_a_subset_has_the_marginals_of_the_full_chain() -> None:
    q = Cosine(1000)
    kept = [0, 40, 300, 999]
    assert torch.equal(q.logsnr(q.times(kept)), q.logsnr(q.grid())[kept])


def test_betas_of_tabulated_come_back() -> None:
    betas = torch.tensor([0.1, 0.001, 0.5, 1.0], dtype=torch.float64)
    keep = Tabulated(betas).keep(Tabulated(betas).grid())
    torch.testing.assert_close(keep, (1 - betas).cumprod(0), rtol=1e-14, atol=0)


def test_harmonic_keeps_one_minus_t() -> None:
    times = Harmonic(40).grid()
    torch.testing.assert_close(Harmonic(40).keep(times), 1 - times, rtol=1e-12, atol=1e-15)
    assert float(Harmonic(40).keep(times[-1])) == 0


@pytest.mark.parametrize("betas", [[], [0.0, 0.5], [1.0, 0.5], [0.5, 1.5], [-0.1], [[0.1]]])
def test_impossible_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="beta"):
        Tabulated(betas)


@pytest.mark.parametrize("t", [0.0, 0.1234, 1.1, -0.1, float("nan")])
def test_times_off_the_chain_are_refused(t: float) -> None:
    with pytest.raises(ValueError, match="Take times from grid"):
        Linear(10).logsnr(torch.tensor(t, dtype=torch.float64))


@pytest.mark.parametrize("kept", [[], [3, 2], [1, 1]])
def test_steps_out_of_order_are_refused(kept: list[int]) -> None:
    with pytest.raises(ValueError, match="increase"):
        Linear(10).times(kept)


@pytest.mark.parametrize("steps", [0, 11, -1])
def test_impossible_grids_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="grid"):
        Linear(10).grid(steps)
    if steps < 1:
        with pytest.raises(ValueError, match="grid"):
            LogSNRLinear().grid(steps)


def test_rising_logsnr_is_refused() -> None:
    with pytest.raises(ValueError, match="fall"):
        LogSNRLinear(-5.0, 13.3)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.float])
def test_tables_stay_float64_when_the_model_is_cast(cast: object) -> None:
    q: Stepped = Linear(1000)
    before = q.logsnr(q.grid()).clone()
    cast(torch.nn.ModuleList([q]))  # type: ignore[operator]
    assert q.logsnrs.dtype == torch.float64 and torch.equal(q.logsnr(q.grid()), before)
