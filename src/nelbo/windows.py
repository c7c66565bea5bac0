r"""Tables over log-SNR: means over neighbours, and polynomials through Chebyshev nodes."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbours(values: Tensor, logsnr: Tensor, width: float) -> Tensor:
    """Means over windows that are symmetric in places and reach `width` in log-SNR at most.

    Weights are positive, so that what is positive stays so; towards the ends of the table the
    windows shrink to the place itself.

    Arguments:
        values: (m, N, ...) with one column for every time. logsnr: (N,) decreasing.
    """
    count = len(logsnr)
    left = torch.searchsorted(-logsnr, -logsnr - width)
    right = torch.searchsorted(-logsnr, -logsnr + width, right=True) - 1
    place = torch.arange(count)
    reach = torch.minimum(place - left, right - place).tolist()
    columns = [values[:, i - w : i + w + 1].mean(1) for i, w in enumerate(reach)]
    return torch.stack(columns, 1)


def chebyshev(width: int) -> Tensor:
    """(width,) nodes in (−1, 1)."""
    return torch.cos(torch.pi * (torch.arange(width, dtype=torch.float64) + 0.5) / width)


def lagrange(place: Tensor, width: int) -> Tensor:
    """(P, width) at `place` in [−1, 1]: the polynomials that are 1 at one node, 0 at others."""
    order = torch.arange(width, dtype=torch.float64)
    at, nodes = (torch.cos(order * v.acos()[:, None]) for v in (place, chebyshev(width)))
    weight = torch.where(order == 0, 1.0, 2.0) / width
    return (at * weight) @ nodes.T
