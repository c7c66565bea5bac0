"""What the learned discriminator saw: D over the plane, or the samples that it found most and
least convincing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo.certificate import Certificate
from nelbo.commands import Compare
from nelbo.randomness import seeded
from nelbo.walks.measures import rows_of
from nelbo.walks.opponents import Reals

SIDE, SHOWN, LOOKED_AT, POINTS = 160, 16, 1000, 1000


@torch.no_grad()
def arrays(
    held: Reals, fakes: Any, certificate: Certificate, options: Compare
) -> dict[str, np.ndarray]:
    """The arrays behind the witness picture; none for data of other kinds.

    The samples that are ranked are new ones where the sampler gives them.
    """
    with seeded(options.seed, "compare", "witness"):
        rows = rows_of(fakes, LOOKED_AT)
    shape = held.dataset.shape()
    if shape == (2,) and held.dataset.levels is None:
        return _plane(held, rows, certificate)
    if len(shape) == 3:
        return _pictures(rows, _score(certificate, rows))
    return {}


def _score(certificate: Certificate, rows: Tensor) -> Tensor:
    assert certificate.score is not None, "a certificate that was made here, not read"
    return certificate.score(rows)


def _plane(held: Reals, rows: Tensor, certificate: Certificate) -> dict[str, np.ndarray]:
    real = held.rows[:POINTS].double()
    both = torch.cat((real, rows.double()))
    low, high = both.quantile(0.002, 0), both.quantile(0.998, 0)
    margin = 0.15 * (high - low)
    axes = [
        torch.linspace(float(a), float(b), SIDE, dtype=torch.float64)
        for a, b in zip(low - margin, high + margin, strict=True)
    ]
    y, x = torch.meshgrid(axes[1], axes[0], indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    learned = _score(certificate, points).sigmoid().reshape(SIDE, SIDE)
    return {
        "witness_x": axes[0].numpy(),
        "witness_y": axes[1].numpy(),
        "witness_learned": learned.numpy(),
        "witness_real": real.numpy(),
        "witness_fake": rows[:POINTS].double().numpy(),
    }


def _pictures(rows: Tensor, logits: Tensor) -> dict[str, np.ndarray]:
    order = logits.argsort(descending=True)
    best, worst = order[:SHOWN], order[-SHOWN:].flip(0)
    return {
        "witness_most": rows[best].numpy(),
        "witness_most_logits": logits[best].numpy(),
        "witness_least": rows[worst].numpy(),
        "witness_least_logits": logits[worst].numpy(),
    }
