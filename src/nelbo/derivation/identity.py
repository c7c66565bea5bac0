"""An identity as an object: what it says, what it assumes, and its sides as numbers.

A side is computed by nelbo's own public functions, and no function is on both sides of a line: a
line agrees because two ways lead to one number. Exact sides have no standard error; sides by Monte
Carlo have one, and then a line disagrees beyond `DEVIATIONS` of them, which happens by chance in
one line of 1.7 million (two sides) whatever the seed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

DEVIATIONS = 5.0
"""Standard errors beyond which two sides disagree."""
RELATIONS = ("=", "<=", ">=")


@dataclass(frozen=True)
class Side:
    """One side of a line."""

    what: str
    """In plain text, in the code's letters: "E_q[-log w]"."""
    value: float
    """Nats, unless the line has another unit."""
    se: float = 0.0
    """Standard error of a Monte Carlo value; 0 for an exact one."""
    by: str = ""
    """The function or method of nelbo that computed it, with its module: "nelbo.bound.bound"."""

    def as_json(self) -> dict[str, Any]:
        """Its JSON object."""
        return {"what": self.what, "value": self.value, "se": self.se, "by": self.by}


@dataclass(frozen=True)
class Line:
    """Two or more sides of which each is to stand in a relation to the next.

    Arguments:
        relation: "=", "<=" or ">=".
        tolerance: absolute, of an exact line, or of what is exact in it; in the line's unit.
        paired_se: standard error of the difference of the two sides, where both come from the same
            draws; None: the sides are independent.
    """

    family: str
    """Where it was computed: "Gaussian", "Bernoulli", "two densities", or a run's name."""
    sides: tuple[Side, ...]
    relation: str = "="
    tolerance: float = 1e-10
    paired_se: float | None = None
    note: str = ""
    """What was computed, as "the worst of 64 trajectories"."""
    unit: str = "nats"

    def __post_init__(self) -> None:
        assert self.relation in RELATIONS and len(self.sides) >= 2
        assert self.paired_se is None or len(self.sides) == 2

    @property
    def agrees(self) -> bool:
        """Whether every side stands in the relation to the next; NaN does not."""
        return all(self._holds(a, b) for a, b in zip(self.sides, self.sides[1:], strict=False))

    def _holds(self, a: Side, b: Side) -> bool:
        if not (math.isfinite(a.value) and math.isfinite(b.value)):
            return False
        se = math.hypot(a.se, b.se) if self.paired_se is None else self.paired_se
        room = self.tolerance + DEVIATIONS * se
        over = a.value - b.value
        return {"=": abs(over), "<=": over, ">=": -over}[self.relation] <= room

    def as_json(self) -> dict[str, Any]:
        """Its JSON object."""
        return {
            "family": self.family,
            "relation": self.relation,
            "sides": [side.as_json() for side in self.sides],
            "tolerance": self.tolerance,
            "paired_se": self.paired_se,
            "unit": self.unit,
            "note": self.note,
            "agrees": self.agrees,
        }


class Identity(ABC):
    """One numbered identity.

    Class attributes:
        id: "I7". name: a word for the command line, "telescoping".
        title: one line for a reader. latex: the statement, without dollars. text: the same in
            plain text. assumes: what has to hold, in plain words.
        steps: how one gets from one side to the other, one sentence or formula each.
        functions: the functions of nelbo that compute the sides, with their modules.
        source: a paper and its equation, or "common lecture notes".
    """

    id: ClassVar[str]
    name: ClassVar[str]
    title: ClassVar[str]
    latex: ClassVar[str]
    text: ClassVar[str]
    assumes: ClassVar[str] = ""
    steps: ClassVar[tuple[str, ...]] = ()
    functions: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""

    @abstractmethod
    def lines(self, seed: int) -> list[Line]:
        """The sides, for every family that it holds for, on small models whose answers are known.

        Arguments:
            seed: of Monte Carlo draws; exact lines do not depend on it.
        """


class Erratum(ABC):
    """A wrong variant from papers or lecture notes, and the check that tells them apart.

    Class attributes:
        id: "E7". identity: "I2", which it gets wrong. printed: as one reads it.
        right: as it should be. why: what breaks.
    """

    id: ClassVar[str]
    identity: ClassVar[str]
    printed: ClassVar[str]
    right: ClassVar[str]
    why: ClassVar[str]

    @abstractmethod
    def line(self, seed: int) -> Line:
        """The wrong variant beside the right value; `agrees` has to be False."""


@dataclass(frozen=True)
class Result:
    """An identity and its lines, computed."""

    identity: Identity
    lines: tuple[Line, ...]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether all lines agree; an identity without a line has shown nothing."""
        return bool(self.lines) and all(line.agrees for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        """Its JSON object; `sides` are those of the first line."""
        one = self.identity
        return {
            "id": one.id,
            "name": one.name,
            "title": one.title,
            "latex": one.latex,
            "text": one.text,
            "assumes": one.assumes,
            "agrees": self.agrees,
            "sides": [side.as_json() for side in self.lines[0].sides] if self.lines else [],
            "lines": [line.as_json() for line in self.lines],
            "seconds": self.seconds,
        }


def worst(left: Tensor, right: Tensor) -> tuple[float, float, int]:
    """The values of two tensors where they differ most, and how many were compared.

    A NaN differs more than anything.
    """
    a, b = torch.broadcast_tensors(left.double(), right.double())
    a, b = a.flatten(), b.flatten()
    gap = (a - b).abs()
    place = int(torch.where(gap.isnan(), torch.full_like(gap, math.inf), gap).argmax())
    return float(a[place]), float(b[place]), a.numel()


def mean_se(draws: Tensor) -> tuple[float, float]:
    """Mean of independent draws (n,) and its standard error."""
    draws = draws.double()
    return float(draws.mean()), float(draws.std() / math.sqrt(len(draws)))
