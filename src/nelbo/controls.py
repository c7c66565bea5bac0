r"""Control variates for the terms of the bound: cheap stand-ins that fluctuate alike.

A term of the bound fluctuates with the noise in x_t and differs between examples. A stand-in that
needs no network takes its share of both away. For Gaussian diffusion it is the error of a linear
denoiser. In an orthonormal basis with coordinates c of x_0 and η of ε, and with weights W,

    G_i = ½ (snr_s − snr_t) ‖(1 − W) c − σ W η‖²,                       σ² = 1/snr_t,
    E[G_i|x_0] = ½ (snr_s − snr_t) Σ_j [(1 − W_j)² c_j² + σ² W_j²],

whatever W is, as long as it does not depend on ε. G − E[G|x_0] has mean zero, so that it may be
subtracted from a term with any factor.

`Wiener`     principal axes of the training data, W = Λ/(Λ + σ²): were the data Gaussian and the
             network exact, G_i would be the term itself.
`Shrinkage`  block cosine transforms of an image, W = c²/(c² + σ²): the best weights for this
             very image, E[G|x_0] = ½ (snr_s − snr_t) Σ_j c_j² σ²/(c_j² + σ²). It knows where an
             image is flat and where it is textured, which no covariance does.

References:
    Wiener 1949 (the linear minimum-mean-square-error filter); Donoho, Johnstone 1994 (ideal
    adaptation with an oracle); Hammersley, Handscomb 1964, ch. 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nelbo.data.transforms import colors, cosines
from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian

EXACT_DIMS = 512
"""Up to so many dimensions coordinates are computed in float64; above in float32, whose rounding
(1e-6 of a term) is far below any Monte-Carlo error."""


class Control(ABC):
    """A stand-in for the pair terms, computed without the network."""

    @abstractmethod
    def expected(self, x_0: Tensor, times: Tensor) -> Tensor:
        """E[G_i|x_0] (B, N−1) float64, nats, for all pairs of the grid."""

    @abstractmethod
    def fluctuation(self, x_0: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """G − E[G|x_0] (B,) float64, nats, at x_t ~ q(x_t|x_0), for the pair s < t, () or (B,)."""


class Linear(Control, ABC):
    """The error of a linear denoiser in an orthonormal basis.

    Arguments:
        process: the Gaussian process that drew x_t.
    """

    def __init__(self, process: Gaussian) -> None:
        self.process = process

    @abstractmethod
    def coordinates(self, x: Tensor) -> Tensor:
        """(B, D) float64 coordinates of x (B, *shape) in the basis."""

    @abstractmethod
    def centred(self, x_0: Tensor) -> Tensor:
        """c (B, D): the coordinates of x_0 about the centre of the denoiser."""

    @abstractmethod
    def left(self, c: Tensor, snr: Tensor) -> Tensor:
        """1 − W, broadcastable to c (B, D); snr () or (B, 1)."""

    def fluctuation(self, x_0: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        schedule = self.process.schedule
        x, noisy = x_0.double(), x_t.double()
        keep, lose = along(schedule.keep(t).sqrt(), x), along(schedule.lose(t).sqrt(), x)
        eta, c = self.coordinates((noisy - keep * x) / lose), self.centred(x_0)
        snr = along(schedule.logsnr(t).exp(), c)
        left = self.left(c, snr)
        # σ W = (1 − (1 − W))/√snr; where snr is 0, W is 0 like snr
        still = left * c
        passed = torch.where(snr > 0, (1 - left) / snr.sqrt(), torch.zeros_like(left))
        moved = 0.5 * ((still - passed * eta) ** 2 - still**2 - passed**2).sum(1)
        out: Tensor = moved * _drop(schedule.logsnr(s), schedule.logsnr(t)).to(x.device)
        return out


class Wiener(Linear):
    """The error of the best linear denoiser of the data.

    Arguments:
        process: the Gaussian process that drew x_t.
        mean: (D,) and covariance (D, D) of the data on the model's scale; see `of`.
    """

    def __init__(self, process: Gaussian, mean: Tensor, covariance: Tensor) -> None:
        super().__init__(process)
        self.mean = mean.double()
        exact = len(mean) <= EXACT_DIMS
        spectrum, self.axes = torch.linalg.eigh(covariance.double() if exact else covariance)
        # rounding can leave the eigenvalues of constant dimensions slightly negative
        self.spectrum = spectrum.double().clamp(min=0)

    @classmethod
    def of(cls, process: Gaussian, x_0: Tensor) -> Wiener:
        """Fit mean and covariance to training examples (n, *shape), n ≥ 2."""
        rows = x_0.flatten(1)
        mean = rows.mean(0, dtype=torch.float64)
        exact = rows.shape[1] <= EXACT_DIMS
        left = rows.double() - mean if exact else rows - mean.to(rows.dtype)
        covariance = left.T @ left / (len(rows) - 1)
        return cls(process, mean, covariance.reshape(rows.shape[1], -1))

    def coordinates(self, x: Tensor) -> Tensor:
        axes = self.axes.to(x.device)
        out: Tensor = (x.flatten(1).to(axes.dtype) @ axes).double()
        return out

    def centred(self, x_0: Tensor) -> Tensor:
        return self.coordinates(x_0.flatten(1).double() - self.mean.to(x_0.device))

    def left(self, c: Tensor, snr: Tensor) -> Tensor:
        out: Tensor = 1 / (1 + self.spectrum.to(c.device) * snr)
        return out

    def expected(self, x_0: Tensor, times: Tensor) -> Tensor:
        logsnr = self.process.schedule.logsnr(times).to(x_0.device)
        snr = logsnr[1:].exp()
        spectrum = self.spectrum.to(x_0.device)[:, None]
        left = 1 / (1 + spectrum * snr)
        energy = self.centred(x_0) ** 2 @ left**2 + (left**2 * spectrum**2 * snr).sum(0)
        terms: Tensor = 0.5 * _drop(logsnr[:-1], logsnr[1:]) * energy
        return terms


class Shrinkage(Linear):
    """The error of the best diagonal denoiser of each image in block cosine transforms.

    Arguments:
        process: the Gaussian process that drew x_t.
        shape: (C, H, W) of an image; three channels are turned to luma and two differences.
        block: side of a block, a divisor of H and W.
    """

    KNOTS = 65
    """Noise levels at which the expectation is computed; between them its logarithm is
    interpolated, to .3 %, which is enough for a stand-in (its fluctuation is exact)."""

    def __init__(self, process: Gaussian, shape: tuple[int, ...], block: int) -> None:
        super().__init__(process)
        channels, height, width = shape
        if height % block or width % block:
            raise ValueError(f"blocks of {block} do not tile images of {height}x{width}")
        self.block = block
        self.shape = shape
        self.cosines = cosines(block)
        self.colors = colors(channels)

    def coordinates(self, x: Tensor) -> Tensor:
        channels, height, width = self.shape
        b, waves = self.block, self.cosines.to(x.device)
        turned = torch.einsum("dc,nchw->ndhw", self.colors.to(x.device), x.double())
        tiles = turned.reshape(len(x), channels, height // b, b, width // b, b)
        out = torch.einsum("pi,ncaibj,qj->ncapbq", waves, tiles, waves)
        return out.flatten(1)

    def centred(self, x_0: Tensor) -> Tensor:
        return self.coordinates(x_0)

    def left(self, c: Tensor, snr: Tensor) -> Tensor:
        out: Tensor = 1 / (1 + c**2 * snr)
        return out

    def expected(self, x_0: Tensor, times: Tensor) -> Tensor:
        logsnr = self.process.schedule.logsnr(times).to(x_0.device)
        finite = logsnr[1:].clamp(min=-40.0)
        knots = torch.linspace(
            float(finite.min()), float(finite.max()), self.KNOTS, dtype=torch.float64
        )
        energy = self.centred(x_0) ** 2
        # snr E = Σ c² snr/(1 + c² snr), which is smooth in log-SNR
        at = [(energy * k.exp() / (1 + energy * k.exp())).sum(1) for k in knots]
        table = torch.stack(at, 1)
        place = (finite - knots[0].to(x_0.device)) / max(float(knots[-1] - knots[0]), 1e-300)
        place = place.clamp(0, 1) * (self.KNOTS - 1)
        below = place.floor().clamp(max=self.KNOTS - 2).long()
        share = place - below
        level = table.clamp(min=torch.finfo(torch.float64).tiny).log()
        error = ((1 - share) * level[:, below] + share * level[:, below + 1]).exp()
        terms: Tensor = 0.5 * torch.expm1(logsnr[:-1] - logsnr[1:]) * error
        return torch.where(logsnr[1:].isfinite(), terms, torch.zeros_like(terms))


def _risk(energy: Tensor, snr: float) -> Tensor:
    """(B,) Σ c² snr/(1 + c² snr) of energies c² (B, D), summed in float64."""
    scaled = energy * snr
    return (scaled / (1 + scaled)).sum(1, dtype=torch.float64)


def _drop(logsnr_s: Tensor, logsnr_t: Tensor) -> Tensor:
    """snr_s − snr_t without cancellation, and finite where snr_t is 0."""
    return -logsnr_s.exp() * torch.expm1(logsnr_t - logsnr_s)
