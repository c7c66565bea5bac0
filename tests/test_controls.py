"""The Wiener control: the term itself on Gaussian data, mean zero on any, finite at the ends."""

from __future__ import annotations

import pytest
import torch

from nelbo.bound import pair_term
from nelbo.controls import Shrinkage, Wiener
from nelbo.data.mixture import GaussianMixture
from nelbo.decoders import Density
from nelbo.evaluation import evaluate
from nelbo.fewcalls import Plan
from nelbo.parameterizations import X0
from nelbo.processes.gaussian import Gaussian
from nelbo.recipes.models import ExactDenoiser
from nelbo.reverse import Reverse
from nelbo.schedules import Harmonic, LogSNRLinear

MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
ROOT = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.5, 0.0], [-0.2, 0.3, 0.6]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T


def gaussian_model(process: Gaussian) -> Reverse:
    one = torch.ones(1, dtype=torch.float64)
    mixture = GaussianMixture(one, MEAN[None], COVARIANCE[None])
    return Reverse(process, ExactDenoiser(mixture, process.schedule), X0(), Density())


def test_on_gaussian_data_it_is_the_term() -> None:
    """Fluctuation plus expectation equal the KL of every pair, draw by draw."""
    process = Gaussian(LogSNRLinear(6.0, -5.0))
    model, control = gaussian_model(process), Wiener(process, MEAN, COVARIANCE)
    times = process.schedule.grid(7)
    generator = torch.Generator().manual_seed(0)
    x_0 = MEAN + torch.randn(5, 3, generator=generator, dtype=torch.float64) @ ROOT.T
    expected = control.expected(x_0, times)
    assert expected.shape == (5, 6)
    for i in range(6):
        x_t = process.marginal(x_0, times[i + 1]).sample()
        term = pair_term(model.at(x_t, times[i + 1]), x_0, times[i])
        g = control.fluctuation(x_0, x_t, times[i], times[i + 1]) + expected[:, i]
        torch.testing.assert_close(g, term, rtol=1e-9, atol=1e-12)


def test_its_fluctuation_has_mean_zero_for_any_data() -> None:
    """4·10⁵ draws, |z| < 5: false alarm 6e-7. An expectation off by 1 % gives |z| > 5."""
    process = Gaussian(LogSNRLinear(6.0, -5.0))
    control = Wiener(process, MEAN, COVARIANCE)
    s, t = torch.tensor([0.3, 0.4], dtype=torch.float64)
    x_0 = torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64).expand(400_000, 3)
    torch.manual_seed(1)
    values = control.fluctuation(x_0, process.marginal(x_0, t).sample(), s, t)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean()) < 5 * error
    (expected,) = control.expected(x_0[:1], torch.stack([s, t]))[0]
    assert abs(values.mean() + 0.01 * expected) > 5 * error


def test_times_may_differ_by_example() -> None:
    process = Gaussian(LogSNRLinear(6.0, -5.0))
    control = Wiener(process, MEAN, COVARIANCE)
    x_0, x_t = torch.randn(2, 4, 3, dtype=torch.float64)
    s = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    together = control.fluctuation(x_0, x_t, s, s + 0.1)
    for k in range(4):
        alone = control.fluctuation(x_0[k : k + 1], x_t[k : k + 1], s[k], s[k] + 0.1)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-12, atol=1e-14)


def test_it_is_finite_where_nothing_is_kept() -> None:
    process = Gaussian(Harmonic(5))
    control = Wiener(process, MEAN, COVARIANCE)
    times = process.schedule.grid()
    x_0 = torch.randn(3, 3, dtype=torch.float64)
    x_t = torch.randn(3, 3, dtype=torch.float64)
    assert torch.isfinite(control.expected(x_0, times)).all()
    assert torch.isfinite(control.fluctuation(x_0, x_t, times[-2], times[-1])).all()


def test_fitting_uses_mean_and_covariance_of_the_rows() -> None:
    process = Gaussian(LogSNRLinear(6.0, -5.0))
    rows = torch.randn(50, 1, 1, 3)
    fitted = Wiener.of(process, rows)
    flat = rows.reshape(50, 3).double()
    again = fitted.axes @ fitted.spectrum.diag() @ fitted.axes.T
    torch.testing.assert_close(fitted.mean, flat.mean(0))
    torch.testing.assert_close(again, torch.cov(flat.T))


def test_an_example_unlike_all_training_examples_does_not_spoil_the_estimate() -> None:
    """A dimension that never moved in training moves in the test: its guess must not run away.

    Without the limit m on E[G|x_0] the spread of the estimates is over five times larger.
    """
    schedule = LogSNRLinear(8.0, -5.0)
    process = Gaussian(schedule)
    model = gaussian_model(process)
    generator = torch.Generator().manual_seed(2)
    train = torch.randn(400, 3, generator=generator)
    train[:, 2] = 0.1
    test = train[:64].clone()
    test[:, 2] = 1.1
    times, control = schedule.grid(200), Wiener.of(process, train)
    errors = []
    for controls in ((), (control,)):
        plan = Plan(controls=controls)
        result = evaluate(model, test, times, calls=16, pilot=train[:64], plan=plan)
        errors.append(result.estimates()["diffusion"].se_mc)
    assert errors[1] < 1.2 * errors[0]


# --- images ------------------------------------------------------------------------------------


def picture(n: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("channels", "block"), [(3, 8), (1, 4), (2, 2)])
def test_block_coordinates_are_a_rotation(channels: int, block: int) -> None:
    control = Shrinkage(Gaussian(LogSNRLinear(8.0, -5.0)), (channels, 8, 8), block)
    x = picture(5, channels).double()
    c = control.coordinates(x)
    torch.testing.assert_close(c.square().sum(1), x.square().flatten(1).sum(1))
    torch.testing.assert_close(c @ c.T, x.flatten(1) @ x.flatten(1).T)
    flat = control.coordinates(torch.ones(1, channels, 8, 8))
    blocks = (8 // block) ** 2 * (1 if channels == 3 else channels)
    assert int((flat.abs() > 1e-9).sum()) == blocks, "a flat grey image has one number a block"


def test_shrinkage_fluctuates_about_zero_and_expects_what_it_says() -> None:
    """2·10⁵ draws, |z| < 5: false alarm 6e-7; an expectation off by 1 % is found."""
    process = Gaussian(LogSNRLinear(8.0, -5.0))
    control = Shrinkage(process, (1, 8, 8), 4)
    x_0 = picture(1, 1).expand(20_000, -1, -1, -1)
    s, t = torch.tensor([0.4, 0.5], dtype=torch.float64)
    torch.manual_seed(0)
    parts = [control.fluctuation(x_0, process.marginal(x_0, t).sample(), s, t) for _ in range(10)]
    values = torch.cat(parts)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean()) < 5 * error
    (expected,) = control.expected(x_0[:1], torch.stack([s, t]))[0]
    assert abs(values.mean() + 0.01 * expected) > 5 * error


def test_the_expectation_of_shrinkage_is_the_oracle_risk() -> None:
    """½ (snr_s − snr_t) Σ c² σ²/(c² + σ²), interpolated to within .3 %."""
    process = Gaussian(LogSNRLinear(13.0, -5.0))
    control, times, x = Shrinkage(process, (3, 8, 8), 8), process.schedule.grid(50), picture(4)
    snr = process.schedule.logsnr(times).exp()
    energy = control.coordinates(x) ** 2
    risk = (energy[:, None] / (energy[:, None] * snr[1:, None] + 1)).sum(2)
    truth = 0.5 * (snr[:-1] - snr[1:]) * risk
    torch.testing.assert_close(control.expected(x, times), truth, rtol=3e-3, atol=1e-9)


def test_shrinkage_is_finite_where_nothing_is_kept() -> None:
    process = Gaussian(Harmonic(5))
    control, times, x = Shrinkage(process, (3, 8, 8), 4), process.schedule.grid(), picture(2)
    assert torch.isfinite(control.expected(x, times)).all()
    assert torch.isfinite(control.fluctuation(x, picture(2), times[-2], times[-1])).all()


def test_blocks_must_tile() -> None:
    with pytest.raises(ValueError, match="do not tile"):
        Shrinkage(Gaussian(Harmonic(5)), (3, 8, 8), 3)
