"""The bound in continuous time, and a log-SNR that is learned from it: end points and shape."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    ExactDenoiser,
    GaussianData,
    MixtureData,
    assert_mean,
    exact_model,
    hermite,
    ring,
)
from tiny import command, silent
from torch import Tensor, nn

from nelbo.averages import Warming
from nelbo.continuous import Continuous
from nelbo.decoders import Density, Discretized
from nelbo.learned_schedule import LearnedLogSNR
from nelbo.networks.informed import Informed
from nelbo.networks.layers import Timed
from nelbo.parameterizations import X0
from nelbo.processes.gaussian import Gaussian
from nelbo.rates import Rate
from nelbo.reverse import Reverse
from nelbo.schedules import Linear, LogSNRLinear, Schedule
from nelbo.timesampling import SecondMoment
from nelbo.trainer import Player, Trainer
from nelbo.variances import Posterior
from nelbo.walks.stored import open_run


def learned(high: float = 6.0, low: float = -4.0, hold: bool = False) -> LearnedLogSNR:
    return LearnedLogSNR(LogSNRLinear(high, low), hold)


def bent(hold: bool = False) -> LearnedLogSNR:
    """A shape that is far from a line."""
    schedule = learned(hold=hold)
    with torch.no_grad():
        schedule.rise.copy_(torch.linspace(-1.5, 1.5, 32))
    return schedule


# --- the schedule --------------------------------------------------------------------------------


def test_it_starts_linear() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    start = LogSNRLinear(13.3, -5.0)
    schedule = LearnedLogSNR(start)
    torch.testing.assert_close(schedule.logsnr(t), start.logsnr(t), rtol=0, atol=1e-12)
    torch.testing.assert_close(schedule.slope(t), start.slope(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.grid(7), start.grid(7), rtol=0, atol=0)


def test_it_falls_whatever_the_parameters() -> None:
    torch.manual_seed(0)
    t = torch.linspace(0, 1, 500, dtype=torch.float64)
    for _ in range(20):
        schedule = learned()
        with torch.no_grad():
            schedule.rise.copy_(3 * torch.randn(32))
            schedule.fall.copy_(5 * torch.randn(()))
            schedule.top.copy_(5 * torch.randn(()))
        values = schedule.logsnr(t)
        assert bool((values.diff() < 0).all())
        high, low = schedule.ends()
        ends = torch.stack([high, low])
        torch.testing.assert_close(values[[0, -1]], ends, rtol=0, atol=1e-12)


def test_the_slope_is_the_derivative() -> None:
    t = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t.requires_grad_(True)
    for schedule in (bent(), LogSNRLinear(3.0, -2.0)):
        (gradient,) = torch.autograd.grad(schedule.logsnr(t).sum(), t)
        torch.testing.assert_close(schedule.slope(t).detach(), gradient, rtol=1e-12, atol=0)


def test_it_stays_float64_and_holds_what_it_should() -> None:
    schedule = bent(hold=True).float()
    assert {v.dtype for v in schedule.state_dict().values()} == {torch.float64}
    assert sorted(name for name, _ in schedule.named_parameters()) == ["fall", "rise"]
    other = learned(1.0, 0.0, hold=True)
    other.load_state_dict(schedule.state_dict())
    t = schedule.grid(9)
    assert torch.equal(other.logsnr(t), schedule.logsnr(t))


class Seen(nn.Module):
    """Gives back the time that it is told."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return t.reshape(-1, 1).expand(len(x_t), 1)


def test_the_network_is_told_the_noise_and_not_the_time() -> None:
    schedule = learned()
    told, timed = Informed(Seen(), schedule, 6.0, -4.0, 1000), Timed(Seen(), 1000)
    x, t = torch.zeros(5, 1), torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(told(x, t), timed(x, t), rtol=1e-6, atol=1e-4)
    moved = bent()
    told.held[0] = moved
    expected = (1000 * (6 - moved.logsnr(t)) / 10).float()[:, None].detach()
    assert torch.equal(told(x, t), expected)
    assert float((expected - timed(x, t)).abs().max()) > 50
    assert list(told.parameters()) == []


def test_an_average_keeps_its_own_schedule() -> None:
    """A deep copy of a model holds one schedule, that of the copy, in both places."""
    schedule = learned()
    network = Informed(Seen(), schedule, 6.0, -4.0, 1)
    model = copy.deepcopy(Reverse(Gaussian(schedule), network, X0(Posterior()), Density()))
    inner = model.network
    assert isinstance(inner, Informed)
    assert inner.held[0] is model.process.schedule is not schedule


# --- the bound in continuous time ----------------------------------------------------------------

MIXTURE = MixtureData([[-0.8], [0.9]], 0.3, torch.tensor([0.3, 0.7]).double())


def integral(schedule: Schedule, x_0: float, times: Tensor, pieces: int = 3200) -> float:
    """E of the objective's part between t_1 and t_N, by quadrature over t and the noise."""
    objective = Continuous(times, decoder=0.5)
    model = exact_model(MIXTURE, schedule, Posterior())
    z, w = hermite(80)
    u = (torch.arange(pieces, dtype=torch.float64) + 0.5) / pieces
    t = times[0] + (times[-1] - times[0]) * u
    index = torch.searchsorted(times, t).clamp(min=1)
    x = torch.full((len(t) * 80, 1), x_0, dtype=torch.float64)
    law = model.process.marginal(x, t.repeat_interleave(80))
    at = model.at(
        law.mean + law.variance.sqrt() * z.repeat(len(t))[:, None], t.repeat_interleave(80)
    )
    with torch.no_grad():
        part = objective.part(at, x, index.repeat_interleave(80)).view(len(t), 80) @ w
    share = objective.probabilities[1:].sum()
    return float((part / (objective.probabilities[index] / share)).mean())


def exact_rest(schedule: Schedule, x_0: float) -> float:
    """KL(q(x_N|x_0)‖q(x_N)) + E[−log q(x_0|x_1)]: prior and decoder of the exact model."""
    z, w = hermite(120)
    one = torch.ones((), dtype=torch.float64)
    point = torch.full((120, 1), x_0, dtype=torch.float64)

    def excess(t: Tensor) -> Tensor:
        """log q(x_t|x_0)/q(x_t) at the nodes."""
        keep, lose = schedule.keep(t), schedule.lose(t)
        x_t = keep.sqrt() * point + lose.sqrt() * z[:, None]
        law = torch.distributions.Normal(keep.sqrt() * x_0, lose.sqrt())
        return law.log_prob(x_t)[:, 0] - MIXTURE.log_marginal(x_t, keep, lose)[0]

    first, last = (excess(t * one) for t in (0.0, 1.0))
    decoder = -first - MIXTURE.log_density(point)
    return float(w @ (last + decoder))


@pytest.mark.parametrize("x_0", [-0.8, 0.1, 1.5])
@pytest.mark.parametrize("kind", ["linear", "bent"])
def test_exact_parts_give_the_log_density(kind: str, x_0: float) -> None:
    """Prior + integral + decoder of the exact model = −log q(x_0), for every x_0 and shape."""
    schedule: Schedule = LogSNRLinear(9.0, -9.0)
    if kind == "bent":
        schedule = LearnedLogSNR(LogSNRLinear(9.0, -9.0))
        with torch.no_grad():
            schedule.rise.copy_(torch.linspace(-1, 1, 32))
    density = -float(MIXTURE.log_density(torch.tensor([[x_0]], dtype=torch.float64)))
    with torch.no_grad():
        found = integral(schedule, x_0, schedule.grid(2)) + exact_rest(schedule, x_0)
    assert found == pytest.approx(density, abs=2e-5)


def test_cuts_and_their_probabilities_change_no_mean() -> None:
    schedule = LogSNRLinear(6.0, -4.0)
    whole, cut = (integral(schedule, 0.4, schedule.grid(n)) for n in (2, 21))
    assert cut == pytest.approx(whole, rel=1e-6)


def test_it_is_the_limit_of_the_bound() -> None:
    """L_N − L_∞ halves as N doubles; both with the very same decoder and prior."""
    data = GaussianData([0.5, -0.2], [[0.49, 0.3], [0.3, 1.7]])
    schedule = LogSNRLinear(6.0, -4.0)
    logsnr = torch.linspace(-4.0, 6.0, 20_001, dtype=torch.float64)
    rate = logsnr.exp() * data.mmse(logsnr)
    limit = 0.5 * float(torch.trapezoid(rate, logsnr))
    sums = {}
    for n in (200, 400):
        at = schedule.logsnr(schedule.grid(n)).flip(0)
        snr = at.exp()
        sums[n] = float((0.5 * snr.diff() * data.mmse(at)[:-1]).sum())
    assert sums[200] > sums[400] > limit
    assert (sums[200] - limit) / (sums[400] - limit) == pytest.approx(2, rel=0.02)
    model, objective = exact_model(data, schedule, Posterior()), Continuous(schedule.grid(2))
    torch.manual_seed(0)
    law = torch.distributions.MultivariateNormal(data.mean, data.cov)
    found = []
    for _ in range(400):
        x_0 = law.sample((64,))
        at = model.at(x_0, torch.zeros((), dtype=torch.float64))
        t = torch.rand(64, dtype=torch.float64)
        draw = model.process.marginal(x_0, t).sample()
        value = objective.part(model.at(draw, t), x_0, torch.ones(64, dtype=torch.int64))
        found.append(value.mean())
        assert at.x_0.shape == x_0.shape
    assert_mean(torch.stack(found), limit, what="continuous")


@pytest.mark.parametrize("way", ["low discrepancy", "independent", "second moment"])
def test_the_loss_is_unbiased_however_times_are_drawn(way: str) -> None:
    """Against every term at once: prior + decoder + the integral, 500 batches of 32."""
    schedule = LogSNRLinear(4.0, -3.0)
    data = GaussianData([0.5], [[0.6]])
    model, objective = exact_model(data, schedule, Posterior()), Continuous(schedule.grid(9))
    objective.independent = way == "independent"
    objective.history = SecondMoment(9) if way == "second moment" else None
    logsnr = torch.linspace(-3.0, 4.0, 20_001, dtype=torch.float64)
    rate = float(torch.trapezoid(0.5 * logsnr.exp() * data.mmse(logsnr), logsnr))
    keep, lose = (float(torch.sigmoid(torch.tensor(s * 4.0))) for s in (1, -1))
    error = 0.6 * lose / (keep * 0.6 + lose)
    decoder = 0.5 * (math.log(2 * math.pi * lose) + error / lose)
    last = 1 / (1 + math.exp(3.0))
    prior = 0.5 * (last * (0.6 + 0.25 - 1) - math.log(1 - last))
    torch.manual_seed(5)
    draws = [
        objective(model, 0.5 + 0.6**0.5 * torch.randn(32, 1, dtype=torch.float64)).mean()
        for _ in range(500)
    ]
    assert_mean(torch.stack(draws), prior + rate + decoder, what=way)


def test_a_chain_has_no_continuous_time() -> None:
    data = GaussianData([0.5], [[0.6]])
    model = exact_model(data, Linear(10), Posterior())
    with pytest.raises(ValueError, match="defined at its own steps only"):
        Continuous(Linear(10).grid())(model, torch.zeros(4, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="two end points"):
        Continuous(torch.ones(1, dtype=torch.float64))


# --- its gradients -------------------------------------------------------------------------------


def model_of(schedule: LearnedLogSNR, data: Any) -> Reverse:
    """The exact denoiser, told the noise by the schedule itself."""
    return Reverse(Gaussian(schedule), ExactDenoiser(data, schedule, None), X0(), Density())


def losses(schedule: LearnedLogSNR, data: Any, n: int = 40) -> Tensor:
    """(B,) losses with the noise and times that seed 3 holds."""
    torch.manual_seed(3)
    x_0 = data.means.repeat(n, 1) if isinstance(data, MixtureData) else data.mean.expand(n, -1)
    return Continuous(schedule.grid(9))(model_of(schedule, data), x_0)


def nudged(schedule: LearnedLogSNR, name: str, place: int, by: float) -> LearnedLogSNR:
    other = copy.deepcopy(schedule)
    with torch.no_grad():
        getattr(other, name).view(-1)[place] += by
    return other


def check_one_backward_pass() -> None:
    """Frozen draws: end points get ∂ mean ℓ, the shape ∂ mean (ℓ − prior)²/d, by differences."""
    schedule, data = bent(), ring(5, 1.0, 0.2)
    losses(schedule, data).mean().backward()
    places = [("top", 0), ("fall", 0), *(("rise", k) for k in (0, 3, 11, 20, 31))]
    for name, place in places:
        values = []
        for h in (1e-5, -1e-5):
            other = nudged(schedule, name, place, h)
            with torch.no_grad():
                loss = losses(other, data)
                prior = (
                    Continuous(other.grid(2))
                    .always(model_of(other, data).at(data.means, other.grid(2)[-1]), data.means)
                    .repeat(40)
                )
                part = (loss - prior) ** 2 / 2 if name == "rise" else loss
            values.append(float(part.mean()))
        gradient = getattr(schedule, name).grad.view(-1)[place]
        difference = (values[0] - values[1]) / 2e-5
        assert float(gradient) == pytest.approx(difference, rel=1e-5, abs=1e-8), (name, place)
        assert abs(difference) > 1e-6


def test_one_backward_pass_gives_both_gradients() -> None:
    check_one_backward_pass()


def test_without_the_squares_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nelbo.learned_schedule.Weights.hook", lambda self, g: g)
    with pytest.raises(AssertionError):
        check_one_backward_pass()


def closed_form(high: float, low: float, data: GaussianData) -> float:
    """E of the continuous bound of the exact denoiser with the decoder N(x̂_0, l_1)."""
    logsnr = torch.linspace(low, high, 20_001, dtype=torch.float64)
    rate = float(torch.trapezoid(0.5 * logsnr.exp() * data.mmse(logsnr), logsnr))
    lose = 1 / (1 + math.exp(high))
    error = float(data.mmse(torch.tensor(high, dtype=torch.float64)))
    decoder = 0.5 * (data.dims * math.log(2 * math.pi * lose) + error / lose)
    keep = 1 / (1 + math.exp(-low))
    second = float(data.eigenvalues.sum() + (data.mean**2).sum())
    prior = 0.5 * (keep * (second - data.dims) - data.dims * math.log(1 - keep))
    return prior + rate + decoder


def test_the_end_points_follow_the_exact_bound() -> None:
    """Mean gradients of 60 batches of 4000 against differences of the closed form."""
    data = GaussianData([0.5, -0.2], [[0.49, 0.3], [0.3, 1.7]])
    schedule = LearnedLogSNR(LogSNRLinear(-1.0, -3.0))
    model, objective = model_of(schedule, data), Continuous(schedule.grid(2))
    law = torch.distributions.MultivariateNormal(data.mean, data.cov)
    torch.manual_seed(0)
    found = []
    for _ in range(60):
        loss = objective(model, law.sample((4000,))).mean()
        top, fall = torch.autograd.grad(loss, [schedule.top, schedule.fall])
        # from (λ_max, fall) to (λ_max, λ_min): λ_min = λ_max − softplus(fall)
        low = -fall / torch.sigmoid(schedule.fall.detach())
        found.append(torch.stack([top - low, low]))
    values, h = torch.stack(found), 1e-4
    high = (closed_form(-1 + h, -3, data) - closed_form(-1 - h, -3, data)) / (2 * h)
    low = (closed_form(-1, -3 + h, data) - closed_form(-1, -3 - h, data)) / (2 * h)
    for column, exact in enumerate((high, low)):
        error = float(values[:, column].std()) / 60**0.5
        # 60 batch means: Student's t with 59 degrees of freedom passes 5.6 at a rate of 6e-7
        assert abs(float(values[:, column].mean()) - exact) < 5.6 * error
        assert abs(exact) > 12 * error


# --- learning ------------------------------------------------------------------------------------


def one_draw(schedule: LearnedLogSNR, data: MixtureData, n: int = 20_000) -> Tensor:
    """(n,) integrals, each from one independent time; seed 9 holds the noise."""
    objective = Continuous(schedule.grid(2), decoder=1e-9)
    objective.independent = True
    torch.manual_seed(9)
    with torch.no_grad():
        return objective(model_of(schedule, data), data.draw(n))


def test_a_learned_shape_lowers_the_variance_and_not_the_bound() -> None:
    data = ring(8, 1.0, 0.05)
    schedule = LearnedLogSNR(LogSNRLinear(6.0, -14.0), hold_max=True)
    start = copy.deepcopy(schedule)
    model = model_of(schedule, data)
    schedule.fall.requires_grad_(False)
    objective = Continuous(schedule.grid(2))
    optimizer = torch.optim.Adam([schedule.rise], lr=0.03)

    def batch(step: int) -> Tensor:
        torch.manual_seed(step)
        return data.draw(256)

    player = Player("model", model, optimizer, lambda x: objective(model, x))
    for _ in Trainer([player], batch, Rate(0.03, 300), steps=300, seed=0, ema=Warming(0.0)):
        pass
    before, after = one_draw(start, data), one_draw(schedule, data)
    assert float(after.var()) < 0.6 * float(before.var())
    gap = float(after.mean() - before.mean())
    assert abs(gap) < 5 * math.hypot(float(before.std()), float(after.std())) / 20_000**0.5


# --- as options ----------------------------------------------------------------------------------

CONTINUOUS = ("--objective", "continuous")


@pytest.mark.parametrize("more", [(), ("--times", "independent"), ("--times", "second-moment")])
def test_a_run_trains_on_the_continuous_bound(more: tuple[str, ...], tmp_path: Path) -> None:
    code, _, err = silent(command(tmp_path / "run", *CONTINUOUS, *more))
    assert code == 0, err


def test_a_run_with_a_learned_schedule(tmp_path: Path) -> None:
    """Trained, resumed, measured with few calls and control, in full, and sampled."""
    out = tmp_path / "run"
    few = ("--members", "2", "--accumulation", "2", "--calls", "6")
    code, text, err = silent(command(out, *CONTINUOUS, "--schedule", "learned", *few))
    assert code == 0, err
    assert "learned from there" in text
    schedule = open_run(out).subject.model.process.schedule
    assert isinstance(schedule, LearnedLogSNR)
    assert float(schedule.rise.detach().abs().max()) > 0 and float(schedule.top.detach()) != 8.0
    code, text, err = silent(["evaluate", str(out), "--limit", "20", "--json"])
    assert code == 0, err
    assert math.isfinite(json.loads(text)["terms"]["total"]["mean"])
    code, _, err = silent(["sample", str(out), "--n", "4", "--sampler", "ddim", "--steps", "5"])
    assert code == 0, err


def test_a_density_keeps_its_first_log_snr(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, err = silent(
        [
            *("train", "swissroll", *CONTINUOUS, "--schedule", "learned", "--steps", "12"),
            *("--examples", "200", "--batch", "16", "--width", "16", "--latents", "12"),
            *("--calls", "4", "--samples", "4", "--threads", "1", "--out", str(out)),
        ]
    )
    assert code == 0, err
    assert "exact denoiser" in text
    schedule = open_run(out).subject.model.process.schedule
    assert isinstance(schedule, LearnedLogSNR)
    high, low = schedule.ends()
    assert float(high) == 8.0 and not high.requires_grad and float(low.detach()) != -6.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--schedule", "learned"), "give --objective continuous as well"),
        ((*CONTINUOUS, "--schedule", "cosine"), "take --schedule logsnr or learned"),
        ((*CONTINUOUS, "--schedule", "learned", "--times", "second-moment"), "take one of them"),
        ((*CONTINUOUS, "--schedule", "learned", "--focus", "1", "2"), "take one of them"),
        ((*CONTINUOUS, "--latents", "1"), "take --latents 2 or more"),
        ((*CONTINUOUS, "--predict", "mean", "--decoder", "discretized"), "continuous time"),
    ],
)
def test_what_makes_no_sense_is_refused(
    more: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    code, _, err = silent(command(tmp_path / "run", *more))
    assert code == 2 and message in err


def test_levels_learn_both_ends() -> None:
    """The decoder's own bins give λ_max a best value."""
    schedule = learned()
    network = Informed(Flat(), schedule, 6.0, -4.0, 1)
    model = Reverse(Gaussian(schedule), network, X0(Posterior()), Discretized(17))
    torch.manual_seed(0)
    x_0 = 2 * torch.randint(0, 17, (64, 3)).double() / 16 - 1
    Continuous(schedule.grid(4))(model, x_0).mean().backward()
    assert schedule.top.grad is not None and float(schedule.top.grad) != 0


class Flat(nn.Module):
    """x̂_0 = x_t."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return x_t
