r"""The bound over a data set, by term, with measured errors.

*Full*: every term of every example, each with its own draw, N network calls per example. *Few
calls*: a stratified estimate of the same figure (`fewcalls`). Both are unbiased, both give values
per example, and both separate the error of the examples (in `se`) from the Monte-Carlo error that
is left on this very set of examples (`se_mc`). The prior term is exact.

References:
    Ho, Jain, Abbeel 2020, section 4.3 (the bound by term); Nichol, Dhariwal 2021, section 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo import fewcalls
from nelbo.bound import prior_term
from nelbo.controls import Control
from nelbo.drawing import Drawer, Integrand
from nelbo.errors import NumericalFailure, UsageError
from nelbo.estimate import Estimate
from nelbo.reverse import Reverse

TERMS = ("prior", "diffusion", "reconstruction", "total")
SHORT = 64
"""Grids up to this length are measured twice by default: their terms bend too much to tell noise
from their roughness."""


@dataclass(frozen=True)
class Evaluation:
    """The bound of every example by term, nats, float64.

    Arguments:
        prior: (n,). diffusion, reconstruction: (n, R), R replicates each.
        noise: (n,) Monte-Carlo variance of an example's diffusion term, where it has one replicate
            and was measured from the roughness of its terms; None where replicates tell.
        calls: network calls per example. pilot_calls: calls on training examples, in all.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    calls: float
    noise: Tensor | None = None
    pilot_calls: int = 0
    integrand: Integrand | None = None
    offset: float = 0.0
    """Nats per example added to the reconstruction: the units of a density (Dataset.offset)."""

    def values(self) -> dict[str, Tensor]:
        """(n,) nats per example by term, the mean over replicates."""
        table = {
            "prior": self.prior,
            "diffusion": self.diffusion.mean(1),
            "reconstruction": self.reconstruction.mean(1) + self.offset,
        }
        table["total"] = table["prior"] + table["diffusion"] + table["reconstruction"]
        return table

    def estimates(self) -> dict[str, Estimate]:
        """Nats per example by term, with se (examples and noise) and se_mc (noise alone)."""
        total = self.prior[:, None] + self.diffusion + self.reconstruction + self.offset
        known = total_known = None
        if self.noise is not None:
            decoder = self.reconstruction.var(1) / self.reconstruction.shape[1]
            known, total_known = (_error_of(v) for v in (self.noise, self.noise + decoder))
        return {
            "prior": Estimate.of(self.prior, exact=True),
            "diffusion": Estimate.of(self.diffusion, se_mc_known=known),
            "reconstruction": Estimate.of(self.reconstruction + self.offset),
            "total": Estimate.of(total, se_mc_known=total_known),
        }


def _error_of(variances: Tensor) -> float:
    """Standard error of a mean from the variance of each of its members."""
    return float(variances.sum().sqrt() / len(variances))


def evaluate(
    model: Reverse,
    data: Tensor,
    times: Tensor,
    *,
    encode: Callable[[Tensor], Tensor] = lambda y: y,
    calls: int | None = None,
    pilot: Tensor | None = None,
    control: Control | None = None,
    replicates: int | None = None,
    batch: int = 512,
    seed: int = 0,
    offset: float = 0.0,
    device: str | torch.device = "cpu",
    track: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure the bound of every example.

    Arguments:
        data: (n, *shape) stored examples; `encode` turns rows into the model's scale.
        times: (N,) the grid of the bound.
        calls: network calls per example, at least 4; None, or N and more: the full bound.
        pilot: (m, *shape) stored training examples on which the design is fixed (few calls).
        control: a control variate (few calls).
        replicates: of the full bound; by default 2 up to 64 latents, above that 1, whose noise is
            read off the roughness of neighbouring terms.
        batch: examples per network call; any value gives the same figures up to rounding.
        offset: nats per example to add to the reconstruction, for densities in other units.
        track: told the number of calls done and planned, in examples.
    Raises:
        UsageError: too few calls, or no training examples for the design.
        NumericalFailure: an example has no finite bound.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            drawer = Drawer(model, data, encode, times, batch, seed, device, track)
            if calls is None or calls >= len(times):
                result = _full(drawer, replicates or (2 if len(times) <= SHORT else 1))
            else:
                result = _few(drawer, calls, pilot, control)
    finally:
        model.train(was_training)
    result = dataclasses.replace(result, offset=offset)
    _check_finite(result)
    return result


def _check_finite(result: Evaluation) -> None:
    bad = (~torch.isfinite(result.values()["total"])).nonzero().flatten().tolist()
    if bad:
        raise NumericalFailure(
            f"the bound of {len(bad)} examples is not finite, the first ones {bad[:8]}: the model "
            "gives them zero probability or its output is not a number"
        )


# --- few calls ---------------------------------------------------------------------------------


def _few(drawer: Drawer, calls: int, pilot: Tensor | None, control: Control | None) -> Evaluation:
    if calls < 4:
        raise UsageError(
            f"--calls {calls}: at least 4 are needed (two replicates of the decoder term and "
            "one pair term each), or leave it out for the full bound"
        )
    if pilot is None or len(pilot) < 2:
        raise UsageError("few calls need training examples on which to fix their design")
    design = fewcalls.pilot(drawer, pilot, control)
    pilot_calls, drawer.done = drawer.done, 0
    few = fewcalls.measure(drawer, calls, design, control)
    return Evaluation(
        few.prior,
        few.diffusion,
        few.decoder,
        float(calls),
        pilot_calls=pilot_calls,
        integrand=few.integrand,
    )


# --- every term --------------------------------------------------------------------------------


def _full(drawer: Drawer, replicates: int) -> Evaluation:
    """All N terms, `replicates` times; with one replicate the decoder is drawn twice."""
    n = len(drawer.times)
    calls = float(max(replicates * n, n + 1))
    parts = [_full_batch(drawer, x_0, rows, replicates, calls) for rows, x_0 in drawer.batches()]
    widths: list[tuple[int, ...]] = [(), (n - 1, replicates), (max(replicates, 2),)]
    prior, terms, decoder = (drawer.collect([p[k] for p in parts], widths[k]) for k in range(3))
    pairs = terms.mean(2)
    noise = None
    if replicates == 1:
        noise = roughness(pairs)
    return Evaluation(
        prior, terms.sum(1), decoder, calls, noise, integrand=_integrand(drawer, pairs)
    )


def _full_batch(
    drawer: Drawer, x_0: Tensor, rows: Tensor, replicates: int, calls: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = len(drawer.times)
    terms = torch.empty(len(rows), n - 1, replicates, dtype=torch.float64)
    decoder = torch.empty(len(rows), max(replicates, 2), dtype=torch.float64)
    for r in range(decoder.shape[1]):
        decoder[:, r] = drawer.term(x_0, rows, torch.tensor(0), "full", r, 0)[0]
    for r in range(replicates):
        for i in range(1, n):
            terms[:, i - 1, r] = drawer.term(x_0, rows, torch.tensor(i), "full", r, i)[0]
            drawer.tick(calls)
    return prior_term(drawer.model, x_0, drawer.times).cpu(), terms, decoder


def roughness(pairs: Tensor) -> Tensor:
    """(n,) Monte-Carlo variance of Σ_i term_i from one independent draw of each.

    Second differences (a − 2b + c)²/6 of neighbouring terms have the variance of one of them as
    their mean, plus a little where the expected terms bend: on the safe side.

    Arguments:
        pairs: (n, N−1); nan with fewer than three pairs.
    """
    if pairs.shape[1] < 3:
        return torch.full((len(pairs),), math.nan, dtype=torch.float64)
    second = pairs[:, :-2] - 2 * pairs[:, 1:-1] + pairs[:, 2:]
    return (second**2).mean(1) / 6 * pairs.shape[1]


def _integrand(drawer: Drawer, pairs: Tensor, most: int = 200) -> Integrand | None:
    """Neighbouring pairs averaged to at most `most` points (their noise is independent)."""
    logsnr = drawer.model.process.schedule.logsnr(drawer.times).cpu()
    # a chain may end at a log-SNR of −∞: its last pair has no place on the axis
    logsnr = logsnr[torch.isfinite(logsnr)]
    pairs = pairs[:, : len(logsnr) - 1]
    if pairs.shape[1] == 0:
        return None
    density = pairs / (logsnr[:-1] - logsnr[1:])
    centre = 0.5 * (logsnr[:-1] + logsnr[1:])
    size = math.ceil(len(centre) / most)
    grouped = [density[:, a : a + size].mean(1) for a in range(0, len(centre), size)]
    values = torch.stack(grouped, 1)
    where = torch.stack([centre[a : a + size].mean() for a in range(0, len(centre), size)])
    se = values.std(0) / math.sqrt(len(values))
    return Integrand(where, values.mean(0), se)
