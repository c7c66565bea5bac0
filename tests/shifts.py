"""Small laws, samplers and judges on which certificates are tested."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nelbo.judges import Regression
from nelbo.randomness import generator

QUICK = (Regression(0),)


def shift(d: float, dims: int = 1) -> Callable[[int], Tensor]:
    """Draws from N(d e_1, I)."""

    def sampler(n: int) -> Tensor:
        x = torch.randn(n, dims, dtype=torch.float64)
        x[:, 0] += d
        return x

    return sampler


def normal(n: int, dims: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(n, dims, dtype=torch.float64, generator=generator(seed, "reals"))


def bits(n: int, p: float, seed: int) -> Tensor:
    return (torch.rand(n, 4, generator=generator(seed, "bits")) < p).to(torch.uint8)


def image(n: int, seed: int = 0) -> Tensor:
    draws = generator(seed, "images")
    return torch.randint(0, 256, (n, 1, 8, 8), generator=draws, dtype=torch.uint8)
