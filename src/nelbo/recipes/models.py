"""From options to a reverse process: schedule, network, parameterisation, decoder, objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nelbo import continuous, objectives
from nelbo.data.base import Dataset
from nelbo.data.mixture import GaussianMixture
from nelbo.data.part import pieces
from nelbo.decoders import (
    Density,
    Discretized,
    Edge,
    EdgeFixed,
    Following,
    LevelMass,
    Lose,
    Ratio,
)
from nelbo.errors import UsageError
from nelbo.learned_schedule import LearnedLogSNR
from nelbo.networks.heads import Ensemble, LevelHead, channel_dropout
from nelbo.networks.informed import Informed
from nelbo.networks.layers import Fourier, Marked, Positions, Timed
from nelbo.networks.mlp import MLP
from nelbo.networks.unet import UNet, zero_last
from nelbo.parameterizations import X0, Epsilon, GaussianParameterization, Levels, Mean, Velocity
from nelbo.processes.gaussian import Gaussian
from nelbo.recipes.combinations import focused
from nelbo.recipes.groups import Diffusion, Noise, UNetShape
from nelbo.reverse import Decoder, Reverse
from nelbo.schedules import Cosine, Harmonic, Learned, Linear, LogSNRLinear, Schedule, Stepped
from nelbo.timesampling import SecondMoment
from nelbo.variances import Between, Free, Posterior, Transition, Variance


def schedule_of(options: Noise) -> Schedule:
    """The schedule that the options name.

    Raises:
        UsageError: betas that cannot be learned.
    """
    schedule = _named(options)
    if options.schedule == "learned":
        assert isinstance(schedule, LogSNRLinear)
        return LearnedLogSNR(schedule, getattr(options, "decoder", "") in ("density", "fixed"))
    if not getattr(options, "learn_betas", False):
        return schedule
    if not isinstance(schedule, Stepped) or options.schedule == "harmonic" or schedule.steps < 2:
        raise UsageError(
            "--learn-betas needs a chain of two steps or more whose last beta is below 1: take "
            "--schedule linear or cosine"
        )
    return Learned(schedule)


def _named(options: Noise) -> Schedule:
    stepped: dict[str, type[Linear] | type[Cosine] | type[Harmonic]] = {
        "linear": Linear,
        "cosine": Cosine,
        "harmonic": Harmonic,
    }
    if options.schedule in stepped:
        return stepped[options.schedule](options.latents)
    return LogSNRLinear(options.logsnr_max, options.logsnr_min)


def variance_of(options: Diffusion) -> Variance:
    """The variance of the reverse steps."""
    kinds: dict[str, type[Variance]] = {
        "posterior": Posterior,
        "transition": Transition,
        "between": Between,
        "free": Free,
    }
    return kinds[options.variance]()


def parameterization_of(
    options: Diffusion, times: Tensor, levels: int | None
) -> GaussianParameterization:
    """What the network predicts."""
    variance = variance_of(options)
    if options.predict == "levels":
        if levels is None:
            raise UsageError("--predict levels needs data with levels; these are real vectors")
        if variance.learned or options.clip_x0 is not None:
            raise UsageError("--predict levels takes a fixed variance and no --clip-x0")
        return Levels(levels, variance)
    if options.predict == "mean":
        return Mean(times, variance, options.clip_x0)
    kinds: dict[str, type[Epsilon] | type[X0] | type[Velocity]] = {
        "epsilon": Epsilon,
        "x0": X0,
        "velocity": Velocity,
    }
    return kinds[options.predict](variance, options.clip_x0)


def edge_of(options: Diffusion, times: Tensor) -> Edge:
    """The decoder's variance."""
    if options.edge == "following":
        if len(times) < 2:
            raise UsageError("--edge following needs two latents; take --edge lose")
        return Following(times[1])
    return Ratio() if options.edge == "ratio" else Lose()


def decoder_of(options: Diffusion, times: Tensor, levels: int | None) -> Decoder:
    """p(x_0|x_1) on the data's own space."""
    if (levels is None) != (options.decoder in ("density", "fixed")):
        kind = "real vectors" if levels is None else f"data with {levels} levels"
        fit = "density" if levels is None else "discretized"
        raise UsageError(f"--decoder {options.decoder} does not fit {kind}: take {fit}")
    if options.decoder == "mass" and options.predict != "levels":
        raise UsageError("--decoder mass reads the masses of --predict levels: take discretized")
    if options.decoder == "fixed":
        return EdgeFixed()
    edge = edge_of(options, times)
    if levels is None:
        return Density(edge)
    return LevelMass() if options.decoder == "mass" else Discretized(levels, edge)


def objective_of(options: Diffusion, times: Tensor) -> objectives.Objective:
    """What is minimised."""
    kinds: dict[str, type[objectives.Objective]] = {
        "vlb": objectives.Vlb,
        "simple": objectives.Simple,
        "mean": objectives.Mean,
        "hybrid": objectives.Hybrid,
        "continuous": continuous.Continuous,
    }
    probabilities = focus_of(options, times)
    if options.objective == "continuous" and probabilities is not None:
        share = continuous.DECODER
        pieces = probabilities[1:]
        probabilities = torch.cat([pieces.new_full((1,), share), (1 - share) * pieces])
        probabilities[1:] /= pieces.sum()
    return drawn(options, kinds[options.objective](times, probabilities))


def drawn(options: Noise, objective: objectives.Objective) -> objectives.Objective:
    """The objective, drawing its times as --times says."""
    objective.independent = options.times == "independent"
    if options.times == "second-moment":
        objective.history = SecondMoment(len(objective.times))
    return objective


def focus_of(options: Noise, times: Tensor) -> Tensor | None:
    """(N,) probabilities of the terms: a normal bump over log-SNR with 20 % uniform; or None."""
    if options.focus is None or not focused(options):
        return None
    centre, width = options.focus
    logsnr = _named(options).logsnr(times)
    bump = torch.exp(-0.5 * ((logsnr - centre) / width) ** 2)
    return 0.8 * bump / bump.sum() + 0.2 / len(times)


def timed(network: nn.Module, schedule: Schedule) -> nn.Module:
    """Time on the scale 0..T−1 of a chain, 0..1000 of a continuous schedule.

    Under a learned log-SNR the network is told the log-SNR itself, on the scale that time had when
    training began.
    """
    if isinstance(schedule, LearnedLogSNR):
        return informed(network, schedule, 1000)
    if isinstance(schedule, Stepped):
        return Timed(network, schedule.steps, -1)
    return Timed(network, 1000)


def informed(network: nn.Module, schedule: LearnedLogSNR, scale: float) -> nn.Module:
    """Told the log-SNR, from 0 at λ_max to `scale` at λ_min, both as they are now."""
    high, low = (float(end.detach()) for end in schedule.ends())
    return Informed(network, schedule, high, low, scale)


def unet(options: UNetShape, shape: tuple[int, ...], out: int, timesteps: Schedule) -> nn.Module:
    """A U-Net for images (C, H, W) under its input wrappers, or an ensemble of them.

    Raises:
        UsageError: the size does not fit the number of resolutions.
    """
    _, height, width = shape
    factor = 2 ** (len(options.multipliers) - 1)
    if height % factor or width % factor:
        raise UsageError(
            f"{height}x{width} images do not fit {len(options.multipliers)} resolutions: both "
            f"sides must be multiples of {factor}. Give fewer --multipliers, or --size"
        )
    members = [_member(options, shape, out) for _ in range(options.members)]
    if isinstance(timesteps, LearnedLogSNR):
        network = members[0] if len(members) == 1 else Ensemble(members)
        return timed(network, timesteps)  # a learned schedule must see the whole batch
    members = [timed(member, timesteps) for member in members]
    return members[0] if len(members) == 1 else Ensemble(members)


def _member(options: UNetShape, shape: tuple[int, ...], out: int) -> nn.Module:
    channels, height, width = shape
    attend = [height // 2**i in options.attention for i in range(len(options.multipliers))]
    network: nn.Module = UNet(
        sample_size=height if height == width else (height, width),
        in_channels=channels * (1 + 2 * len(options.fourier)) + options.positions,
        out_channels=out,
        block_out_channels=tuple(options.channels * m for m in options.multipliers),
        layers_per_block=options.layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attend),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)),
        dropout=options.dropout,
        norm_num_groups=_groups(options.channels),
        attention_head_dim=options.head_dim,
        num_class_embeds=2 if options.augment else None,
        norm_eps=1e-6,
    )
    zero_last(network)
    if options.drop_channels:
        channel_dropout(network)
    if options.augment:
        network = Marked(network)
    if options.positions:
        network = Positions(network, (height, width), options.positions)
    return Fourier(network, options.fourier) if options.fourier else network


def level_head(network: nn.Module, dataset: Dataset, waves: int) -> LevelHead:
    """A head with smooth logits whose bias starts at the training frequencies of each pixel.

    The counts are mixed with 5 examples of the frequencies of all pixels together, and these with
    a tenth of an example of every level, so that none is zero.
    """
    levels = dataset.levels
    assert levels is not None
    head = LevelHead(network, dataset.shape(), levels, waves)
    counts = torch.zeros(dataset.shape()[0], levels, *dataset.shape()[1:], dtype=torch.float64)
    for rows in pieces(dataset.train):
        counts += torch.stack([(rows == j).sum(0) for j in range(levels)], 1)
    overall = counts.mean((0, 2, 3), keepdim=True) + 0.1
    head.start_at((counts + 5 * overall / overall.sum()) / (len(dataset.train) + 5))
    return head


def _groups(channels: int) -> int:
    """The largest divisor of the width up to 32 that leaves at least 4 channels in a group."""
    return max(g for g in range(1, 33) if channels % g == 0 and (channels // g >= 4 or g == 1))


def assemble(
    options: Diffusion, levels: int | None, network: nn.Module, times: Tensor, schedule: Schedule
) -> Reverse:
    """Put the parts together."""
    return Reverse(
        Gaussian(schedule),
        network,
        parameterization_of(options, times, levels),
        decoder_of(options, times, levels),
    )


def mlp(
    dims: int, width: int, depth: int, out: int, schedule: Schedule | None = None
) -> nn.Module:
    """A residual perceptron for vectors; time stays in [0, 1], as does a learned log-SNR."""
    network = MLP(dims, width=width, depth=depth, out=out)
    return informed(network, schedule, 1) if isinstance(schedule, LearnedLogSNR) else network


class ExactDenoiser(nn.Module):
    """E[x_0|x_t] of a Gaussian mixture: the network that no network can beat.

    Arguments:
        mixture: on the model's scale. schedule: that of the process.
    """

    def __init__(self, mixture: GaussianMixture, schedule: Schedule) -> None:
        super().__init__()
        self.mixture = mixture
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B, D), in the dtype of x_t."""
        keep, lose = self.schedule.keep(t), self.schedule.lose(t)
        return self.mixture.denoise(x_t.double(), keep, lose).to(x_t.dtype)


def exact_model(options: Diffusion, mixture: GaussianMixture, times: Tensor) -> Reverse:
    """The reverse process with the exact denoiser, same grid, variance and decoder."""
    schedule = schedule_of(options)
    network = ExactDenoiser(mixture, schedule)
    variance = variance_of(options)
    parameterization = X0(Posterior() if variance.learned else variance)
    return Reverse(Gaussian(schedule), network, parameterization, decoder_of(options, times, None))
