"""Options of diffusion models on data whose law is known: finite Gaussian mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nelbo.recipes.groups import (
    Diffusion,
    GaussianData,
    GridData,
    Options,
    RingData,
    RollData,
)


@dataclass(frozen=True, kw_only=True)
class Mixture(Options, Diffusion):
    """A finite Gaussian mixture: density, entropy and denoiser are known."""

    width: int = 128
    """Hidden width of the network."""
    depth: int = 3
    """Residual blocks."""
    steps: int = 8000
    batch: int = 512
    predict: Literal["epsilon", "x0", "velocity", "mean", "levels"] = "velocity"
    decoder: Literal["discretized", "mass", "density", "fixed"] = "density"
    logsnr_max: float = 8.0
    logsnr_min: float = -6.0
    rate: float = 2e-3
    samples: int = 2000
    calls: int | None = 16


@dataclass(frozen=True, kw_only=True)
class SwissRoll(Mixture, RollData):
    """A Swiss roll in the plane, a finite Gaussian mixture: the entropy is known."""


@dataclass(frozen=True, kw_only=True)
class Ring(Mixture, RingData):
    """Eight tight Gaussians on a circle: the entropy is known."""

    logsnr_max: float = 12.0


@dataclass(frozen=True, kw_only=True)
class Grid(Mixture, GridData):
    """Twenty-five tight Gaussians on a square lattice: the entropy is known."""

    logsnr_max: float = 12.0


@dataclass(frozen=True, kw_only=True)
class Gaussian(Mixture, GaussianData):
    """One Gaussian with two correlated dimensions: the entropy is known."""

    logsnr_max: float = 5.0
    steps: int = 4000
