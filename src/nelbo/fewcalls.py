r"""The bound from a few network calls per example, or from fewer than one.

A pilot on training examples fixes with which probability p_i each term is drawn (`pilot`). A
design pairs examples with terms (`design`). Each draw costs one network call per model, and what a
stand-in fitted on the other draws cannot explain (`surrogate`) is accounted for (`accounting`):

    L̂ = mean over the set of [prior + Σ_i E h_i] + mean over the draws of (term_i − h_i)/p_i.

Nothing that weighs a draw was fitted on it, the probabilities are known, and nothing is clipped,
so the estimate is unbiased for the bound of this very set. Rounds of growing size are added until
a wanted error is reached (`until`). Two models are measured on the same examples, terms and noise,
and the difference of their terms is estimated like a bound of its own.

References:
    Kingma et al. 2021 (low-discrepancy times); Cochran 1977, ch. 5, 7, 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.accounting import Account, account
from nelbo.bound import prior_term
from nelbo.controls import Control
from nelbo.design import Design, design, enough
from nelbo.drawing import Drawer, check_finite
from nelbo.pilot import Draws, draw, expectation, fluctuation, probabilities
from nelbo.rounds import Round
from nelbo.surrogate import Basis, Nodes, hat_count

FOLDS = 5
PILOT_SHARE, PILOT_LEAST, PILOT_MOST = 0.1, 256, 2048
"""Calls of the pilot: a share of those of the evaluation, within limits."""


@dataclass(frozen=True)
class Plan:
    """What an evaluation with few calls may use; each can be switched off.

    Arguments:
        controls: control variates.
        features: (n, L) of the data and (m, L) of the pilot's examples, or None.
        allocate: draw terms as the pilot says; otherwise all with equal probability.
        latin: pair examples and times as a Latin hypercube; otherwise independently.
        crossfit: fit the stand-in on the other folds as well; otherwise on the pilot alone.
    """

    controls: tuple[Control, ...] = ()
    features: tuple[Tensor, Tensor] | None = None
    allocate: bool = True
    latin: bool = True
    crossfit: bool = True


def standardized(features: tuple[Tensor, Tensor] | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Features of data and pilot on the pilot's scale; (n, 0) and (m, 0) without any."""
    if features is None or features[0].shape[1] == 0:
        return torch.zeros(n, 0, dtype=torch.float64), torch.zeros(m, 0, dtype=torch.float64)
    data, pilot = features
    scale = pilot.std(0)
    used = scale > 1e-9
    mean, scale = pilot.mean(0)[used], scale[used]
    return (data[:, used] - mean) / scale, (pilot[:, used] - mean) / scale


class FewCalls:
    """Rounds of a few-call evaluation of one model, or of several on the same draws.

    Arguments:
        drawers: one per model, of the same data, grid, batch and seed.
        pilot: (m, *shape) stored training examples. calls: planned, for the size of the pilot.
    """

    def __init__(self, drawers: list[Drawer], pilot: Tensor, plan: Plan, calls: float) -> None:
        self.drawers = drawers
        self.plan = plan
        n = len(drawers[0].data)
        self.features, known = standardized(plan.features, n, len(pilot))
        budget = min(max(PILOT_SHARE * calls * n, PILOT_LEAST), PILOT_MOST)
        self.draws: Draws = draw(drawers, pilot, known, plan.controls, round(budget))
        self.pilot_calls = len(self.draws.terms)
        self.rounds: list[Round] = []

    # --- drawing -------------------------------------------------------------------------------

    def add(self, calls: float) -> None:
        """One more round of `calls` network calls per example."""
        drawer, number = self.drawers[0], len(self.rounds)
        p = self._probabilities()
        latin = self.plan.latin
        plan = design(len(drawer.data), calls, FOLDS, drawer.seed, number, latin=latin)
        fitted = self.pilot_calls + (plan.calls if self.plan.crossfit else 0)
        count = hat_count(fitted, self.draws.nodes, len(drawer.times) - 1)
        basis = Basis.of(_middle(p[1:]), count)
        parts = [self._batch(rows, x_0, plan, p, basis.fine) for rows, x_0 in drawer.batches()]
        k, models, q = plan.both.shape[1], len(self.drawers), len(self.plan.controls)
        widths: list[tuple[int, ...]]
        widths = [(models,), (count, q), (k,), (k, models), (k, q), (k, q)]
        prior, sums, index, terms, stand_in, moved = (
            drawer.collect([part[j] for part in parts], widths[j]) for j in range(6)
        )
        drawn = index.isfinite()
        known = self.features[drawn.nonzero()[:, 0]]
        nodes = Nodes(index[drawn].long(), stand_in[drawn], moved[drawn], known)
        check_finite(torch.where(drawn[..., None], terms, 0.0).sum((1, 2)) + prior.sum(1))
        place = torch.where(drawn, index, -1.0).long()
        self.rounds.append(Round(plan, p, basis, prior, sums, place, terms, nodes, self.features))

    def _probabilities(self) -> Tensor:
        n = len(self.drawers[0].times)
        if not self.plan.allocate:
            return torch.full((n,), 1 / n, dtype=torch.float64)
        terms = self.draws.terms
        wanted = [terms[:, 0]] + [terms[:, 0] - terms[:, m] for m in range(1, terms.shape[1])]
        return probabilities(self.drawers[0], self.draws, wanted)

    def _batch(
        self, rows: Tensor, x_0: Tensor, plan: Design, p: Tensor, phi: Tensor
    ) -> tuple[Tensor, ...]:
        drawer, number = self.drawers[0], len(self.rounds)
        found = expectation(self.plan.controls, x_0, drawer.times)
        expected = torch.minimum(found, self.draws.most)
        prior = torch.stack([prior_term(d.model, x_0, d.times).cpu() for d in self.drawers], 1)
        columns_of: list[list[Tensor]] = [[], [], [], []]
        cdf = p.cumsum(0)
        for j, v in enumerate(plan.both[rows].T):
            node = self._node(rows, x_0, v, cdf, expected, f"round {number}", j)
            for column, value in zip(columns_of, node, strict=True):
                column.append(value)
            drawer.tick((plan.calls + self.calls + self.pilot_calls) / len(drawer.data))
        index, terms, stand_in, moved = (torch.stack(c, 1) for c in columns_of)
        sums = torch.einsum("bnq,nk->bkq", expected, phi[1:])
        return prior, sums, index, terms, stand_in, moved

    def _node(
        self,
        rows: Tensor,
        x_0: Tensor,
        v: Tensor,
        cdf: Tensor,
        expected: Tensor,
        purpose: str,
        j: int,
    ) -> list[Tensor]:
        """Term index (B,), terms (B, models), G̅ and fluctuation (B, Q); nan where v is."""
        drawer = self.drawers[0]
        seen = v.isfinite().nonzero()[:, 0]
        widths = ((), (len(self.drawers),), (expected.shape[2],), (expected.shape[2],))
        out = [torch.full((len(rows), *w), math.nan, dtype=torch.float64) for w in widths]
        if len(seen):
            index = torch.zeros(len(rows), dtype=torch.int64)
            place = torch.searchsorted(cdf, v[seen] * cdf[-1], right=True)
            index[seen] = place.clamp(max=len(cdf) - 1)
            # whole blocks are drawn, so that the noise of an example does not depend on the others
            x_t = drawer.latent(x_0, rows, drawer.times[index], "few", purpose, j)
            here = seen.to(x_0.device)
            some, x, y = index[seen], x_0[here], x_t[here]
            terms = torch.stack([d.value(y, x, some) for d in self.drawers], 1)
            stand_in = expected[seen, (some - 1).clamp(min=0)] * (some > 0)[:, None]
            moved = fluctuation(self.plan.controls, x, y, drawer.times, some)
            for table, value in zip(out, (some.double(), terms, stand_in, moved), strict=True):
                table[seen] = value
        return out

    # --- what it says ----------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """Network calls of all rounds, of each model."""
        return sum(r.design.calls for r in self.rounds)

    def account(self, component: str, weights: Tensor, without: tuple[str, ...] = ()) -> Account:
        """The mean of a component over the set, all rounds together.

        Arguments:
            component: "diffusion", "reconstruction" or "total".
            weights: (models,) of a linear combination of the models' terms.
            without: groups of columns that the stand-in does not use.
        """
        parts = [self._one(r, component, weights, without) for r in self.rounds]
        shares = [r.design.calls / self.calls for r in self.rounds]
        pieces = [(w * a.se_mc) ** 2 for w, a in zip(shares, parts, strict=True)]
        mc = sum(pieces)
        # the population's part is not lowered by more draws on the same examples
        beyond = sum(w * (a.se**2 - a.se_mc**2) for w, a in zip(shares, parts, strict=True))
        values = torch.stack([w * a.values for w, a in zip(shares, parts, strict=True)]).sum(0)
        unsure = sum(v**2 / a.freedom for v, a in zip(pieces, parts, strict=True))
        freedom = mc**2 / unsure if unsure > 0 else math.inf
        return Account(values, math.sqrt(mc), math.sqrt(mc + beyond), freedom)

    def _one(self, r: Round, component: str, weights: Tensor, without: tuple[str, ...]) -> Account:
        base, residuals = r.residuals(
            component,
            weights,
            self.draws.gram(r.basis, self.draws.terms @ weights, r.p),
            without=without,
            fit=self.plan.crossfit,
        )
        return account(base, residuals, r.design, self.plan.latin)


def _middle(p: Tensor) -> Tensor:
    """(N−1,) in [0, 1]: the cdf at the middle of every pair, where hats have equal shares."""
    cdf = p.cumsum(0)
    position: Tensor = (cdf - 0.5 * p) / cdf[-1]
    return position.clamp(0, 1)


@dataclass(frozen=True)
class Target:
    """Run until an error is at most `value`, in nats per example.

    Arguments:
        error: "se_mc" or "se".
        most: network calls per example, at which to stop all the same; None: no limit.
        report: told (calls per example so far, error so far) after every round.
    """

    value: float
    error: str = "se_mc"
    most: float | None = None
    report: Callable[[float, float], None] = lambda calls, error: None


def until(few: FewCalls, target: Target, first: float) -> None:
    """Add rounds until the error of the total is reached.

    A round is at least as large as all before it together, so that there are few of them, and at
    most what the error so far asks for with a margin of 10 %.
    """
    n, one = len(few.drawers[0].data), _unit(few, 0)
    step = first
    while True:
        few.add(_allowed(step, few.calls / n, target.most))
        found = few.account("total", one)
        error = getattr(found, target.error)
        spent = few.calls / n
        target.report(spent, error)
        full = target.most is not None and not _another(n, target.most - spent, target.most)
        beyond = found.se**2 - found.se_mc**2 if target.error == "se" else 0.0
        # what more calls cannot lower is known well only where it is most of the error
        hopeless = beyond > max(target.value**2, 2 * found.se_mc**2)
        if error <= target.value or full or hopeless:
            return
        room = max(target.value**2 - beyond, target.value**2 / 4)
        needed = spent * found.se_mc**2 / room * 1.1
        step = max(spent, min(needed - spent, 8 * spent))


def _another(n: int, left: float, most: float) -> bool:
    """Whether what is left of `most` calls per example makes a design of its own."""
    return left > 0.01 * most and enough(n, left) <= left


def _allowed(step: float, spent: float, most: float | None) -> float:
    """A size that a design can have: whole from 2 on, and within what is left."""
    if most is not None and step >= most - spent:
        left = most - spent
        return float(math.floor(left)) if left >= 2 else left
    return float(math.ceil(step)) if step > 1.5 else step


def _unit(few: FewCalls, model: int) -> Tensor:
    out = torch.zeros(len(few.drawers), dtype=torch.float64)
    out[model] = 1
    return out
