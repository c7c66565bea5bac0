"""The bound over a data set: unbiased, with honest errors, whatever the batch or the world size.

Per-example truth is exact: cubature over ε where terms are quadratic in it, Gauss-Hermite
quadrature for a mixture. So one evaluation of n examples gives n independent errors of mean zero.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    FALSE_ALARM,
    GaussianData,
    MixtureData,
    Points,
    assert_mean,
    bound_at,
    exact_model,
    expected_bound,
    gaussian_points,
    hermite,
    sphere,
)
from scipy.stats import chi2
from torch import Tensor, nn
from torch import multiprocessing as mp

from nelbo import design, distributed, rounds
from nelbo.controls import Wiener
from nelbo.decoders import Density
from nelbo.errors import NumericalFailure, UsageError
from nelbo.estimate import Estimate
from nelbo.evaluation import TERMS, Evaluation, compare, evaluate
from nelbo.everyterm import Terms
from nelbo.fewcalls import Plan, Target
from nelbo.networks.mlp import MLP
from nelbo.parameterizations import Epsilon
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import LogSNRLinear
from nelbo.variances import Posterior, Transition

SCHEDULE = LogSNRLinear(6.0, -3.0)
GAUSSIAN = GaussianData([0.5, -0.2], [[0.49, 0.3], [0.3, 1.7]])
MIXTURE = MixtureData([[-1.2], [0.3], [1.5]], 0.4, [0.3, 0.5, 0.2])


def draw(n: int) -> Tensor:
    return torch.distributions.MultivariateNormal(GAUSSIAN.mean, GAUSSIAN.cov).sample((n,))


def gaussian_model() -> Reverse:
    """Neither optimal (σ² = β) nor trivial."""
    return exact_model(GAUSSIAN, SCHEDULE, Transition())


def over_noise(
    model: Reverse, x_0: Tensor, times: Tensor, z: Tensor, w: Tensor
) -> dict[str, Tensor]:
    """The exact bound of every example (n,), integrated over the points z (m, D) of ε."""
    n, m = len(x_0), len(z)
    points = Points(x_0.repeat_interleave(m, 0), z.repeat(n, 1), torch.ones(n * m))
    each = bound_at(model, points, times)
    parts = {
        "prior": each.prior,
        "diffusion": each.diffusion.sum(1),
        "reconstruction": each.reconstruction,
        "total": each.total,
    }
    return {name: value.view(n, m) @ w for name, value in parts.items()}


def gaussian_truth(x_0: Tensor, times: Tensor) -> dict[str, Tensor]:
    z = sphere(2)
    return over_noise(gaussian_model(), x_0, times, z, torch.full((len(z),), 1 / len(z)).double())


def few(model: Reverse, x_0: Tensor, times: Tensor, calls: float, **more: Any) -> Evaluation:
    """With a design from examples that are nothing like the data: it may not bias, only blur."""
    pilot = 2 * draw(16) + 3
    return evaluate(model, x_0, times, calls=calls, pilot=pilot, batch=4096, **more)


def plan_for(x_0: Tensor, control: bool, **more: Any) -> Plan:
    """Everything that there is: a control, and a feature that the terms go with."""
    controls = (Wiener.of(Gaussian(SCHEDULE), draw(200)),) if control else ()
    norms = x_0.square(), (2 * draw(16) + 3).square()
    return Plan(controls=controls, features=norms if control else None, **more)


# --- unbiased ------------------------------------------------------------------------------------


def check_few(calls: int, control: bool = False) -> None:
    """2048 examples against their exact bounds by term; false-alarm rate 1e-6 over the terms."""
    torch.manual_seed(calls)
    times, model, x_0 = SCHEDULE.grid(30), gaussian_model(), draw(2048)
    result = few(model, x_0, times, calls, plan=plan_for(x_0, control))
    truth, values = gaussian_truth(x_0, times), result.values()
    torch.testing.assert_close(values["prior"], truth["prior"], rtol=1e-12, atol=1e-12)
    assert_mean(values["diffusion"] - truth["diffusion"], 0, 2, "diffusion")
    assert_mean(values["reconstruction"] - truth["reconstruction"], 0, 2, "reconstruction")
    assert result.calls == calls and result.pilot_calls > 0


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("calls", [4, 5, 7, 16])
def test_few_calls_are_unbiased(calls: int, control: bool) -> None:
    check_few(calls, control)


def nodes_short_of_one(patch: pytest.MonkeyPatch) -> None:
    """The last tenth of the strata is never visited."""
    right = design.nodes
    patch.setattr(design, "nodes", lambda *arguments: 0.9 * right(*arguments))


def stand_in_off_by_5_percent(patch: pytest.MonkeyPatch) -> None:
    """What is added for all examples is not what is subtracted at the draws."""
    right = rounds.totals
    patch.setattr(rounds, "totals", lambda *arguments: 1.05 * right(*arguments))


@pytest.mark.parametrize("plant", [nodes_short_of_one, stand_in_off_by_5_percent])
def test_the_check_finds_a_biased_estimate(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="diffusion"):
        check_few(16)


@pytest.mark.parametrize("calls", [None, 6])
def test_a_mixture_against_quadrature(calls: int | None) -> None:
    torch.manual_seed(0)
    times = LogSNRLinear(4.0, -3.0).grid(12)
    model = exact_model(MIXTURE, LogSNRLinear(4.0, -3.0), Posterior())
    x_0 = MIXTURE.draw(600)
    z, w = hermite(80)
    truth = over_noise(model, x_0, times, z[:, None], w)
    z, w = hermite(60)
    coarse = over_noise(model, x_0, times, z[:, None], w)
    assert float((truth["total"] - coarse["total"]).abs().mean()) < 1e-4
    values = evaluate(model, x_0, times, calls=calls, pilot=MIXTURE.draw(32)).values()
    for name in ("diffusion", "reconstruction"):
        assert_mean(values[name] - truth[name], 0, 2, name)


@pytest.mark.parametrize("replicates", [1, 2, 3])
def test_the_full_bound_by_term(replicates: int) -> None:
    torch.manual_seed(replicates)
    times, model, x_0 = SCHEDULE.grid(20), gaussian_model(), draw(2048)
    result = evaluate(model, x_0, times, replicates=replicates, batch=2048)
    truth, values = gaussian_truth(x_0, times), result.values()
    torch.testing.assert_close(values["prior"], truth["prior"], rtol=1e-12, atol=1e-12)
    for name in ("diffusion", "reconstruction"):
        assert_mean(values[name] - truth[name], 0, 2, name)
    assert result.calls == max(20 * replicates, 21)
    torch.testing.assert_close(values["total"], sum(values[n] for n in TERMS[:3]))


def test_the_population_is_what_bound_says() -> None:
    """The mean over drawn data against the exact expectation over data and noise."""
    torch.manual_seed(7)
    times, model = SCHEDULE.grid(10), gaussian_model()
    truth = float(expected_bound(model, gaussian_points(GAUSSIAN), times).total)
    total = evaluate(model, draw(4096), times, batch=4096).estimates()["total"]
    assert abs(total.mean - truth) < 5 * total.se


# --- errors --------------------------------------------------------------------------------------


def ratios(runs: int, n: int, steps: int, **more: Any) -> tuple[float, float]:
    """Σ error²/Σ se_mc² against this set's own bound, Σ error²/Σ se² against the population's."""
    times, model = SCHEDULE.grid(steps), gaussian_model()
    population = float(expected_bound(model, gaussian_points(GAUSSIAN), times).total)
    sums = torch.zeros(4, dtype=torch.float64)
    for seed in range(runs):
        x_0 = draw(n)
        here = float(gaussian_truth(x_0, times)["total"].mean())
        result = evaluate(model, x_0, times, seed=seed, pilot=draw(16), **more).estimates()[
            "total"
        ]
        errors = (result.mean - here, result.se_mc, result.mean - population, result.se)
        sums += torch.tensor(errors, dtype=torch.float64) ** 2
    return float(sums[0] / sums[1]), float(sums[2] / sums[3])


def check_errors(runs: int = 120, low: float = 0.0, **more: Any) -> None:
    """Evaluations of fresh data: squared errors are χ²-distributed about what was claimed.

    False-alarm rate 1e-6 over both ratios; the limits are widened by 10 % for the noise of the
    claimed errors themselves. Of 120 runs, an error wrong by 2 is found.
    """
    torch.manual_seed(5)
    within, between = ratios(runs, 64, **more)
    least, most = (float(chi2.ppf(q, runs)) / runs for q in (FALSE_ALARM / 4, 1 - FALSE_ALARM / 4))
    assert (low or 0.9 * least) < within < 1.1 * most, f"se_mc: {within}"
    assert 0.9 * least < between < 1.1 * most, f"se: {between}"


@pytest.mark.parametrize("calls", [5, 6])
def test_errors_of_few_calls(calls: int) -> None:
    check_errors(100, steps=7, calls=calls)


def test_errors_of_the_full_bound() -> None:
    check_errors(steps=5)


def test_errors_read_off_the_roughness() -> None:
    """One replicate of a long grid: on the safe side by what the terms bend, never by half."""
    check_errors(60, 0.3, steps=40, replicates=1)


def test_the_check_finds_a_wrong_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Terms.estimates

    def estimates(terms: Terms, offset: float) -> dict[str, Estimate]:
        """The spread within an example, halved."""
        shrunk = {}
        for name, dim in (("pairs", 2), ("decoder", 1)):
            values = getattr(terms, name)
            mean = values.mean(dim, keepdim=True)
            shrunk[name] = mean + (values - mean) / 2
        return right(replace(terms, **shrunk), offset)

    monkeypatch.setattr(Terms, "estimates", estimates)
    with pytest.raises(AssertionError, match="se_mc"):
        check_errors(steps=6)


def test_more_calls_and_a_control_lower_the_error() -> None:
    torch.manual_seed(0)
    times, model, x_0 = SCHEDULE.grid(60), gaussian_model(), draw(512)
    plan = Plan(controls=(Wiener.of(Gaussian(SCHEDULE), draw(4000)),))
    errors = [
        few(model, x_0, times, calls).estimates()["diffusion"].se_mc for calls in (4, 16, 40)
    ]
    # mirrored strata beat K^{-1/2}, which would be 1/√7 from 2 pair calls to 14
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1]
    steadied = few(model, x_0, times, 16, plan=plan).estimates()["diffusion"].se_mc
    assert steadied < 0.5 * errors[1]


@pytest.mark.parametrize("calls", [0.3, 1, 1.5])
def test_less_than_two_calls_are_unbiased_with_honest_errors(calls: float) -> None:
    """150 evaluations of one set of 400 against its own bound: mean z, Σz², and coverage.

    Of 150 intervals of 95 %, fewer than 126 hold the truth with probability 3e-7 (binomial), and
    |mean z| > 5/√150 with 6e-7; an error too small by a third is found in 99.9 % of runs.
    """
    torch.manual_seed(int(10 * calls))
    times, model, x_0 = SCHEDULE.grid(30), gaussian_model(), draw(400)
    truth = float(gaussian_truth(x_0, times)["total"].mean())
    plan = plan_for(x_0, True)
    z = []
    for seed in range(150):
        total = few(model, x_0, times, calls, plan=plan, seed=seed).estimates()["total"]
        z.append((total.mean - truth) / total.se_mc)
    scores = torch.tensor(z)
    assert abs(float(scores.mean())) < 5 / math.sqrt(150)
    assert int((scores.abs() < 1.96).sum()) >= 126


@pytest.mark.parametrize("name", ["controls", "features", "allocate", "latin", "crossfit"])
def test_every_device_can_be_switched_off(name: str) -> None:
    """Without it the estimate is as unbiased: 2048 examples, false-alarm rate 1e-6."""
    torch.manual_seed(3)
    times, model, x_0 = SCHEDULE.grid(30), gaussian_model(), draw(2048)
    off: dict[str, Any] = {"controls": (), "features": None}
    plan = replace(plan_for(x_0, True), **{name: off.get(name, False)})
    result = few(model, x_0, times, 6, plan=plan)
    truth, values = gaussian_truth(x_0, times), result.values()
    assert_mean(values["diffusion"] - truth["diffusion"], 0, 2, "diffusion")
    whole = few(model, x_0, times, 6, plan=plan_for(x_0, True)).savings
    assert result.savings[0].name == whole[0].name == "all of it"
    assert whole[-1].se_mc > whole[0].se_mc, "uniform times cost more than all devices together"


def test_until_an_error_is_reached() -> None:
    torch.manual_seed(2)
    times, model, x_0 = SCHEDULE.grid(40), gaussian_model(), draw(300)
    once = few(model, x_0, times, 2).estimates()["total"]
    seen: list[tuple[float, float]] = []
    target = Target(once.se_mc / 3, report=lambda c, e: seen.append((c, e)))
    result = evaluate(model, x_0, times, until=target, pilot=draw(16))
    assert result.estimates()["total"].se_mc <= target.value
    assert seen[-1][0] == result.calls and len(seen) > 1
    assert [c for c, _ in seen] == sorted(c for c, _ in seen)
    truth = gaussian_truth(x_0, times)["total"]
    total = result.estimates()["total"]
    assert abs(total.mean - float(truth.mean())) < 5 * total.se_mc
    capped = evaluate(model, x_0, times, until=Target(1e-9, most=6), pilot=draw(16))
    assert 5 < capped.calls <= 6.1
    # what is left of the cap need not make a design of its own
    small = evaluate(model, x_0[:40], times, until=Target(1e-9, most=5), pilot=draw(16))
    assert 4 <= small.calls <= 5
    floor = math.sqrt(total.se**2 - total.se_mc**2)
    population = evaluate(model, x_0, times, until=Target(floor / 2, "se"), pilot=draw(16))
    assert population.estimates()["total"].se > floor / 2, "300 examples cannot say more"
    found = population.estimates()["total"]
    beyond = math.sqrt(found.se**2 - found.se_mc**2)
    assert beyond > floor / 2 and found.se_mc > 0.2 * beyond, "nothing is spent once that is known"


def test_two_models_on_the_same_draws() -> None:
    """The difference is that of the bounds, and known better than either."""
    torch.manual_seed(4)
    times, x_0 = SCHEDULE.grid(30), draw(500)
    one, two = gaussian_model(), exact_model(GAUSSIAN, SCHEDULE, Posterior())
    truth = float((gaussian_truth(x_0, times)["total"]).mean())
    for calls in (None, 2, 0.5):
        a, b, gap = compare(one, two, x_0, times, calls=calls, pilot=draw(64), seed=1)
        totals = [e.estimates()["total"] for e in (a, b, gap)]
        assert abs(totals[2].mean - (totals[0].mean - totals[1].mean)) < 3 * totals[2].se + 1e-9
        assert abs(totals[0].mean - truth) < 5 * totals[0].se_mc
        assert gap.estimates()["prior"].mean == 0
    same = compare(one, gaussian_model(), x_0, times, calls=2, pilot=draw(64))[2]
    assert same.estimates()["total"].mean == same.estimates()["total"].se == 0


# --- the same figures, however it is computed ----------------------------------------------------


def small_net() -> Reverse:
    torch.manual_seed(0)
    network = MLP(2, width=16, depth=1)
    nn.init.normal_(network.last.weight, std=0.1)
    return Reverse(Gaussian(SCHEDULE), network, Epsilon(Posterior()), Density())


def measured(batch: int, calls: float | None, n: int) -> Evaluation:
    torch.manual_seed(1)
    data, pilot, times = draw(n).float(), draw(16).float(), SCHEDULE.grid(8)
    return evaluate(small_net(), data, times, calls=calls, pilot=pilot, batch=batch, seed=3)


def assert_same(a: Evaluation, b: Evaluation, rtol: float) -> None:
    for name in TERMS:
        torch.testing.assert_close(a.values()[name], b.values()[name], rtol=rtol, atol=rtol)
    assert a.integrand is not None and b.integrand is not None
    torch.testing.assert_close(a.integrand.mean, b.integrand.mean, rtol=rtol, atol=rtol)
    assert (a.calls, a.pilot_calls) == (b.calls, b.pilot_calls)


@pytest.mark.parametrize("calls", [None, 0.5, 4, 7])
def test_the_batch_size_changes_nothing(calls: int | None) -> None:
    one = measured(200, calls, 200)
    for batch in (1, 64, 128, 1000):
        assert_same(one, measured(batch, calls, 200), 1e-4)


def test_an_example_is_measured_alike_among_more_examples() -> None:
    """Noise belongs to the place in the data set: 64 examples, then 200 that begin with them."""
    few_of_them, all_of_them = measured(64, None, 64), measured(64, None, 200)
    assert torch.equal(few_of_them.values()["diffusion"], all_of_them.values()["diffusion"][:64])


def test_seeds() -> None:
    model, times = gaussian_model(), SCHEDULE.grid(8)
    x_0 = GAUSSIAN.mean.expand(8, 2)
    a, b, c = (evaluate(model, x_0, times, seed=s).values()["total"] for s in (0, 0, 1))
    assert torch.equal(a, b) and not bool((a == c).any())
    assert len(a.unique()) == 8, "equal examples get noise of their own"


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    evaluate(gaussian_model(), GAUSSIAN.mean.expand(8, 2), SCHEDULE.grid(4))
    assert torch.equal(torch.rand(3), wanted)


_CASES = [(None, 200), (6, 200), (0.5, 200), (6, 50), (None, 64)]


def _ranks(rank: int, folder: str) -> None:
    """World of 3, then of 2, measure the same data; four batches, and fewer batches than ranks."""
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
            distributed.init(60.0, rendezvous=f"file://{folder}/meet{world}")
            found = [measured(64, calls, n) for calls, n in _CASES]
            torch.save([f.values() for f in found], f"{folder}/{world}-{rank}.pt")
            distributed.shutdown()


def test_one_two_and_three_processes(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    children = [context.Process(target=_ranks, args=(r, str(tmp_path))) for r in range(3)]
    for child in children:
        child.start()
    truth = [measured(64, calls, n).values() for calls, n in _CASES]
    deadline = time.monotonic() + 120
    try:
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
        assert [child.exitcode for child in children] == [0, 0, 0]
    finally:
        for child in children:
            child.kill()
    for world in (2, 3):
        for rank in range(world):
            found = torch.load(tmp_path / f"{world}-{rank}.pt")
            for one, many in zip(truth, found, strict=True):
                assert all(torch.equal(one[name], many[name]) for name in TERMS)


# --- the model as it should be measured ----------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small_net().network
        self.drop = nn.Dropout(0.5)

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        out: Tensor = self.drop(self.inner(x_t, t))
        return out


def check_eval_mode() -> None:
    """A model left in training mode is measured without dropout, and left in training mode."""
    model = Reverse(Gaussian(SCHEDULE), Dropping(), Epsilon(Posterior()), Density())
    data, times = draw(64).float(), SCHEDULE.grid(5)
    model.train()
    in_training = evaluate(model, data, times).values()["total"]
    assert model.training and model.network.training
    model.network.drop.p = 0.0  # type: ignore[union-attr]
    assert torch.equal(in_training, evaluate(model, data, times).values()["total"]), "dropout"


def test_dropout_is_off() -> None:
    check_eval_mode()


def test_the_check_finds_train_mode_at_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "eval", lambda module: module)
    with pytest.raises(AssertionError, match="dropout"):
        check_eval_mode()


def test_no_gradient_is_recorded() -> None:
    model = small_net()
    result = evaluate(model, draw(8).float(), SCHEDULE.grid(4))
    assert not result.values()["diffusion"].requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_offset_encode_and_track() -> None:
    model, times, x_0 = gaussian_model(), SCHEDULE.grid(5), draw(100)
    plain = evaluate(model, x_0, times)
    seen: list[tuple[int, int]] = []
    other = evaluate(
        model,
        2 * x_0 + 1,
        times,
        encode=lambda y: (y - 1) / 2,
        offset=3.5,
        batch=64,
        track=lambda done, planned: seen.append((done, planned)),
    )
    torch.testing.assert_close(other.values()["total"], plain.values()["total"] + 3.5)
    difference = (
        other.estimates()["reconstruction"].mean - plain.estimates()["reconstruction"].mean
    )
    assert abs(difference - 3.5) < 1e-9
    assert seen[-1] == (1000, 1000) and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert plain.calls == 10


def test_more_calls_than_latents_lower_the_error() -> None:
    torch.manual_seed(6)
    model, times, x_0 = gaussian_model(), SCHEDULE.grid(6), draw(200)
    truth = float(gaussian_truth(x_0, times)["total"].mean())
    found = [few(model, x_0, times, calls).estimates()["total"] for calls in (2, 6, 40)]
    assert found[2].se_mc < 0.5 * found[0].se_mc
    assert all(abs(f.mean - truth) < 5 * f.se_mc for f in found)


def test_one_latent() -> None:
    """A grid of one has a prior and a decoder, and no pair."""
    x_0 = draw(2000)
    times = SCHEDULE.grid(1)
    result = evaluate(gaussian_model(), x_0, times)
    truth = gaussian_truth(x_0, times)
    assert_mean(result.values()["total"] - truth["total"], 0)
    assert float(result.values()["diffusion"].abs().max()) == 0


def test_refusals() -> None:
    model, times, x_0 = gaussian_model(), SCHEDULE.grid(20), draw(10)
    for calls in (1.9, 0.1, 0, -1):
        with pytest.raises(UsageError, match="take at least 2$"):
            evaluate(model, x_0, times, calls=calls, pilot=x_0)
    with pytest.raises(UsageError, match="whole number"):
        evaluate(model, x_0, times, calls=7.5, pilot=x_0)
    for pilot in (None, x_0[:0]):
        with pytest.raises(UsageError, match="training examples"):
            evaluate(model, x_0, times, calls=8, pilot=pilot)


def test_a_bound_that_is_not_finite_is_refused() -> None:
    x_0 = draw(100)
    x_0[[17, 80]] = math.nan
    with pytest.raises(NumericalFailure, match=r"2 examples .* \[17, 80\]"):
        evaluate(gaussian_model(), x_0, SCHEDULE.grid(4))
