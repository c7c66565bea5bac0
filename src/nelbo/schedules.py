r"""Noise schedules: how much of the data a latent keeps, as a function of time.

A schedule is one decreasing function λ(t) = log-SNR = log(keep/lose) in float64, keep = ᾱ = σ(λ),
lose = 1 − ᾱ = σ(−λ). Everything else follows without cancellation:

    log keep = −softplus(−λ),   log lose = −softplus(λ),   c(s, t) = −expm1(λ_t − λ_s).

Time belongs to the latents. `grid(N)` is an increasing tensor of N times; a chain of T betas is
defined at i/T, i = 1..T, and only there, a continuous schedule on the whole of [0, 1]. Any subset
of a grid is another grid.

References:
    Kingma, Salimans, Poole, Ho 2021, Variational diffusion models (log-SNR).
    Ho, Jain, Abbeel 2020 (`Linear`); Nichol, Dhariwal 2021 (`Cosine`);
    Sohl-Dickstein, Weiss, Maheswaranathan, Ganguli 2015 (`Harmonic`, `Learned`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus


class Float64(nn.Module):
    """A module whose tensors follow the model to its device and stay float64 when it is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda x: x.to(fn(x.detach().flatten()[:0]).device), recurse)


class Schedule(Float64, ABC):
    """A decreasing log-SNR, in float64."""

    @abstractmethod
    def logsnr(self, t: Tensor) -> Tensor:
        """λ(t), float64, the shape of t.

        Arguments:
            t: float64 times, any shape, in [0, 1].
        """

    @abstractmethod
    def grid(self, steps: int) -> Tensor:
        """`steps` increasing times (N,), float64, that end at the last time of the schedule."""

    def keep(self, t: Tensor) -> Tensor:
        """ᾱ(t) = σ(λ)."""
        return torch.sigmoid(self.logsnr(t))

    def lose(self, t: Tensor) -> Tensor:
        """1 − ᾱ(t) = σ(−λ)."""
        return torch.sigmoid(-self.logsnr(t))

    def log_keep(self, t: Tensor) -> Tensor:
        """log ᾱ(t) = −softplus(−λ)."""
        return -softplus(-self.logsnr(t))

    def log_lose(self, t: Tensor) -> Tensor:
        """log(1 − ᾱ(t)) = −softplus(λ)."""
        return -softplus(self.logsnr(t))


class Smooth(Schedule, ABC):
    """A schedule of continuous time: λ is differentiable on the whole of [0, 1]."""

    @abstractmethod
    def slope(self, t: Tensor) -> Tensor:
        """λ′(t) < 0, float64, the shape of t."""

    def grid(self, steps: int) -> Tensor:
        """linspace(0, 1, steps)."""
        if steps < 1:
            raise ValueError(f"a grid needs at least one time, not {steps}")
        return torch.linspace(0 if steps > 1 else 1, 1, steps, dtype=torch.float64)


class LogSNRLinear(Smooth):
    """λ(t) = λ_max + (λ_min − λ_max) t: the continuous schedule of this library.

    Arguments:
        logsnr_max: λ at t = 0, next to the data.
        logsnr_min: λ at t = 1, next to the prior.
    """

    def __init__(self, logsnr_max: float = 13.3, logsnr_min: float = -5.0) -> None:
        super().__init__()
        if not logsnr_min < logsnr_max:
            raise ValueError(
                f"log-SNR must fall with time: logsnr_max={logsnr_max} is not above "
                f"logsnr_min={logsnr_min}; swap them"
            )
        self.logsnr_max = logsnr_max
        self.logsnr_min = logsnr_min

    def logsnr(self, t: Tensor) -> Tensor:
        return self.logsnr_max + (self.logsnr_min - self.logsnr_max) * t.double()

    def slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.logsnr_min - self.logsnr_max, dtype=torch.float64)


class Stepped(Schedule, ABC):
    """A chain of T betas, keep(i/T) = Π_{j≤i} (1 − β_j), defined at i/T only.

    Arguments:
        betas: (T,) float64 in (0, 1]; only the last may be 1.
    """

    logsnrs: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        betas = betas.detach().double()
        _check_betas(betas)
        log_keep = torch.log1p(-betas).cumsum(0)
        log_lose = torch.log(-torch.expm1(log_keep))
        self.register_buffer("logsnrs", log_keep - log_lose, persistent=False)

    @property
    def steps(self) -> int:
        """T."""
        return self.logsnrs.numel()

    def betas(self) -> Tensor:
        """(T,) β_i = 1 − keep_i/keep_{i−1} = l_i (1 − snr_i/snr_{i−1})."""
        logsnr = self.table()
        before = torch.cat([logsnr.new_full((1,), math.inf), logsnr[:-1]])
        return torch.sigmoid(-logsnr) * -torch.expm1(logsnr - before)

    def logsnr(self, t: Tensor) -> Tensor:
        position = t.double() * self.steps
        index = position.round().long() - 1
        if t.device.type == "cpu":  # elsewhere the check would stall the queue at every call
            self._check(position, index)
        return self.table()[index.to(self.logsnrs.device)].to(t.device)

    def table(self) -> Tensor:
        """(T,) the log-SNR of every step."""
        return self.logsnrs

    def _check(self, position: Tensor, index: Tensor) -> None:
        off = ((position - index - 1).abs() > 1e-6) | (index < 0) | (index >= self.steps)
        if bool(off.any()):
            t = float((position / self.steps)[off].flatten()[0])
            raise ValueError(
                f"this schedule has {self.steps} steps and is defined at i/{self.steps} only, "
                f"i = 1..{self.steps}; t = {t:.9g} is none of them. Take times from grid()"
            )

    def grid(self, steps: int | None = None) -> Tensor:
        """All T times, or `steps` of them at (rounded) even distance, first and last included.

        With one step the last time stays: sampling starts there.
        """
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"a chain of {self.steps} steps has no grid of {steps}")
        return self.times(even(self.steps, steps).tolist())

    def times(self, kept: Sequence[int]) -> Tensor:
        """Times (N,) of the steps with the given 0-based numbers, which must increase."""
        index = torch.tensor(list(kept), dtype=torch.float64)
        if index.numel() == 0 or bool((index.diff() <= 0).any()):
            raise ValueError(f"step numbers must increase and not be empty: {list(kept)[:8]}")
        return (index + 1) / self.steps


def even(count: int, size: int) -> Tensor:
    """(size,) places 0..count−1 at rounded even distance, first and last included; one: the last.

    Arguments:
        count: N. size: K ≤ N.
    """
    assert 1 <= size <= count
    if size == 1:
        return torch.tensor([count - 1])
    stride = (count - 1) / (size - 1)
    return torch.tensor([round(m * stride) for m in range(size)])


def _check_betas(betas: Tensor) -> None:
    if betas.dim() != 1 or betas.numel() == 0:
        raise ValueError(f"betas must be a vector with at least one entry, not {betas.shape}")
    inner_ok = ((betas[:-1] > 0) & (betas[:-1] < 1)).all() and 0 < betas[-1] <= 1
    if not bool(inner_ok):
        raise ValueError(
            "every beta must lie in (0, 1), the last may be 1; "
            f"found values from {float(betas.min()):.6g} to {float(betas.max()):.6g}"
        )


class Tabulated(Stepped):
    """Any betas.

    Arguments:
        betas: T numbers.
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        super().__init__(torch.as_tensor(betas, dtype=torch.float64))


class Linear(Stepped):
    """DDPM: β_i evenly spaced from `start` to `end` (at every T; nothing is rescaled).

    References:
        Ho, Jain, Abbeel 2020, section 4.
    """

    def __init__(self, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> None:
        super().__init__(torch.linspace(start, end, steps, dtype=torch.float64))


class Cosine(Stepped):
    """Improved DDPM: β_i = min(1 − f(i/T)/f((i−1)/T), cap), f = cos²((t + .008)/1.008 · π/2).

    keep is the product of the *capped* 1 − β_i.

    References:
        Nichol, Dhariwal 2021, eq. 17.
    """

    def __init__(self, steps: int = 1000, cap: float = 0.999, offset: float = 0.008) -> None:
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((t + offset) / (1 + offset) * (math.pi / 2)) ** 2
        super().__init__((1 - f[1:] / f[:-1]).clamp(max=cap))


class Harmonic(Stepped):
    """β_i = 1/(T − i + 1), i.e. keep(i/T) = 1 − i/T: the last step erases what is left.

    References:
        Sohl-Dickstein et al. 2015, section 2.4.1.
    """

    def __init__(self, steps: int = 1000) -> None:
        super().__init__(1 / torch.arange(steps, 0, -1, dtype=torch.float64))


class Learned(Stepped):
    """β_2..β_T are parameters, β_1 stays: log keep_i = log(1−β_1) − Σ_{1<j≤i} softplus(rise_j).

    keep falls whatever the parameters are. Latents drawn by `rsample` carry the gradient: their
    noise is held, and the bound is differentiated through the schedule. β_1 sets the resolution
    of the data, and a bound in which it is free has no best value on a density.

    Arguments:
        start: the chain to begin with; its last beta must be below 1.

    References:
        Sohl-Dickstein et al. 2015, section 2.4.1.
    """

    def __init__(self, start: Stepped) -> None:
        betas = start.betas()
        super().__init__(betas)
        if float(betas[-1]) == 1:
            raise ValueError(
                "a learned schedule cannot start from one that erases everything (last beta 1): "
                "start from Tabulated betas whose last one is below 1"
            )
        steps = -torch.log1p(-betas[1:])
        self.rise = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))

    def table(self) -> Tensor:
        first = logsigmoid(self.logsnrs[:1])
        log_keep = torch.cat([first, first - softplus(self.rise).cumsum(0)])
        return log_keep - torch.log(-torch.expm1(log_keep))
