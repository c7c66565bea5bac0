"""The Gaussian kernel of Sohl-Dickstein et al. 2015: learned betas, free diagonal, fixed edge."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracles import GaussianData, exact_model, expected_bound, gaussian_points
from tiny import silent
from torch import Tensor, nn

from nelbo.averages import Warming
from nelbo.bound import bound, draw, term_of
from nelbo.decoders import Density, EdgeFixed
from nelbo.objectives import Vlb
from nelbo.parameterizations import X0, Epsilon
from nelbo.processes.gaussian import Gaussian
from nelbo.rates import Rate
from nelbo.reverse import Reverse
from nelbo.schedules import Harmonic, Learned, Linear, Tabulated
from nelbo.trainer import Player, Trainer
from nelbo.variances import Free, Posterior
from nelbo.walks.stored import open_run

BETAS = [0.02, 0.1, 0.2, 0.4, 0.6]
MEAN, VARIANCE = 0.5, 0.6


class Denoiser(nn.Module):
    """E[x_0|x_t] of N(.5, .6): m + √k v/(k v + l) (x_t − √k m), k, l of the schedule."""

    def __init__(self, process: Gaussian) -> None:
        super().__init__()
        self.held = [process]

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        q = self.held[0].schedule
        keep, lose = (v.reshape(-1, 1) for v in (q.keep(t), q.lose(t)))
        gain = keep.sqrt() * VARIANCE / (keep * VARIANCE + lose)
        return MEAN + gain * (x_t - keep.sqrt() * MEAN)


def model_of(schedule: Learned, decoder: object = None) -> Reverse:
    process = Gaussian(schedule)
    edge = EdgeFixed() if decoder is None else decoder
    return Reverse(process, Denoiser(process), X0(Posterior()), edge)  # type: ignore[arg-type]


def data(n: int = 6) -> Tensor:
    torch.manual_seed(7)
    return MEAN + VARIANCE**0.5 * torch.randn(n, 2, dtype=torch.float64)


def moved(schedule: Learned, place: int, by: float) -> Learned:
    other = Learned(Tabulated(BETAS))
    with torch.no_grad():
        other.rise.copy_(schedule.rise)
        other.rise[place] += by
    return other


# --- the schedule --------------------------------------------------------------------------------


def test_starts_at_the_given_betas() -> None:
    for start in (Tabulated(BETAS), Linear(1000)):
        learned = Learned(start)
        times = start.grid()
        expected = start.logsnr(times)
        torch.testing.assert_close(learned.logsnr(times), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(learned.betas(), start.betas(), rtol=1e-10, atol=0)


def test_betas_are_those_given() -> None:
    expected = torch.tensor(BETAS, dtype=torch.float64)
    torch.testing.assert_close(Tabulated(BETAS).betas(), expected, rtol=1e-13, atol=0)
    harmonic = torch.tensor([1 / 4, 1 / 3, 1 / 2, 1], dtype=torch.float64)
    torch.testing.assert_close(Harmonic(4).betas(), harmonic, rtol=1e-13, atol=0)


def test_keep_falls_and_the_first_beta_stays_whatever_the_parameters() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        learned = Learned(Tabulated(BETAS))
        with torch.no_grad():
            learned.rise.copy_(3 * torch.randn(4))
        logsnr = learned.logsnr(learned.grid())
        assert bool((logsnr.diff() < 0).all())
        assert learned.betas()[0].item() == pytest.approx(BETAS[0], rel=1e-12)


def test_it_has_t_minus_one_parameters_in_float64() -> None:
    learned = Learned(Tabulated(BETAS)).float()
    assert [p.shape for p in learned.parameters()] == [(4,)]
    assert learned.rise.dtype == torch.float64 and learned.rise.requires_grad


def test_it_needs_a_start_that_does_not_erase() -> None:
    with pytest.raises(ValueError, match="last one is below 1"):
        Learned(Harmonic(5))


# --- its gradient --------------------------------------------------------------------------------


def loss_of(schedule: Learned) -> Tensor:
    """The training loss of six examples with the noise that seed 3 holds."""
    times = schedule.grid()
    torch.manual_seed(3)
    return Vlb(times)(model_of(schedule), data().repeat(5, 1)).mean()


def check_gradient() -> None:
    """Frozen noise: the gradient of the objective is that of central differences."""
    schedule = Learned(Tabulated(BETAS))
    (gradient,) = torch.autograd.grad(loss_of(schedule), schedule.rise)
    for place in range(4):
        with torch.no_grad():
            high, low = (float(loss_of(moved(schedule, place, h))) for h in (1e-5, -1e-5))
        assert float(gradient[place]) == pytest.approx((high - low) / 2e-5, rel=1e-6, abs=1e-9)
        assert abs(float(gradient[place])) > 1e-3


def test_gradient_with_frozen_noise() -> None:
    check_gradient()


def test_a_latent_without_gradient_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = draw
    monkeypatch.setattr("nelbo.objectives.draw", lambda m, x, t: right(m, x, t).detach())
    with pytest.raises(AssertionError):
        check_gradient()


def expected_loss(schedule: Learned) -> float:
    known = GaussianData([MEAN, MEAN], [[VARIANCE, 0.0], [0.0, VARIANCE]])
    with torch.no_grad():
        return float(
            expected_bound(model_of(schedule), gaussian_points(known), schedule.grid()).total
        )


def test_the_mean_gradient_is_that_of_the_exact_bound() -> None:
    """E over data and noise, 40000 draws of every term; |z| < 5.3 for 4 means: rate 5e-7."""
    schedule = Learned(Tabulated(BETAS))
    model, times = model_of(schedule), schedule.grid()
    torch.manual_seed(0)
    gradients = []
    for _ in range(40):
        x_0 = MEAN + VARIANCE**0.5 * torch.randn(1000, 2, dtype=torch.float64)
        (g,) = torch.autograd.grad(bound(model, x_0, times).total.mean(), schedule.rise)
        gradients.append(g)
    found = torch.stack(gradients)
    for place in range(4):
        high, low = (expected_loss(moved(schedule, place, h)) for h in (1e-4, -1e-4))
        truth = (high - low) / 2e-4
        error = float(found[:, place].std()) / 40**0.5
        # 40 batch means: Student's t with 39 degrees of freedom passes 6.1 at a rate of 4e-7
        assert abs(float(found[:, place].mean()) - truth) < 6.1 * error


def test_training_betas_lowers_the_exact_bound() -> None:
    schedule = Learned(Tabulated(BETAS))
    model, times = model_of(schedule), schedule.grid()
    before = expected_loss(schedule)
    objective = Vlb(times)
    player = Player(
        "model",
        model,
        torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.0),
        lambda x: objective(model, x),
    )

    def batch(step: int) -> Tensor:
        torch.manual_seed(step)
        return MEAN + VARIANCE**0.5 * torch.randn(128, 2, dtype=torch.float64)

    trainer = Trainer([player], batch, Rate(0.03, 150), steps=150, seed=0, ema=Warming(0.9))
    for _ in trainer:
        pass
    after = trainer.averages["model"].module.process.schedule
    assert isinstance(after, Learned)
    assert expected_loss(after) < before - 0.02
    assert after.betas()[0].item() == pytest.approx(BETAS[0], rel=1e-12)


# --- free diagonal and fixed edge ----------------------------------------------------------------


class TwoHeaded(nn.Module):
    """The exact denoiser of a diagonal Gaussian, and any log ratio v beside it."""

    def __init__(self, process: Gaussian, v: Tensor) -> None:
        super().__init__()
        self.mean = Denoiser(process)
        self.v = v

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return torch.cat([self.mean(x_t, t), self.v.expand_as(x_t)], 1)


def test_free_variance_is_a_log_ratio_to_the_posteriors() -> None:
    process = Gaussian(Tabulated(BETAS))
    times = process.schedule.grid()
    v = torch.tensor([0.7, -0.4], dtype=torch.float64)
    model = Reverse(process, TwoHeaded(process, v), X0(Free()), EdgeFixed())
    at = model.at(data(), times[2])
    pair = process.pair(times[1], times[2])
    expected = (float(pair.log_posterior) + v).exp().expand(6, 2)
    torch.testing.assert_close(at.kernel(times[1]).variance, expected)
    assert model.parameterization.channels(3) == 6
    density = Reverse(process, TwoHeaded(process, v), X0(Free()), Density())
    edge = density.at(data(), times[0]).decoder().variance
    low = float(process.schedule.log_lose(times[0]))
    torch.testing.assert_close(edge, (low + v).exp().expand(6, 2))


def optimal(process: Gaussian, times: Tensor) -> Iterator[tuple[int, float]]:
    """log σ*²/β̃ = log(1 + (snr_s − snr_t) M_t) of the exact denoiser, for every pair."""
    q = process.schedule
    for i in range(1, len(times)):
        snr_s, snr_t = (float(q.logsnr(t).exp()) for t in (times[i - 1], times[i]))
        error = VARIANCE / (1 + snr_t * VARIANCE)
        yield i, math.log1p((snr_s - snr_t) * error)


def test_the_best_free_variance_is_the_exact_one() -> None:
    """F5: at v = log(1 + (snr_s − snr_t) M_t) the KL is v/2 per dimension, and stationary."""
    process = Gaussian(Tabulated(BETAS))
    times = process.schedule.grid()
    known = GaussianData([MEAN, MEAN], [[VARIANCE, 0.0], [0.0, VARIANCE]])
    for i, best in optimal(process, times):
        v = torch.full((2,), best, dtype=torch.float64, requires_grad=True)
        model = Reverse(process, TwoHeaded(process, v), X0(Free()), EdgeFixed())
        points = gaussian_points(known)
        value = expected_bound(model, points, times).diffusion.flatten()[i - 1]
        assert value.item() == pytest.approx(2 * best / 2, rel=1e-9)
        (gradient,) = torch.autograd.grad(value, v)
        assert float(gradient.abs().max()) < 1e-9


def test_fixed_edge_of_a_gaussian() -> None:
    """N(√k_1 x_1, l_1 I), free of parameters, and π(x_0) q(x_1|x_0) = π(x_1) p(x_0|x_1)."""
    process = Gaussian(Tabulated(BETAS))
    t = process.schedule.grid()[0]
    model = Reverse(process, nn.Linear(2, 2), Epsilon(), EdgeFixed())
    model.network.forward = lambda x, t, cond: x.float()  # type: ignore[method-assign,assignment]
    x_0, x_1 = data(), data().flip(0)
    law = model.decoder(x_1, t)
    torch.testing.assert_close(law.mean, math.sqrt(1 - BETAS[0]) * x_1)
    torch.testing.assert_close(law.variance, torch.full_like(x_1, BETAS[0]))
    prior = process.prior(x_0)
    left = prior.log_prob(x_0) + process.marginal(x_0, t).log_prob(x_1)
    torch.testing.assert_close(left, prior.log_prob(x_1) + law.log_prob(x_0))


def test_the_edge_term_needs_no_gradient_and_pairs_have_one() -> None:
    schedule = Learned(Tabulated(BETAS))
    model, times = model_of(schedule), schedule.grid()
    x_0 = data()
    t = times[:1].expand(6)
    first = torch.zeros(6, dtype=torch.int64)
    value = term_of(model.at(draw(model, x_0, t), t), x_0, times, first)
    (gradient,) = torch.autograd.grad(value.sum(), schedule.rise, allow_unused=True)
    assert gradient is None or float(gradient.abs().max()) == 0


def test_fixed_edge_and_exact_kernels_reach_the_theory() -> None:
    """E L = H + price of the edge: the decoder term is H_q(X_1|X_0) + ce(0) − ce(t_1)."""
    process = Gaussian(Tabulated(BETAS))
    times = process.schedule.grid()
    known = GaussianData([MEAN, MEAN], [[VARIANCE, 0.0], [0.0, VARIANCE]])
    model = exact_model(known, process.schedule, Posterior())
    model = Reverse(model.process, model.network, model.parameterization, EdgeFixed())
    found = expected_bound(model, gaussian_points(known), times)
    keep, lose = 1 - BETAS[0], BETAS[0]
    second = MEAN**2 + VARIANCE
    entropy = math.log(2 * math.pi * math.e * lose)
    ce = [math.log(2 * math.pi) + s for s in (second, keep * second + lose)]
    assert float(found.reconstruction) == pytest.approx(entropy + ce[0] - ce[1], abs=1e-10)


# --- as options ----------------------------------------------------------------------------------

ROLL = [
    *("train", "swissroll", "--steps", "8", "--examples", "200", "--batch", "16", "--width", "16"),
    *("--latents", "12", "--calls", "4", "--validate-every", "0", "--save-every", "8"),
    *("--samples", "16", "--threads", "1", "--quiet"),
]


def test_a_run_with_the_papers_kernel(tmp_path: Path) -> None:
    """Learned betas, free variance and fixed edge: K beside the bound, and the run opens again."""
    out = tmp_path / "run"
    paper = ["--schedule", "linear", "--learn-betas", "--variance", "free", "--decoder", "fixed"]
    code, text, err = silent([*ROLL, *paper, "--out", str(out)])
    assert code == 0, err
    assert "K (entropy form)" in text and "fixed edge step" in text and "betas learned" in text
    opened = open_run(out)
    schedule = opened.subject.model.process.schedule
    assert isinstance(schedule, Learned)
    start = Linear(12).betas()
    assert not torch.equal(schedule.betas()[1:].detach(), start[1:])
    file = next((out / "evaluation").glob("test-*.json"))
    found = json.loads(file.read_text())["comparison"]
    gap = found["K"]["mean"] - found["K_plus_bound"]["mean"] - found["minus_bound"]["mean"]
    # −L = K − [K + L]: the two share all draws but those of the decoder term
    assert abs(gap) < 6 * found["minus_bound"]["se"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learn-betas"], "--schedule linear or cosine"),
        (["--learn-betas", "--schedule", "harmonic"], "--schedule linear or cosine"),
    ],
)
def test_betas_that_cannot_be_learned_are_refused(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    code, _, err = silent([*ROLL, *arguments, "--out", str(tmp_path / "run")])
    assert code == 2 and message in err


def test_a_fixed_edge_is_no_mass_of_levels(tmp_path: Path) -> None:
    code, _, err = silent(
        ["train", "digits", "--decoder", "fixed", "--out", str(tmp_path / "run")]
    )
    assert code == 2 and "does not fit data with 17 levels" in err
