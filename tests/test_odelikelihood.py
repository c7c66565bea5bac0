"""From data to a density: dequantisation, its constants, errors, and what the command prints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Exact, GaussianData, assert_mean, exact_model, ring
from tiny import silent
from torch import Tensor, nn

from nelbo import odelikelihood
from nelbo.decoders import Density, LevelMass
from nelbo.errors import UsageError
from nelbo.networks.mlp import MLP
from nelbo.odelikelihood import FlowLikelihood, Measure, ode_likelihood
from nelbo.parameterizations import Levels, Velocity
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import LogSNRLinear
from nelbo.variances import Posterior

ENDS = LogSNRLinear(8.0, -26.0)
MASSES = torch.tensor(
    [[0.1, 0.2, 0.3, 0.15, 0.25], [0.6, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64
)
"""P of five levels in two independent dimensions."""


class Constant(nn.Module):
    """Logits that do not look: with `Levels` the exact model of independent dimensions."""

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return MASSES.log().flatten().expand(len(x_t), -1)


def level_model() -> Reverse:
    return Reverse(Gaussian(ENDS), Constant(), Levels(5), LevelMass())


def every_pattern() -> tuple[Tensor, Tensor]:
    """All 25 patterns on the model's scale (25, 2), and −log P."""
    j = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    nats = -(MASSES[0, j[:, 0]].log() + MASSES[1, j[:, 1]].log())
    return 2 * j.double() / 4 - 1, nats


def density(x: Tensor) -> Tensor:
    """log of the true density of x_1/√k_1 of the levels: a mixture of normals, (B,)."""
    keep, lose = ENDS.keep(torch.tensor(0.0)), ENDS.lose(torch.tensor(0.0))
    places = torch.linspace(-1, 1, 5, dtype=torch.float64)
    normal = torch.distributions.Normal(places, (lose / keep).sqrt())
    parts = [(MASSES[d].log() + normal.log_prob(x[:, d : d + 1])).logsumexp(1) for d in range(2)]
    return parts[0] + parts[1]


# --- the three ways ------------------------------------------------------------------------------


def check_variational() -> None:
    """Exact model, exact decoder: −log P(x_0) for every pattern and every draw of x_1."""
    x_0, nats = every_pattern()
    measure = Measure("variational", 5, draws=2, tolerance=1e-8)
    found = ode_likelihood(level_model(), x_0, ENDS.grid(2), measure)
    torch.testing.assert_close(
        found.values[..., 0], nats[:, None].expand(-1, 2), atol=1e-4, rtol=0
    )


def test_no_dequantisation_is_exact_for_an_exact_model() -> None:
    check_variational()


def check_uniform() -> None:
    """−log density − d log(bin) at the very draw, and above −log P on average."""
    x_0, nats = every_pattern()
    measure = Measure("uniform", 5, draws=3, tolerance=1e-7)
    found = ode_likelihood(level_model(), x_0, ENDS.grid(2), measure)
    paths = torch.arange(75)
    noise = odelikelihood._drawn(torch.rand, x_0[paths // 3], paths, measure) - 0.5
    truth = -density(x_0[paths // 3] + 0.5 * noise) - 2 * math.log(0.5)
    torch.testing.assert_close(found.values.flatten(), truth, rtol=0, atol=1e-3)
    assert float((found.values.mean((1, 2)) - nats).mean()) > 0.5


def test_uniform_dequantisation_fills_the_bins() -> None:
    check_uniform()


def check_none() -> None:
    """The density of x_1/√k_1: the ring, widened by 1/snr."""
    data = ring(8, 1.0, 0.15)
    model = exact_model(data, ENDS, Posterior())
    x = torch.tensor([[0.9, 0.1], [0.3, -1.1], [0.0, 0.4]], dtype=torch.float64)
    found = ode_likelihood(model, x, ENDS.grid(2), Measure(tolerance=1e-7), offset=0.25)
    wide = ring(8, 1.0, math.sqrt(0.15**2 + math.exp(-8.0)))
    torch.testing.assert_close(
        found.values.flatten(), 0.25 - wide.log_density(x), rtol=0, atol=1e-5
    )
    assert found.estimate().se_mc == 0.0


def test_real_vectors_as_they_are() -> None:
    check_none()


def test_the_decoder_step_of_real_vectors() -> None:
    """An exact Gaussian decoder and an exact flow: −log p(x_0) for every draw."""
    data = GaussianData([0.5, -1.0], [[0.49, 0.0], [0.0, 0.2]])
    model = exact_model(data, ENDS, Exact())
    x = torch.tensor([[0.9, 0.1], [0.3, -1.1]], dtype=torch.float64)
    measure = Measure("variational", draws=3, tolerance=1e-8)
    found = ode_likelihood(model, x, ENDS.grid(2), measure)
    truth = -data.log_density(x)[:, None].expand(2, 3)
    torch.testing.assert_close(found.values[..., 0], truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("levels", "bits"), [(256, 6.9944), (2, -1.0), (17, 3.0)])
def test_the_constant_of_the_bins(levels: int, bits: float) -> None:
    """log2(1/a) bits/dim for bins of width a = 2/(n−1): 6.9944 for 256 levels."""
    model = exact_model(GaussianData([0.0], [[1.0]]), ENDS, Posterior())
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)[:4, None]
    measure = Measure("uniform", levels, tolerance=1e-8)
    found = ode_likelihood(model, x, ENDS.grid(2), measure).values.flatten()
    noise = odelikelihood._drawn(torch.rand, x, torch.arange(len(x)), measure) - 0.5
    there = x + 2 / (levels - 1) * noise
    wide = torch.distributions.Normal(0.0, math.sqrt(1 + math.exp(-8.0)))
    constant = (found + wide.log_prob(there)[:, 0]) / math.log(2)
    assert constant.tolist() == pytest.approx([bits] * len(x), abs=5e-5)


# --- randomness and errors -----------------------------------------------------------------------


def small_model() -> Reverse:
    torch.manual_seed(0)
    network = MLP(3, width=16, depth=1).double()
    nn.init.normal_(network.last.weight, std=0.3)
    return Reverse(Gaussian(LogSNRLinear(6.0, -4.0)), network, Velocity(), Density())


def measured(measure: Measure, count: int = 6) -> FlowLikelihood:
    g = torch.Generator().manual_seed(8)
    x = torch.randn(8, 3, dtype=torch.float64, generator=g)[:count]
    return ode_likelihood(small_model(), x, LogSNRLinear(6.0, -4.0).grid(2), measure)


def test_batches_and_limits_change_nothing() -> None:
    """Draws and probes belong to the example: batches of 1, 5 and 64, six examples or three."""
    measure = Measure("variational", draws=2, probes=2)
    whole = measured(measure)
    for batch in (1, 5):
        found = measured(replace(measure, batch=batch))
        # a path amplifies the rounding of products of another batch size
        torch.testing.assert_close(found.values, whole.values, rtol=0, atol=1e-9)
        assert torch.equal(found.evaluations, whole.evaluations)
    few = measured(measure, 3)
    torch.testing.assert_close(few.values, whole.values[:3], rtol=0, atol=1e-9)
    other = measured(replace(measure, seed=1))
    assert float((other.values - whole.values).abs().min()) > 0


def test_errors_say_what_they_know() -> None:
    """Exact: none. Probes: theirs. Draws: all of it. One draw: not known."""
    exact = measured(Measure()).estimate()
    assert exact.se_mc == 0.0 and exact.se > 0
    assert measured(Measure()).probe_error() == 0.0
    probed = measured(Measure(probes=4))
    assert 0 < probed.estimate().se_mc == pytest.approx(probed.probe_error())
    assert math.isnan(measured(Measure(probes=1)).estimate().se_mc)
    both = measured(Measure("variational", draws=2, probes=4))
    assert both.estimate().se_mc > both.probe_error() > 0
    assert math.isnan(measured(Measure("variational")).estimate().se_mc)


def test_draws_are_unbiased_over_each_other() -> None:
    """Two disjoint halves of 60 draws of one example agree within their errors."""
    measure = Measure("variational", draws=60, tolerance=1e-3)
    values = measured(measure, 1).values[0, :, 0]
    halves = values[:30], values[30:]
    assert_mean(halves[0] - halves[1], 0.0, 1, "halves")


def test_the_prior_mismatch_is_the_divergence_at_the_end() -> None:
    found = measured(Measure())
    q = LogSNRLinear(6.0, -4.0)
    keep, lose = float(q.keep(torch.tensor(1.0))), float(q.lose(torch.tensor(1.0)))
    g = torch.Generator().manual_seed(8)
    x = torch.randn(8, 3, dtype=torch.float64, generator=g)[:6]
    truth = 0.5 * (keep * (x**2 - 1) - math.log(lose)).sum(1)
    torch.testing.assert_close(found.prior, truth)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dequantise": "none", "levels": 5}, "have no density"),
        ({"dequantise": "uniform"}, "no bins"),
        ({"dequantise": "none", "draws": 2}, "--draws"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Measure(**keys)  # type: ignore[arg-type]


# --- planted errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_variational, check_uniform, check_none])
def test_planted_constants_are_caught(
    check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 % of a nat per dimension too much between data and x_1."""
    right = odelikelihood._first_latent

    def wrong(*arguments: object) -> tuple[Tensor, Tensor]:
        x_1, change = right(*arguments)  # type: ignore[arg-type]
        return x_1, change + 0.02

    monkeypatch.setattr(odelikelihood, "_first_latent", wrong)
    with pytest.raises(AssertionError):
        check()


def test_a_forgotten_entropy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without log q(x_1|x_0) the variational value is far off."""
    right = odelikelihood._first_latent

    def wrong(flow, x_0, paths, t_1, measure):  # type: ignore[no-untyped-def]
        x_1, change = right(flow, x_0, paths, t_1, measure)
        forward = flow.model.process.marginal(x_0, t_1).log_prob(x_1)
        return x_1, change - forward.sum(1)

    monkeypatch.setattr(odelikelihood, "_first_latent", wrong)
    with pytest.raises(AssertionError):
        check_variational()


# --- the command ---------------------------------------------------------------------------------


def ode(run: Path, *more: str) -> tuple[int, str, str]:
    return silent(["evaluate", str(run), "--ode", "--tolerance", "1e-2", "--quiet", *more])


def test_the_command_prints_and_stores_what_it_measured(run_copy: Path) -> None:
    code, out, err = ode(run_copy, "--limit", "3", "--probes", "2", "--json")
    assert code == 0, err
    value = json.loads(out)
    found = value["ode"]
    assert found["is"].endswith("another model than the bound's")
    assert found["dequantise"] == "variational" and found["draws"] == 2
    assert found["total"]["unit"] == "bits/dim" and found["total"]["n"] == 3
    calls = found["evaluations"]
    assert found["se_probes"] > 0 and calls["max"] >= calls["mean"] >= 14
    (stored,) = (run_copy / "evaluation").glob("ode-*.json")
    assert json.loads(stored.read_text()) == value
    arrays = np.load(stored.with_suffix(".npz"), allow_pickle=False)
    assert arrays["values"].shape == (3, 2, 2) and arrays["evaluations"].shape == (3, 2)
    mean = arrays["total"].mean() / (64 * math.log(2))
    assert mean == pytest.approx(found["total"]["mean"])


def test_the_table_says_what_it_is(run_copy: Path) -> None:
    code, out, err = ode(run_copy, "--limit", "1", "--dequantise", "uniform", "--draws", "1")
    assert code == 0, err
    assert "another model than the bound's" in out and "uniform noise within the bins" in out
    assert "trace: exact" in out and "evaluations of the field" in out and "1 draws" in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--calls 8", "--calls belongs to the bound"),
        ("--importance 2", "--importance belongs to the bound"),
        ("--dequantise none", "no density"),
        ("--probes 0", "--probes 0: it must be at least 1"),
        ("--tolerance 1", "at most 0.1"),
    ],
)
def test_usage(more: str, words: str, finished_run: Path) -> None:
    code, _, err = ode(finished_run, *more.split())
    assert code == 2 and words in err


def test_options_of_the_flow_alone_are_refused(finished_run: Path) -> None:
    code, _, err = silent(["evaluate", str(finished_run), "--probes", "2"])
    assert code == 2 and "--probes belongs to --ode" in err


@pytest.mark.parametrize("sampler", ["dpmpp", "heun"])
def test_the_solvers_draw_from_a_run(sampler: str, run_copy: Path) -> None:
    words = ["sample", str(run_copy), "--n", "4", "--sampler", sampler, "--steps", "5"]
    code, out, err = silent([*words, "--grid", "logsnr", "--quiet", "--json"])
    assert code == 0, err
    value = json.loads(out)
    assert value["sampler"] == sampler and value["grid"] == 5
    assert f"{sampler}-" in value["array"] and "-logsnr-" in value["array"]
