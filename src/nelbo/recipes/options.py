"""What a run can be told: one dataclass per recipe, its fields are the command line's options.

The text under each field is its help. Nothing heavy is imported here. What describes the run is
stored in its recipe.json; what describes only this start of it (`Control`) is not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Control:
    """This start of the program; not part of what the run is."""

    out: Path | None = None
    """Run directory; runs/NAME by default (NELBO_OUT names another root)."""
    resume: bool = False
    """Continue the run in --out from its newest valid checkpoint."""
    device: Device = "auto"
    """Where to compute."""
    threads: int | None = None
    """CPU threads; as many as there are cores by default."""
    json: bool = False
    """Print one JSON document on stdout instead of tables."""
    quiet: bool = False
    """No progress on stderr."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast to train, and what to keep."""

    steps: int = 20_000
    """Updates."""
    batch: int = 128
    """Examples per update."""
    rate: float = 1e-3
    """Peak learning rate (AdamW)."""
    warmup: int = 100
    """Updates of linear warm-up."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    beta2: float = 0.99
    """AdamW's second beta."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones that are measured and sampled."""
    clip: float | None = 1.0
    """Largest gradient norm of the loss in nats per dimension."""
    accumulation: int = 1
    """Parts into which a batch is split to save memory."""
    bf16: bool = False
    """Compute the network in bfloat16 (autocast); official figures are float32 all the same."""
    compile: bool = False
    """Compile the network (torch.compile)."""
    validate_every: int = 1000
    """Updates between validation bounds; 0 for none."""
    validate_calls: int = 8
    """Network calls per validation example."""
    save_every: int = 1000
    """Updates between checkpoints."""
    calls: int | None = 32
    """Network calls per test example at the end of the run; `None` for the full bound."""
    samples: int = 100
    """Samples drawn at the end of the run."""
    seed: int = 0
    """Every random number of the run is a function of it."""


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The forward process, and what the network's output means."""

    schedule: Literal["logsnr", "linear", "cosine", "harmonic"] = "logsnr"
    """Log-SNR linear in time, DDPM's betas, improved DDPM's cosine, or 1/(T-t+1)."""
    logsnr_max: float = 13.3
    """Log-SNR next to the data (schedule logsnr)."""
    logsnr_min: float = -5.0
    """Log-SNR next to the prior (schedule logsnr)."""
    latents: int = 1000
    """N, latents of the grid: T of a DDPM."""
    predict: Literal["epsilon", "x0", "velocity", "mean", "levels"] = "velocity"
    """What the network predicts."""
    variance: Literal["posterior", "transition", "between"] = "posterior"
    """Variance of the reverse steps: beta tilde, beta, or learned between them."""
    decoder: Literal["discretized", "mass", "density"] = "discretized"
    """p(x_0|x_1): normal mass of each bin, free masses (with levels), or a density."""
    edge: Literal["lose", "ratio", "following"] = "lose"
    """Variance of the decoder: lose(t_1), 1/snr(t_1), or beta tilde of the first pair."""
    clip_x0: float | None = None
    """Clip the predicted data to this size; part of the model."""
    objective: Literal["vlb", "simple", "mean", "hybrid"] = "vlb"
    """What is minimised."""
    focus: tuple[float, float] | None = None
    """Centre and width in log-SNR of the times that are drawn more often; the objective stays
    unbiased."""


@dataclass(frozen=True, kw_only=True)
class UNetShape:
    """A U-Net with the tensors of diffusers' UNet2DModel."""

    channels: int = 64
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Channels at each resolution, as multiples."""
    layers: int = 2
    """Residual blocks per resolution."""
    attention: tuple[int, ...] = (16, 8)
    """Heights at which attention is used."""
    head_dim: int | None = None
    """Channels of an attention head; one head by default."""
    dropout: float = 0.1
    """In every residual block."""
    drop_channels: bool = False
    """Drop whole channels instead of single values."""
    members: int = 1
    """Networks whose mean output is the prediction; each is trained on its part of a batch."""
    waves: int | None = None
    """With --predict levels: cosines that make up a level's logits; free logits by default."""
    augment: float = 0.0
    """Share of examples that are moved a little, and marked as such to the network."""
    fourier: tuple[int, ...] = (7, 8)
    """Fourier features of the input, exponents n of 2^n pi; empty for none."""
    positions: int = 0
    """Learned position channels appended to the input."""


@dataclass(frozen=True, kw_only=True)
class Options(Control, Training):
    """What every recipe has."""


@dataclass(frozen=True, kw_only=True)
class Digits(Options, Diffusion, UNetShape):
    """The 1,797 embedded handwritten digits, 8x8 with 17 grey levels: trains in two minutes."""

    threads: int | None = 1
    """CPU threads: images this small gain a third from two, and lose tenfold when another program
    wants one of the two cores."""
    validation: int = 100
    """Images held out of the training part to watch the bound."""
    samples: int = 64
    steps: int = 2000
    predict: Literal["epsilon", "x0", "velocity", "mean", "levels"] = "levels"
    decoder: Literal["discretized", "mass", "density"] = "mass"
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
    save_every: int = 1000


@dataclass(frozen=True, kw_only=True)
class SwissRoll(Options, Diffusion):
    """A Swiss roll in the plane, a finite Gaussian mixture: the entropy is known."""

    examples: int = 20_000
    """Training examples."""
    width: int = 128
    """Hidden width of the network."""
    depth: int = 3
    """Residual blocks."""
    steps: int = 8000
    batch: int = 512
    predict: Literal["epsilon", "x0", "velocity", "mean", "levels"] = "velocity"
    decoder: Literal["discretized", "mass", "density"] = "density"
    logsnr_max: float = 8.0
    logsnr_min: float = -6.0
    rate: float = 2e-3
    samples: int = 2000
    calls: int | None = 16


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
    decoder: Literal["discretized", "mass", "density"] = "density"
    logsnr_max: float = 10.0
    logsnr_min: float = -6.0
    samples: int = 1000


@dataclass(frozen=True, kw_only=True)
class Mnist(Options, Diffusion, UNetShape):
    """MNIST-format IDX files (plain or .gz), a file of images or the folder that holds them."""

    path: tyro.conf.Positional[Path]
    """File or folder."""
    multipliers: tuple[int, ...] = (1, 2)
    attention: tuple[int, ...] = (14,)
    channels: int = 32


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
    "images": Images,
    "vectors": Vectors,
    "mnist": Mnist,
    "cifar10": Cifar10,
}
_CONTROL = {f.name for f in dataclasses.fields(Control)}


def name_of(options: Options) -> str:
    """The recipe's name."""
    return next(name for name, kind in RECIPES.items() if type(options) is kind)


def stored(options: Options) -> dict[str, Any]:
    """JSON-able fields that define the run (no `Control`)."""
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in _CONTROL}
    return {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in values.items()}


def restored(name: str, values: dict[str, Any]) -> Options:
    """Options from what `stored` gave; unknown names are refused, absent ones take defaults.

    Raises:
        ValueError: the recipe or a field is unknown to this version.
    """
    if name not in RECIPES:
        raise ValueError(f"this version of nelbo has no recipe {name!r}: {', '.join(RECIPES)}")
    kind = RECIPES[name]
    known = {f.name: f for f in dataclasses.fields(kind)}
    extra = set(values) - set(known)
    if extra:
        raise ValueError(f"this version of nelbo does not know the options {sorted(extra)}")
    fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if "path" in fixed:
        fixed["path"] = Path(fixed["path"])
    return kind(**fixed)
