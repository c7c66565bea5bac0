"""What a game can be told: a dataclass per recipe, its fields are the command line's options.

The text under each field is its help. Nothing heavy is imported here. Defaults differ from those
of a diffusion model on the same data wherever the best value does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nelbo.recipes.groups import (
    GameOptions,
    GaussianData,
    GridData,
    Perceptrons,
    Pyramids,
    RingData,
    RollData,
)


@dataclass(frozen=True, kw_only=True)
class MixtureGame(GameOptions, Perceptrons):
    """A finite Gaussian mixture against a generator."""

    loss: Literal["non-saturating", "relativistic", "minimax", "hinge"] = "relativistic"
    r1: float = 0.1
    r2: float = 0.1
    relax: float = 0.1
    latent: int = 2
    batch: int = 256
    steps: int = 10_000
    warmup: int = 200
    half_life: float = 200_000.0
    validate_every: int = 2000
    save_every: int = 2000
    samples: int = 2000


@dataclass(frozen=True, kw_only=True)
class RingGame(MixtureGame, RingData):
    """Eight tight Gaussians on a circle: does the generator find them all?"""

    examples: int = 100_000


@dataclass(frozen=True, kw_only=True)
class GridGame(MixtureGame, GridData):
    """Twenty-five tight Gaussians on a square lattice: does the generator find them all?"""

    examples: int = 100_000


@dataclass(frozen=True, kw_only=True)
class SwissRollGame(MixtureGame, RollData):
    """A Swiss roll in the plane, a finite Gaussian mixture: the density is known."""

    examples: int = 100_000


@dataclass(frozen=True, kw_only=True)
class GaussianGame(MixtureGame, GaussianData):
    """One Gaussian with two correlated dimensions: the density is known."""

    examples: int = 100_000
    latent: int = 3


@dataclass(frozen=True, kw_only=True)
class VectorsGame(GameOptions, Perceptrons):
    """An .npy/.npz array of real vectors, N x D."""

    path: tyro.conf.Positional[Path]
    """Array file."""
    loss: Literal["non-saturating", "relativistic", "minimax", "hinge"] = "relativistic"
    r1: float = 0.1
    r2: float = 0.1
    relax: float = 0.1
    width: int = 256
    batch: int = 256
    half_life: float = 200_000.0
    samples: int = 1000


@dataclass(frozen=True, kw_only=True)
class DigitsGame(GameOptions, Pyramids):
    """The 1,797 embedded handwritten digits, 8x8 with 17 grey levels."""

    threads: int | None = 1
    """CPU threads."""
    validation: int = 100
    """Images held out of the training part to choose the best checkpoint."""
    steps: int = 4000
    batch: int = 64
    relax: float = 0.3
    validate_every: int = 500
    save_every: int = 500
    samples: int = 64


@dataclass(frozen=True, kw_only=True)
class PicturesGame(GameOptions, Pyramids):
    """Images from the user's disk."""

    path: tyro.conf.Positional[Path]
    """Folder or file."""
    batch: int = 64
    latent: int = 128
    rate: float = 2e-4
    half_life: float = 20_000.0
    samples: int = 64


@dataclass(frozen=True, kw_only=True)
class ImagesGame(PicturesGame):
    """A folder of images, an .npy/.npz array of levels, or a folder in a known format."""

    size: int | None = None
    """Crop to a square and resize to this size."""


@dataclass(frozen=True, kw_only=True)
class MnistGame(PicturesGame):
    """MNIST-format IDX files (plain or .gz), grey."""


@dataclass(frozen=True, kw_only=True)
class Cifar10Game(PicturesGame):
    """CIFAR-10's binary batches."""

    channels: int = 64
    steps: int = 100_000


GAMES: dict[str, type[GameOptions]] = {
    "digits": DigitsGame,
    "swissroll": SwissRollGame,
    "ring": RingGame,
    "grid": GridGame,
    "gaussian": GaussianGame,
    "images": ImagesGame,
    "vectors": VectorsGame,
    "mnist": MnistGame,
    "cifar10": Cifar10Game,
}
