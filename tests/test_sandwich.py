"""Lower bound, truth and upper bound in their order, and a bug named where they are not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import (
    GaussianData,
    at_logsnr,
    exact_model,
    expected_bound,
    gaussian_points,
    model_law,
)

from nelbo.data.mixture import GaussianMixture
from nelbo.estimate import Estimate
from nelbo.jsd import kappa, phi
from nelbo.quadrature import jsd, kl
from nelbo.sandwich import Reference, Sandwich
from nelbo.variances import Posterior, Transition

LOG2 = math.log(2)


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def exactly(nats: float) -> Estimate:
    """A bound without error."""
    return Estimate(nats, 0.0, 0.0, 1)


# --- I65 on chains of three states ---------------------------------------------------------------


def chain(rng: np.random.Generator, near: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """p, g, E L and its prior term of a random chain with two latents, all in three states.

    The reverse kernels are the true ones mixed with `near` of random ones.
    """
    p, kernels = rng.dirichlet([1.0] * 3), rng.dirichlet([1.0] * 3, (2, 3))
    joint = p[:, None, None] * kernels[0][:, :, None] * kernels[1][None]  # q(x_0, x_1, x_2)
    later, last = joint.sum(0), joint.sum((0, 1))
    true_1, true_0 = later / last, joint.sum(2) / joint.sum((0, 2))  # q(x_1|x_2), q(x_0|x_1)
    random = rng.dirichlet([1.0] * 3, (2, 3)).swapaxes(1, 2)
    prior = (1 - near) * last + near * rng.dirichlet([1.0] * 3)
    model_1, model_0 = (
        (1 - near) * t + near * r for t, r in zip((true_1, true_0), random, strict=True)
    )
    model = prior * model_1[None] * model_0[:, :, None]  # p(x_0, x_1, x_2)
    bound = float((joint * (np.log(joint / p[:, None, None]) - np.log(model))).sum())
    return p, model.sum((1, 2)), bound, -float(last @ np.log(prior))


def divergence(p: np.ndarray, g: np.ndarray) -> float:
    m = (p + g) / 2
    return float((p * np.log(p / m) + g * np.log(g / m)).sum() / 2)


def chains(count: int, near: float) -> list[tuple[Sandwich, float]]:
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        p, g, bound, prior = chain(rng, near)
        value, entropy = divergence(p, g), -float((p * np.log(p)).sum())
        lower = min(max(value, 0.0), LOG2)
        found.append((Sandwich(lower, 0.95, exactly(bound), entropy, 0, Reference(value)), prior))
    return found


@pytest.mark.parametrize("near", [1.0, 0.1])
def test_random_chains_lie_between(near: float) -> None:
    """The lower bound is the divergence itself, so that nothing is left to spare."""
    for both, _ in chains(150, near):
        assert both.holds and both.upper is not None and both.bound is not None
        assert both.lower <= both.upper <= LOG2
        assert both.bound.mean >= (both.entropy or 0) + both.kappa - 1e-12


def test_a_bound_without_its_prior_term_is_called_a_bug() -> None:
    caught = 0
    for both, prior in chains(150, 0.1):
        assert both.bound is not None
        broken = replace(both, bound=exactly(both.bound.mean - prior))
        caught += broken.verdict.startswith("a bug:")
    assert caught == 150


# --- exact models of Gaussian data ---------------------------------------------------------------


def test_exact_gaussian_models_lie_between() -> None:
    """Both variance rules on short chains: the sampler's law, its bound and JSD are all exact."""
    data = GaussianData([0.5, -0.2], [[0.49, 0.1], [0.1, 1.7]])
    p = one(data.mean, data.cov)
    for variance in (Posterior(), Transition()):
        for levels in ([4.0, 2, 0, -2, -6], [3.0, 0, -2], [6.0, 4, 2, 0, -2, -4, -7]):
            schedule = at_logsnr(levels)
            times = schedule.grid(len(levels))
            model = exact_model(data, schedule, variance)
            bound = float(expected_bound(model, gaussian_points(data), times).total)
            g = one(*model_law(model, times, 2))
            value = jsd(p, g)
            reference = Reference(value.value, value.error)
            both = Sandwich(value.value, 0.95, exactly(bound), data.entropy(), 0, reference)
            assert both.holds, both
            assert both.upper is not None and both.upper > value.value
            assert (both.gap or 0) >= kl(p, g).value
            assert both.kappa <= kl(p, g).value
            # Half of the gap would be a lie, and is found out.
            short = replace(both, bound=exactly(data.entropy() + both.kappa / 2))
            assert "contradict" in short.verdict and not short.holds


def one(mean: torch.Tensor, cov: torch.Tensor) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=torch.float64), mean[None], (cov + cov.T)[None] / 2)


# --- what is said --------------------------------------------------------------------------------

MEASURED = Estimate(1.42, 0.013, 0.001, 4000)
FULL = Sandwich(0.1014, 0.95, MEASURED, 1.093234, 1e-9, Reference(0.109, 0.0, "quadrature"))


def test_every_side_is_the_formula() -> None:
    gap = 1.42 + 1.644854 * 0.013 + 1e-9 - 1.093234
    assert FULL.gap == pytest.approx(gap, abs=1e-12)
    assert FULL.upper == pytest.approx(float(phi(double(math.exp(-gap)))), abs=1e-12)
    assert FULL.central is not None and FULL.upper is not None and FULL.central < FULL.upper
    assert FULL.kappa == pytest.approx(float(kappa(double(0.1014))), abs=1e-12)
    above = FULL.entropy_upper
    assert above is not None and above.mean == pytest.approx(1.42 - FULL.kappa)
    assert (above.se, above.n) == (0.013, 4000)
    assert FULL.holds and FULL.verdict.startswith("holds: 0.1014 <= ")


def test_json_says_what_is_unknown() -> None:
    full = json.loads(json.dumps(FULL.as_json(), allow_nan=False))
    assert full["jsd_nats_lower"] == 0.1014 and full["exact"]["what"] == "quadrature"
    assert full["bound_nats"] == MEASURED.as_json() and full["entropy_nats"] == 1.093234
    assert full["entropy_upper_nats"]["mean"] == pytest.approx(1.42 - full["kappa_nats"])
    assert full["jsd_nats_upper"] == FULL.upper and full["holds"] is True
    bare = Sandwich(0.2, 0.95).as_json()
    for key in ("jsd_nats_upper", "exact", "bound_nats", "entropy_nats", "entropy_upper_nats"):
        assert bare[key] is None
    assert bare["kappa_nats"] == pytest.approx(0.63639, abs=1e-4)
    real = Sandwich(0.2, 0.95, MEASURED)
    assert real.as_json()["jsd_nats_upper"] is None and "entropy of the data" in real.verdict


def test_every_contradiction_is_a_bug() -> None:
    assert "below the entropy" in replace(FULL, bound=replace(MEASURED, mean=1.0)).verdict
    wrong = {
        "contradict": replace(FULL, lower=0.3, exact=None),
        "was certified, and it is 0.0900": replace(FULL, exact=Reference(0.09)),
        "was found, and it is 0.4000": replace(FULL, exact=Reference(0.4)),
    }
    for words, both in wrong.items():
        assert both.verdict.startswith("a bug: ") and words in both.verdict, both.verdict
        assert "5 % of certificates" in both.verdict and not both.holds


def test_a_blurred_reference_bounds_one_side_only() -> None:
    below = Reference(0.05, 0.001, "blurred by N(0, 0.1^2)", blurred=True)
    assert replace(FULL, exact=below).holds
    assert not replace(FULL, exact=replace(below, jsd_nats=0.4)).holds
    assert "0.0500 ± 0.0010" in str(replace(FULL, exact=below))


def test_an_unknown_error_leaves_no_upper_side() -> None:
    alone = replace(FULL, bound=Estimate(1.42, math.nan, math.nan, 1))
    assert alone.upper is None and alone.holds and "error" in alone.verdict


def test_tables_fit_80_columns() -> None:
    worst = replace(
        FULL, bound=Estimate(-12345.678, 12.3456, 0.1, 10000), exact=None, entropy=-12999.1234
    )
    for both in (FULL, worst, Sandwich(0.0, 0.95), replace(FULL, lower=0.3)):
        text = str(both)
        assert all(len(line) <= 80 for line in text.splitlines()), text
        assert ">= " in text


def test_zero_certifies_nothing_and_contradicts_nothing() -> None:
    both = Sandwich(0.0, 0.95, Estimate(1.1, 0.01, 0.001, 4000), 1.093234)
    assert both.kappa < 1e-12 and both.holds
    assert both.upper is not None and both.upper < 0.02
