r"""The loss that was trained, seen as each of its forms, on the network's own predictions.

With σ² = β̃ a term of the bound is a weighted square, of x_0, of the noise, or of v; L_simple has
the weight 1 at every time instead, and so is no bound. The expectation of an objective over its
random time is a sum over all times, which is taken here instead of drawing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nelbo.bound import pair_term
from nelbo.continuous import Continuous
from nelbo.derivation.identity import Line
from nelbo.derivation.trained import Trained
from nelbo.derivation.trainedchain import BOUND, KERNEL, PAIR, POSTERIOR, Said, paired
from nelbo.distributions import per_example
from nelbo.objectives import Hybrid, Mean, Objective, Simple, Vlb
from nelbo.parameterizations import GaussianParameterization, with_variance
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import seeded
from nelbo.schedules import Smooth
from nelbo.variances import Posterior

NOISE, GUESS = "nelbo.reverse.Prediction.noise", "nelbo.reverse.Prediction.x_0"
MIXTURE = "nelbo.data.mixture.GaussianMixture"
SQUARES = "squared error per example"
DRAWS = 32
"""Times drawn for every row."""
NOT_GAUSSIAN = "its process is not Gaussian: bits have no mean part and no noise"


def gaussian(lines: Callable[[Trained, Gaussian], Said]) -> Callable[[Trained], Said]:
    """Only for a Gaussian process with a pair of latents."""

    def checked(t: Trained) -> Said:
        return NOT_GAUSSIAN if t.gaussian is None else lines(t, t.gaussian)

    return paired(checked)


class _Scales(NamedTuple):
    """√k_t, √l_t and snr_t of a time, ()."""

    keep: Tensor
    lose: Tensor
    snr: Tensor


def _scales(q: Gaussian, t: Tensor) -> _Scales:
    s = q.schedule
    return _Scales((0.5 * s.log_keep(t)).exp(), (0.5 * s.log_lose(t)).exp(), s.logsnr(t).exp())


def _noise(t: Trained, q: Gaussian, index: int) -> tuple[Tensor, Tensor]:
    """ε and ε̂ at the trajectories' latents."""
    scale = _scales(q, t.times[index])
    x_t = t.rows.latents[:, index]
    return (x_t - scale.keep * t.x_0) / scale.lose, t.at(index).noise()


def mean_difference(t: Trained, q: Gaussian) -> Said:
    """I22, where the two differ most."""
    found: list[tuple[Tensor, Tensor]] = []
    for i in range(1, len(t.times)):
        noise, guess = _noise(t, q, i)
        pair = q.pair(t.times[i - 1], t.times[i])
        at = t.at(i)
        law = q.posterior(at.x_t, t.x_0, at.t, t.times[i - 1])
        factor = -pair.c * (q.schedule.log_lose(at.t) - pair.log_alpha).mul(0.5).exp()
        left, right = law.mean - at.kernel(t.times[i - 1]).mean, factor * (noise - guess)
        place = int((left - right).abs().flatten().argmax())
        found.append((left.flatten()[place], right.flatten()[place]))
    left, right = (torch.stack(v) for v in zip(*found, strict=True))
    line = t.exact(
        ("mean of q(x_s|x_t,x_0) - mean of p(x_s|x_t)", left, f"{POSTERIOR}, {KERNEL}"),
        ("-c √(l_t/alpha) (eps - eps^)", right, NOISE),
        of=f"pairs, each at the worst of {t.x_0.numel()} numbers",
    )
    return [line]


def _squares(t: Trained, q: Gaussian) -> dict[str, Tensor]:
    """Σ over pairs of the mean part, (R,), in its four forms."""
    plain = with_variance(t.model, Posterior())
    names = ("divergence", "data", "noise", "velocity")
    total = {name: torch.zeros(len(t.x_0), dtype=torch.float64) for name in names}
    for i in range(1, len(t.times)):
        s, at = t.times[i - 1], t.at(i)
        here, gap = _scales(q, at.t), q.schedule.logsnr(s) - q.schedule.logsnr(at.t)
        noise, guess = _noise(t, q, i)
        step = here.snr * torch.expm1(gap)  # snr_s − snr_t
        v, v_guess = (here.keep * e - here.lose * x for e, x in ((noise, t.x_0), (guess, at.x_0)))
        total["divergence"] += pair_term(t.at(i, plain), t.x_0, s)
        total["data"] += 0.5 * step * per_example((t.x_0 - at.x_0) ** 2)
        total["noise"] += 0.5 * torch.expm1(gap) * per_example((noise - guess) ** 2)
        total["velocity"] += 0.5 * step * here.lose**2 * per_example((v - v_guess) ** 2)
    return total


def four_forms(t: Trained, q: Gaussian) -> Said:
    """I23: the divergence with σ² = β̃ and three weighted squares."""
    total = _squares(t, q)
    return [
        t.exact(
            ("sum over pairs of KL, variance beta~", total["divergence"], PAIR),
            (
                "½ (snr_s - snr_t) ‖x_0 - x_0^‖²",
                total["data"],
                "nelbo.reverse.Prediction.x_0",
            ),
            ("½ expm1(λ_s - λ_t) ‖eps - eps^‖²", total["noise"], NOISE),
            ("½ (snr_s - snr_t) l_t ‖v - v^‖²", total["velocity"], NOISE),
            of="examples",
        )
    ]


def _expected(objective: Objective, t: Trained) -> Tensor:
    """The loss of every row averaged over the index it draws, at the trajectories' latents."""
    total = torch.zeros(len(t.x_0), dtype=torch.float64)
    for i in range(len(t.times)):
        total = total + objective.part(t.at(i), t.x_0, torch.tensor(i))
    return total + objective.always(t.at(0), t.x_0)


def _by(objective: Objective) -> str:
    return f"nelbo.objectives.{type(objective).__name__}"


def losses(t: Trained, q: Gaussian) -> Said:
    """I24: the bound's weights, L_simple without them, the squares of the means, the hybrid."""
    total, simple = _squares(t, q), _simple(t, q)
    own = Simple(t.times)
    weighted = t.means(
        ("sum over pairs of E KL, variance beta~", total["divergence"], PAIR),
        ("sum of ½ expm1(λ_s - λ_t) E ‖eps - eps^‖²", total["noise"], NOISE),
    )
    unweighted = t.means(
        ("L_simple, averaged over its time", _expected(own, t), _by(own)),
        ("mean over times of ‖eps - eps^‖², weight 1", simple, NOISE),
        SQUARES,
    )
    lines = [weighted, _own(t, unweighted, Simple), _own(t, _means(t, q), Mean)]
    rule = t.model.parameterization
    if isinstance(rule, GaussianParameterization) and rule.variance.learned:
        lines.append(_own(t, _hybrid(t, simple), Hybrid))
    return lines


def _simple(t: Trained, q: Gaussian) -> Tensor:
    """‖ε − ε̂‖² averaged over all times, (R,)."""
    total = torch.zeros(len(t.x_0), dtype=torch.float64)
    for i in range(len(t.times)):
        noise, guess = _noise(t, q, i)
        total += per_example((noise - guess) ** 2) / len(t.times)
    return total


def _hybrid(t: Trained, simple: Tensor) -> Line:
    """L_simple and the bound, as weighted."""
    d = t.x_0[0].numel()
    weight = t.objective.weight if isinstance(t.objective, Hybrid) else Hybrid(t.times).weight
    own = Hybrid(t.times, weight=weight)
    right = simple / d + weight * (t.terms.total - t.terms.prior) / (d * math.log(2))
    return t.means(
        ("L_hybrid, averaged over its time", _expected(own, t), _by(own)),
        (f"L_simple/d + {weight:g} (L - prior)/(d log 2)", right, PAIR),
        "",
    )


def _means(t: Trained, q: Gaussian) -> Line:
    """‖μ̃ − μ_θ‖² against the means of the two laws."""
    total = per_example((t.x_0 - t.at(0).x_0) ** 2)
    for i in range(1, len(t.times)):
        at, s = t.at(i), t.times[i - 1]
        apart = q.posterior(at.x_t, t.x_0, at.t, s).mean - at.kernel(s).mean
        total = total + per_example(apart**2)
    own = Mean(t.times)
    return t.means(
        ("L_mean, averaged over its time", _expected(own, t), _by(own)),
        (
            "mean over times of ‖mean of q - mean of p‖²",
            total / len(t.times),
            f"{POSTERIOR}, {KERNEL}",
        ),
        SQUARES,
    )


def _own(t: Trained, line: Line, kind: type[Objective]) -> Line:
    """The line, marked if this is what the run trained."""
    if type(t.objective) is not kind:
        return line
    return dataclasses.replace(line, note=f"THE LOSS THAT WAS TRAINED; {line.note}")


def floor(t: Trained, q: Gaussian) -> Said:
    """I25 where the exact denoiser is known."""
    if t.law is None:
        return "the law of its data is not known, and with it the best denoiser"
    whole, least, more = (torch.zeros(len(t.x_0), dtype=torch.float64) for _ in range(3))
    for i, time in enumerate(t.times):
        here, at = _scales(q, time), t.at(i)
        noise, guess = _noise(t, q, i)
        keep, lose = here.keep**2, here.lose**2
        best = t.law.denoise(at.x_t, keep, lose)
        whole += per_example((noise - guess) ** 2) / len(t.times)
        least += here.snr * t.law.spread(at.x_t, keep, lose) / len(t.times)
        more += here.snr * per_example((best - at.x_0) ** 2) / len(t.times)
    return [
        t.drawn(
            ("E ‖eps - eps^‖²", whole, NOISE),
            (
                "E ‖eps - E[eps|x_t]‖² + E ‖E[eps|x_t] - eps^‖²",
                least + more,
                f"{MIXTURE}.spread, {MIXTURE}.denoise",
            ),
            note="mean over times",
            unit=SQUARES,
        ),
        t.drawn(
            ("E ‖eps - E[eps|x_t]‖², the floor", least, f"{MIXTURE}.spread"),
            ("E ‖eps - eps^‖²", whole, NOISE),
            "<=",
            "mean over times",
            SQUARES,
        ),
    ]


def unbiased(t: Trained) -> Said:
    """I34: the loss over all of its times, and drawn, uniformly and by importance."""
    plain = Vlb(t.times)
    terms = torch.cat([t.terms.reconstruction[:, None], t.terms.diffusion], 1)
    spread = terms.square().mean(0).sqrt()
    weighted = Vlb(t.times, 0.9 * spread / spread.sum() + 0.1 / len(t.times))
    weighted.independent = True
    whole = t.means(
        ("L_vlb, averaged over its time", _expected(plain, t), _by(plain)),
        ("prior + sum KL - log p(x_0|x_1), at the same latents", t.terms.total, PAIR),
    )
    lines = [_own(t, whole, Vlb)]
    for name, objective in (
        ("uniform times of low discrepancy", plain),
        ("times drawn as the terms are large", weighted),
    ):
        with seeded(t.setting.seed, "derive", "times", name):
            losses = torch.stack([objective(t.model, t.x_0) for _ in range(DRAWS)]).mean(0)
        lines.append(
            t.drawn((f"E L_vlb, {name}", losses, _by(objective)), ("E L", t.bound, BOUND))
        )
    if isinstance(t.objective, Continuous):
        lines.append(_continuous(t))
    return lines


def _continuous(t: Trained) -> Line:
    """The loss in continuous time against its integral, one time drawn in every interval."""
    own = Continuous(t.times)
    own.independent = True
    with seeded(t.setting.seed, "derive", "continuous"):
        drawn = torch.stack([own(t.model, t.x_0) for _ in range(DRAWS)]).mean(0)
        integral = _integral(t)
    line = t.drawn(
        ("E L in continuous time, times drawn", drawn, _by(own)),
        ("prior + ½ integral ‖eps - eps^‖² - log p(x_0|x_1)", integral, NOISE),
    )
    return _own(t, line, Continuous)


def _integral(t: Trained) -> Tensor:
    process, schedule = t.model.process, t.model.process.schedule
    assert isinstance(process, Gaussian) and isinstance(schedule, Smooth)
    total = t.terms.prior + t.terms.reconstruction
    for low, high in zip(t.times[:-1], t.times[1:], strict=True):
        time = low + torch.rand((), dtype=torch.float64) * (high - low)
        here, x_t = _scales(process, time), process.marginal(t.x_0, time).sample()
        apart = (x_t - here.keep * t.x_0) / here.lose - t.model.at(x_t, time).noise()
        total = total - 0.5 * schedule.slope(time) * (high - low) * per_example(apart**2)
    return total


TABLE: dict[str, Callable[[Trained], Said]] = {
    "I22": gaussian(mean_difference),
    "I23": gaussian(four_forms),
    "I24": gaussian(losses),
    "I25": gaussian(floor),
    "I34": unbiased,
}
