"""Groups of options that recipes are made of: control, training, noise, process, network.

The text under each field is its help. Nothing heavy is imported here. What describes the run is
stored in its recipe.json; what describes only this start of it (`Control`, `Pace`) is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    cache: Literal["auto", "ram", "none"] = "auto"
    """Hold the data of a path in memory (ram), read them batch by batch (none), or what fits."""
    ahead: int = 2
    """Batches that a thread prepares before they are needed; 0 for no thread."""
    dist_timeout: float = 600.0
    """Under torchrun: seconds to wait for a rank that does not answer."""
    shard: bool = False
    """Under torchrun: deal weights, gradients and moments to the ranks, 1/W each (FSDP2)."""
    json: bool = False
    """Print one JSON document on stdout instead of tables."""
    quiet: bool = False
    """No progress on stderr."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How this start computes a network; not part of what the run is, but for rounding."""

    kernels: Literal["auto", "plain", "triton", "native"] = "auto"
    """How a U-Net is computed: auto takes triton on a GPU and native, C, elsewhere, if it runs."""
    graphs: Literal["auto", "update", "network", "none"] = "auto"
    """On a GPU, what is recorded once as a CUDA graph and replayed: a whole update, the compiled
    network; auto, with --compile: the update where that can be, else the network."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast to train, and what to keep: of either family."""

    steps: int = 20_000
    """Updates."""
    batch: int = 128
    """Examples per update."""
    rate: float = 1e-3
    """Peak learning rate."""
    warmup: int = 100
    """Updates of linear warm-up."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    validate_every: int = 1000
    """Updates between looks at the validation part; 0 for none."""
    save_every: int = 1000
    """Updates between checkpoints."""
    keep: int = 1
    """Newest checkpoints that stay, besides the best one; evaluate --against compares them."""
    samples: int = 100
    """Samples drawn at the end of the run."""
    seed: int = 0
    """Every random number of the run is a function of it."""


@dataclass(frozen=True, kw_only=True)
class Start(Control, Course):
    """What every run has, of either family."""


@dataclass(frozen=True, kw_only=True)
class Training(Course):
    """How a diffusion model is trained and measured."""

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
    validate_calls: int = 8
    """Network calls per validation example."""
    calls: int | None = 32
    """Network calls per test example at the end of the run; `None` for the full bound."""


@dataclass(frozen=True, kw_only=True)
class Playing(Course):
    """How a generator and a discriminator are trained against each other."""

    loss: Literal["non-saturating", "relativistic", "minimax", "hinge"] = "non-saturating"
    """What the players minimise; relativistic (pairs of a real and a fake) is the robust one where
    modes get lost, minimax the theory."""
    r1: float = 1.0
    """Gamma of the gradient penalty at reals, gamma/2 |grad D|^2; 0 for none."""
    r2: float = 0.0
    """Gamma of the gradient penalty at fakes."""
    relax: float = 1.0
    """Part of --r1 and --r2 that is left at the last update; they fall by a half cosine."""
    latent: int = 64
    """Dimensions of the noise that the generator turns into data."""
    critic_moves: int = 1
    """Updates of the discriminator, each on a batch of its own, before one of the generator."""
    half_life: float = 10_000.0
    """Of the generator's averaged weights, in examples; those are what is sampled. 0: the last."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Adam's two betas, of both players."""
    clip: float | None = None
    """Largest gradient norm of a player's loss per dimension; none by default."""
    compare: bool = True
    """At the end, certify the samples against held-out data, as nelbo compare does."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The times of the forward process, and how training draws them."""

    schedule: Literal["logsnr", "linear", "cosine", "harmonic", "learned"] = "logsnr"
    """Log-SNR linear in time, DDPM's betas, improved DDPM's cosine, 1/(T-t+1), or log-SNR learned
    (with --objective continuous)."""
    logsnr_max: float = 13.3
    """Log-SNR next to the data (schedule logsnr; where learned starts)."""
    logsnr_min: float = -5.0
    """Log-SNR next to the prior (schedule logsnr; where learned starts)."""
    latents: int = 1000
    """N, latents of the grid: T of a DDPM."""
    focus: tuple[float, float] | None = None
    """Centre and width in log-SNR of the times that are drawn more often; the objective stays
    unbiased."""
    times: Literal["low-discrepancy", "independent", "second-moment"] = "low-discrepancy"
    """How a batch draws its times: evenly spread, each by itself, or evenly spread under
    probabilities that follow the last ten terms of every step (improved DDPM; unbiased)."""


@dataclass(frozen=True, kw_only=True)
class Diffusion(Noise):
    """Gaussian diffusion, and what the network's output means."""

    predict: Literal["epsilon", "x0", "velocity", "mean", "levels"] = "velocity"
    """What the network predicts."""
    learn_betas: bool = False
    """Learn all betas of a chain but the first (not of the harmonic one, which erases all)."""
    variance: Literal["posterior", "transition", "between", "free"] = "posterior"
    """Variance of the reverse steps: beta tilde, beta, learned between them, or free."""
    decoder: Literal["discretized", "mass", "density", "fixed"] = "discretized"
    """p(x_0|x_1): normal mass of each bin, free masses (with levels), a density, or the fixed
    step of the forward process (densities)."""
    edge: Literal["lose", "ratio", "following"] = "lose"
    """Variance of the decoder: lose(t_1), 1/snr(t_1), or beta tilde of the first pair."""
    clip_x0: float | None = None
    """Clip the predicted data to this size; part of the model."""
    objective: Literal["vlb", "simple", "mean", "hybrid", "continuous"] = "vlb"
    """What is minimised: the bound, DDPM's L_simple, the error of the mean, improved DDPM's
    L_hybrid, or the bound of infinitely many latents (schedule logsnr or learned)."""


@dataclass(frozen=True, kw_only=True)
class BitDiffusion(Noise):
    """Bernoulli diffusion of bits, and what the network's output means."""

    stationary: float | Literal["data"] = 0.5
    """Pi, the rate of ones of pure noise; data: that of the training part."""
    predict: Literal["logits", "context", "flip"] = "logits"
    """The network gives P(x_0=1|x_t), what the other bits say of it, or the next step's flips."""
    decoder: Literal["bernoulli", "fixed"] = "bernoulli"
    """p(x_0|x_1): read off the network, or the fixed step of the forward process."""


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
class Perceptrons:
    """Players of vectors."""

    width: int = 128
    """Hidden width of both networks."""
    depth: int = 4
    """Hidden layers of the generator."""
    critic_depth: int = 3
    """Hidden layers of the discriminator."""
    directions: int = 64
    """Random directions along which the discriminator also sees sines and cosines; 0 for none."""
    finest: float = 64.0
    """Largest frequency of these, in radians per standard deviation of the data."""


@dataclass(frozen=True, kw_only=True)
class Pyramids:
    """Players of images."""

    channels: int = 32
    """Channels of both networks at full size; twice as many at half the size, up to four times."""
    augment: float = 0.0
    """Probability of each change (shift, cut, brightness) that the discriminator sees, of reals
    and fakes alike."""


@dataclass(frozen=True, kw_only=True)
class RingData:
    """Gaussians on a circle."""

    examples: int = 20_000
    """Training examples."""
    modes: int = 8
    """Gaussians."""
    radius: float = 1.0
    """Of the circle."""
    std: float = 0.01
    """Standard deviation of each Gaussian."""


@dataclass(frozen=True, kw_only=True)
class GridData:
    """Gaussians on a square lattice."""

    examples: int = 20_000
    """Training examples."""
    side: int = 5
    """Gaussians per side."""
    spacing: float = 2.0
    """Distance of neighbours."""
    std: float = 0.05
    """Standard deviation of each Gaussian."""


@dataclass(frozen=True, kw_only=True)
class GaussianData:
    """One Gaussian with correlated dimensions."""

    examples: int = 20_000
    """Training examples."""


@dataclass(frozen=True, kw_only=True)
class RollData:
    """A Swiss roll."""

    examples: int = 20_000
    """Training examples."""


@dataclass(frozen=True, kw_only=True)
class Options(Start, Pace, Training):
    """What every recipe of a diffusion model has."""


@dataclass(frozen=True, kw_only=True)
class GameOptions(Start, Playing):
    """What every recipe of a game has."""
