"""What every network shares: times, their embedding, and wrappers around a whole network.

A network is any module with the call `network(x_t, t, cond=None) -> Tensor`. It knows nothing of
noise: x_t is an array, t a number per example. The scale of t is the network's own affair; the
model's time lives in [0, 1], and `Timed` carries it over to a network that was trained on another
scale, such as the integer timesteps 0..T-1 of a DDPM (Ho et al., 2020).

Two wrappers widen the input. `Fourier` appends sin(2^n pi x), cos(2^n pi x): a smooth network sees
differences of one grey level poorly, and the likelihood is decided there (Kingma et al., 2021).
`Positions` appends learned channels that tell a convolution where it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused
from nelbo.randomness import by_row


def per_example(t: Tensor | float, x_t: Tensor) -> Tensor:
    """One time for each example, on the device of x_t.

    Arguments:
        t: () or (B,), any real dtype, which is kept.
        x_t: (B, ...).

    Returns:
        (B,).

    Raises:
        InputRefused: t is neither () nor (B,).
    """
    t = torch.as_tensor(t, device=x_t.device)
    if t.shape not in ((), (len(x_t),)):
        raise InputRefused(
            f"t has shape {tuple(t.shape)}: pass one time, shape (), or one per example, "
            f"shape ({len(x_t)},)"
        )
    return t.expand(len(x_t))


def without_condition(cond: Tensor | None, network: nn.Module) -> None:
    """Refuse a condition that the network would have to ignore.

    Raises:
        InputRefused: cond is not None.
    """
    if cond is not None:
        raise InputRefused(f"{type(network).__name__} takes no condition: pass cond=None")


def sinusoid(
    t: Tensor, width: int, *, cos_first: bool = True, freq_shift: float = 0, period: float = 10_000
) -> Tensor:
    """Sinusoidal embedding of a timestep, always computed in float32.

    sin(t w_k), cos(t w_k),   w_k = period^(-k / (h - freq_shift)),   k = 0..h-1, h = width // 2

    Arguments:
        t: (B,), in units of timesteps; fractions are allowed.
        width: the number of features; an odd one ends in a zero.
        cos_first: the cosines come before the sines.
        freq_shift: 1 makes the last frequency exactly 1/period, as DDPM has it.
        period: the slowest frequency is about its inverse.

    Returns:
        (B, width), float32.

    References:
        Vaswani et al. (2017), section 3.5; Ho et al. (2020), appendix B.
    """
    half = width // 2
    # Published checkpoints were trained on frequencies rounded to float32 in this order; at
    # t = 999 another rounding moves the embedding by 1e-4.
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) * -math.log(period)
    angles = t.float()[:, None] * torch.exp(exponents / (half - freq_shift))
    halves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return nn.functional.pad(torch.cat(halves, dim=1), (0, width % 2))


class TimeFeatures(nn.Module):
    """A learned embedding of the model's time: two linear layers on t and its harmonics.

    SiLU(W_2 SiLU(W_1 f)),   f = (t, sin(2^k pi t), cos(2^k pi t)),   k = 0..harmonics-1

    Arguments:
        width: the number of features that come out.
        harmonics: the fastest one turns 2^(harmonics - 2) times while t goes from 0 to 1.
    """

    def __init__(self, width: int, harmonics: int = 6) -> None:
        super().__init__()
        self.harmonics = harmonics
        self.linear_1 = nn.Linear(1 + 2 * harmonics, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times of shape (B,) in [0, 1] as (B, width)."""
        t = t[:, None] if t.is_floating_point() else t[:, None].float()
        octaves = torch.arange(self.harmonics, dtype=t.dtype, device=t.device)
        angles = t * (math.pi * 2.0**octaves)
        features = torch.cat((t, angles.sin(), angles.cos()), dim=1).to(self.linear_1.weight.dtype)
        silu = nn.functional.silu
        return silu(self.linear_2(silu(self.linear_1(features))))


class Timed(nn.Module):
    """Carries the model's time in [0, 1] to the scale of a network: network(x_t, scale t + shift).

    A DDPM whose latent i = 1..T has the time i/T and the timestep i - 1 is Timed(unet, T, -1).

    Arguments:
        network: the module to call.
        scale: timesteps per unit of time.
        shift: the timestep of t = 0.
    """

    def __init__(self, network: nn.Module, scale: float, shift: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.scale = scale
        self.shift = shift

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Call the network at scale t + shift, computed in float64 and passed on in float32."""
        steps = torch.as_tensor(t, device=x_t.device).double() * self.scale + self.shift
        out: Tensor = self.network(x_t, steps.float(), cond)
        return out


class Fourier(nn.Module):
    """Appends Fourier features of the input: x, then sin(2^n pi x) and cos(2^n pi x) for each n.

    Arguments:
        network: built with `in_channels * multiplier` input channels, where multiplier is
            1 + 2 len(exponents).
        exponents: the n; on [-1, 1] with 256 levels n = 7 has a period of two levels.

    References:
        Kingma et al. (2021), Variational diffusion models, appendix C.
    """

    def __init__(self, network: nn.Module, exponents: Sequence[float] = (7, 8)) -> None:
        super().__init__()
        self.network = network
        self.exponents = tuple(exponents)

    @property
    def multiplier(self) -> int:
        """Channels that the wrapped network sees for each channel of the data."""
        return 1 + 2 * len(self.exponents)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Call the network on (B, multiplier C, ...), widened along dimension 1."""
        angles = [2.0**n * math.pi * x_t for n in self.exponents]
        features = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        out: Tensor = self.network(torch.cat((x_t, *features), dim=1), t, cond)
        return out


class Marked(nn.Module):
    """Gives a class-conditional network the mark 0 wherever no condition is passed.

    Arguments:
        network: takes cond (B,) int64; see `nelbo.data.augmentation`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Call the network with cond, or with zeros."""
        if cond is None:
            cond = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
        out: Tensor = self.network(x_t, t, cond)
        return out


class Positions(nn.Module):
    """Appends learned channels, the same for every example, that depend on the position alone.

    Arguments:
        network: built with `in_channels + channels` input channels.
        shape: (H, W) of the data.
        channels: how many channels to append; they start as standard normal draws over ten.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.network = network
        self.positions = nn.Parameter(0.1 * torch.randn(1, channels, *shape))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Call the network on (B, C + channels, H, W).

        Raises:
            InputRefused: x_t has another height or width than the positions.
        """
        if x_t.shape[2:] != self.positions.shape[2:]:
            raise InputRefused(
                f"the network has learned positions for {_by(self.positions)} images, "
                f"this input is {_by(x_t)}: resize the input, or build another network"
            )
        places = self.positions.to(x_t.dtype).expand(len(x_t), -1, -1, -1)
        out: Tensor = self.network(torch.cat((x_t, places), dim=1), t, cond)
        return out


def _by(images: Tensor) -> str:
    return "x".join(str(size) for size in images.shape[2:])


class Dropout(nn.Module):
    """x_i k_i/(1 − p) with k_i ~ Bernoulli(1 − p) in training; x otherwise.

    Unlike torch's, what is dropped of a row does not depend on how a batch is cut into pieces.

    Arguments:
        p: probability, below one. channels: drop whole channels of feature maps.
    """

    def __init__(self, p: float, channels: bool = False) -> None:
        super().__init__()
        self.p = p
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same."""
        if not self.training or self.p == 0:
            return x
        shape = (x.shape[1], *[1] * (x.dim() - 2)) if self.channels else x.shape[1:]

        def kept(rows: int, stream: torch.Generator | None) -> Tensor:
            empty = torch.empty(rows, *shape, dtype=torch.bool, device=x.device)
            return empty.bernoulli_(1 - self.p, generator=stream)

        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return x * by_row(len(x), kept, x.device) * scale

    def extra_repr(self) -> str:
        """For printing."""
        return f"p={self.p}, channels={self.channels}"
