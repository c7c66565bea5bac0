"""Lines over many places at once: an equality shows its worst place, an order its tightest."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nelbo.derivation.identity import Line, Side, worst


class Said(NamedTuple):
    """What a side is, and the function of nelbo that computes it, if one does."""

    what: str
    by: str = ""


def equal(
    family: str,
    left: Said,
    right: Said,
    a: Tensor,
    b: Tensor,
    *,
    of: str = "places",
    tolerance: float = 1e-10,
    unit: str = "nats",
) -> Line:
    """a = b at every place; the line shows where they differ most.

    Arguments:
        a, b: tensors that broadcast. of: what the places are, for the note.
    """
    x, y, count = worst(a.detach(), b.detach())
    note = f"the worst of {count} {of}" if count > 1 else ""
    sides = (Side(left.what, x, 0.0, left.by), Side(right.what, y, 0.0, right.by))
    return Line(family, sides, "=", tolerance, note=note, unit=unit)


def below(
    family: str,
    left: Said,
    right: Said,
    a: Tensor,
    b: Tensor,
    *,
    of: str = "places",
    tolerance: float = 1e-10,
    unit: str = "nats",
) -> Line:
    """a <= b at every place; the line shows where the least room is left. NaN leaves none.

    Arguments:
        a, b: tensors that broadcast. of: what the places are, for the note.
    """
    x, y = (v.detach().double().flatten() for v in torch.broadcast_tensors(a, b))
    room = y - x
    place = int(torch.where(room.isnan(), torch.full_like(room, -math.inf), room).argmin())
    note = f"the tightest of {len(x)} {of}" if len(x) > 1 else ""
    sides = (
        Side(left.what, float(x[place]), 0.0, left.by),
        Side(right.what, float(y[place]), 0.0, right.by),
    )
    return Line(family, sides, "<=", tolerance, note=note, unit=unit)


def single(value: float) -> Tensor:
    """A number as a tensor () in float64."""
    return torch.tensor(value, dtype=torch.float64)
