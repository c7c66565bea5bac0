"""One function per game: options in, a complete `GameRecipe` out."""

from __future__ import annotations

from nelbo import gan
from nelbo.data.base import Dataset
from nelbo.data.differentiable import Dequantised, Moved
from nelbo.data.embedded import digits
from nelbo.data.sources import cifar10, open_path
from nelbo.errors import InputRefused
from nelbo.networks import adversaries as players
from nelbo.randomness import seeded
from nelbo.recipes import games as o
from nelbo.recipes.datasets import KnownLaw, known_law
from nelbo.recipes.families import name_of
from nelbo.recipes.groups import GameOptions, Perceptrons, Pyramids
from nelbo.recipes.recipe import GameRecipe

LOSSES: dict[str, type[gan.Loss]] = {
    "non-saturating": gan.NonSaturating,
    "relativistic": gan.Relativistic,
    "minimax": gan.Minimax,
    "hinge": gan.Hinge,
}


def build_game(options: GameOptions) -> GameRecipe:
    """The recipe of a game; weights are a function of the seed.

    Raises:
        InputRefused: the data is not what the recipe needs.
    """
    dataset = dataset_of(options)
    with seeded(options.seed, "weights"):
        game = game_of(options, dataset)
    return GameRecipe(
        name=name_of(options),
        options=options,
        dataset=dataset,
        game=game,
        rules=rules_of(options, dataset),
        description=_words(options, game),
    )


def dataset_of(options: GameOptions) -> Dataset:
    """What the generator is to imitate."""
    if isinstance(options, o.DigitsGame):
        return digits(options.validation)
    if isinstance(options, o.VectorsGame):
        return _vectors(open_path(options.path, cache=options.cache))
    if isinstance(options, o.Cifar10Game):
        return cifar10(options.path)
    if isinstance(options, o.ImagesGame):
        return _images(open_path(options.path, size=options.size, cache=options.cache))
    if isinstance(options, o.MnistGame):
        return _images(open_path(options.path, cache=options.cache))
    assert isinstance(options, KnownLaw)
    return known_law(options, options.seed)


def _vectors(dataset: Dataset) -> Dataset:
    if dataset.levels is not None:
        raise InputRefused(f"{dataset.name} holds images: use the recipe images")
    return dataset


def _images(dataset: Dataset) -> Dataset:
    if dataset.levels is None:
        raise InputRefused(
            f"{dataset.name} holds real vectors, not images: use the recipe vectors"
        )
    return dataset


def game_of(options: GameOptions, dataset: Dataset) -> gan.Game:
    """The two networks with fresh weights."""
    if isinstance(options, Pyramids):
        shape, size = dataset.shape(), options.channels
        generator = players.ImageGenerator(options.latent, shape, size)
        return gan.Game(generator, players.ImageDiscriminator(shape, size), options.latent)
    assert isinstance(options, Perceptrons)
    dims, size = dataset.dims, options.width
    waves = options.directions, options.finest
    return gan.Game(
        players.VectorGenerator(options.latent, dims, size, options.depth),
        players.VectorDiscriminator(dims, size, options.critic_depth, *waves),
        options.latent,
    )


def rules_of(options: GameOptions, dataset: Dataset) -> gan.Rules:
    """The loss, the penalties, and what the discriminator sees of data and samples."""
    moved = options.augment if isinstance(options, Pyramids) else 0.0
    return gan.Rules(
        LOSSES[options.loss](),
        r1=options.r1,
        r2=options.r2,
        relax=options.relax,
        prepare=None if dataset.levels is None else Dequantised(dataset.levels),
        change=Moved(moved) if moved else None,
    )


def _words(options: GameOptions, game: gan.Game) -> dict[str, str]:
    """Who plays for what, in words."""
    counts = {
        name: sum(p.numel() for p in player.parameters())
        for name, player in (("generator", game.generator), ("discriminator", game.discriminator))
    }
    moves = options.critic_moves
    relaxed = f", down to {options.relax:g} of it" if options.relax != 1 else ""
    return {
        "family": "game",
        "loss": options.loss,
        "penalties": f"R1 {options.r1:g}, R2 {options.r2:g}{relaxed}",
        "latent": f"{options.latent} dimensions",
        "discriminator moves": f"{moves} for one of the generator",
        "average": f"half-life {options.half_life:g} examples",
        **{f"{name} parameters": f"{count}" for name, count in counts.items()},
    }
