r"""What is done to both sides before they are compared.

Any channel T, applied to reals and fakes alike, can only lower the divergence: what is certified
after T holds for the pair before it. Levels and vectors are first put on the scale of a model,
which is invertible and changes nothing; then T acts, such as the forward process at one log-SNR,

    T(x) = sqrt(k) x + sqrt(l) e,   k = sigmoid(logsnr), l = sigmoid(-logsnr), e normal,

with fresh noise for every row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from nelbo.randomness import generator

Encode = Callable[[Tensor], Tensor]


class Channel(ABC):
    """A (random) map of rows, the same law on both sides."""

    name: str

    @abstractmethod
    def __call__(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        """(B, *shape) float32 -> (B, *shape') float32, row by row."""


class Declared(Channel):
    """A channel that both sides have passed already; it is only recorded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        return rows


class Noise(Channel):
    """The forward marginal of diffusion at one log-SNR."""

    def __init__(self, logsnr: float) -> None:
        self.logsnr = logsnr
        self.name = f"noise to log-SNR {logsnr:g}"

    def __call__(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        signal, noise = (1 / math.sqrt(1 + math.exp(s)) for s in (-self.logsnr, self.logsnr))
        return signal * rows + noise * torch.randn(rows.shape, generator=draws)


class Standard:
    """Each dimension to mean 0 and standard deviation 1 over the reals of FIT."""

    def of(self, fit: Tensor) -> Encode:
        """The encoding that these (n, *shape) reals set."""
        shift, scale = fit.double().mean(0), fit.double().std(0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return lambda rows: ((rows.double() - shift) / scale).float()


class View:
    """What a classifier sees of the rows of a part: encoded, and sent through the channel.

    Arguments:
        encode: stored rows -> float32, or `Standard` until FIT is known. channel: or None.
        seed: of the channel's noise.
    """

    def __init__(self, encode: Encode | Standard, channel: Channel | None, seed: int) -> None:
        self.encode, self.channel, self.seed = encode, channel, seed

    def fitted(self, fit: Tensor) -> View:
        """The same, once the reals of FIT are known."""
        encode = self.encode.of(fit) if isinstance(self.encode, Standard) else self.encode
        return View(encode, self.channel, self.seed)

    def __call__(self, rows: Tensor, *part: str | int) -> Tensor:
        assert not isinstance(self.encode, Standard), "the view needs the reals of FIT first"
        x = self.encode(rows).float()
        if self.channel is None:
            return x
        return self.channel(x, generator(self.seed, self.channel.name, *part))


def usual_scale(real: Tensor, levels: int | None) -> Encode:
    """Levels 0..levels-1 onto [-1, 1], float32; vectors as they are.

    Arguments:
        real: the reals. levels: None for 2 where they are all 0 or 1, and else 256.
    """
    if real.is_floating_point():
        return Tensor.float
    top = (levels or (2 if int(real.max()) <= 1 else 256)) - 1
    return lambda rows: rows.float() * (2 / top) - 1
