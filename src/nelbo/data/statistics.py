"""What the training part says of its scale, and where figures would mislead.

Vectors are scaled to mean 0 and variance 1 by dimension. A part of many rows is gone through block
by block, in the order of its file, so that the same numbers come of it in memory and on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nelbo.data.part import Part, pieces
from nelbo.data.provenance import Provenance
from nelbo.errors import InputRefused

FEW_LEVELS = 128
LATTICE_ROWS = 4096
SOME = 16
"""Images that are looked at before asking whether they have shown enough levels."""
AT_ONCE = 65_536
"""Rows of vectors whose moments are taken at once; more are taken block by block."""


def scaling(train: Part, origin: Provenance, places: np.ndarray) -> tuple[Tensor, float | Tensor]:
    """Mean and standard deviation of each dimension of training vectors; 0 and 1 for images.

    Arguments:
        places: (n,) where the training rows stand in the file.
    """
    if origin.levels is not None:
        return torch.zeros((), dtype=torch.float64), 1.0
    if len(train) <= AT_ONCE:
        values = train[:]
        shift, scale = values.mean(0), values.std(0, correction=0)
    else:
        shift, scale = _moments(train, np.argsort(places))
    bad = torch.nonzero(~(torch.isfinite(scale) & (scale > 1e-12 * shift.abs()))).flatten()
    if len(bad):
        raise InputRefused(
            f"{origin.source}: column(s) {_few(bad.tolist())} are constant (or beyond the range "
            "of float64) in the training part, so they have no density; remove them"
        )
    return shift, scale


def _moments(train: Part, order: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, block by block, the same whether in memory or not.

    Blocks are joined by S = S_a + S_b + (m_b - m_a)^2 n_a n_b/(n_a + n_b), which cancels nothing.

    References:
        Chan, Golub, LeVeque 1983, Algorithms for computing the sample variance, equation 1.5.
    """
    n, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for rows in np.array_split(order, -(-len(order) // AT_ONCE)):
        some = train[torch.from_numpy(rows)]
        here, m = some.mean(0), len(some)
        apart = here - mean
        squares = squares + ((some - here) ** 2).sum(0) + apart**2 * (n * m / (n + m))
        mean, n = mean + apart * (m / (n + m)), n + m
    return mean, (squares / n).sqrt()


def note_levels(train: Part, origin: Provenance) -> None:
    """Warn where the figure in bits/dim would mislead: few levels in use, or a lattice."""
    if origin.levels is None:
        some = train[:LATTICE_ROWS].numpy()
        few = [d for d in range(some.shape[1]) if 2 * len(np.unique(some[:, d])) < len(some)]
        if few:
            origin.warnings.append(
                f"column(s) {_few(few)} repeat their values: a density can grow without limit on "
                "such data, and the bound says little"
            )
        return
    if origin.levels <= FEW_LEVELS:
        return
    seen = np.zeros(origin.levels, bool)
    for rows in pieces(train, SOME):
        seen[rows.numpy()] = True
        if seen.sum() > FEW_LEVELS:
            return  # more rows cannot make them fewer
    origin.warnings.append(
        f"only {int(seen.sum())} of {origin.levels} levels occur: bits/dim are not comparable "
        "with those of images that use them all"
    )


def _few(items: Sequence[int]) -> str:
    shown = ", ".join(map(str, items[:8]))
    return shown if len(items) <= 8 else f"{shown}, ... ({len(items)} in all)"
