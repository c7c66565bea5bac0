"""Objectives: unbiased for the bound, evenly spread, and trained by the parts that they name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from oracles import (
    GaussianData,
    assert_mean,
    bound_at,
    exact_model,
    expected_bound,
    gaussian_points,
    noise_points,
)
from torch import Tensor, nn

from nelbo import objectives
from nelbo.bound import draw, term_masked, term_of
from nelbo.continuous import Continuous
from nelbo.decoders import Density, Following
from nelbo.objectives import Hybrid, Mean, Objective, Simple, Vlb
from nelbo.parameterizations import Epsilon
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Prediction, Reverse
from nelbo.schedules import LogSNRLinear
from nelbo.timesampling import Places, ladder
from nelbo.variances import Between, Posterior

STEPS = 6
SCHEDULE = LogSNRLinear(5.0, -1.0)
TIMES = SCHEDULE.grid(STEPS)
DATA = GaussianData([0.5, -0.2], [[0.49, 0.3], [0.3, 1.7]])
SKEWED = torch.tensor([0.25, 0.08, 0.12, 0.2, 0.1, 0.25], dtype=torch.float64)
KINDS = {"uniform": None, "skewed": SKEWED}


def exact() -> Reverse:
    return exact_model(DATA, SCHEDULE, Posterior())


def draw_data(n: int) -> Tensor:
    law = torch.distributions.MultivariateNormal(DATA.mean, DATA.cov)
    return law.sample((n,))


class Learned(nn.Module):
    """ε̂ and the variance's channels from disjoint parameters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mean, self.spread = (
            nn.Parameter(torch.randn(3, 2, generator=generator).double()) for _ in range(2)
        )

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        features = torch.cat([x_t, t.expand(len(x_t))[:, None].to(x_t)], 1)
        return torch.cat([features @ self.mean, features @ self.spread], 1)


def learned() -> Reverse:
    return Reverse(Gaussian(SCHEDULE), Learned(), Epsilon(Between()), Density())


def predictions(model: Reverse, x_0: Tensor, noise: Tensor) -> list[Prediction]:
    """One prediction per index, all with the same noise."""
    found = []
    for t in TIMES:
        marginal = model.process.marginal(x_0, t)
        x_t = marginal.mean + marginal.variance.sqrt() * noise
        found.append(model.at(x_t, t.expand(len(x_0))))
    return found


def averaged(objective: Objective, model: Reverse, x_0: Tensor, noise: Tensor) -> Tensor:
    """Σ_i p_i loss(i): the expectation over the index, by enumeration."""
    total = torch.zeros(len(x_0), dtype=torch.float64)
    for i, at in enumerate(predictions(model, x_0, noise)):
        p = objective.probabilities[i]
        index = torch.full((len(x_0),), i)
        total = total + p * objective.loss(at, x_0, index, p.expand(len(x_0)))
    return total


# --- unbiased for the bound ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [exact, learned])
def test_the_mean_of_vlb_over_indices_is_the_bound(kind: str, make: Callable[[], Reverse]) -> None:
    model, points = make(), gaussian_points(DATA)
    mean = averaged(Vlb(TIMES, KINDS[kind]), model, points.x_0, points.noise)
    truth = bound_at(model, points, TIMES).total
    torch.testing.assert_close(mean, truth, rtol=1e-12, atol=1e-12)


def check_vlb(probabilities: Tensor | None) -> None:
    """600 batches of four points, 64 times each, against theory; false-alarm rate 1e-6."""
    objective, model = Vlb(TIMES, probabilities), exact()
    corners = torch.tensor([[2.0, -1.0], [0.5, 0.0], [-2.0, 3.0], [1.0, 1.0]]).double()
    torch.manual_seed(1)
    means = torch.stack([objective(model, corners.repeat(64, 1)).mean() for _ in range(600)])
    each = [float(expected_bound(model, noise_points(x), TIMES).total) for x in corners]
    assert_mean(means, sum(each) / 4, what="vlb")


@pytest.mark.parametrize("kind", KINDS)
def test_vlb_is_unbiased(kind: str) -> None:
    check_vlb(KINDS[kind])


def unweighted(patch: pytest.MonkeyPatch) -> None:
    """Every term times N, whatever p is."""
    right = Vlb.loss

    def loss(o: Vlb, at: Prediction, x_0: Tensor, index: Tensor, p: Tensor) -> Tensor:
        return right(o, at, x_0, index, torch.full_like(p, 1 / STEPS))

    patch.setattr(Vlb, "loss", loss)


def no_decoder(patch: pytest.MonkeyPatch) -> None:
    right = Vlb.inputs

    def inputs(o: Vlb, x_0: Tensor) -> tuple[Tensor, ...]:
        x_0, index, fraction, probability = right(o, x_0)
        return x_0, index.clamp(min=1), fraction, probability

    patch.setattr(Vlb, "inputs", inputs)


def no_prior(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(objectives, "prior_term", lambda model, x_0, times: 0.0)


def in_bits(patch: pytest.MonkeyPatch) -> None:
    right = Vlb.loss
    patch.setattr(Vlb, "loss", lambda *arguments: right(*arguments) / math.log(2))


@pytest.mark.parametrize("plant", [unweighted, no_decoder, no_prior, in_bits])
def test_the_check_finds_a_biased_objective(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="vlb"):
        check_vlb(SKEWED)


# --- low discrepancy -----------------------------------------------------------------------------


def low_discrepancy(p: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """What an objective draws: indices, and their probabilities."""
    index, _, probability = Places.of(p, ladder(batch), torch.device("cpu"))
    return index, probability


@pytest.mark.parametrize("p", [torch.full((7,), 1 / 7).double(), SKEWED])
@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_every_member_is_distributed_as_p(
    p: Tensor, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integrated over u exactly (a fine grid), not sampled."""
    nodes = 4000
    counts = torch.zeros(batch, len(p))
    for k in range(nodes):
        u = torch.tensor((k + 0.5) / nodes, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: u)
        index, probability = low_discrepancy(p, batch)
        counts[torch.arange(batch), index] += 1
        assert torch.equal(probability, p[index])
    assert float((counts / nodes - p).abs().max()) <= 2 / nodes


def check_even(draw: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Of a batch of B, index i gets B p_i members, give or take less than 2."""
    torch.manual_seed(0)
    for batch in (1, 5, 64, 333):
        for _ in range(50):
            counts = torch.bincount(draw(SKEWED, batch)[0], minlength=len(SKEWED))
            assert float((counts - batch * SKEWED).abs().max()) < 2


def test_a_batch_covers_p_evenly() -> None:
    check_even(low_discrepancy)
    with pytest.raises(AssertionError):
        check_even(lambda p, batch: (torch.multinomial(p, batch, True), p))


def test_rounding_of_the_distribution_function_is_harmless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = torch.full((1000,), 1e-3, dtype=torch.float64)
    last = torch.tensor(1 - 2**-53, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: last)
    assert int(low_discrepancy(p, 1)[0]) == 999


def test_low_discrepancy_lowers_the_variance() -> None:
    """The variance of a batch mean against that of independent indices, a factor of 2 at least."""
    model, objective = exact(), Vlb(TIMES)
    torch.manual_seed(0)
    x_0 = draw_data(1).expand(64, 2)
    spread = torch.stack([objective(model, x_0).mean() for _ in range(100)]).var()
    single = torch.stack([objective(model, x_0[:1])[0] for _ in range(400)]).var()
    assert float(spread) < 0.5 * float(single) / 64


@pytest.mark.parametrize("p", [[0.5, 0.5], [0.2, 0.2, 0.2, 0.2, 0.2, 0.0]])
def test_probabilities_must_reach_every_term(p: list[float]) -> None:
    with pytest.raises(ValueError, match="positive probability"):
        Vlb(TIMES, torch.tensor(p))


# --- squared errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_simple_is_the_error_of_the_noise(kind: str) -> None:
    """Σ_i p_i loss(i) = mean over i of ‖ε − ε̂‖², from the network's own output."""
    model, points = learned(), gaussian_points(DATA)
    mean = averaged(Simple(TIMES, KINDS[kind]), model, points.x_0, points.noise)
    errors = [
        ((points.noise - at.output[:, :2]) ** 2).sum(1)
        for at in predictions(model, points.x_0, points.noise)
    ]
    torch.testing.assert_close(mean, torch.stack(errors).mean(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_is_the_error_of_the_posterior_mean(kind: str) -> None:
    """‖μ̃ − μ_θ‖² from the distributions themselves; ‖x_0 − x̂_0‖² at the first time."""
    model, points = learned(), gaussian_points(DATA)
    x_0 = points.x_0
    mean = averaged(Mean(TIMES, KINDS[kind]), model, x_0, points.noise)
    errors = []
    for i, at in enumerate(predictions(model, x_0, points.noise)):
        right = x_0 if i == 0 else model.process.posterior(at.x_t, x_0, at.t, TIMES[i - 1]).mean
        mine = at.x_0 if i == 0 else at.kernel(TIMES[i - 1].expand(len(x_0))).mean
        errors.append(((right - mine) ** 2).sum(1))
    torch.testing.assert_close(mean, torch.stack(errors).mean(0), rtol=1e-9, atol=1e-12)


def test_simple_and_the_bound_differ_by_the_weights_alone() -> None:
    """With σ² = β̃, term_i = ½ expm1(λ_s − λ_t) ‖ε − ε̂‖²."""
    model, points = exact(), gaussian_points(DATA)
    logsnr = SCHEDULE.logsnr(TIMES)
    terms = bound_at(model, points, TIMES).diffusion
    for i, at in enumerate(predictions(model, points.x_0, points.noise)):
        if i > 0:
            index = torch.full((len(points.x_0),), i)
            one = torch.full((len(points.x_0),), 1 / STEPS, dtype=torch.float64)
            error = Simple(TIMES).loss(at, points.x_0, index, one)
            weight = 0.5 * torch.expm1(logsnr[i - 1] - logsnr[i])
            torch.testing.assert_close(weight * error, terms[:, i - 1], rtol=1e-9, atol=1e-12)


def test_one_latent() -> None:
    torch.manual_seed(0)
    for kind in (Simple, Mean, Vlb):
        loss = kind(TIMES[:1])(exact(), draw_data(4))
        assert loss.shape == (4,) and bool(torch.isfinite(loss).all())


# --- hybrid --------------------------------------------------------------------------------------


def gradients(objective: Objective, model: Reverse) -> tuple[Tensor, Tensor]:
    """Of the mean channels and of the variance channels; the same draws for every objective."""
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    objective(model, draw_data(64)).mean().backward()
    network = model.network
    assert isinstance(network, Learned)
    zero = torch.zeros(3, 2, dtype=torch.float64)
    mean, spread = (zero if p.grad is None else p.grad for p in (network.mean, network.spread))
    return mean.clone(), spread.clone()


def check_hybrid(kind: str) -> None:
    """The mean channels learn from Simple/d alone, the variance channels from the bound alone."""
    p, weight, model = KINDS[kind], 0.25, learned()
    hybrid = gradients(Hybrid(TIMES, p, weight), model)
    simple, vlb = gradients(Simple(TIMES, p), model), gradients(Vlb(TIMES, p), model)
    assert float(simple[0].abs().min()) > 0 and float(vlb[1].abs().min()) > 0
    assert float(simple[1].abs().max()) == 0
    torch.testing.assert_close(hybrid[0], simple[0] / 2, rtol=1e-10, atol=1e-12)
    scale = weight / (2 * math.log(2))
    torch.testing.assert_close(hybrid[1], scale * vlb[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_trains_each_part_by_its_own_loss(kind: str) -> None:
    check_hybrid(kind)


def test_the_check_finds_a_missing_stop_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prediction, "mean_detached", lambda at: at)
    with pytest.raises(AssertionError):
        check_hybrid("uniform")


def test_hybrid_value() -> None:
    """‖ε − ε̂‖²/d + λ N term/(d log 2), in expectation over the index."""
    model, points = learned(), gaussian_points(DATA)
    x_0, noise = points.x_0, points.noise
    value = averaged(Hybrid(TIMES, SKEWED, 0.5), model, x_0, noise)
    simple = averaged(Simple(TIMES), model, x_0, noise)
    each = bound_at(model, points, TIMES)
    terms = each.diffusion.sum(1) + each.reconstruction
    truth = simple / 2 + 0.5 * terms / (2 * math.log(2))
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)


def test_hybrid_needs_a_learned_variance() -> None:
    with pytest.raises(ValueError, match="Between"):
        Hybrid(TIMES)(exact(), draw_data(4))


# --- the forms that a GPU computes ---------------------------------------------------------------


def slopes(of: Tensor, model: Reverse) -> list[Tensor]:
    return list(torch.autograd.grad(of.sum(), list(model.network.parameters()), retain_graph=True))


@pytest.mark.parametrize("kind", ["fixed variance", "learned variance", "one latent"])
def test_masked_terms_are_the_terms(kind: str) -> None:
    """Value and gradient of both kinds of rows; nothing infinite is left in either."""
    torch.manual_seed(0)
    times = TIMES if kind != "one latent" else TIMES[-1:]
    learned = kind == "learned variance"
    network = Plain(4 if learned else 2)
    variance = Between() if learned else Posterior()
    process = Gaussian(LogSNRLinear())
    decoder = Density(Following(times[1])) if kind == "fixed variance" else Density()
    model = Reverse(process, network, Epsilon(variance), decoder).double()
    x_0 = torch.randn(20, 2, dtype=torch.float64)
    index = torch.arange(20) % len(times)
    at = model.at(draw(model, x_0, times[index]), times[index])
    rows, masked = term_of(at, x_0, times, index), term_masked(at, x_0, times, index)
    torch.testing.assert_close(masked, rows, rtol=1e-12, atol=1e-12)
    pairs = zip(slopes(masked, model), slopes(rows, model), strict=True)
    for found, expected in pairs:
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Plain(nn.Module):
    """One layer, that sees the time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, channels)

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        out: Tensor = self.layer(torch.cat([x_t, t.expand(len(x_t))[:, None].to(x_t)], 1))
        return out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [Vlb, Simple, Mean, Continuous])
def test_no_objective_waits_for_a_gpu(kind: type[Objective]) -> None:
    """Inputs, loss and gradient; the losses of given places are those of the CPU."""
    torch.manual_seed(0)
    here = Reverse(Gaussian(LogSNRLinear()), Plain(2), Epsilon(), Density())
    x_0 = torch.randn(64, 2)
    inputs = kind(TIMES).inputs(x_0)
    there, objective = copy.deepcopy(here).cuda(), kind(TIMES)
    sent = [x.cuda() for x in inputs]
    objective.given(there, *sent)  # times are copied there once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = objective.given(there, *objective.inputs(sent[0]))
        found.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(found.isfinite().all())
