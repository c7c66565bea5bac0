r"""Dormand-Prince 5(4) for many initial value problems at once, each with a step of its own.

Every row of the batch has its own time, step and error control, and leaves the batch when it has
arrived. Nothing of a row depends on its companions: not its steps, not its value, not the number
of evaluations (up to the rounding of a field whose matrix products depend on the batch size).

The step is controlled by Gustafsson's PI rule, h ← 0.9 h e^{−0.17} e_before^{0.04}, e the norm of
the error in units of absolute + relative·max(|y|, |y_new|); a step with e > 1 is done again.

References:
    Dormand, Prince 1980, A family of embedded Runge-Kutta formulae.
    Hairer, Norsett, Wanner 1993, Solving ordinary differential equations I, sections II.4-5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.errors import NumericalFailure

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The last one is the step itself, so that its slope serves the next step."""
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, LEAST, MOST = 0.9, 0.2, 10.0
NOW, BEFORE = 0.17, 0.04
SHORTEST = 1e-9
"""Steps below this share of the whole way mean that the field is rougher than the tolerance."""

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows (b,) of the batch, times (b,), states (b, D)) -> slopes (b, D)."""
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """States at the end (B, D); evaluations, accepted and rejected steps of every row (B,)."""

    y: Tensor
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


def root_mean_square(error: Tensor) -> Tensor:
    """(b, D) -> (b,)."""
    return error.square().mean(1).sqrt()


@dataclass
class _Walk:
    """All rows: where each is, its next step and the slope there."""

    field: Field
    end: Tensor
    relative: float
    absolute: float
    norm: Norm
    s: Tensor
    y: Tensor
    slope: Tensor
    step: Tensor
    error: Tensor
    repeated: Tensor
    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor

    def attempt(self, rows: Tensor, shortest: Tensor) -> None:
        """One step of every row of `rows`; those whose error is too large stay where they are."""
        s, y, left = self.s[rows], self.y[rows], self.end[rows] - self.s[rows]
        # the last step takes the whole rest, and never leaves a crumb behind
        last = self.step[rows] * 1.01 >= left.abs()
        h = torch.where(last, left, self.step[rows] * left.sign())
        new, slope, error = self._try(rows, s, y, h)
        size = self.norm(error / self._scale(y, new))
        good = size <= 1
        self._record(rows, good, size)
        moved, kept = rows[good], good.nonzero()[:, 0]
        self.y[moved], self.slope[moved] = new[kept], slope[kept]
        self.s[moved] = torch.where(last, self.end[rows], s + h)[kept]
        self.step[rows] = h.abs() * self._factor(rows, size, good)
        self.error[moved], self.repeated[rows] = size[kept].clamp(min=1e-4), ~good
        stuck = ~good & (self.step[rows] < shortest[rows])
        if bool(stuck.any()):
            _refuse(rows[stuck], self.s[rows[stuck]])

    def _try(self, rows: Tensor, s: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slopes, wide = [self.slope[rows]], h[:, None]
        for node, weights in zip(NODES, STAGES, strict=True):
            new = y + wide * _weighted(weights, slopes)
            slopes.append(self.field(rows, s + node * h, new))
        return new, slopes[-1], wide * _weighted(ERROR, slopes)

    def _scale(self, y: Tensor, new: Tensor) -> Tensor:
        return self.absolute + self.relative * torch.maximum(y.abs(), new.abs())

    def _record(self, rows: Tensor, good: Tensor, size: Tensor) -> None:
        self.evaluations[rows] += len(STAGES)
        self.accepted[rows] += good.long()
        self.rejected[rows] += (~good).long()

    def _factor(self, rows: Tensor, size: Tensor, good: Tensor) -> Tensor:
        # a step that ended where the field has no value is tried again at a fifth
        size = torch.where(size.isfinite(), size, 1e30).clamp(min=1e-30)
        plain = SAFETY * size**-NOW
        most = torch.where(self.repeated[rows], 1.0, MOST)
        after = torch.minimum((plain * self.error[rows] ** BEFORE).clamp(min=LEAST), most)
        return torch.where(good, after, plain.clamp(LEAST, 1.0))


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    parts = [w * k for w, k in zip(weights, slopes, strict=True) if w != 0]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _refuse(rows: Tensor, s: Tensor) -> None:
    raise NumericalFailure(
        f"the step of {len(rows)} examples became too small, the first ones "
        f"{rows[:8].tolist()}, at {s[:1].item():.4g}: the field is rougher there than the "
        "tolerance asks; take a larger --tolerance"
    )


@torch.no_grad()
def integrate(
    field: Field,
    y: Tensor,
    start: Tensor | float,
    end: Tensor | float,
    *,
    relative: float = 1e-5,
    absolute: float = 1e-5,
    norm: Norm = root_mean_square,
) -> Solution:
    """y(end) of dy/ds = field, row by row.

    Arguments:
        y: (B, D) float64, the states at `start`.
        start, end: () or (B,); either may be the larger one.
        relative, absolute: the error allowed in one step.
        norm: of an error in units of what is allowed, (b, D) -> (b,).
    Raises:
        NumericalFailure: a step became too small, or the field has no finite value at the start.
    """
    count = len(y)
    begin, stop = (torch.as_tensor(v).to(y).expand(count).clone() for v in (start, end))
    rows = torch.arange(count, device=y.device)
    slope = field(rows, begin, y)
    if not bool(slope.isfinite().all()):
        raise NumericalFailure("the field is not finite where the way starts")
    zeros = torch.zeros(count, dtype=torch.long, device=y.device)
    walk = _Walk(
        field=field,
        end=stop,
        relative=relative,
        absolute=absolute,
        norm=norm,
        s=begin,
        y=y.clone(),
        slope=slope,
        step=torch.zeros_like(begin),
        error=torch.full_like(begin, 1e-4),
        repeated=torch.zeros(count, dtype=torch.bool, device=y.device),
        evaluations=zeros + 2,
        accepted=zeros.clone(),
        rejected=zeros.clone(),
    )
    walk.step = _first_step(walk, rows)
    shortest = SHORTEST * (stop - begin).abs()
    while len(rows := (walk.s != walk.end).nonzero()[:, 0]) > 0:
        walk.attempt(rows, shortest)
    return Solution(walk.y, walk.evaluations, walk.accepted, walk.rejected)


def _first_step(walk: _Walk, rows: Tensor) -> Tensor:
    """Hairer, Norsett, Wanner 1993, II.4: from the size of y, y' and y''; one evaluation."""
    way = walk.end - walk.s
    scale = walk._scale(walk.y, walk.y)
    size, rate = walk.norm(walk.y / scale), walk.norm(walk.slope / scale)
    guess = torch.where((size < 1e-5) | (rate < 1e-5), 1e-6, 0.01 * size / rate)
    guess = torch.minimum(guess, way.abs())
    h = guess * way.sign()
    slope = walk.field(rows, walk.s + h, walk.y + h[:, None] * walk.slope)
    bend = walk.norm((slope - walk.slope) / scale) / guess.clamp(min=1e-300)
    most = torch.maximum(rate, bend)
    second = torch.where(most <= 1e-15, (1e-3 * guess).clamp(min=1e-6), (0.01 / most) ** 0.2)
    return torch.minimum(torch.minimum(100 * guess, second), way.abs())
