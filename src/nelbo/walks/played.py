"""A game as it lies on disk, opened: its data, and a generator with its averaged weights.

What comes out is a sampler: a callable n -> n samples as data are stored, rows independent of each
other and of how they were split into batches, z from the global generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nelbo import checkpoint
from nelbo.errors import InputRefused
from nelbo.recipes.adversarial import build_game
from nelbo.recipes.families import GAME
from nelbo.recipes.groups import GameOptions
from nelbo.recipes.recipe import GameRecipe
from nelbo.rundir import RunDirectory
from nelbo.walks.stored import check_data, choose, options_of

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


@dataclass(frozen=True)
class Played:
    """An opened game.

    Arguments:
        generator: with the averaged weights of `step`, in evaluation mode. device: where it is.
    """

    directory: RunDirectory
    recipe: GameRecipe
    generator: nn.Module
    step: int
    device: str
    info: dict[str, Any]

    def sampler(self, batch: int = 1024) -> Callable[[int], Tensor]:
        """n -> (n, *shape) as data are stored: levels uint8, or vectors float64.

        z comes from the global generator: seed it (`nelbo.randomness.seeded`) for samples that can
        be drawn again.

        Arguments:
            batch: examples per call of the network; changes last digits at most.
        """
        return lambda n: drawn(self.recipe, self.generator, n, self.device, batch)


@torch.no_grad()
def drawn(
    recipe: GameRecipe, generator: nn.Module, count: int, device: str, batch: int = 1024
) -> Tensor:
    """(count, *shape) samples as data are stored.

    Raises:
        NumericalFailure: a sample is not finite.
    """
    z = recipe.game.noise(count)
    parts = [recipe.dataset.decode(generator(part.to(device)).cpu()) for part in z.split(batch)]
    return torch.cat(parts)


def is_game(path: Path) -> bool:
    """Whether a path holds a game's run; False if it holds none that can be read."""
    try:
        return RunDirectory(path).open().get("family") == GAME
    except (InputRefused, AttributeError):
        return False  # whoever opens it says why


def open_game(path: Path, which: str = "newest", device: str = "cpu") -> Played:
    """Build the generator of a game and load its averaged weights.

    Arguments:
        which: "newest", "best" (by its validation), or a step number.
    Raises:
        InputRefused: no game, no valid checkpoint, data that changed, or tensors that do not fit.
    """
    directory = RunDirectory(path)
    options = options_of(directory)
    if not isinstance(options, GameOptions):
        raise InputRefused(f"{path}: a diffusion model, not a game")
    recipe = build_game(options)
    check_data(directory, recipe.dataset)
    step, loaded = choose(directory, which)
    generator = recipe.game.generator
    where = str(checkpoint.step_path(directory.checkpoints, step))
    groups = {f"{GENERATOR}-ema": generator, DISCRIMINATOR: recipe.game.discriminator}
    for group, module in groups.items():
        state = loaded.tensors.get(group, {})
        checkpoint.check_tensors(state, module.state_dict(), where)
        module.load_state_dict(state)
        module.to(device).eval()
    return Played(directory, recipe, generator, step, device, loaded.info)
