"""What can be said of samples where the law of the data is a known mixture in the plane."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nelbo.blurred import LEAST, blurred, too_fine
from nelbo.commands import Compare
from nelbo.data.mixture import GaussianMixture
from nelbo.ladder import Rung
from nelbo.modes import modes
from nelbo.randomness import seeded
from nelbo.walks.measures import apart
from nelbo.walks.opponents import Reals

EXACT, COUNTED = 1_000_000, 2500
"""Samples behind a blurred divergence, where they cost little; samples whose modes are counted."""


def exact(options: Compare, held: Reals, fakes: Any, rung: Rung) -> float | None:
    """The divergence of a rung of the ladder, nats; None where it is not known."""
    mixture = plane(held)
    if mixture is None:
        return None
    scale = float(torch.as_tensor(held.dataset.scale).max())
    found = blur(options, fakes, mixture, scale * math.exp(-rung.logsnr / 2))
    return None if found is None else found["jsd_nats"]


def plane(held: Reals) -> GaussianMixture | None:
    """The law of the reals, if it is a known mixture in the plane."""
    truth = held.dataset.truth
    known = truth is not None and truth.components is not None and truth.components.dims == 2
    return truth.components if known and truth is not None else None


def blur(
    options: Compare, fakes: Any, mixture: GaussianMixture, std: float
) -> dict[str, Any] | None:
    """The divergence after a blur of both laws.

    None where the blur is too fine for a lattice over the law, or the samples are too few.
    """
    count = len(fakes) if isinstance(fakes, Tensor) else EXACT
    if count < LEAST or too_fine(mixture, std):
        return None
    dealt = 0

    def sampler(n: int) -> Tensor:
        nonlocal dealt
        if not isinstance(fakes, Tensor):
            return torch.as_tensor(fakes(n))
        dealt += n
        return fakes[dealt - n : dealt]

    with seeded(options.seed, "compare", "blur"):
        found = blurred(sampler, mixture, std, count)
    return {"sd": std, "jsd_nats": found.value, "error": found.reach, "n": found.n}


def blurs(options: Compare, held: Reals, fakes: Any) -> list[dict[str, Any]]:
    """The divergence from a known law after blurs by its own finest width, and by .1 of its sd."""
    mixture = plane(held)
    if mixture is None:
        return []
    finest = float(torch.linalg.eigvalsh(mixture.covariances).min().sqrt())
    scale = float(torch.as_tensor(held.dataset.scale).max())
    found = [blur(options, fakes, mixture, std) for std in (finest, 0.1 * scale)]
    return [entry for entry in found if entry is not None]


def counted(options: Compare, held: Reals, fakes: Any) -> dict[str, Any] | None:
    """Mode counts of toys whose modes lie apart."""
    mixture = plane(held)
    if mixture is None or not apart(mixture):
        return None
    with seeded(options.seed, "compare", "modes"):
        rows = fakes[:COUNTED] if isinstance(fakes, Tensor) else torch.as_tensor(fakes(COUNTED))
    return modes(mixture, rows).as_json()
