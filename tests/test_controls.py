"""The Wiener control: the term itself on Gaussian data, mean zero on any, finite at the ends."""

from __future__ import annotations

import pytest
import torch

from nelbo.bound import pair_term
from nelbo.controls import Wiener
from nelbo.data.mixture import GaussianMixture
from nelbo.decoders import Density
from nelbo.evaluation import evaluate
from nelbo.fewcalls import interpolated, nodes
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


@pytest.mark.parametrize("k", [2, 6, 7])
def test_nodes_are_uniform_on_strata_and_exact_for_linear_integrands(k: int) -> None:
    u = torch.rand(1000, 2, dtype=torch.float64)
    v = torch.stack(nodes(u, k), 1)
    assert v.shape == (1000, k)
    for j in range(k // 2):
        pair = v[:, 2 * j : 2 * j + 2]
        assert ((pair >= 2 * j / k) & (pair <= (2 * j + 2) / k)).all()
        torch.testing.assert_close(pair.mean(1), torch.full((1000,), (2 * j + 1) / k).double())
    if k % 2:
        assert ((v[:, -1] >= (k - 1) / k) & (v[:, -1] <= 1)).all()
    else:
        torch.testing.assert_close((3 * v + 1).mean(1), torch.full((1000,), 2.5).double())


def test_interpolation_passes_through_its_points() -> None:
    at = torch.tensor([0, 3, 10])
    values = torch.tensor([1.0, 4.0, -3.0], dtype=torch.float64)
    line = interpolated(at, values, 11)
    torch.testing.assert_close(line[at], values)
    torch.testing.assert_close(line[:4], torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(line[3:].diff(), torch.full((7,), -1.0, dtype=torch.float64))


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
    settings = {"calls": 16, "pilot": train[:64]}
    plain = evaluate(model, test, times, **settings).diffusion
    helped = evaluate(model, test, times, control=control, **settings).diffusion
    assert _noise(helped) < 1.2 * _noise(plain)


def _noise(replicates: torch.Tensor) -> float:
    """Root mean square difference of the two replicates of an example."""
    return float((replicates[:, 0] - replicates[:, 1]).square().mean().sqrt())
