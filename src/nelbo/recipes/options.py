"""What a diffusion run can be told: a dataclass per recipe, its fields are the options to type.

The text under each field is its help. Nothing heavy is imported here. The fields that recipes
share are in `groups`; the same data as games are in `games`, and which family a name means by
default in `families`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nelbo.recipes.groups import BitDiffusion as BitDiffusion
from nelbo.recipes.groups import Control as Control
from nelbo.recipes.groups import Diffusion as Diffusion
from nelbo.recipes.groups import Options as Options
from nelbo.recipes.groups import UNetShape as UNetShape
from nelbo.recipes.mixtures import Gaussian as Gaussian
from nelbo.recipes.mixtures import Grid as Grid
from nelbo.recipes.mixtures import Mixture as Mixture
from nelbo.recipes.mixtures import Ring as Ring
from nelbo.recipes.mixtures import SwissRoll as SwissRoll


@dataclass(frozen=True, kw_only=True)
class Digits(Options, Diffusion, UNetShape):
    """The 1,797 embedded handwritten digits, 8x8 with 17 grey levels: trains in two minutes."""

    threads: int | None = 1
    """CPU threads: images this small gain a third from two, and lose tenfold when another program
    wants one of the two cores."""
    validation: int = 100
    """Images held out of the training part to watch the bound."""
    samples: int = 64
    steps: int = 1500
    predict: Literal["epsilon", "x0", "velocity", "mean", "levels"] = "levels"
    decoder: Literal["discretized", "mass", "density", "fixed"] = "mass"
    logsnr_max: float = 8.0
    logsnr_min: float = -6.0
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    layers: int = 1
    attention: tuple[int, ...] = (4,)
    head_dim: int | None = 16
    dropout: float = 0.2
    drop_channels: bool = True
    waves: int | None = 8
    focus: tuple[float, float] | None = (4.5, 2.5)
    fourier: tuple[int, ...] = ()
    positions: int = 8
    batch: int = 64
    rate: float = 2e-3
    ema: float = 0.998
    validate_every: int = 500
    save_every: int = 500


@dataclass(frozen=True, kw_only=True)
class Heartbeat(Options, BitDiffusion):
    """Bits with a one at every fifth place: the binary heartbeat of Sohl-Dickstein et al. 2015."""

    length: int = 20
    """Bits of a sequence."""
    period: int = 5
    """A one at every so-manieth place."""
    stationary: float = 0.2
    """Pi, the rate of ones of pure noise."""
    schedule: Literal["logsnr", "linear", "cosine", "harmonic"] = "harmonic"
    latents: int = 2000
    decoder: Literal["bernoulli", "fixed"] = "fixed"
    width: int = 128
    """Hidden width of the network."""
    depth: int = 2
    """Residual blocks."""
    steps: int = 12_000
    batch: int = 256
    rate: float = 3e-3
    ema: float = 0.999
    validate_every: int = 4000
    save_every: int = 4000
    calls: int | None = None
    samples: int = 100


@dataclass(frozen=True, kw_only=True)
class Patches(Options, Diffusion, UNetShape):
    """Small pictures without end, and a network that a laptop trains on them in minutes."""

    steps: int = 3000
    batch: int = 32
    channels: int = 32
    layers: int = 1
    attention: tuple[int, ...] = (8,)
    dropout: float = 0.0
    calls: int | None = 16
    samples: int = 36


@dataclass(frozen=True, kw_only=True)
class DeadLeaves(Patches):
    """Dead leaves: grey disks that occlude each other, radii of density r^-3."""

    examples: int = 10_000
    """Training images."""
    size: int = 32
    """Side of an image."""
    radius_min: float = 2.0
    """Least radius of a disk, pixels."""
    radius_max: float = 16.0
    """Greatest radius of a disk, pixels."""


@dataclass(frozen=True, kw_only=True)
class Texture(Patches):
    """Random crops of one photograph, from regions that share no pixel."""

    path: tyro.conf.Positional[Path]
    """The photograph."""
    examples: int = 20_000
    """Training crops."""
    size: int = 32
    """Side of a crop."""
    color: bool = False
    """RGB crops instead of grey ones."""


@dataclass(frozen=True, kw_only=True)
class Images(Options, Diffusion, UNetShape):
    """A folder of images, an .npy/.npz array of levels, or a folder in a known format."""

    path: tyro.conf.Positional[Path]
    """Folder or file."""
    size: int | None = None
    """Crop to a square and resize to this size."""
    calls: int | None = 32
    samples: int = 64


@dataclass(frozen=True, kw_only=True)
class Vectors(Options, Diffusion):
    """An .npy/.npz array of real vectors, N x D."""

    path: tyro.conf.Positional[Path]
    """Array file."""
    width: int = 256
    """Hidden width of the network."""
    depth: int = 4
    """Residual blocks."""
    batch: int = 512
    decoder: Literal["discretized", "mass", "density", "fixed"] = "density"
    logsnr_max: float = 10.0
    logsnr_min: float = -6.0
    samples: int = 1000


@dataclass(frozen=True, kw_only=True)
class Mnist(Options, Diffusion, UNetShape):
    """MNIST-format IDX files (plain or .gz), grey or as bits (--binarize)."""

    path: tyro.conf.Positional[Path]
    """File of images, or the folder that holds the files."""
    binarize: Literal["none", "threshold", "stochastic"] = "none"
    """Bits by a threshold at half, or one fixed coin per pixel; Bernoulli diffusion of them."""
    bits: Literal["context", "logits"] = "context"
    """With --binarize: the network gives what the other bits say of one, or P(x_0=1|x_t)."""
    stationary: float | Literal["data"] = "data"
    """With --binarize: pi, the rate of ones of pure noise; data: that of the training part."""
    bit_schedule: Literal["logsnr", "linear", "cosine", "harmonic"] = "cosine"
    """With --binarize: instead of --schedule."""
    multipliers: tuple[int, ...] = (1, 2)
    layers: int = 1
    attention: tuple[int, ...] = (14,)
    channels: int = 24
    dropout: float = 0.0
    steps: int = 3000
    batch: int = 32
    rate: float = 2e-3
    ema: float = 0.998
    validate_every: int = 1500
    save_every: int = 500
    calls: int | None = 8
    samples: int = 36


@dataclass(frozen=True, kw_only=True)
class Bits(Options, BitDiffusion):
    """An .npy/.npz array of zeros and ones, N x D."""

    path: tyro.conf.Positional[Path]
    """Array file."""
    stationary: float | Literal["data"] = "data"
    predict: Literal["logits", "context", "flip"] = "context"
    schedule: Literal["logsnr", "linear", "cosine", "harmonic"] = "harmonic"
    latents: int = 500
    width: int = 256
    """Hidden width of the network."""
    depth: int = 3
    """Residual blocks."""
    steps: int = 10_000
    batch: int = 256
    samples: int = 100


@dataclass(frozen=True, kw_only=True)
class Cifar10(Options, Diffusion, UNetShape):
    """CIFAR-10's binary batches, with DDPM's 35.7 M-parameter network."""

    path: tyro.conf.Positional[Path]
    """Folder with data_batch_1.bin ... test_batch.bin."""
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.1
    steps: int = 100_000
    rate: float = 2e-4
    warmup: int = 1000
    decay: Literal["cosine", "constant"] = "constant"
    ema: float = 0.9999


RECIPES: dict[str, type[Options]] = {
    "digits": Digits,
    "swissroll": SwissRoll,
    "ring": Ring,
    "grid": Grid,
    "gaussian": Gaussian,
    "heartbeat": Heartbeat,
    "deadleaves": DeadLeaves,
    "texture": Texture,
    "images": Images,
    "vectors": Vectors,
    "bits": Bits,
    "mnist": Mnist,
    "cifar10": Cifar10,
}
