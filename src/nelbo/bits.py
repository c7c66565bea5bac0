r"""Independent bits as a distribution, exact at its edges.

Masses travel as logits, so that a probability of 1e-30 and one of 1 − 1e-30 are equally exact, and
a certain bit is a logit of ±∞. `torch.distributions.Bernoulli` clamps such probabilities away from
0 and 1, and its divergence of two nearly equal laws loses all digits.

    KL(Bern(a) ‖ Bern(b)) = a log(a/b) + (1−a) log((1−a)/(1−b)),   0 log 0 = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from nelbo.distributions import Shape, expm1_minus
from nelbo.randomness import by_row

_SERIES = 1e-2  # below this |y| the first terms of the series of y − log(1 + y) are exact


class Bits(Distribution):
    """Independent bits: P(1) = σ(logits) for every dimension; batch_shape is the full shape.

    A logit of ±∞ is a certain bit. Entropies and divergences take 0 log 0 = 0, so that certain
    bits give numbers; both masses are read off the logit, so neither is 1 minus the other.

    Arguments:
        logits: any shape.
    """

    arg_constraints = {}

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return True

    @property
    def mean(self) -> Tensor:
        """P(1)."""
        return torch.sigmoid(self.logits)

    @property
    def variance(self) -> Tensor:
        return torch.sigmoid(self.logits) * torch.sigmoid(-self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), nats per dimension (elementwise); value is 0 or 1."""
        return logsigmoid(torch.where(value > 0.5, self.logits, -self.logits))

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            # float32 uniforms are multiples of 2⁻²⁴: a mass of 1e-10 would come up 600 times too
            # often
            uniform = self._uniform(shape)
            return (uniform < torch.sigmoid(self.logits.double())).to(self.logits.dtype)

    def _uniform(self, shape: torch.Size) -> Tensor:
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self.logits.device}
        if not shape:
            return torch.rand(shape, **kind)

        def uniform(rows: int, stream: torch.Generator | None) -> Tensor:
            return torch.rand(rows, *shape[1:], generator=stream, **kind)

        return by_row(shape[0], uniform, self.logits.device)

    def entropy(self) -> Tensor:
        """h(p) = −p log p − (1−p) log(1−p), nats per dimension (elementwise)."""
        size = self.logits.abs()
        certain = size == math.inf
        size = torch.where(certain, torch.zeros_like(size), size)
        value = torch.log1p((-size).exp()) + size * torch.sigmoid(-size)
        return torch.where(certain, torch.zeros_like(value), value)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """(2, *batch_shape): all zeros, all ones."""
        return torch.stack([torch.zeros_like(self.logits), torch.ones_like(self.logits)])


@register_kl(Bits, Bits)
def _kl_bits_bits(p: Bits, q: Bits) -> Tensor:
    """a (e^δ − 1 − δ) − [y − log(1 + y)], a = P(1) ≤ ½, δ = logit q − logit p, y = a (e^δ − 1).

    No part of this cancels for small δ: relative precision holds down to divergences of 1e-30.
    """
    # the rarer value of the two is counted, so that a ≤ ½
    sign = torch.where(p.logits > 0, -1.0, 1.0).to(p.logits.dtype)
    of, other = sign * p.logits, sign * q.logits
    near = (other - of).abs() < 1
    apart = _kl_apart(torch.where(near, -1, of), torch.where(near, 1, other))
    delta = torch.where(near, other - of, torch.zeros_like(of))
    a = torch.sigmoid(torch.where(near, of, torch.zeros_like(of)))
    close = a * expm1_minus(delta) - _minus_log1p(a * torch.expm1(delta))
    same = torch.where(of == other, torch.zeros_like(close), apart)
    return torch.where(near, close, same)


def _kl_apart(of: Tensor, other: Tensor) -> Tensor:
    """a log(a/b) + (1−a) log((1−a)/(1−b)) with a = σ(of), b = σ(other); 0 log 0 = 0, of ≤ 0."""
    certain = of == -math.inf
    finite = torch.where(certain, torch.full_like(of, -1.0), of)
    one = torch.sigmoid(finite) * (logsigmoid(finite) - logsigmoid(other))
    zero = torch.sigmoid(-of) * (logsigmoid(-of) - logsigmoid(-other))
    return torch.where(certain, torch.zeros_like(one), one) + zero


def _minus_log1p(y: Tensor) -> Tensor:
    """y − log(1 + y) without cancellation near zero (series y²/2 − y³/3 + … below 1e-2)."""
    small = y.abs() < _SERIES
    d = torch.where(small, y, torch.zeros_like(y))
    tail = 1 / 2 - d * (1 / 3 - d * (1 / 4 - d * (1 / 5 - d * (1 / 6 - d * (1 / 7 - d / 8)))))
    large = torch.where(small, torch.ones_like(y), y)
    return torch.where(small, d * d * tail, large - torch.log1p(large))
