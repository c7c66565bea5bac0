"""What each subcommand can be told, `train` apart: its fields are the command line's options.

The text under each field is its help. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Recipes:
    """List the recipes."""

    json: bool = False
    """Print one JSON document."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The variational bound of a run's model, by term, with errors."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    calls: int | None = None
    """Network calls per example; the full bound (every step) by default."""
    control: Literal["wiener", "none"] = "wiener"
    """Control variate of a few-call evaluation: the linear denoiser of the training data."""
    importance: int | None = None
    """Also the importance-weighted bound, from so many joint trajectories of each example: as many
    walks down the whole grid; take a --limit."""
    split: Literal["test", "validation", "train"] = "test"
    """Part of the data."""
    limit: int | None = None
    """Only the first so many examples."""
    progressive: bool = False
    """Instead: rate and distortion of progressive coding, from about 64 (or --calls) calls."""
    checkpoint: str = "newest"
    """newest, best (by validation bound), or a step."""
    seed: int = 0
    """Of the noise and the times."""
    batch: int = 512
    """Examples per network call; changes no figure."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads."""
    json: bool = False
    """Print one JSON document."""
    quiet: bool = False
    """No progress on stderr."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw samples from a run's model."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    n: int | None = None
    """How many; 64, or 8 under a condition or between two images."""
    observe: Path | None = None
    """Picture (with --mask) or .npy (NaN: unknown) to fill in, of the model's size."""
    mask: Path | None = None
    """Picture or .npy: white (1) where --observe is known, black (0) where to fill in."""
    hole: int | None = None
    """Side of a square to fill in, in the middle of --observe or of the first test image."""
    denoise: Path | None = None
    """Picture or .npy to take noise off, of the model's size."""
    noise: float | None = None
    """Standard deviation of the noise of --denoise, in its own units (picture: of 255)."""
    particles: int = 32
    """Weighted particles behind each draw under a condition; more are nearer to the truth."""
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    """ancestral: the model that the bound speaks of. ddim: another one."""
    eta: float = 0.0
    """DDIM's noise, 0 deterministic to 1."""
    steps: int | None = None
    """Latents to walk over; the model's own grid by default."""
    progressive: bool = False
    """Instead: what the model guesses of the data along walks from noise, as strips."""
    interpolate: tuple[str, str] | None = None
    """Instead: between two images, numbers of test examples or pictures of the model's size."""
    at: tuple[float, ...] = (0.4, 0.6, 0.8)
    """With --interpolate: through the latents at these fractions of the last time, or of these
    numbers."""
    out: Path | None = None
    """Folder for the picture and the array; RUN/samples/NAME by default."""
    checkpoint: str = "newest"
    """newest, best (by validation bound), or a step."""
    seed: int = 0
    """Of the noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads."""
    json: bool = False
    """Print one JSON document."""
    quiet: bool = False
    """No progress on stderr."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html of a run, and its figures as PNGs."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    json: bool = False
    """Print one JSON document."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine and installation."""

    json: bool = False
    """Print one JSON document."""
