"""Planted bugs: each must make a check fail that the tests of the library run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from goldens import (
    check_bound,
    check_decoder,
    check_kl,
    check_schedules,
    check_steps,
    check_strided,
)
from oracles import check_entropy, check_gaussian3
from test_distributions import check_masses_sum_to_one
from torch import Tensor

import nelbo.distributions
from nelbo.bound import Bound
from nelbo.decoders import Following
from nelbo.distributions import DiagonalNormal, DiscretizedNormal, level_values
from nelbo.parameterizations import GaussianParameterization
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Prediction
from nelbo.samplers import DDIM
from nelbo.schedules import Schedule, Stepped
from nelbo.variances import Transition

Plant = Callable[[pytest.MonkeyPatch], None]


def missing_prior(patch: pytest.MonkeyPatch) -> None:
    total = property(lambda b: b.diffusion.sum(1) + b.reconstruction)
    patch.setattr(Bound, "total", total)


def one_pair_too_many(patch: pytest.MonkeyPatch) -> None:
    """The mean over pairs is multiplied by N instead of N − 1."""

    def total(b: Bound) -> Tensor:
        count = b.diffusion.shape[1] + 1
        return b.prior + b.diffusion.mean(1) * count + b.reconstruction

    patch.setattr(Bound, "total", property(total))


def decoder_in_bits(patch: pytest.MonkeyPatch) -> None:
    right = DiscretizedNormal.log_prob
    patch.setattr(DiscretizedNormal, "log_prob", lambda d, x: right(d, x) / math.log(2))


def density_in_bits(patch: pytest.MonkeyPatch) -> None:
    right = DiagonalNormal.log_prob
    patch.setattr(DiagonalNormal, "log_prob", lambda d, x: right(d, x) / math.log(2))


def copied_variance_is_lose(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Following, "log_variance", lambda e, process, t: process.schedule.log_lose(t))


def large_decoder_takes_lose(patch: pytest.MonkeyPatch) -> None:
    def edge(
        v: Transition, log_low: Tensor, log_lose: Tensor, extra: object, like: Tensor
    ) -> Tensor:
        return log_lose.to(like.dtype)

    patch.setattr(Transition, "edge", edge)


def edges_by_value(patch: pytest.MonkeyPatch) -> None:
    """|x| > .999 counts as an edge bin: right for 256 levels, 66 edges for 65536."""
    right = DiscretizedNormal.log_mass

    def log_mass(d: DiscretizedNormal, level: Tensor) -> Tensor:
        x = level_values(d.levels, d.mean.double())[level]
        low, high = (torch.full_like(level, edge) for edge in (0, d.levels - 1))
        scale = (-0.5 * d.logvar).exp()
        half = 1 / (d.levels - 1)
        below = nelbo.distributions.log_cdf((x + half - d.mean) * scale)
        above = nelbo.distributions.log_cdf(-(x - half - d.mean) * scale)
        mass = right(d, torch.where(x < -0.999, low, torch.where(x > 0.999, high, level)))
        return torch.where(x < -0.999, below, torch.where(x > 0.999, above, mass))

    patch.setattr(DiscretizedNormal, "log_mass", log_mass)


def lose_from_float32_keep(patch: pytest.MonkeyPatch) -> None:
    right = Stepped.logsnr

    def logsnr(q: Stepped, t: Tensor) -> Tensor:
        keep = torch.sigmoid(right(q, t)).float()
        return (keep / (1 - keep)).log().double()

    patch.setattr(Stepped, "logsnr", logsnr)


def lose_by_subtraction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Schedule, "log_lose", lambda q, t: (1 - q.keep(t).float()).double().log())


def tanh_cdf(patch: pytest.MonkeyPatch) -> None:
    def log_cdf(x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return torch.nn.functional.logsigmoid(2 * inner)

    patch.setattr(nelbo.distributions, "log_cdf", log_cdf)


def cancelling_kl(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nelbo.distributions, "expm1_minus", lambda d: d.exp() - 1 - d)


def variance_of_the_pair_swapped(patch: pytest.MonkeyPatch) -> None:
    """β̃ = l_t c in place of l_s c."""
    right = Gaussian.pair

    def pair(process: Gaussian, s: Tensor, t: Tensor) -> object:
        value = right(process, s, t)
        return value._replace(log_posterior=value.log_beta)

    patch.setattr(Gaussian, "pair", pair)


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GaussianParameterization, "x_0", lambda p, at: p.convert(at))


def noise_always_raw(patch: pytest.MonkeyPatch) -> None:
    right = Prediction.noise
    patch.setattr(Prediction, "noise", lambda at, clipped=True: right(at, False))


def eta_on_the_wrong_side(patch: pytest.MonkeyPatch) -> None:
    """The direction keeps √l_s although noise of size σ is added."""
    right = DDIM.mean_and_sigma

    def mean_and_sigma(d: DDIM, *args: object) -> tuple[Tensor, Tensor]:
        mean, _ = right(DDIM(0.0, d.clipped_noise), *args)  # type: ignore[arg-type]
        return mean, right(d, *args)[1]  # type: ignore[arg-type]

    patch.setattr(DDIM, "mean_and_sigma", mean_and_sigma)


def golden_bound_64() -> None:
    check_bound("bound_T10", 10, torch.float64)


PLANTED: list[tuple[Plant, Callable[[], None]]] = [
    (missing_prior, lambda: check_entropy(4)),
    (missing_prior, check_gaussian3),
    (one_pair_too_many, lambda: check_entropy(20)),
    (decoder_in_bits, golden_bound_64),
    (density_in_bits, lambda: check_entropy(4)),
    (copied_variance_is_lose, golden_bound_64),
    (copied_variance_is_lose, check_gaussian3),
    (large_decoder_takes_lose, golden_bound_64),
    (edges_by_value, lambda: check_masses_sum_to_one(65536, torch.float64)),
    (lose_from_float32_keep, check_schedules),
    (lose_from_float32_keep, golden_bound_64),
    (lose_by_subtraction, check_schedules),
    (tanh_cdf, lambda: check_decoder(torch.float64)),
    (tanh_cdf, golden_bound_64),
    (cancelling_kl, check_kl),
    (variance_of_the_pair_swapped, check_schedules),
    (variance_of_the_pair_swapped, lambda: check_entropy(4)),
    (no_clipping, golden_bound_64),
    (noise_always_raw, lambda: check_steps(torch.float64)),
    (eta_on_the_wrong_side, lambda: check_steps(torch.float64)),
    (copied_variance_is_lose, lambda: check_strided(torch.float64)),
]


@pytest.mark.parametrize(("plant", "check"), PLANTED, ids=lambda f: f.__name__)
def test_planted_bug_is_found(
    plant: Plant, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    "check",
    sorted({c for _, c in PLANTED if c.__name__ != "<lambda>"}, key=lambda c: c.__name__),
    ids=lambda c: c.__name__,
)
def test_the_same_checks_pass_without_the_bug(check: Callable[[], None]) -> None:
    check()
