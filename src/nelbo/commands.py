"""What each subcommand can be told, `train` apart: its fields are the command line's options.

The text under each field is its help. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nelbo.derivecommand import Derive as Derive


@dataclass(frozen=True)
class Recipes:
    """List the recipes."""

    json: bool = False
    """Print one JSON document."""


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Checkpoints of other code bases: what their files do not say. Runs take none of these."""

    scaling: Literal["symmetric", "unit"] | None = None
    """Data as the network sees it: in [-1, 1], or in [0, 1]; symmetric unless the files say so."""
    levels: int | None = None
    """Grey levels of the data; 256 unless the files say otherwise."""
    edge: Literal["following", "lose", "ratio"] | float | None = None
    """Variance of the decoder p(x_0|x_1): that of the second step, beta_1, 1/snr, or a number;
    following unless the files say otherwise."""
    clip: Literal["scheduler", "none"] | float = "scheduler"
    """Clip the predicted data: as the checkpoint's own sampler does, never, or to this size."""
    label: int | None = None
    """Class of a class-conditional network."""
    trust_pickle: bool = False
    """Open weights in a pickle (.bin, .pt), which you trust; only tensors are read."""
    flags: Path | None = None
    """JSON file with the flags that a .pt file was trained with."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The variational bound of a model, by term, with errors."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a checkpoint of another code base (with --data)."""
    calls: float | None = None
    """Network calls per example, on average, also below one; the full bound (every step) by
    default. With --until: where to stop all the same."""
    until: float | None = None
    """Draw until the error of the total is at most this, in bits/dim."""
    error: Literal["se_mc", "se"] = "se_mc"
    """Which error --until speaks of: that of the draws, or that of the population as well."""
    against: Path | None = None
    """Another run, whose model is measured on the same draws; prints the difference."""
    against_checkpoint: str = "newest"
    """Which checkpoint of --against: newest, best or a step."""
    without: str = ""
    """Devices of a few-call evaluation to switch off, with commas: wiener, shrinkage, features,
    allocation, pairing, crossfit."""
    importance: int | None = None
    """Also the importance-weighted bound, from so many joint trajectories of each example: as many
    walks down the whole grid; take a --limit."""
    split: Literal["test", "validation", "train", "all"] | None = None
    """Part of the data; test for a run, all for a checkpoint of another code base."""
    limit: int | None = None
    """Only the first so many examples."""
    progressive: bool = False
    """Instead: rate and distortion of progressive coding, from about 64 (or --calls) calls."""
    checkpoint: str = "newest"
    """newest, best (by its validation), or a step."""
    ode: bool = False
    """Instead of the bound the likelihood of the probability-flow ODE, which is another model."""
    tolerance: float = 1e-5
    """Of --ode: the error allowed in a step, per dimension."""
    probes: Literal["exact"] | int | None = None
    """Of --ode: Hutchinson probes of the divergence, or exact (default up to 100 dimensions, 2
    probes above)."""
    dequantise: Literal["none", "uniform", "variational"] | None = None
    """Of --ode: how data get to the first latent; variational, or none for real vectors."""
    draws: int | None = None
    """Of --ode: draws per example of the noise that --dequantise adds; 2, or none."""
    seed: int = 0
    """Of the noise and the times."""
    batch: int = 512
    """Examples per network call; changes no figure."""
    steps: str | None = None
    """Table of the bound on grids of so many latents, as 10,25,50,100."""
    grid: Literal["even", "logsnr", "optimal", "both"] = "even"
    """With --steps, which latents stay: at even distance in time or in log-SNR, or those that cost
    least; both: even and optimal."""
    variance: str = "model"
    """With --steps, of the reverse steps: model, posterior, transition, optimal, or several of
    them with commas."""
    fit: int = 128
    """With --steps, training examples on which grids and the optimal variance are fitted."""
    data: Path | None = None
    """Data for a checkpoint of another code base: images, .npy, .npz, IDX, CIFAR-10."""
    size: int | None = None
    """Crop the images of --data to a square and resize them to this size."""
    out: Path | None = None
    """New folder for the figures of such a checkpoint, which are else only printed."""
    elsewhere: Annotated[Elsewhere, tyro.conf.arg(name="")] = Elsewhere()
    """Checkpoints of other code bases."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads."""
    dist_timeout: float = 600.0
    """Under torchrun: seconds to wait for a rank that does not answer."""
    json: bool = False
    """Print one JSON document."""
    quiet: bool = False
    """No progress on stderr."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw samples from a model."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a checkpoint of another code base."""
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
    sampler: Literal["ancestral", "ddim", "dpmpp", "heun"] = "ancestral"
    """ancestral: the model that the bound speaks of. The others follow its probability flow:
    ddim first order; dpmpp (DPM-Solver++ 2M) and heun (two calls per step) second order."""
    eta: float = 0.0
    """DDIM's noise, 0 deterministic to 1."""
    steps: int | None = None
    """Latents to walk over; the model's own grid by default."""
    grid: Literal["even", "logsnr", "optimal"] = "even"
    """With --steps, which latents stay: at even distance in time or in log-SNR (which solvers
    want), or those that cost least."""
    variance: Literal["model", "posterior", "transition", "optimal"] = "model"
    """Of the reverse steps: the model's own, or another (--sampler ancestral)."""
    fit: int = 128
    """Training examples on which an optimal grid or variance is fitted."""
    progressive: bool = False
    """Instead: what the model guesses of the data along walks from noise, as strips."""
    interpolate: tuple[str, str] | None = None
    """Instead: between two images, numbers of test examples or pictures of the model's size."""
    at: tuple[float, ...] = (0.4, 0.6, 0.8)
    """With --interpolate: through the latents at these fractions of the last time, or of these
    numbers."""
    out: Path | None = None
    """New folder for the picture and the array; RUN/samples/NAME by default, samples/NAME here for
    a checkpoint of another code base."""
    checkpoint: str = "newest"
    """newest, best (by its validation), or a step."""
    seed: int = 0
    """Of the noise."""
    elsewhere: Annotated[Elsewhere, tyro.conf.arg(name="")] = Elsewhere()
    """Checkpoints of other code bases."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads."""
    json: bool = False
    """Print one JSON document."""
    quiet: bool = False
    """No progress on stderr."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """A certified lower bound on the Jensen-Shannon divergence between data and samples."""

    real: tyro.conf.Positional[str]
    """Data: digits, swissroll, ring, grid or gaussian; a path (./digits: a folder of that name);
    or the word data, for a run's own (its test part, which it was not trained on)."""
    fakes: tyro.conf.Positional[tuple[str, ...]]
    """Run directories, checkpoints of other code bases, files or folders of samples, or
    FILE.py:FUNCTION with n -> (n, ...)."""
    alpha: float = 0.05
    """Probability with which a certificate may be wrong."""
    n: int | None = None
    """At most so many pairs in the certificate; 5,000 of data drawn from a known law."""
    draws: int | None = None
    """Samples drawn of a diffusion model; by default twice as many as data are held out. More of
    them train better classifiers."""
    mode: Literal["split", "prequential"] = "split"
    """Hold a part of the data out, or (for few data) bet on one block after the other."""
    ladder: tuple[float, ...] = (6.0, 3.0, 0.0, -3.0)
    """Log-SNRs at which noise is added to both sides and a certificate made; empty for none."""
    metrics: bool = True
    """Companion metrics, each with its spread and a real-versus-real row."""
    features: str = "auto"
    """Of the metrics: raw, pca, classifier (labelled data), random (a fixed ConvNet), or
    FILE.py:FUNCTION, which gives a torch module."""
    weights: Path | None = None
    """Safetensors for the module of --features."""
    seeds: int = 5
    """Draws of the samples over which a metric's spread is measured."""
    as_is: bool = False
    """Let pass samples of another range, and with many copies, where the laws are like that."""
    calls: float = 16.0
    """Network calls per example for the bound of a diffusion model, in the sandwich."""
    checkpoint: str = "newest"
    """Of runs: newest, best, or a step."""
    sampler: Literal["ancestral", "ddim", "dpmpp", "heun"] = "ancestral"
    """Of diffusion models. Only ancestral is the law that the bound speaks of."""
    steps: int | None = None
    """Latents to walk over; the model's own grid by default."""
    grid: Literal["even", "logsnr", "optimal"] = "even"
    """With --steps, which latents stay."""
    variance: Literal["model", "posterior", "transition", "optimal"] = "model"
    """Of the reverse steps."""
    seed: int = 0
    """Of the split, the draws and the classifiers."""
    out: Path | None = None
    """New folder for documents and arrays; RUN/compare/NAME by default, and none for samples that
    are not a run's."""
    size: int | None = None
    """Crop the images of folders to a square and resize them to this size."""
    elsewhere: Annotated[Elsewhere, tyro.conf.arg(name="")] = Elsewhere()
    """Checkpoints of other code bases."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads."""
    dist_timeout: float = 600.0
    """Under torchrun: seconds to wait for a rank that does not answer."""
    json: bool = False
    """Print one JSON document."""
    quiet: bool = False
    """No progress on stderr."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's model for another library."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    out: tyro.conf.Positional[Path]
    """New folder."""
    to: Literal["diffusers"] = "diffusers"
    """Which library: its DDPMPipeline.from_pretrained loads the folder."""
    checkpoint: str = "newest"
    """newest, best (by its validation), or a step."""
    json: bool = False
    """Print one JSON document."""


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
