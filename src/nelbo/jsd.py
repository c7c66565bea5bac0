"""phi and kappa, which join KL and JSD."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def phi(r: Tensor) -> Tensor:
    """log 2 + [r log r - (1 + r) log(1 + r)]/2 for r in [0, 1], float64."""
    r = torch.as_tensor(r, dtype=torch.float64)
    return math.log(2) + (torch.xlogy(r, r) - (1 + r) * r.log1p()) / 2


def kappa(x: Tensor) -> Tensor:
    """The KL (nats) that a JSD of x nats certifies: -log of the inverse of phi."""
    x = torch.as_tensor(x, dtype=torch.float64)
    low, high = torch.zeros_like(x), torch.full_like(x, 800.0)
    for _ in range(200):
        middle = (low + high) / 2
        above = phi((-middle).exp()) >= x
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high
