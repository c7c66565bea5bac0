"""A recipe: everything a run consists of, built and typed, in either family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.gan import Game, Rules
from nelbo.losses import Augmented
from nelbo.objectives import Objective
from nelbo.recipes.groups import GameOptions, Options
from nelbo.reverse import Reverse

TRUTH, OPTIMUM = "truth", "exact optimum of this set-up"
"""Names of the references between which a model's gap is put: −h, and what no model exceeds."""


@dataclass(frozen=True)
class Reference:
    """A figure that a run is compared with: −L or K, in bits per example or per pixel."""

    name: str
    bits: float
    unit: str = "bits/example"
    se: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the data that it is measured on: all that evaluation and sampling need.

    Arguments:
        times: (N,) the grid on which the model is measured.
        exact: the model whose denoiser is exact, on the same grid (toys).
        description: short words for reports: what the bound is a bound of.
        references: published and exact figures for the same set-up, computed when asked for.
    """

    dataset: Dataset
    model: Reverse
    times: Tensor
    exact: Reverse | None = None
    description: dict[str, str] = field(default_factory=dict)
    references: Callable[[], tuple[Reference, ...]] = tuple


@dataclass(frozen=True, kw_only=True)
class Recipe(Subject):
    """What `build` makes of options: a subject with fresh weights, and how it is trained."""

    name: str
    options: Options
    objective: Objective | Augmented


@dataclass(frozen=True, kw_only=True)
class GameRecipe:
    """A game with fresh weights, the data that it is about, and how it is played.

    Arguments:
        description: short words for reports: who plays, for what.
    """

    name: str
    options: GameOptions
    dataset: Dataset
    game: Game
    rules: Rules
    description: dict[str, str] = field(default_factory=dict)
