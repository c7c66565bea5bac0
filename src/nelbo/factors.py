r"""Factors r(x) that kernels are multiplied by: what was measured, what is wished for.

The target is p̃(x_0) ∝ p_θ(x_0) r(x_0). Every kernel is multiplied by a widened factor r(x_s, s),

    p̃(x_s|x_t) = p_θ(x_s|x_t) r(x_s, s)/Z(x_t),   Z(x_t) = ∫ p_θ(x_s|x_t) r(x_s, s) dx_s,

and the decoder by r(x_0) itself. For a normal kernel and a normal factor this is exact,

    N(m, v) N(y; x, τ²) = Z N(v'(m/v + y/τ²), v'),  v' = 1/(1/v + 1/τ²),  Z = N(y; m, v + τ²),

for a delta x = y and Z = N(y; m, v), for bits f r(1)/Z, for levels a sum over levels. The chain of
these products alone is *approximate* at any number of steps: multiplying each step by r is not
multiplying the end by r. `conditioning` adds the weights that make it right.

References:
    Sohl-Dickstein et al. 2015, section 2.5 and table App.1.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from nelbo.distributions import DiagonalNormal, per_example
from nelbo.processes.base import Process
from nelbo.processes.gaussian import Gaussian
from nelbo.products import masses, reweighted

Moments = tuple[Tensor, Tensor]


class Factor(ABC):
    """r(x): what a sample should satisfy. `s` is a time, or None for the data itself."""

    exact = True
    """Whether `multiply` gives p·r/Z itself, and not a proposal near it."""
    process: Process | None = None
    shape: tuple[int, ...] | None = None
    """Shape of an example where the factor knows it."""
    batch = 1
    """For how many different examples it speaks."""

    @abstractmethod
    def multiply(self, kernel: Distribution, s: Tensor | None) -> tuple[Distribution, Tensor]:
        """p(x_s) r(x_s, s)/Z elementwise, and log Z (B,) in nats, float64."""

    @abstractmethod
    def log_r(self, x_s: Tensor, s: Tensor | None) -> Tensor:
        """log r(x_s, s), (B,) nats, float64."""

    def bind(self, process: Process, repeats: int = 1) -> Factor:
        """The factor as widened by a forward process, each of its examples `repeats` times."""
        bound = copy.copy(self)
        bound.process = process
        return bound


class Line(NamedTuple):
    """A factor that is normal in x: N(target; offset + slope·x, variance), float64."""

    target: Tensor
    offset: Tensor
    slope: Tensor
    variance: Tensor


class Measured(Factor):
    """Dimensions that were measured with normal noise: r(x_0) = Π_{i: mask} N(y_i; x_i, τ²).

    Widened to time t, with k = keep(t) and l = lose(t): nothing known of the data beforehand,

        r(x, t) = N(√k y; x, kτ² + l),

    or, with `moments` (m, v) of each dimension, E[r(X_0)|X_t = x] of independent X_0 ~ N(m, v),

        r(x, t) = N(y; a + b x, lv/(l + kv) + τ²),   a = ml/(l + kv),   b = √k v/(l + kv).

    Both are right in the limit once weighted; the nearer r(x, t) is to E[r(X_0)|X_t = x] under the
    model, the more even are the weights. For bits the same sums run over 0 and 1.

    Arguments:
        y: (B, *shape) on the model's scale, B = 1 for one condition.
        scale: τ ≥ 0 on the model's scale, one number or one per dimension.
        mask: what was measured, bool, (*shape) or (B, *shape); all by default.
        moments: (mean, variance) of the data, each broadcastable to (*shape); for bits the mean.
        grain: distance Δ of neighbouring levels, if the data have some: near the data all x within
            a level's bin are equally good, so latents are widened by its variance Δ²/12 more.
    Raises:
        ValueError: shapes that do not fit, a negative scale, a variance that is not positive.
    """

    def __init__(
        self,
        y: Tensor,
        scale: float | Tensor,
        mask: Tensor | None = None,
        moments: Moments | None = None,
        grain: float = 0.0,
    ) -> None:
        self.scale = torch.as_tensor(scale, dtype=torch.float64)
        if not bool((self.scale.isfinite() & (self.scale >= 0)).all()):
            raise ValueError(f"scale {scale}: the noise has a standard deviation of at least 0")
        known = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
        if known.dtype != torch.bool or known.shape not in (y.shape, y.shape[1:]):
            raise ValueError(
                f"a mask of type {known.dtype} and shape {tuple(known.shape)} does not fit data "
                f"of shape {tuple(y.shape)}: it must be bool and have the shape of the data"
            )
        if moments is not None and not bool((moments[1] > 0).all()):
            raise ValueError("the variances in `moments` must be positive")
        self.mask = known.expand(y.shape)
        self.y = torch.where(self.mask, y, torch.zeros_like(y)).double()
        self.moments = moments
        self.grain = grain
        self.shape, self.batch = tuple(y.shape[1:]), len(y)

    def bind(self, process: Process, repeats: int = 1) -> Measured:
        bound = copy.copy(self)
        bound.process = process
        if self.batch > 1:
            bound.y, bound.mask = (v.repeat_interleave(repeats, 0) for v in (self.y, self.mask))
        return bound

    def multiply(self, kernel: Distribution, s: Tensor | None) -> tuple[Distribution, Tensor]:
        if isinstance(kernel, DiagonalNormal):
            return self._normal(kernel, self.line(s, kernel.mean))
        support, log_mass = masses(kernel)
        return reweighted(kernel, log_mass, self.each(support, s))

    def log_r(self, x_s: Tensor, s: Tensor | None) -> Tensor:
        if s is None or not isinstance(self._process(), Gaussian):
            return per_example(self.each(x_s[None], s)[0])
        mean, variance = self._seen(x_s.double(), self.line(s, x_s))
        return per_example(self._log_normal(self.line(s, x_s).target - mean, variance))

    def line(self, s: Tensor | None, like: Tensor) -> Line:
        """r(·, s) as a normal function of x, on the device of `like`."""
        y, one = self.y.to(like.device), torch.ones((), dtype=torch.float64, device=like.device)
        if s is None:
            return Line(y, 0 * one, one, self.scale.to(like.device) ** 2)
        schedule = self._process().schedule
        keep, lose = (v.to(like.device) for v in (schedule.keep(s), schedule.lose(s)))
        reach = self.scale.to(like.device) ** 2 + self.grain**2 / 12
        if self.moments is None:
            return Line(keep.sqrt() * y, 0 * one, one, keep * reach + lose)
        m, v = (value.to(like.device, torch.float64) for value in self.moments)
        total = lose + keep * v
        noise = lose * v / total + reach
        return Line(y, m * lose / total, keep.sqrt() * v / total, noise)

    def each(self, values: Tensor, s: Tensor | None) -> Tensor:
        """log r(·, s) elementwise at values (n, B, *shape) of data or bits; 0 where unmeasured."""
        log_r = self._at_data(values) if s is None else self._at_bits(values, s)
        return torch.where(self.mask.to(values.device), log_r, torch.zeros_like(log_r))

    def _process(self) -> Process:
        if self.process is None:
            raise ValueError("this factor is not widened yet: take factor.bind(model.process)")
        return self.process

    def _normal(self, kernel: DiagonalNormal, line: Line) -> tuple[DiagonalNormal, Tensor]:
        mean, logvar = kernel.mean.double(), kernel.logvar.double().expand_as(kernel.mean)
        seen, variance = self._seen(mean, line)
        total = variance + line.slope**2 * logvar.exp()
        miss = line.target - seen
        moved = mean + line.slope * logvar.exp() / total * miss
        # a delta, without the rounding of mean + (y - mean)
        moved = torch.where(variance == 0, line.target, moved)
        mask = self.mask.to(mean.device)
        narrowed = logvar + variance.log() - total.log()
        product = DiagonalNormal(
            torch.where(mask, moved, mean).to(kernel.mean.dtype),
            torch.where(mask, narrowed, logvar).to(kernel.mean.dtype),
        )
        return product, per_example(self._log_normal(miss, total))

    @staticmethod
    def _seen(x: Tensor, line: Line) -> tuple[Tensor, Tensor]:
        """Mean and variance of the measurement given x."""
        return line.offset + line.slope * x, line.variance.expand_as(x)

    def _log_normal(self, miss: Tensor, variance: Tensor) -> Tensor:
        log_density = -0.5 * (miss**2 / variance + (2 * math.pi * variance).log())
        return torch.where(self.mask.to(miss.device), log_density, torch.zeros_like(log_density))

    def _at_data(self, values: Tensor) -> Tensor:
        y = self.y.to(values.device)
        scale = self.scale.to(values.device)
        if bool((scale > 0).all()):
            z = (values.double() - y) / scale
            return -0.5 * z**2 - scale.log() - 0.5 * math.log(2 * math.pi)
        # levels are at least 2/65535 apart, and the data's own are rounded by 6e-8
        here = (values.double() - y).abs() < 1e-6
        return torch.where(here, 0.0, -math.inf).to(values.device, torch.float64)

    def _at_bits(self, values: Tensor, s: Tensor) -> Tensor:
        """log Σ_j p_j q(x_s|j) r(j) − log Σ_j p_j q(x_s|j), without moments log Σ_j q(x_s|j) r(j).

        The p_j are the moments' rates, the sums over j = 0, 1.
        """
        ends = [torch.full_like(values[0], j) for j in (0.0, 1.0)]
        reach = [self._process().marginal(end, s).log_prob(values).double() for end in ends]
        if self.moments is None:
            return torch.logaddexp(
                *[q + self._at_data(e) for q, e in zip(reach, ends, strict=True)]
            )
        rate = self.moments[0].to(values.device, torch.float64)
        joint = [reach[0] + torch.log1p(-rate), reach[1] + rate.log()]
        given = [q + self._at_data(e) for q, e in zip(joint, ends, strict=True)]
        return torch.logaddexp(*given) - torch.logaddexp(*joint)


class Observed(Measured):
    """Known dimensions: r is a delta at the data, widened to q(x_s|x_0 = data) (inpainting).

    Observed dimensions of x_0 are the data exactly. Their log Z at the decoder is log p_θ of the
    data given x_1, so the evidence is p_θ of the observed part: a mass for levels and bits.

    Arguments:
        x: (B, *shape) on the model's scale; entries outside the mask are not looked at.
        mask: what is known, bool, (*shape) or (B, *shape).
        moments, grain: see `Measured`.
    """

    def __init__(
        self, x: Tensor, mask: Tensor, moments: Moments | None = None, grain: float = 0.0
    ) -> None:
        super().__init__(x, 0.0, mask, moments, grain)


class Noisy(Measured):
    """All dimensions, or those of a mask, seen through noise of known size (denoising).

    Arguments:
        y: (B, *shape) what was seen, on the model's scale.
        scale: τ > 0, standard deviation of its noise on that scale, one or one per dimension.
        mask, moments, grain: see `Measured`.
    """

    def __init__(
        self,
        y: Tensor,
        scale: float | Tensor,
        mask: Tensor | None = None,
        moments: Moments | None = None,
        grain: float = 0.0,
    ) -> None:
        if bool((torch.as_tensor(scale) == 0).any()):
            raise ValueError("scale 0: without noise the dimensions are known; take Observed")
        super().__init__(y, scale, mask, moments, grain)


class Tilt(Factor):
    """Any positive r: each kernel is tilted along ∇log r at its mean.

    N(m, v) becomes N(m + v g, v), a bit with probability f gets the logit of f plus g, masses of
    levels are multiplied by e^{g v_j}, and log Z = log r(m) + ½ v ‖g‖² for the normal. This is the
    product with r only if log r is linear (for bits: if it is a sum over bits and g the difference
    log r(1) − log r(0) of each); otherwise a proposal, whose weights still correct it exactly.

    Arguments:
        log_r: (x (B, *shape), s) ↦ (B,) nats; s is a time, None for the data.
        gradient: (x, s) ↦ (B, *shape), of log r with respect to x.
    """

    exact = False

    def __init__(
        self,
        log_r: Callable[[Tensor, Tensor | None], Tensor],
        gradient: Callable[[Tensor, Tensor | None], Tensor],
    ) -> None:
        self._log_r, self._gradient = log_r, gradient

    def log_r(self, x_s: Tensor, s: Tensor | None) -> Tensor:
        return self._log_r(x_s, s).double()

    def multiply(self, kernel: Distribution, s: Tensor | None) -> tuple[Distribution, Tensor]:
        mean = kernel.mean
        g, base = self._gradient(mean, s), self.log_r(mean, s)
        if isinstance(kernel, DiagonalNormal):
            push = kernel.variance * g
            return DiagonalNormal(mean + push, kernel.logvar), base + per_example(0.5 * push * g)
        support, log_mass = masses(kernel)
        product, log_z = reweighted(kernel, log_mass, (g * (support - mean)).double())
        return product, base + log_z
