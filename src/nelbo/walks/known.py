"""What can be said of samples where the law of the data is a known mixture in the plane."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nelbo.blurred import LEAST, blurred, smoothed, too_fine
from nelbo.commands import Compare
from nelbo.data.mixture import GaussianMixture
from nelbo.ladder import Rung
from nelbo.modes import modes
from nelbo.randomness import seeded
from nelbo.sandwich import Reference
from nelbo.walks.chains import Means
from nelbo.walks.heldout import Reals
from nelbo.walks.measures import apart

EXACT, COUNTED = 1_000_000, 2500
"""Samples behind a blurred divergence, where they cost little; samples whose modes are counted."""


def plane(held: Reals) -> GaussianMixture | None:
    """The law of the reals, if it is a known mixture in the plane."""
    truth = held.dataset.truth
    known = truth is not None and truth.components is not None and truth.components.dims == 2
    return truth.components if known and truth is not None else None


def pool(options: Compare, held: Reals, fakes: Any) -> Tensor | None:
    """Samples for everything that is computed from the known law; None where there is none."""
    if plane(held) is None or isinstance(fakes, Tensor):
        return None if plane(held) is None else fakes
    with seeded(options.seed, "compare", "pool"):
        return torch.as_tensor(fakes(EXACT))


def exact(held: Reals, rows: Tensor | None, rung: Rung) -> dict[str, float | None]:
    """The divergence of a rung of the ladder and its error, nats; None where it is not known."""
    scale = float(torch.as_tensor(held.dataset.scale).max())
    found = _blur(held, rows, scale * math.exp(-rung.logsnr / 2))
    if found is None:
        return {"exact": None, "exact_error": None}
    return {"exact": found["jsd_nats"], "exact_error": found["error"]}


def blurs(held: Reals, rows: Tensor | None) -> list[dict[str, Any]]:
    """The divergence from a known law after blurs by its own finest width, and by .1 of its sd."""
    mixture = plane(held)
    if mixture is None:
        return []
    finest = float(torch.linalg.eigvalsh(mixture.covariances).min().sqrt())
    scale = float(torch.as_tensor(held.dataset.scale).max())
    found = [_blur(held, rows, std) for std in (finest, 0.1 * scale)]
    return [entry for entry in found if entry is not None]


def _blur(held: Reals, rows: Tensor | None, std: float) -> dict[str, Any] | None:
    """The divergence after a blur of both laws.

    None where the blur is too fine for a lattice over the law, or the samples are too few.
    """
    mixture = plane(held)
    if rows is None or mixture is None or len(rows) < LEAST or too_fine(mixture, std):
        return None
    dealt = 0

    def next_rows(count: int) -> Tensor:
        nonlocal dealt
        dealt += count
        return rows[dealt - count : dealt]

    found = blurred(next_rows, mixture, std, len(rows))
    return {"sd": std, "jsd_nats": found.value, "error": found.reach, "n": found.n}


def whole(held: Reals, means: Means | None) -> Reference | None:
    """The divergence of a chain from a known law, by the means of its normal decoder.

    None where the decoder is too narrow for a lattice over the law, or the walks are too few.
    """
    mixture = plane(held)
    if means is None or mixture is None or len(means.centres) < LEAST:
        return None
    if too_fine(mixture, means.std):
        return None
    found = smoothed(means.centres, mixture, means.std)
    return Reference(found.value, found.reach, "by the decoder's means")


def counted(held: Reals, rows: Tensor | None) -> dict[str, Any] | None:
    """Mode counts of toys whose modes lie apart."""
    mixture = plane(held)
    if rows is None or mixture is None or not apart(mixture):
        return None
    return modes(mixture, rows[:COUNTED]).as_json()
