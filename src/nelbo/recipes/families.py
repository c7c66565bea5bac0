"""The two families of runs, diffusion models and games, and what a run's options are on disk.

A recipe is a name; with `--game` or `--no-game`, or by its own default, it means a dataclass of
options. What is stored defines the run again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nelbo.errors import UsageError
from nelbo.recipes.games import GAMES
from nelbo.recipes.groups import Control, GameOptions, Options, Pace
from nelbo.recipes.options import RECIPES

DIFFUSION, GAME = "diffusion", "game"
Run = Options | GameOptions
GAMES_FIRST = ("ring", "grid")
"""Recipes that are games unless --no-game is typed."""
_TABLES: dict[str, dict[str, Any]] = {DIFFUSION: RECIPES, GAME: GAMES}
_CONTROL = {f.name for kind in (Control, Pace) for f in dataclasses.fields(kind)}


def families(name: str) -> list[str]:
    """The families in which there is a recipe, the default first."""
    found = [family for family, table in _TABLES.items() if name in table]
    return found[::-1] if name in GAMES_FIRST else found


def kind_of(name: str, family: str) -> type[Run]:
    """The dataclass of a recipe's options."""
    kind: type[Run] = _TABLES[family][name]
    return kind


def chosen(name: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The family that is meant, and the arguments without --game and --no-game.

    Raises:
        UsageError: no such recipe, both were typed, or the recipe has no game.
    """
    known = families(name)
    if not known:
        names = ", ".join(RECIPES)
        raise UsageError(f"no recipe {name!r}; there are {names}. To see them: nelbo recipes")
    typed = [word for word in ("--game", "--no-game") if word in arguments]
    rest = [word for word in arguments if word not in typed]
    if len(typed) > 1:
        raise UsageError("--game and --no-game exclude each other: give one of them")
    family = known[0] if not typed else {"--game": GAME, "--no-game": DIFFUSION}[typed[0]]
    if family not in known:
        raise UsageError(f"--game: the recipe {name} has none; games are {', '.join(GAMES)}")
    return family, rest


def name_of(options: Run) -> str:
    """The recipe's name."""
    table = _TABLES[family_of(options)]
    return next(name for name, kind in table.items() if type(options) is kind)


def family_of(options: Run) -> str:
    """Diffusion model or game."""
    return GAME if isinstance(options, GameOptions) else DIFFUSION


def folder_name(options: Run) -> str:
    """The recipe's name, and the family if it is not the default one."""
    name, family = name_of(options), family_of(options)
    return name if families(name)[0] == family else f"{name}-{family}"


def flag_of(options: Run) -> list[str]:
    """What must be typed so that the recipe's name means this family."""
    name, family = name_of(options), family_of(options)
    return [] if families(name)[0] == family else ["--game" if family == GAME else "--no-game"]


def stored(options: Run) -> dict[str, Any]:
    """JSON-able fields that define the run (no `Control`, no `Pace`)."""
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in _CONTROL}
    return {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in values.items()}


def restored(name: str, values: dict[str, Any], family: str = DIFFUSION) -> Run:
    """Options from what `stored` gave; unknown names are refused, absent ones take defaults.

    Raises:
        ValueError: the recipe, the family or a field is unknown to this version.
    """
    if family not in _TABLES:
        raise ValueError(f"this version of nelbo has no family {family!r}: {', '.join(_TABLES)}")
    table = _TABLES[family]
    if name not in table:
        raise ValueError(f"this version of nelbo has no recipe {name!r}: {', '.join(table)}")
    kind = table[name]
    known = {f.name: f for f in dataclasses.fields(kind)}
    extra = set(values) - set(known)
    if extra:
        raise ValueError(f"this version of nelbo does not know the options {sorted(extra)}")
    fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if "path" in fixed:
        fixed["path"] = Path(fixed["path"])
    made: Run = kind(**fixed)
    return made
