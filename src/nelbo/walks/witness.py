"""What the learned discriminator saw: D over the plane, or the samples that it found most and
least convincing."""

from __future__ import annotations

import numpy as np
import torch

from nelbo.certificate import Certificate
from nelbo.walks.chains import Means
from nelbo.walks.heldout import Reals
from nelbo.walks.known import plane

SIDE, SHOWN, POINTS = 160, 16, 1000


@torch.no_grad()
def arrays(held: Reals, certificate: Certificate, means: Means | None) -> dict[str, np.ndarray]:
    """The arrays behind the witness picture, from the certificate's own pairs.

    None for data of other kinds. The optimal D stands beside the learned one where both laws are
    known.
    """
    shape = held.dataset.shape()
    if shape == (2,) and held.dataset.levels is None:
        return _plane(held, certificate, means)
    return _pictures(certificate) if len(shape) == 3 else {}


def _plane(held: Reals, certificate: Certificate, means: Means | None) -> dict[str, np.ndarray]:
    real, fake, judge = certificate.rows_real, certificate.rows_fake, certificate.discriminator
    assert real is not None and fake is not None and judge is not None
    both = torch.cat((real, fake)).double()
    low, high = both.quantile(0.002, 0), both.quantile(0.998, 0)
    margin = 0.15 * (high - low)
    axes = [
        torch.linspace(float(a), float(b), SIDE, dtype=torch.float64)
        for a, b in zip(low - margin, high + margin, strict=True)
    ]
    y, x = torch.meshgrid(axes[1], axes[0], indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    learned = judge(points).sigmoid()
    mixture, known = plane(held), {}
    if mixture is not None and means is not None:
        best = (mixture.log_prob(points) - means.log_prob(points)).sigmoid()
        known = {"witness_optimal": best.reshape(SIDE, SIDE).numpy()}
    return {
        **known,
        "witness_x": axes[0].numpy(),
        "witness_y": axes[1].numpy(),
        "witness_learned": learned.reshape(SIDE, SIDE).numpy(),
        "witness_real": real[:POINTS].numpy(),
        "witness_fake": fake[:POINTS].numpy(),
    }


def _pictures(certificate: Certificate) -> dict[str, np.ndarray]:
    rows, logits = certificate.rows_fake, certificate.logits_fake
    assert rows is not None
    order = logits.argsort(descending=True)
    best, worst = order[:SHOWN], order[-SHOWN:].flip(0)
    return {
        "witness_most": rows[best].numpy(),
        "witness_most_logits": logits[best].numpy(),
        "witness_least": rows[worst].numpy(),
        "witness_least_logits": logits[worst].numpy(),
    }
