"""Products over a finite support: bits and levels, where p·r/Z is a sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from nelbo.bits import Bits
from nelbo.distributions import DiscretizedNormal, LevelCategorical, level_values, per_example


def masses(kernel: Distribution) -> tuple[Tensor, Tensor]:
    """Support (n, B, *shape) and log masses of a distribution over bits or levels, float64.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(kernel, Bits):
        support = kernel.enumerate_support()
        return support, kernel.log_prob(support).double()
    if not isinstance(kernel, LevelCategorical | DiscretizedNormal):
        raise ValueError(
            f"no product of a factor with {type(kernel).__name__} is known: normal kernels, bits "
            "and levels can be conditioned"
        )
    shape = (-1, *[1] * len(kernel.batch_shape))
    values = level_values(kernel.levels, kernel.mean).view(shape)
    if isinstance(kernel, LevelCategorical):
        log_mass = kernel.logits.movedim(-1, 0)
    else:
        level = torch.arange(kernel.levels, device=values.device).view(shape)
        log_mass = kernel.log_mass(level)
    return values.expand_as(log_mass), log_mass.double()


def reweighted(
    kernel: Distribution, log_mass: Tensor, log_r: Tensor
) -> tuple[Distribution, Tensor]:
    """p·r/Z over a finite support (first dimension), and log Z (B,).

    Where Z = 0 the product does not exist: log Z is −∞, and the law is r's own.
    """
    table = log_mass + log_r
    total = table.logsumexp(0)
    table = torch.where(total == -math.inf, log_r.expand_as(table), table)
    dtype = kernel.mean.dtype
    if isinstance(kernel, Bits):
        return Bits((table[1] - table[0]).to(dtype)), per_example(total)
    return LevelCategorical(table.movedim(0, -1).to(dtype)), per_example(total)
