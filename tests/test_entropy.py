"""K in entropy form against the bound, with and without the condition under which they agree."""

from __future__ import annotations

import math

import pytest
import torch
from bernoulli_goldens import all_bits, expected
from oracles import GaussianData, exact_model, expected_bound, gaussian_points
from torch import Tensor, nn

from nelbo.binary import Logits
from nelbo.decoders import EdgeFixed
from nelbo.distributions import kl_divergence, per_example
from nelbo.entropy import entropy_form, measure, step_entropies
from nelbo.processes.base import Process
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import Harmonic, Linear, LogSNRLinear, Schedule, Tabulated
from nelbo.variances import Posterior, Transition

GRIDS: list[tuple[Schedule, int]] = [
    (LogSNRLinear(4.0, -4.0), 5),
    (Linear(20, 1e-3, 0.3), 20),
    (Tabulated([0.1, 0.5, 0.7]), 3),
]


def gaussian_edge(data: GaussianData, q: Schedule, times: Tensor, variance: object) -> Reverse:
    """The exact denoiser of Gaussian data with the fixed edge step."""
    model = exact_model(data, q, variance)  # type: ignore[arg-type]
    return Reverse(model.process, model.network, model.parameterization, EdgeFixed())


def both(model: Reverse, data: GaussianData, times: Tensor) -> tuple[float, float, float]:
    """E L by `bound`, E K by the entropy form, and the bracket between them; exact."""
    points = gaussian_points(data)
    total = expected_bound(model, points, times)
    divergences = float(total.diffusion.sum())
    x_0, weight = moments(data)
    form = entropy_form(model.process, x_0, times, torch.zeros(len(x_0), dtype=torch.float64))
    k = float((weight * form.k).sum()) - divergences
    return float(total.total), k, float((weight * form.excess).sum())


def moments(data: GaussianData) -> tuple[Tensor, Tensor]:
    """Points and weights with the mean and covariance of the data: every part is quadratic."""
    root = torch.linalg.cholesky(torch.as_tensor(data.cov, dtype=torch.float64))
    d = len(root)
    mean = torch.as_tensor(data.mean, dtype=torch.float64)
    x = torch.cat([mean + math.sqrt(d) * root.T, mean - math.sqrt(d) * root.T])
    return x, torch.full((2 * d,), 1 / (2 * d), dtype=torch.float64)


@pytest.mark.parametrize(("schedule", "steps"), GRIDS)
@pytest.mark.parametrize("variance", [Posterior(), Transition()])
def test_k_is_the_bound_for_unit_second_moment(
    schedule: Schedule, steps: int, variance: object
) -> None:
    """I15: mean² + variance = 1 per dimension on average, the mean included."""
    data = GaussianData([0.6, -0.2], [[0.5, 0.2], [0.2, 1.1]])
    assert sum((0.36, 0.04, 0.5, 1.1)) == pytest.approx(2)
    times = schedule.grid(steps)
    loss, k, excess = both(gaussian_edge(data, schedule, times, variance), data, times)
    assert excess == pytest.approx(0, abs=1e-12) and loss == pytest.approx(-k, abs=1e-10)


@pytest.mark.parametrize(("schedule", "steps"), GRIDS)
def test_k_is_not_the_bound_otherwise(schedule: Schedule, steps: int) -> None:
    """I14: E L + K = ce(t_N) − ce(t_1) + ce(0) − H_p, here .02 to .12 nats."""
    data = GaussianData([1.0, 0.3], [[1.5, 0.2], [0.2, 0.4]])
    times = schedule.grid(steps)
    loss, k, excess = both(gaussian_edge(data, schedule, times, Transition()), data, times)
    assert loss + k == pytest.approx(excess, abs=1e-10)
    keep = schedule.keep(times)
    second = 1 + 0.09 + 1.9
    # ce(t) − H_p = ½ (k_t E‖x_0‖² + d l_t − d), keep of the data itself is 1
    closed = 0.5 * (second - 2) * float(keep[-1] - keep[0] + 1)
    assert excess == pytest.approx(closed, abs=1e-12) and abs(excess) > 0.01


class Guess(nn.Module):
    """A network that is far from exact."""

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return 1.5 * x_t - 0.4 + 0.5 * t.reshape(-1, 1).to(x_t) - 0.3 * x_t.mean(1, keepdim=True)


CHAINS: list[tuple[Schedule, int]] = [(Tabulated([0.1, 0.3, 0.6]), 3), (Harmonic(6), 6)]


@pytest.mark.parametrize(("schedule", "steps"), CHAINS)
@pytest.mark.parametrize(("rate", "agree"), [(0.5, True), (0.25, True), (0.4, False)])
def test_k_of_bits(schedule: Schedule, steps: int, rate: float, agree: bool) -> None:
    """I14, I15 by enumeration: data of mean activity .25 per bit, whatever its law."""
    x_0 = all_bits(4)[[1, 2, 4, 8, 3, 0]]
    weight = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.1, 0.1], dtype=torch.float64)
    assert float((weight * x_0.sum(1)).sum()) == pytest.approx(1.0)
    process, times = Bernoulli(schedule, rate), schedule.grid(steps)
    model = Reverse(process, Guess(), Logits(), EdgeFixed())
    terms = expected(model, x_0, times)
    prior = per_example(kl_divergence(process.marginal(x_0, times[-1]), process.prior(x_0)))
    loss = float((weight * (prior + terms.sum(1))).sum())
    form = entropy_form(process, x_0, times, terms[:, 1:].sum(1))
    k, excess = float((weight * form.k).sum()), float((weight * form.excess).sum())
    assert loss + k == pytest.approx(excess, abs=1e-12)
    assert (abs(excess) < 1e-12) == agree
    assert float((weight * form.bound).sum()) == pytest.approx(loss, abs=1e-12)
    null = 1 * math.log(rate) + 3 * math.log(1 - rate)
    assert float((weight * form.null).sum()) == pytest.approx(null, abs=1e-12)
    if agree:
        assert float(form.prior.mean()) == pytest.approx(-null, abs=1e-12)


def test_measured_k_agrees_with_the_expected_one() -> None:
    """20000 draws of every pair: |z| < 5 fails by chance at a rate of 6e-7."""
    schedule = Tabulated([0.1, 0.3, 0.6])
    process, times = Bernoulli(schedule, 0.4), schedule.grid(3)
    model = Reverse(process, Guess(), Logits(), EdgeFixed())
    x_0 = all_bits(4)[[9]]
    exact = float(expected(model, x_0, times)[0, 1:].sum())
    torch.manual_seed(0)
    form = measure(model, x_0.expand(20_000, 4), times)
    z = (float(form.divergences.mean()) - exact) / (float(form.divergences.std()) / 20_000**0.5)
    assert abs(z) < 5
    torch.testing.assert_close(form.gain, form.k - form.null)


def test_closed_entropies() -> None:
    """½ log(2πe l) per dimension; h(k x_0 + l π)."""
    q = LogSNRLinear(3.0, -3.0)
    x_0, times = all_bits(2), q.grid(4)
    zero = torch.zeros(4, dtype=torch.float64)
    form = entropy_form(Gaussian(q), x_0, times, zero)
    closed = [math.log(2 * math.pi * math.e * float(q.lose(t))) for t in (times[-1], times[0])]
    torch.testing.assert_close(form.last, torch.full_like(zero, closed[0]))
    torch.testing.assert_close(form.first, torch.full_like(zero, closed[1]))
    torch.testing.assert_close(form.prior, torch.full_like(zero, math.log(2 * math.pi * math.e)))
    bits = entropy_form(Bernoulli(q, 0.2), x_0, times, zero)
    p = q.keep(times[0]) * x_0 + q.lose(times[0]) * 0.2
    h = -(p * p.log() + (1 - p) * (1 - p).log()).sum(1)
    torch.testing.assert_close(bits.first, h, rtol=1e-12, atol=0)


# --- entropies of reverse steps ------------------------------------------------------------------


def reverse_entropy(process: Process, x_0: Tensor, weight: Tensor, s: Tensor, t: Tensor) -> float:
    """H_q(X_s|X_t) of bits by enumeration of both."""
    latents = all_bits(x_0.shape[1])
    joint = torch.zeros(len(latents), len(latents), dtype=torch.float64)
    for x, w in zip(x_0, weight, strict=True):
        here = per_example(process.marginal(x.expand_as(latents), s).log_prob(latents)).exp()
        steps = process.transition(latents, s, t)
        onward = torch.stack(
            [per_example(steps.log_prob(y.expand_as(latents))) for y in latents], 1
        ).exp()
        joint += w * here[:, None] * onward
    marginal = joint.sum(0)
    return float(-(joint * joint.log()).sum() + (marginal * marginal.log()).sum())


def test_reverse_entropies_of_bits_lie_between_the_bounds() -> None:
    """I57 for uniform π, where both hold; for π = .1 and busy data the upper one fails."""
    x_0 = all_bits(3)[[1, 6, 7]]
    weight = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    schedule = LogSNRLinear(3.0, -3.0)
    times = schedule.grid(6)
    above = {}
    for rate in (0.5, 0.1):
        process = Bernoulli(schedule, rate)
        steps = step_entropies(process, x_0, times)
        lower, upper = ((weight[:, None] * v).sum(0) for v in (steps.lower, steps.upper))
        truth = torch.tensor(
            [
                reverse_entropy(process, x_0, weight, s, t)
                for s, t in zip(times[:-1], times[1:], strict=True)
            ],
            dtype=torch.float64,
        )
        assert bool((truth > lower).all())
        above[rate] = bool((truth < upper).all())
    assert above == {0.5: True, 0.1: False}


def test_reverse_entropies_of_gaussian_data() -> None:
    """½ log 2πe β̃ and ½ log 2πe β; variance 4 at keep .6 and .3: .658 lies above β = .444."""
    q = Tabulated([0.4, 0.5])
    process, times = Gaussian(q), q.grid(2)
    steps = step_entropies(process, torch.zeros(1, 1, dtype=torch.float64), times)
    pair = process.pair(times[0], times[1])
    constant = math.log(2 * math.pi * math.e)
    assert float(steps.lower) == pytest.approx(0.5 * (constant + float(pair.log_posterior)))
    assert float(steps.upper) == pytest.approx(0.5 * (constant + float(pair.log_beta)))
    beta = float(pair.log_beta.exp())
    for variance, holds in ((0.5, True), (1.0, True), (4.0, False)):
        here = 0.6 * variance + 0.4
        there = 0.5 * here + beta
        truth = 0.5 * (constant + math.log(here * beta / there))
        assert truth >= float(steps.lower)
        assert (truth <= float(steps.upper) + 1e-12) == holds
