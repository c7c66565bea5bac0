r"""Betting on every block with what the blocks before it taught.

No part is set aside for good: D_k is fitted and calibrated on the blocks before block k and bets
on block k, and the capital is carried over,

    K(x) = prod (1 + b_i (Z_i - x)),   0 <= b_i <= c/(x - lo_i),   lo_i = log 2 - sp(B_i),

with stakes b_i that know earlier pairs alone. For JSD <= x each factor has mean at most 1 given
the past, because E[Z_i | past] = L(D_k) <= JSD. So K exceeds 1/alpha at any time with probability
at most alpha, and one may stop, or go on, when one likes. The first block is not bet on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo.jsd import CEILING, LOG2, largest, lowest, payoff, refuse_level

START, BLOCKS = 0.3, 5


def boundaries(n: int) -> list[int]:
    """Ends of the blocks: the first holds 30 % of n pairs, the others grow in proportion."""
    return [round(n * START ** (1 - k / BLOCKS)) for k in range(BLOCKS + 1)]


def prequential_bound(
    real: Tensor, fake: Tensor, clips: Tensor, alpha: float = 0.05, c: float = CEILING
) -> float:
    """Lower confidence bound on JSD(p, g) from pairs scored by growing discriminators.

    Arguments:
        real, fake: (n,) logits in the order of betting, each by a discriminator that was fixed
            before its pair was seen.
        clips: (n,) B_i > 0, fixed likewise.
        alpha: error probability, at any time of stopping.

    Returns:
        nats, at least 0.
    """
    refuse_level(alpha)
    z, least = payoff(real, fake, clips), lowest(clips)
    stake = _stakes(z, clips, alpha)

    def capital(shift: float) -> float:
        x = start + shift
        return float(torch.log1p(torch.minimum(stake, c / (x - least)) * (z - x)).cumsum(0).max())

    # A bound below 0 says nothing, so the search begins there.
    start = 0.0
    return largest(capital, math.log(1 / alpha), 1e-12, LOG2)


def _stakes(z: Tensor, clips: Tensor, alpha: float) -> Tensor:
    """sqrt(2 log(1/alpha)/(n v)), v the variance of the pairs before, begun at that of B."""
    count = torch.arange(1, len(z) + 1, dtype=torch.float64)
    mu = z.cumsum(0) / (count + 1)
    first = float(clips[0]) ** 2 / 16
    v = (first + (z - mu).square().cumsum(0)) / (count + 1)
    before = torch.cat([torch.tensor([first], dtype=torch.float64), v[:-1]])
    return (2 * math.log(1 / alpha) / (len(z) * before)).sqrt()
