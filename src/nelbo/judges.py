r"""Candidate classifiers: each tells reals from fakes in its own way, and any of them is valid.

A certificate is true for every discriminator that was fixed before its pairs were opened; a better
one makes it larger. The optimal logit is log p/g. Which candidate comes near depends on the rows,
so several are fitted and one is chosen on the calibration part. Their logits belong to one row
each: batch statistics would tie the rows of a batch together, and have no place here.
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nelbo.errors import UsageError
from nelbo.fitting import Schedule, fit_networks
from nelbo.logistic import PRODUCTS, Features, Summaries, Textures, fit_logistic

FEW, MANY = 400, 4000
"""Rows of a side below which fits are short, and from which they are long."""
FLAT, WAVES = 4, 64
NONE = "none"
"""The name of the classifier that says nothing, where no other did better than chance."""


class Judge(ABC):
    """A way to fit a classifier."""

    name: str

    @abstractmethod
    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        """Fit on these rows, and return a module (B, *shape) -> (B,) logits of "real".

        Arguments:
            real, fake: (n, *shape) and (m, *shape) float32, n and m need not be equal: the logit
                is the one at equal shares.
            seed: the same seed gives the same logits.
        """


class Regression(Judge):
    """Logistic regression on coordinates, products and random Fourier features.

    Arguments:
        fourier: features at each width, fewer for few rows; 0 for none.
    """

    def __init__(self, fourier: int = 100) -> None:
        self.fourier = fourier
        self.name = f"logistic-fourier-{fourier}" if fourier else "logistic-quadratic"

    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        waves = min(self.fourier, math.ceil(min(len(real), len(fake)) / 6))
        return fit_logistic(lambda x: Features(x, waves, seed), real, fake, seed).eval()


class Texture(Judge):
    """Logistic regression on the laws of pixels and of their differences, for images."""

    name = "logistic-texture"

    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        return fit_logistic(Textures, real, fake, seed).eval()


class Summary(Judge):
    """Logistic regression on a few statistics of the whole row, for rows of many dimensions."""

    name = "logistic-summary"

    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        return fit_logistic(Summaries, real, fake, seed).eval()


class Perceptron(Judge):
    """A perceptron with two hidden layers, stopped early; the mean of a few.

    In up to four dimensions it reads waves of the row besides: smooth networks are slow to see
    fine structure, such as the width of a curve.

    Arguments:
        width: of both hidden layers. members: fits that are averaged.
    """

    def __init__(self, width: int = 128, members: int = 3) -> None:
        self.width, self.members = width, members
        self.name = f"mlp-2x{width}"

    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        dims = math.prod(real.shape[1:])
        make = _perceptron(dims, self.width)
        return fit_networks(make, real, fake, seed, _schedule(real, fake), self.members)


class Convolutional(Judge):
    """A small network of strided convolutions with GroupNorm, for images.

    Arguments:
        width: channels of the first layer. members: fits that are averaged.
    """

    def __init__(self, width: int = 32, members: int = 1) -> None:
        self.width, self.members = width, members
        self.name = f"conv-{width}"

    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        make = _convolutions(real.shape[1], min(real.shape[2:]), self.width)
        schedule = Schedule(steps=600, batch=64, patience=150, rate=1e-3)
        return fit_networks(make, real, fake, seed, schedule, self.members, per_channel=True)


class Fixed(Judge):
    """A classifier that is already there, such as the discriminator of a GAN; nothing is fitted.

    Arguments:
        network: (B, *shape) float32 -> (B,) or (B, 1) logits of "real", on the scale that `encode`
            gives the rows. It is called as it is: put it into evaluation mode.
        name: what certificates call it.
    """

    def __init__(self, network: nn.Module | Callable[[Tensor], Tensor], name: str = "") -> None:
        self.network = network if isinstance(network, nn.Module) else _Called(network)
        self.name = name or getattr(network, "__name__", type(network).__name__)

    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        # a module with running statistics would change while it is looked at
        return copy.deepcopy(self.network)


class _Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, rows: Tensor) -> Tensor:
        return self.function(rows)


def usual(shape: Sequence[int]) -> tuple[Judge, ...]:
    """The candidates for rows of a shape: images (C, H, W), or vectors, bits and levels (D,)."""
    if len(shape) == 3 and min(shape[1:]) >= 4:
        return Regression(0), Regression(100), Texture(), Convolutional()
    wide = (Summary(),) if math.prod(shape) > PRODUCTS else ()
    return Regression(0), Regression(100), Perceptron(), *wide


def candidates(
    given: Sequence[Judge | nn.Module | Callable[[Tensor], Tensor]] | None, shape: Sequence[int]
) -> tuple[Judge, ...]:
    """The judges to try: the usual ones, or those given, where modules are taken as they are."""
    if given is None:
        return usual(shape)
    if not given:
        raise UsageError("no judges: give at least one, or None for the usual ones")
    return tuple(judge if isinstance(judge, Judge) else Fixed(judge) for judge in given)


def fingerprint(network: nn.Module, logits: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of the weights; of some logits if it has none."""
    state = network.state_dict()
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode() + state[name].detach().cpu().contiguous().numpy().tobytes())
    if not state:
        total.update(logits.numpy().tobytes())
    return total.hexdigest()[:16]


def _schedule(real: Tensor, fake: Tensor) -> Schedule:
    rows = min(len(real), len(fake))
    if rows < FEW:
        return Schedule(steps=400, batch=64, patience=100)
    return Schedule() if rows < MANY else Schedule(steps=2500, batch=256)


class _Waves(nn.Module):
    """x and cos(w^T x + b), fixed w of length 1/2 to 4 per standard deviation."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, dims: int, waves: int) -> None:
        super().__init__()
        lengths = 0.5 * 8 ** torch.rand(waves)
        self.register_buffer("frequencies", torch.randn(dims, waves) * lengths)
        self.register_buffer("phases", 2 * math.pi * torch.rand(waves))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.cos(x @ self.frequencies + self.phases)], 1)


def _perceptron(dims: int, width: int) -> Callable[[], nn.Module]:
    waves = WAVES if dims <= FLAT else 0

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            _Waves(dims, waves),
            nn.Linear(dims + waves, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )

    return make


def _convolutions(channels: int, side: int, width: int) -> Callable[[], nn.Module]:
    halvings = max(1, min(3, int(math.log2(side)) - 1))

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        now = channels
        for layer in range(halvings):
            then = width * 2 ** min(layer, 1)
            layers += [nn.Conv2d(now, then, 3, stride=2, padding=1), nn.GroupNorm(8, then)]
            layers += [nn.SiLU()]
            now = then
        layers += [nn.Conv2d(now, now, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * now, 1))

    return make
