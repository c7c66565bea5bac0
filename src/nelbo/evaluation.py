r"""The bound over a data set, by term, with measured errors.

*Full*: every term of every example, each with its own draw, N network calls per example. *Few
calls*: an unbiased estimate of the same figure from a handful of calls per example, or from fewer
than one (`fewcalls`). Both give values per example whose mean is the estimate, and both separate
the error of the examples (in `se`) from the Monte-Carlo error that is left on this very set of
examples (`se_mc`). The prior term is exact.

References:
    Ho, Jain, Abbeel 2020, section 4.3 (the bound by term); Nichol, Dhariwal 2021, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from nelbo.drawing import Drawer, Integrand, check_finite
from nelbo.errors import UsageError
from nelbo.estimate import NORMAL95, Estimate, student95
from nelbo.everyterm import SHORT, Terms, every_term
from nelbo.fewcalls import FewCalls, Plan, Target, until
from nelbo.reverse import Reverse
from nelbo.savings import Saving, savings
from nelbo.scattered import scattered

TERMS = ("prior", "diffusion", "reconstruction", "total")


@dataclass(frozen=True)
class Evaluation:
    """The bound of a data set by term, in nats per example.

    Arguments:
        table: (n,) by term; each column's mean is the estimate. From less than one call per
            example a single value says little.
        figures: the estimates by term.
        calls: network calls per example. pilot_calls: calls on training examples, in all.
        savings: what each device of a few-call evaluation saved.
        freedom: degrees of freedom with which the Monte-Carlo error of the total is known.
    """

    table: dict[str, Tensor]
    figures: dict[str, Estimate]
    calls: float
    pilot_calls: int = 0
    integrand: Integrand | None = None
    savings: list[Saving] = field(default_factory=list)
    freedom: float = math.inf

    def values(self) -> dict[str, Tensor]:
        """(n,) nats per example by term."""
        return self.table

    def estimates(self) -> dict[str, Estimate]:
        """Nats per example by term, with se (examples and noise) and se_mc (noise alone)."""
        return self.figures

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % of the total in nats: for this very set, and for the population it is from.

        The Monte-Carlo part is widened by Student's quantile, since its error is an estimate.
        """
        total = self.figures["total"]
        noise = student95(self.freedom) * total.se_mc
        beyond = NORMAL95**2 * (total.se**2 - total.se_mc**2)
        both = math.sqrt(max(noise**2 + beyond, 0.0)) if math.isfinite(beyond) else math.nan
        widths = {"set": noise, "population": both}
        return {name: (total.mean - w, total.mean + w) for name, w in widths.items()}


class How(TypedDict, total=False):
    """The keyword arguments of `measure`, which says what they mean."""

    encode: Callable[[Tensor], Tensor]
    calls: float | None
    until: Target | None
    pilot: Tensor | None
    plan: Plan | None
    replicates: int | None
    batch: int
    seed: int
    offset: float
    device: str | torch.device
    track: Callable[[int, int], None]


def evaluate(model: Reverse, data: Tensor, times: Tensor, **how: Unpack[How]) -> Evaluation:
    """Measure the bound of every example.

    Arguments:
        data: (n, *shape) stored examples. times: (N,) the grid. how: see `measure`.
    Raises:
        UsageError, NumericalFailure: as `measure`.
    """
    return measure([model], data, times, **how)[0]


def compare(
    model: Reverse, other: Reverse, data: Tensor, times: Tensor, **how: Unpack[How]
) -> tuple[Evaluation, Evaluation, Evaluation]:
    """Two models of one process on the same examples, times and noise, and model less other.

    The noise that both share drops out of the difference, whose error is its own.

    Arguments:
        data: (n, *shape) stored examples. times: (N,) the grid. how: see `measure`.
    Raises:
        UsageError, NumericalFailure: as `measure`.
    """
    one, two, difference = measure([model, other], data, times, **how)
    return one, two, difference


def measure(
    models: list[Reverse],
    data: Tensor,
    times: Tensor,
    *,
    encode: Callable[[Tensor], Tensor] = lambda y: y,
    calls: float | None = None,
    until: Target | None = None,
    pilot: Tensor | None = None,
    plan: Plan | None = None,
    replicates: int | None = None,
    batch: int = 512,
    seed: int = 0,
    offset: float = 0.0,
    device: str | torch.device = "cpu",
    track: Callable[[int, int], None] = lambda done, total: None,
) -> list[Evaluation]:
    """The bounds of models on the same draws, and of two models their difference as a third.

    Arguments:
        data: (n, *shape) stored examples; `encode` turns rows into the model's scale.
        times: (N,) the grid of the bound.
        calls: network calls per example, also below one; None, or a grid of one: the full bound.
        until: draw until an error is reached, instead of a number of calls.
        pilot: (m, *shape) stored training examples on which the design is fixed (few calls).
        plan: which devices a few-call evaluation uses.
        replicates: of the full bound; by default 2 up to 64 latents, above that 1, whose noise is
            read off the roughness of neighbouring terms.
        batch: examples per network call; any value gives the same figures up to rounding.
        offset: nats per example to add to the reconstruction, for densities in other units.
        track: told the number of calls done and planned, in examples.
    Raises:
        UsageError: too few calls, or no training examples for the design.
        NumericalFailure: an example has no finite bound.
    """
    modes = [m.training for m in models]
    drawers = [Drawer(m.eval(), data, encode, times, batch, seed, device, track) for m in models]
    try:
        with torch.no_grad():
            if len(times) == 1 or (until is None and calls is None):
                results = _full(drawers, replicates or (2 if len(times) <= SHORT else 1), offset)
            else:
                results = _few(drawers, calls, until, pilot, plan or Plan(), offset)
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    return results


def _combinations(models: int, offset: float) -> list[tuple[Tensor, float]]:
    """Each model on its own, then the difference of the first two, and the offset of each."""
    eye = torch.eye(models, dtype=torch.float64)
    rows = [(row, offset) for row in eye]
    return rows if models == 1 else [*rows, (eye[0] - eye[1], 0.0)]


# --- few calls ---------------------------------------------------------------------------------


def _few(
    drawers: list[Drawer],
    calls: float | None,
    target: Target | None,
    pilot: Tensor | None,
    plan: Plan,
    offset: float,
) -> list[Evaluation]:
    if pilot is None or len(pilot) < 2:
        raise UsageError("few calls need training examples on which to fix their design")
    n = len(drawers[0].data)
    first = min(4.0, max(1.0, 1000 / n)) if n < 1000 else 1000 / n
    few = FewCalls(drawers, pilot, plan, first if calls is None else calls)
    if target is None:
        assert calls is not None
        few.add(calls)
    else:
        until(few, target, first)
    return [_of(few, weights, o) for weights, o in _combinations(len(drawers), offset)]


def _of(few: FewCalls, weights: Tensor, offset: float) -> Evaluation:
    prior = few.rounds[0].prior @ weights
    found = {name: few.account(name, weights) for name in TERMS[1:]}
    shift = {"diffusion": 0.0, "reconstruction": offset, "total": offset}
    table = {"prior": prior} | {name: a.values + shift[name] for name, a in found.items()}
    n = len(prior)
    figures = {"prior": Estimate.of(prior, exact=True)}
    figures |= {
        name: Estimate(a.mean + shift[name], a.se, a.se_mc, n) for name, a in found.items()
    }
    return Evaluation(
        table,
        figures,
        few.calls / n,
        few.pilot_calls,
        scattered(few, weights),
        savings(few, weights),
        found["total"].freedom,
    )


# --- every term --------------------------------------------------------------------------------


def _full(drawers: list[Drawer], replicates: int, offset: float) -> list[Evaluation]:
    terms = every_term(drawers, replicates)
    calls = float(max(replicates * len(drawers[0].times), len(drawers[0].times) + 1))
    return [_of_terms(terms.combined(w), calls, o) for w, o in _combinations(len(drawers), offset)]


def _of_terms(terms: Terms, calls: float, offset: float) -> Evaluation:
    table = terms.values(offset)
    check_finite(table["total"])
    return Evaluation(table, terms.estimates(offset), calls, 0, terms.integrand())
