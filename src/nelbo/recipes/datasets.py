"""Data with known truth, as either family's options describe it."""

from __future__ import annotations

from typing import Any

from nelbo.data.base import Dataset
from nelbo.data.toys import PLANE, correlated, grid25, ring, swissroll
from nelbo.recipes.groups import GaussianData, GridData, RingData, RollData

TEST, VALIDATION = 10_000, 2_000
"""Examples that a certificate can spend, and that choose the best checkpoint."""
KnownLaw = RingData | GridData | GaussianData | RollData


def known_law(options: KnownLaw, seed: int) -> Dataset:
    """Draws from a finite Gaussian mixture."""
    many = options.examples
    if isinstance(options, RingData):
        size: dict[str, Any] = {"radius": options.radius, "std": options.std}
        return ring(many, TEST, seed, n_validation=VALIDATION, modes=options.modes, **size)
    if isinstance(options, GridData):
        size = {"step": options.spacing, "std": options.std}
        return grid25(many, TEST, seed, n_validation=VALIDATION, side=options.side, **size)
    if isinstance(options, GaussianData):
        return correlated(many, TEST, seed, n_validation=VALIDATION, **PLANE)
    return swissroll(options.examples, seed=seed)
