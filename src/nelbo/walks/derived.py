"""The derivation on a run: its model or its players, before its own test data.

Where the whole chain of latents would take too long, a subset of it is looked at: it is a chain as
well, with the same marginals and the same network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nelbo import console
from nelbo.binary import Flip
from nelbo.commands import Derive
from nelbo.data.base import Dataset
from nelbo.data.mixture import GaussianMixture
from nelbo.data.part import head
from nelbo.derivation import chain, printed, trainedchain, trainedgame, trainedloss
from nelbo.derivation.identity import Result
from nelbo.derivation.trained import FEWEST, Kept, Trained, in_float64
from nelbo.derivation.trainedchain import Said
from nelbo.derivation.trainedgame import Players
from nelbo.errors import UsageError
from nelbo.gan import Game
from nelbo.losses import Augmented
from nelbo.randomness import seeded
from nelbo.recipes.recipe import Recipe
from nelbo.reverse import strided
from nelbo.walks.played import is_game, open_game
from nelbo.walks.stored import device_of, open_run

ROWS, PICTURES, PAIRS, FEWEST_PAIRS = 512, 64, 10_000, 100
"""Examples of vectors, of pictures, and of a game, by default."""
WORK, MOST = 4e11, 400
"""Products in the network, and latents, that take half a minute on two cores."""
LEAST_BLUR = 0.1
"""On the model's scale; finer ones make the quadrature long."""
LEAST = 8
"""Latents."""
SMALL = "shown on small exact models only: leave out the run"


@dataclass(frozen=True, eq=False)
class Opened:
    """A run, and what can be said of it.

    Arguments:
        about: for the document. words: one line for people. table: lines of an identity by id, or
            why there are none. absent: why identities are not in the table, where it is not that
            they are shown on small models only.
    """

    about: dict[str, Any]
    words: str
    table: Mapping[str, Callable[[], Said]]
    absent: Mapping[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def results(self, wanted: set[str] | None) -> Iterator[Result]:
        """The identities that apply, in the order of the chain; the others are noted.

        Arguments:
            wanted: ids; all for None.
        """
        for one in chain.IDENTITIES:
            if wanted is not None and one.id not in wanted:
                continue
            if one.id not in self.table:
                if wanted is not None:
                    self.skipped[one.id] = self.absent.get(one.id, SMALL)
                continue
            started = time.perf_counter()
            with torch.no_grad():
                found = self.table[one.id]()
            if isinstance(found, str):
                self.skipped[one.id] = found
            else:
                yield Result(one, tuple(found), time.perf_counter() - started)

    def opening(self, width: int) -> Iterator[printed.Row]:
        """What is looked at."""
        for row in printed.beside(console.clean(self.words), "", width):
            yield row, printed.PLAIN
        yield "", printed.PLAIN

    def nothing(self) -> str:
        """That no identity applies, and why, where one reason may be that of several."""
        by_reason: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            by_reason.setdefault(why, []).append(name)
        told = [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
        return f"no identity of these applies to this run: {'; '.join(told)}"

    def closing(self, width: int) -> Iterator[printed.Row]:
        """What does not apply, and why."""
        for name, why in self.skipped.items():
            text = f"{name} {chain.find(name).name} does not apply: {why}"
            for row in printed.beside(text, "", width, "", "    "):
                yield row, printed.QUIET
        if self.skipped:
            yield "", printed.PLAIN


def opened(options: Derive, path: Path) -> Opened:
    """A run of either family.

    Raises:
        InputRefused: no run, or one that cannot be read. UsageError: options of the other family.
    """
    return _game(options, path) if is_game(path) else _diffusion(options, path)


def _law(dataset: Dataset) -> GaussianMixture | None:
    """The data's law on the model's scale, if it is a known mixture."""
    known = dataset.truth is not None and dataset.truth.components is not None
    return dataset.scaled_components() if known else None


def _diffusion(options: Derive, path: Path) -> Opened:
    device = device_of(options.device)
    stored = open_run(path, options.checkpoint)
    recipe = stored.subject
    assert isinstance(recipe, Recipe)
    dataset = recipe.dataset
    picture = len(dataset.shape()) > 1
    count = options.examples or (PICTURES if picture else ROWS)
    rows = dataset.encode(head(dataset.test, count)[:]).double()
    _enough(len(rows), FEWEST)
    weighed = (FEWEST, 8) if picture else (min(len(rows), 2 * FEWEST), 16)
    times = _latents(options, recipe, len(rows), weighed)
    model = recipe.model if len(times) == len(recipe.times) else strided(recipe.model, times)
    weight = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    setting = Kept(
        in_float64(model, device), times, rows, weight, path.resolve().name, options.seed
    )
    objective = recipe.objective
    plain = objective.objective if isinstance(objective, Augmented) else objective
    trained = Trained(setting, plain, _law(dataset), weighed)
    tables = trainedchain.TABLE | trainedloss.TABLE
    many = f"{len(times)} of its {len(recipe.times)} latents, which are a chain as well (I17)"
    many = f"all of its {len(times)} latents" if len(times) == len(recipe.times) else many
    about = {
        "path": str(path),
        "family": "diffusion",
        "data": dataset.name,
        "step": stored.step,
        "examples": len(rows),
        "latents": len(times),
        "of_latents": len(recipe.times),
        "objective": recipe.description.get("objective"),
    }
    words = (
        f"{path}, weights ema of step {stored.step}: {recipe.description['process']} of "
        f"{dataset.name}, trained on the objective {about['objective']}; {len(rows)} test "
        f"examples, {many}; nats per example unless said otherwise."
    )
    absent = dict.fromkeys(trainedgame.TABLE, "it speaks of a game, and this is a diffusion model")
    return Opened(about, words, {name: partial(f, trained) for name, f in tables.items()}, absent)


def _enough(count: int, least: int) -> None:
    if count < least:
        raise UsageError(
            f"{count} test examples: their mean says too little; take {least} or more"
        )


def _latents(options: Derive, recipe: Recipe, rows: int, weighed: tuple[int, int]) -> Tensor:
    """All of the grid, or as many evenly chosen latents as half a minute allows."""
    times = recipe.times
    if options.latents is not None and not 2 <= options.latents <= len(times):
        raise UsageError(f"--latents {options.latents}: give 2 to {len(times)}, all of its chain")
    if isinstance(recipe.model.parameterization, Flip):
        return times  # flips speak of the steps of their own chain
    shape = recipe.dataset.shape()
    places = shape[-1] * shape[-2] if len(shape) > 1 else 1
    each = places * sum(p.numel() for p in recipe.model.network.parameters())
    most = int(WORK / max(each, 1) / (2 * rows + weighed[0] * weighed[1]))
    wanted = options.latents or max(LEAST, min(MOST, most))
    if wanted >= len(times):
        return times
    return times[torch.linspace(0, len(times) - 1, wanted).round().long()]


def _game(options: Derive, path: Path) -> Opened:
    device = device_of(options.device)
    if options.latents is not None:
        raise UsageError("--latents speaks of a diffusion model, and this run is a game")
    played = open_game(path, options.checkpoint, device)
    dataset, rules = played.recipe.dataset, played.recipe.rules
    law = _law(dataset)
    law = law if law is not None and law.dims == 2 else None
    finest = 0.0 if law is None else float(torch.linalg.eigvalsh(law.covariances).min().sqrt())
    game = Game(played.generator, played.recipe.game.discriminator, played.recipe.game.latent)

    def shown(part: Any, purpose: str) -> Tensor:
        rows = dataset.encode(head(part, options.examples or PAIRS)[:])
        with seeded(options.seed, "derive", purpose):
            return rows if rules.prepare is None else rules.prepare(rows)

    players = Players(
        name=path.resolve().name,
        game=game,
        real=shown(dataset.test, "reals"),
        tuning=shown(dataset.train, "training"),
        law=law,
        blur=max(finest, LEAST_BLUR),
        seed=options.seed,
        centred=rules.loss.centred,
        device=device,
    )
    _enough(len(players.real), FEWEST_PAIRS)
    about = {
        "path": str(path),
        "family": "game",
        "data": dataset.name,
        "step": played.step,
        "examples": len(players.real),
    }
    words = (
        f"{path}, step {played.step}: a game of {dataset.name}, loss "
        f"{played.recipe.description['loss']}; its discriminator and its averaged generator, "
        f"{len(players.real)} test examples; nats."
    )
    table = {name: partial(f, players) for name, f in trainedgame.TABLE.items()}
    told = trainedchain.TABLE | trainedloss.TABLE
    absent = dict.fromkeys(told, "it speaks of a diffusion model, and this is a game")
    return Opened(about, words, table, absent)
