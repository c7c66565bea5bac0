r"""What each device of a few-call evaluation saves, read off its own draws.

With residuals e = (term − h)/p of m draws, the error without a device is that of the same m calls
had it been left out:

    without features, without controls        the stand-in fitted again without these columns
    without Latin pairing                     Var e/m: examples and times drawn on their own
    without allocation                        E_p[(N (term − h))²/(N p)] in place of E e²
    nothing but uniform times                 the same with h = 0, on its own

and (error without/error with)² times the calls would be needed for the same error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.fewcalls import FewCalls
from nelbo.rounds import Round


@dataclass(frozen=True)
class Saving:
    """A device, the error without it (nats per example), and how many times the calls."""

    name: str
    se_mc: float
    calls: float


def savings(few: FewCalls, weights: Tensor) -> list[Saving]:
    """What every device that was used saves, the whole of them first."""
    found = {"all of it": few.account("total", weights).se_mc}
    if few.features.shape[1]:
        found["without features"] = few.account("total", weights, ("features",)).se_mc
    if few.plan.controls:
        found["without controls"] = few.account("total", weights, ("control",)).se_mc
    if few.plan.latin:
        found["without Latin pairing"] = _pooled(few, weights, _independent)
    if few.plan.allocate:
        found["without allocation"] = _pooled(few, weights, _uniform)
    found["uniform times only"] = _pooled(few, weights, _plain)
    least = found["all of it"]
    return [
        Saving(name, error, (error / least) ** 2 if least > 0 else math.nan)
        for name, error in found.items()
    ]


def _pooled(
    few: FewCalls, weights: Tensor, variance: Callable[[FewCalls, Round, Tensor], float]
) -> float:
    """Root of Σ_r (share)² variance/m over the rounds."""
    total = 0.0
    for r in few.rounds:
        share = r.design.calls / few.calls
        total += share**2 * variance(few, r, weights) / r.design.calls
    return math.sqrt(total)


def _left(few: FewCalls, r: Round, weights: Tensor) -> Tensor:
    """(M,) residuals of the total."""
    gram = few.draws.gram(r.basis, few.draws.terms @ weights, r.p)
    _, table = r.residuals("total", weights, gram, fit=few.plan.crossfit)
    return table[r.drawn]


def _independent(few: FewCalls, r: Round, weights: Tensor) -> float:
    return float(_left(few, r, weights).var())


def _uniform(few: FewCalls, r: Round, weights: Tensor) -> float:
    p = r.probability()
    return _of_uniform(_left(few, r, weights) * p, p, len(r.p))


def _plain(few: FewCalls, r: Round, weights: Tensor) -> float:
    return _of_uniform(r.values(weights), r.probability(), len(r.p))


def _of_uniform(value: Tensor, p: Tensor, terms: int) -> float:
    """Variance of terms · value with all terms equally probable, from draws under p."""
    share = 1 / (terms * p)
    first = (share * terms * value).mean()
    second = (share * (terms * value) ** 2).mean()
    return float(torch.clamp(second - first**2, min=0))
