"""Identities that can be said of any setting: the small models, or a trained one.

`lines` says them of the small models, exactly; `on(Sampled(...), seed)` says the same of any model
by Monte Carlo. Where a side has a value for every example, pair or trajectory, the line shows the
one where the two sides are worst off.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nelbo.derivation.identity import DEVIATIONS, Identity, Line, Side
from nelbo.derivation.models import settings
from nelbo.derivation.rows import Mean
from nelbo.derivation.settings import Setting

EXACT = 1e-10
"""Relative to the size of the sides, above 1."""


class Stated(Identity, ABC):
    """An identity of any setting."""

    def lines(self, seed: int) -> list[Line]:
        told = [line for setting in settings() for line in self.on(setting, seed)]
        return told + self.apart(seed)

    def apart(self, seed: int) -> list[Line]:
        """Lines that need a model of their own; none unless said otherwise."""
        return []

    @abstractmethod
    def on(self, setting: Setting, seed: int) -> list[Line]:
        """The sides of one setting; empty where the identity does not apply to it.

        Arguments:
            seed: of what is drawn beyond the setting's own rows.
        """


class Values(NamedTuple):
    """A side before the worst place is known."""

    what: str
    by: str
    mean: Mean


def exact(what: str, by: str, values: Tensor) -> Values:
    """A side without error: values of any shape."""
    flat = values.double().flatten()
    return Values(what, by, Mean(flat, torch.zeros_like(flat)))


def together(means: Sequence[Mean]) -> Mean:
    """Means of several things as one list."""
    return Mean(torch.cat([m.value for m in means]), torch.cat([m.se for m in means]))


def drawn(values: Tensor, weight: Tensor) -> Mean:
    """Σ_x q(x) E_x of independent draws; values (n, M), weight (n,) sums to one; (1,) each."""
    values = values.double()
    value = weight @ values.mean(1)
    variance = weight**2 @ (values.var(1) / values.shape[1])
    return Mean(value[None], variance.sqrt()[None])


def averaged(values: Tensor, weight: Tensor) -> Tensor:
    """Σ_x q(x) values, (1,)."""
    return (weight @ values)[None]


def line_of(
    family: str, left: Values, right: Values, note: str = "", relation: str = "=", of: str = ""
) -> Line:
    """The line at the place where the sides stand worst in their relation.

    Arguments:
        note: of the whole. of: what there are several of, as "trajectories".
    """
    a, b = left.mean, right.mean
    size = torch.stack([torch.ones_like(a.value), a.value.abs(), b.value.abs()]).amax(0)
    room = EXACT * size + DEVIATIONS * torch.hypot(a.se, b.se)
    gap = a.value - b.value
    over = {"=": gap.abs(), "<=": gap, ">=": -gap}[relation] / room
    place = int(torch.where(over.isnan(), torch.full_like(over, torch.inf), over).argmax())
    several = f"the worst of {len(over)} {of}" if of and len(over) > 1 else ""
    sides = tuple(
        Side(v.what, float(v.mean.value[place]), float(v.mean.se[place]), v.by)
        for v in (left, right)
    )
    described = "; ".join(part for part in (several, note) if part)
    return Line(family, sides, relation, EXACT * float(size[place]), note=described)
