"""Orthonormal changes of basis for images: cosines over space, luma and its differences."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosines(size: int) -> Tensor:
    """(size, size) the orthonormal cosine transform (DCT-II); row k has frequency k."""
    k = torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi / size * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    table[0] /= math.sqrt(2)
    return table


def colors(channels: int) -> Tensor:
    """(C, C) orthonormal: luma and two differences of three channels, otherwise as they are."""
    if channels != 3:
        return torch.eye(channels, dtype=torch.float64)
    rows = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    out: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return out
